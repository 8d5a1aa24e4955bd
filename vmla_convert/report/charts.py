"""The charts of a report. A chart without rows is empty."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from vmla_convert.report.plots import (
    GREY,
    INK,
    MARKERS,
    RING,
    Chart,
    Line,
    Panel,
    curve_line,
)
from vmla_convert.report.settings import (
    DENSE,
    UNQUANTISED,
    Dense,
    Key,
    Setting,
    group_medians,
    key_of,
    read_dense,
    read_settings,
    setting_names,
)
from vmla_convert.report.wording import format_number
from vmla_convert.results import Metric, Row

MOST_PANELS = 6
MOST_LINES = 6
VELOCITY_ERROR = "velocity error (share)"
# Okabe-Ito colours without yellow, which is too pale for lines on white.
COLOURS = {
    "codec": ["#0072B2", "#00456b", "#3b9bd4"],
    UNQUANTISED: ["#56B4E9", "#2f86b8"],
    DENSE: [GREY],
    "mla": ["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#7a5195"],
}
# From small caches to large ones.
BY_SIZE = ["#440154", "#414487", "#2a788e", "#22a884", "#58b947", "#9a8a00"]
SPECTRA = {"weights": ("weights", "#D55E00"), "weights_x_activations": ("on data", "#0072B2")}
SEGMENTED = {
    Metric.BACKGROUND_PSNR: ("Background PSNR", "higher is better"),
    Metric.DIGIT_ACCURACY: ("Digit accuracy", "higher is better"),
    Metric.DRIFT: ("Drift", "0: like the first segment"),
}


def draw_charts(rows: Sequence[Row], best: Setting | None) -> dict[str, Chart]:
    """Every chart that has rows, by name. `best` is the recommended setting."""
    settings, dense = read_settings(rows), read_dense(rows)
    charts = {
        "quality": quality_chart(settings, dense, best),
        "recovery": recovery_chart(settings),
        "rollout": rollout_chart(rows, settings, best),
        "spectra": spectra_chart(rows, settings),
    }
    return {name: chart for name, chart in charts.items() if chart}


def quality_chart(settings: Sequence[Setting], dense: Dense | None, best: Setting | None) -> Chart:
    """velocity_error over bytes per token: a line per method, dotted before recovery.

    The dense model's size is marked where known; a ring marks the recommended setting.
    """
    lines: list[Line] = []
    for method, (colour, marker) in _looks(settings).items():
        own = [each for each in settings if each.method == method and math.isfinite(each.nbytes)]
        if any(each.last_step for each in own):
            before = Line(f"{method}, as converted", colour, *_least_errors(own, first=True))
            how = {"named": False, "dash": ":", "width": 1.2, "hollow": True, "marker": marker}
            lines.append(replace(before, **how))
        lines.append(Line(method, colour, *_least_errors(own), marker=marker))
    lines = [line for line in lines if line.xs]
    if not lines:
        return []
    if best is not None and math.isfinite(best.nbytes) and best.error > 0:
        ring = Line("recommended", INK, [best.nbytes], [best.error], marker="o", named=False)
        lines.append(replace(ring, width=0, hollow=True, marker_size=RING))
    subtitle = "lower left is better; ring: recommended"
    subtitle += "; dotted: before recovery" if any(each.last_step for each in settings) else ""
    marks = {}
    if dense is not None and dense.nbytes:
        marks = {f"dense {format_number(dense.nbytes)}": dense.nbytes}
    title, xlabel = "Velocity error against bytes", "cache (bytes per token and layer)"
    panel = Panel(title, subtitle, xlabel, VELOCITY_ERROR, lines, "log", "log", marks)
    return [panel]


def recovery_chart(settings: Sequence[Setting]) -> Chart:
    """velocity_error by step of recovery, a panel per method, a line per size."""
    by_method: defaultdict[str, list[Setting]] = defaultdict(list)
    for setting in settings:
        if sum(0 < error < math.inf for error in setting.errors.values()) > 1:
            by_method[setting.method].append(setting)
    everything = [e for own in by_method.values() for s in own for e in s.errors.values() if e > 0]
    finite = [error for error in everything if error < math.inf]
    return [
        Panel(
            f"Recovery: {method}",
            "a line per size, in bytes per token and layer",
            "step of recovery",
            VELOCITY_ERROR,
            _recovery_lines(own),
            yscale="log",
            ylimits=(min(finite) / 1.3, max(finite) * 1.3),
        )
        for method, own in list(by_method.items())[:MOST_PANELS]
    ]


def rollout_chart(rows: Sequence[Row], settings: Sequence[Setting], best: Setting | None) -> Chart:
    """Quality and drift by segment of a rollout, dense beside the most accurate settings."""
    measured = [row for row in rows if row.metric in SEGMENTED and row.segment is not None]
    errors = {setting.key: setting.error for setting in settings}
    products = {key_of(row): row.product for row in measured if row.run != DENSE}

    def place(key: Key) -> tuple[bool, bool, float]:
        recommended = best is not None and key == best.key
        return not recommended, products[key] != "codec", errors.get(key, math.inf)

    found = sorted(products, key=place)
    names, panels = setting_names(settings), list[Panel]()
    keys = [*(key for key in names if key.run == DENSE), *found[: MOST_LINES - 1]]
    for metric, (title, how) in SEGMENTED.items():
        lines: list[Line] = []
        for number, key in enumerate(keys):
            lines += _rolled(measured, metric, key, names.get(key, key.run), number)
        if lines:
            unit = next(row.unit for row in measured if row.metric == metric)
            share = (0.0, 1.05) if metric == Metric.DIGIT_ACCURACY else None
            panels.append(
                Panel(title, how, "segment of the rollout (index)", unit, lines, ylimits=share)
            )
    return panels


def spectra_chart(rows: Sequence[Row], settings: Sequence[Setting]) -> Chart:
    """Energy by rank, 99 %-energy rank by layer, and the used share of the rank of MLA layers."""
    kept: list[Line] = []
    needed: list[Line] = []
    for run, (name, colour) in SPECTRA.items():
        own = [row for row in rows if row.run == run]
        energies = group_medians(own, Metric.ENERGY_AT_RANK, lambda row: row.kv_lora_rank)
        ranks = group_medians(own, Metric.EFFECTIVE_RANK_99, lambda row: row.layer)
        kept += curve_line(name, colour, energies)
        needed += curve_line(name, colour, ranks, marker="o")
    by_layer, of_rank = "layer (index)", "rank (directions)"
    how = "keys and values together; median of layers"
    energy = Panel(
        "Energy kept by rank", how, of_rank, "energy kept (share)", kept, "log",
        ylimits=(0.0, 1.05),
    )  # fmt: skip
    title = "Rank that keeps 99 % of the energy"
    rank = Panel(title, "lower converts better", by_layer, of_rank, needed)
    how = "99 %-energy rank of the operator over R; dotted: as converted, solid: recovered"
    filled = _filled_lines(rows, settings)
    share = Panel(
        "Share of its rank that an MLA layer fills", how, by_layer, "share of R", filled,
        ylimits=(0.0, 1.08),
    )  # fmt: skip
    return [panel for panel in (energy, rank, share) if panel.lines]


def spectra_notes(rows: Sequence[Row]) -> list[str]:
    """Compare the ranks of weights with and without activations, with this model's figures."""
    ranges: list[str] = []
    for run in SPECTRA:
        own = [row for row in rows if row.run == run]
        ranks = list(group_medians(own, Metric.EFFECTIVE_RANK_99, lambda row: row.layer).values())
        if not ranks:
            return []
        low, high = format_number(min(ranks)), format_number(max(ranks))
        ranges.append(low if low == high else f"{low} to {high}")
    return [
        f"For 99 % of the energy the weights need {ranges[0]} directions; the same weights on real "
        f"activations need {ranges[1]}. A layer's output on real data is low-rank, while "
        "the matrix is not; therefore codec and latent are fitted to activations."
    ]


