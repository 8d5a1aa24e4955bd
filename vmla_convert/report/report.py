"""Write the report of a folder of rows, without torch. Sections without rows are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmla_convert.config import ReportConfig
from vmla_convert.errors import VmlaError
from vmla_convert.report.answer import recommend
from vmla_convert.report.charts import draw_charts
from vmla_convert.report.pages import to_html, to_markdown
from vmla_convert.report.plots import Chart, chart_csv, draw_chart
from vmla_convert.report.recipe import RECIPE_FILE, recipe_toml
from vmla_convert.report.sections import PLOTS, answer_blocks, report_sections
from vmla_convert.report.settings import read_settings
from vmla_convert.results import read_rows
from vmla_convert.tables import read_json


def write_report(
    folder: Path,
    title: str = ReportConfig.title,
    loss_bound: float = ReportConfig.loss_bound,
) -> list[Path]:
    """Write `report.md`, `report.html` and `plots/*` from the folder's `rows.jsonl`.

    Every plot is a PNG with a CSV of the drawn points. With `recipe.json`, also write
    `recipe.toml`, which makes the recommended size again. The report also shows `strips/*.png` and
    the contact sheet `compare.png` of the folder, and links `compare.mp4`.

    `loss_bound` is the flow loss that the recommended size may have above the dense model's, as a
    share of the dense model's loss.

    Returns:
        The paths written.

    Raises:
        VmlaError: There are no rows, a line is not a row, or `recipe.json` holds no recipe.
        MissingExtraError: matplotlib is not installed.
    """
    rows = read_rows(folder / "rows.jsonl")
    if not rows:
        raise VmlaError(f"no rows in {folder / 'rows.jsonl'}", "run a sweep or an eval first")
    record = _read_recipe(folder / "recipe.json")
    best = recommend(read_settings(rows), loss_bound)
    toml = recipe_toml(best.setting, record.get("recipe") or {}) if best is not None else ""
    charts = draw_charts(rows, best.setting if best is not None else None)
    written = _save_plots(folder / "plots", charts)
    answer = answer_blocks(rows, best, loss_bound, record, toml)
    sections = report_sections(folder, rows, best, answer, charts, record)
    texts = {
        "report.md": to_markdown(title, sections),
        "report.html": to_html(title, sections, folder),
        RECIPE_FILE: toml,
    }
    for name, text in texts.items():
        if text:
            (folder / name).write_text(text.strip() + "\n", encoding="utf-8")
            written.append(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    return written


def _save_plots(folder: Path, charts: dict[str, Chart]) -> list[Path]:
    """Save every plot with a CSV; remove the plots of an earlier report."""
    figures = {name: draw_chart(chart) for name, chart in charts.items()}
    folder.mkdir(exist_ok=True)
    for name in PLOTS:
        for kind in ("png", "csv"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    written: list[Path] = []
    for name, figure in figures.items():
        image, data = folder / f"{name}.png", folder / f"{name}.csv"
        figure.savefig(image)
        data.write_text(chart_csv(charts[name]), encoding="utf-8")
        written += [image, data]
    return written


def _read_recipe(path: Path) -> dict[str, Any]:
    """Settings and versions of the run; empty without `recipe.json`."""
    if not path.is_file():
        return {}
    try:
        record = read_json(path)
    except ValueError as error:
        raise VmlaError(
            f"{path} is not JSON: {error}", "remove the file, or write it anew"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("recipe", {}), dict):
        raise VmlaError(f"{path} holds no table of settings", "remove the file, or write it anew")
    return record
