"""Report: from the rows of a folder to a page that says which setting to use.

Written from `rows.jsonl` alone, without torch; a section appears only when its rows exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from vmla_convert.errors import VmlaError
from vmla_convert.pipelines.report.pages import Section, to_html, to_markdown
from vmla_convert.pipelines.report.plots import draw_plots
from vmla_convert.pipelines.report.points import (
    Point,
    Recommendation,
    decisive_table,
    format_cut,
    format_excess,
    format_number,
    group_medians,
    read_dense,
    read_points,
    recommend,
)
from vmla_convert.results import Row, read_rows

__all__ = ["decisive_table", "write_report"]

FLOW_LOSS_BOUND = 0.15
PLOT_NAMES = ("quality", "recovery", "spectra", "rollout")


def write_report(
    folder: Path, title: str = "Conversion report", flow_loss_bound: float = FLOW_LOSS_BOUND
) -> list[Path]:
    """Write `report.md`, `report.html` and `plots/*.png` from the folder's `rows.jsonl`.

    A contact sheet `compare.png` (dense rollout beside converted rollout) is shown when it is
    there, and `compare.mp4` is linked.

    Args:
        folder: Where the rows lie and the report goes.
        title: Of the report.
        flow_loss_bound: Flow loss that a recommended setting may have above the dense model's, as
            a share of it.

    Returns:
        The paths written.

    Raises:
        VmlaError: There are no rows, or a line is not a row.
        MissingExtraError: matplotlib is not installed.
    """
    rows = read_rows(folder / "rows.jsonl")
    if not rows:
        raise VmlaError(f"no rows in {folder / 'rows.jsonl'}", "run a sweep or an eval first")
    plots = _save_plots(folder / "plots", rows, flow_loss_bound)
    sections = [
        *_answer_sections(rows, flow_loss_bound),
        *_plot_sections(rows, {path.stem for path in plots}),
        *_compare_sections(folder),
        _provenance_section(rows),
    ]
    markdown, html = folder / "report.md", folder / "report.html"
    markdown.write_text(to_markdown(title, sections), encoding="utf-8")
    html.write_text(to_html(title, sections, folder), encoding="utf-8")
    return [markdown, html, *plots]


def _save_plots(folder: Path, rows: Sequence[Row], bound: float) -> list[Path]:
    """Save what can be drawn; plots of an earlier report that no longer can be are removed."""
    figures = draw_plots(rows, bound)
    folder.mkdir(exist_ok=True)
    for name in PLOT_NAMES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def _answer_sections(rows: Sequence[Row], bound: float) -> list[Section]:
    points = read_points(rows)
    if not points:
        return []
    best = recommend(points, bound)
    table = decisive_table(rows)
    first = len(table) - len(points)
    marked = first + points.index(best.point) if best is not None else None
    notes = [
        "Errors are medians over seeds, on held-out clips whose past is read from the cache. "
        "velocity_error is the squared difference from the dense model's velocity, relative to it; "
        "after recovery means at the last measured step of each line.",
        *_dense_notes(rows),
    ]
    return [
        Section("Answer", lead=_answer(best, bound)),
        Section("Every setting", table=table, marked=marked, paragraphs=notes),
    ]


def _answer(best: Recommendation | None, bound: float) -> str:
    if best is None:
        return "No setting can be recommended: no point has a finite velocity_error."
    point = best.point
    limit = f"{100 * bound:g} %"
    setting = f"{point.init} with {_sizes(point)}"
    if point.layer:
        setting += f" ({point.layer})"
    cut = f"cuts the cache by {format_cut(point.cut)}" if point.cut is not None else "is smaller"
    when = f"after {point.last_step} steps of recovery" if point.last_step else "without recovery"
    figures = f"It {cut} and has velocity_error {format_number(point.final_error)} {when}"
    if point.final_loss is not None:
        figures += f", with flow loss {format_excess(point.final_loss)} against the dense model"
    if best.within_bound:
        return f"Use {setting}. {figures} (bound: +{limit})."
    if best.within_bound is None:
        return f"The most accurate is {setting}; no row tells its flow loss. {figures}."
    return (
        f"No setting stays within {limit} of the dense model's flow loss. "
        f"The most accurate is {setting}. {figures}."
    )


def _sizes(point: Point) -> str:
    if point.kv_lora_rank is None:
        return f"{format_number(point.scalars)} numbers per token, divided among layers"
    rank = f"kv_lora_rank {format_number(point.kv_lora_rank)}"
    if not point.qk_rope_head_dim:
        return rank
    return f"{rank} and qk_rope_head_dim {format_number(point.qk_rope_head_dim)}"


def _dense_notes(rows: Sequence[Row]) -> list[str]:
    dense = read_dense(rows)
    if dense is None or dense.flow_loss is None:
        return []
    note = f"The dense model's flow loss is {format_number(dense.flow_loss)}"
    if dense.flow_loss_other_past is None:
        return [f"{note}."]
    other = format_number(dense.flow_loss_other_past)
    return [f"{note}, and {other} when another clip is put in its past: the cache matters."]


def _plot_sections(rows: Sequence[Row], drawn: set[str]) -> list[Section]:
    sections = {
        "quality": (
            "Quality against bytes",
            "velocity_error against scalars per token for each init, at step 0 and after recovery",
            ["Settings of the same size are drawn side by side; a dotted line joins the best of "
             "each size."],
        ),
        "recovery": (
            "Recovery",
            "velocity_error and flow loss above dense against the step, for each cache size",
            [],
        ),
        "spectra": (
            "Spectra",
            "effective rank and kept energy per layer, of the weights and on activations",
            _spectra_notes(rows),
        ),
        "rollout": (
            "Rollout",
            "quality per segment of a rollout, dense and converted",
            ["A cache that loses the past shows as a drop from segment to segment that the dense "
             "model does not have."],
        ),
    }  # fmt: skip
    return [
        Section(title, image=f"plots/{name}.png", alt=alt, paragraphs=notes)
        for name, (title, alt, notes) in sections.items()
        if name in drawn
    ]


def _spectra_notes(rows: Sequence[Row]) -> list[str]:
    """Why the rank on activations matters, with this model's figures."""
    ranges: list[str] = []
    for run in ("weights", "weights_x_activations"):
        of_run = [row for row in rows if row.run == run]
        ranks = group_medians(of_run, "effective_rank_99", lambda row: row.layer).values()
        finite = [rank for rank in ranks if math.isfinite(rank)]
        if not finite:
            return []
        low, high = format_number(min(finite)), format_number(max(finite))
        ranges.append(low if low == high else f"{low} to {high}")
    return [
        f"For 99 % of the energy the weights need {ranges[0]} directions; the same weights on real "
        f"activations need {ranges[1]}. What is low-rank is what a layer computes on the data it "
        "sees, not its matrix, so the latent should be fitted to activations."
    ]


def _compare_sections(folder: Path) -> list[Section]:
    image = "compare.png" if (folder / "compare.png").is_file() else ""
    link = "compare.mp4" if (folder / "compare.mp4").is_file() else ""
    if not image and not link:
        return []
    alt = "Frames of the dense rollout beside frames of the converted rollout"
    return [Section("Dense beside converted", image=image, alt=alt, link=link)]


def _provenance_section(rows: Sequence[Row]) -> Section:
    seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in rows}))
    devices = ", ".join(sorted({row.device for row in rows}))
    facts = [["fact", "value"], ["rows", str(len(rows))], ["seeds", seeds], ["devices", devices]]
    for name in ("current_chunk", "positions", "latent", "k_norm"):
        values = sorted({value for row in rows if (value := getattr(row, name)) is not None})
        if values:
            facts.append([name, ", ".join(values)])
    for metric in ("convert_seconds", "recover_seconds"):
        seconds = [row.value for row in rows if row.metric == metric]
        if seconds:
            facts.append([f"{metric}, all runs", f"{sum(seconds):.1f}"])
    return Section("Provenance", table=facts)