def _looks(settings: Iterable[Setting]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method; colours distinguish products."""
    families: defaultdict[str, list[str]] = defaultdict(list)
    for setting in sorted(settings, key=lambda each: each.method):
        family = UNQUANTISED if setting.key.dtype == UNQUANTISED else setting.product
        if setting.method not in families[family]:
            families[family].append(setting.method)
    return {
        method: (COLOURS[family][i % len(COLOURS[family])], MARKERS[(start + i) % len(MARKERS)])
        for start, family in enumerate(COLOURS)
        for i, method in enumerate(families[family])
    }


def _least_errors(own: Sequence[Setting], first: bool = False) -> tuple[list[float], list[float]]:
    """Sizes and the least positive error of each, at step 0 or at the last step."""
    best: dict[float, float] = {}
    for each in own:
        error = each.errors.get(0, math.inf) if first else each.error
        if 0 < error < best.get(each.nbytes, math.inf):
            best[each.nbytes] = error
    return sorted(best), [best[size] for size in sorted(best)]


def _recovery_lines(own: Sequence[Setting]) -> list[Line]:
    """A line per size; of many sizes at most `MOST_LINES`, from the smallest to the largest."""
    count, lines = min(len(own), MOST_LINES), list[Line]()
    for i in range(count):
        share = i / max(1, count - 1)
        each = own[round(share * (len(own) - 1))]
        curve = {step: error for step, error in each.errors.items() if error > 0}
        label = format_number(each.nbytes) + (f" ({each.sizes})" if each.sizes else "")
        colour = BY_SIZE[round(share * (len(BY_SIZE) - 1))]
        lines += curve_line(label, colour, curve, marker="o")
    return lines


def _rolled(
    measured: Sequence[Row], metric: Metric, key: Key, name: str, number: int
) -> list[Line]:
    """A line of one metric by segment; the dense model's is black and dashed."""
    own = [row for row in measured if key_of(row) == key]
    curve = group_medians(own, metric, lambda row: row.segment)
    if key.run == DENSE:
        return curve_line(name, INK, curve, marker="X", dash="--")
    colours = [*COLOURS["mla"][:4], COLOURS["codec"][0]]
    return curve_line(name, colours[-number % len(colours)], curve, marker=MARKERS[number])


def _filled_lines(rows: Sequence[Row], settings: Sequence[Setting]) -> list[Line]:
    """Lines per MLA method, the median of all sizes: as converted and at the last step."""
    looks, mla = _looks(settings), {each.key: each for each in settings if each.product == "mla"}
    ranks = group_medians(rows, Metric.KV_LORA_RANK, lambda row: (key_of(row), row.layer))
    shares: defaultdict[tuple[str, bool], defaultdict[int, list[float]]]
    shares = defaultdict(lambda: defaultdict(list))
    for row in rows:
        setting = mla.get(key_of(row)) if row.metric == Metric.EFFECTIVE_RANK_99 else None
        rank = ranks.get((key_of(row), row.layer), row.kv_lora_rank)
        if setting is None or row.layer is None or not rank:
            continue
        if (row.step or 0) in (0, setting.last_step):
            shares[setting.method, bool(row.step)][row.layer].append(row.value / rank)
    lines: list[Line] = []
    for (method, after), by_layer in shares.items():
        curve = {layer: statistics.median(values) for layer, values in by_layer.items()}
        (colour, marker), label = looks[method], method if after else f"{method}, as converted"
        own = curve_line(label, colour, curve, marker=marker)
        # Only the later of the two lines shows its name.
        named = after or (method, True) not in shares
        how = {"dash": "-" if after else ":", "hollow": not after, "named": named}
        lines += [replace(line, **how) for line in own]
    return lines
