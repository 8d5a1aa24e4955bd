"""Report: from the rows of a folder to a page that says which setting to use.

Written from `rows.jsonl` alone, without torch; a section appears only when its rows exist.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vmla_convert.config import ReportConfig
from vmla_convert.errors import VmlaError
from vmla_convert.pipelines.report.pages import to_html, to_markdown
from vmla_convert.pipelines.report.panels import Chart, chart_csv
from vmla_convert.pipelines.report.plots import draw_chart, save_figure
from vmla_convert.pipelines.report.sections import PLOTS, draw_charts, report_sections
from vmla_convert.pipelines.report.tables import decisive_table
from vmla_convert.results import read_rows

__all__ = ["decisive_table", "write_report"]


def write_report(
    folder: Path,
    title: str = ReportConfig.title,
    flow_loss_bound: float = ReportConfig.loss_bound,
) -> list[Path]:
    """Write `report.md`, `report.html` and `plots/*` from the folder's `rows.jsonl`.

    Every plot is a PNG with a CSV of all that it draws beside it. What else lies in the folder is
    shown when it is there: `strips/*.png`, a contact sheet `compare.png`, `compare.mp4` as a link,
    and the settings and versions of `recipe.json`.

    Args:
        folder: Where the rows lie and the report goes.
        title: Of the report.
        flow_loss_bound: Flow loss that a recommended setting may have above the dense model's, as
            a share of it.

    Returns:
        The paths written.

    Raises:
        VmlaError: There are no rows, a line is not a row, or `recipe.json` is no JSON object.
        MissingExtraError: matplotlib is not installed.
    """
    rows = read_rows(folder / "rows.jsonl")
    if not rows:
        raise VmlaError(f"no rows in {folder / 'rows.jsonl'}", "run a sweep or an eval first")
    recipe = _read_recipe(folder / "recipe.json")
    charts = draw_charts(rows, flow_loss_bound)
    plots = _save_plots(folder / "plots", charts)
    sections = report_sections(folder, rows, flow_loss_bound, list(charts), recipe)
    markdown, html = folder / "report.md", folder / "report.html"
    markdown.write_text(to_markdown(title, sections), encoding="utf-8")
    html.write_text(to_html(title, sections, folder), encoding="utf-8")
    return [markdown, html, *plots]


def _save_plots(folder: Path, charts: dict[str, Chart]) -> list[Path]:
    """Save every plot and its data; of an earlier report, what can no longer be is removed."""
    figures = {name: draw_chart(chart) for name, chart in charts.items()}
    folder.mkdir(exist_ok=True)
    for name in PLOTS:
        for kind in ("png", "csv"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    written: list[Path] = []
    for name, figure in figures.items():
        image, data = folder / f"{name}.png", folder / f"{name}.csv"
        save_figure(figure, image)
        data.write_text(chart_csv(charts[name]), encoding="utf-8")
        written += [image, data]
    return written


def _read_recipe(path: Path) -> dict[str, Any]:
    """Settings, versions and command of the run, where it left them."""
    if not path.is_file():
        return {}
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VmlaError(f"{path} is not JSON: {error}", "remove it, or write it anew") from error
    if not isinstance(recipe, dict):
        raise VmlaError(f"{path} holds no table of settings", "remove it, or write it anew")
    return recipe
