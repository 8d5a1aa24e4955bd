"""Charts of spectra: what the weights, and the weights on activations, can be reduced to.

After VideoMLA's figures 1 (singular values of the stacked key and value weights), 2 (the learned
operator fills its rank) and 8 (so it does at step 0, whatever the init), for this checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from vmla_convert.pipelines.report.panels import (
    GREY,
    Chart,
    Guide,
    Line,
    Panel,
    curve_line,
    init_looks,
)
from vmla_convert.pipelines.report.points import (
    Dense,
    Point,
    group_medians,
    point_key,
)
from vmla_convert.pipelines.report.wording import format_number
from vmla_convert.results import Row

ENERGY = 0.99
SPECTRA_RUNS = {
    "weights": ("weights", "#D55E00", "o"),
    "weights_x_activations": ("on activations", "#0072B2", "s"),
}


def spectra_chart(rows: Sequence[Row], dense: Dense | None, best: Point | None) -> Chart | None:
    """Kept energy by rank, then the 99 %-energy rank and the chosen rank by layer."""
    spectra = [row for row in rows if row.run in SPECTRA_RUNS and row.layer is not None]
    ranks = _chosen_by_layer(spectra, rows, best)
    panels = [*_energy_panels(spectra, ranks), *_rank_panels(spectra, ranks, dense)]
    return Chart(panels, columns=min(2, len(panels)), height=3.6) if panels else None


def spectra_notes(rows: Sequence[Row]) -> list[str]:
    """Why the rank on activations matters, with this model's figures."""
    ranges: list[str] = []
    for run in SPECTRA_RUNS:
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


def effective_rank_chart(rows: Sequence[Row]) -> Chart | None:
    """The learned operator's 99 %-energy rank against its rank, and by layer before and after."""
    learned = [
        row
        for row in rows
        if row.metric == "effective_rank_99" and row.init is not None and row.layer is not None
    ]
    chosen = _chosen_ranks(rows)
    panels = [
        *_saturation_panels(learned, chosen),
        *_operator_panels(learned, chosen),
    ]
    return Chart(panels, columns=min(2, len(panels)), height=3.6) if panels else None


def _energy_panels(spectra: Sequence[Row], chosen: Mapping[int, float]) -> list[Panel]:
    """Cumulative spectra where several ranks were measured, else energy at the one by layer."""
    energies = [row for row in spectra if row.metric == "energy_at_rank" and row.kv_lora_rank]
    ranks = {row.kv_lora_rank for row in energies}
    if len(ranks) > 2:
        return [
            panel
            for run, look in SPECTRA_RUNS.items()
            for panel in _cumulative_panels(
                [r for r in energies if r.run == run], *look[:2], chosen
            )
        ]
    panels: list[Panel] = []
    for rank in sorted(ranks, key=lambda rank: rank or 0):
        lines = _run_lines([r for r in energies if r.kv_lora_rank == rank], "energy_at_rank")
        if lines:
            title = f"Energy kept at rank {rank}"
            how = "higher converts better"
            panels.append(Panel(title, how, "layer (index)", "energy kept (share)", lines))
    return panels


def _cumulative_panels(
    energies: Sequence[Row], name: str, colour: str, chosen: Mapping[int, float]
) -> list[Panel]:
    """One panel for one kind of spectrum: a thin line per layer and the median of them."""
    curves: defaultdict[int, dict[int, float]] = defaultdict(dict)
    at = group_medians(energies, "energy_at_rank", lambda r: (r.layer or 0, r.kv_lora_rank or 0))
    for (layer, rank), energy in at.items():
        if math.isfinite(energy):
            curves[layer][rank] = energy
    if not curves:
        return []
    lines = [
        Line(
            f"layer {layer}", colour, "", [float(x) for x in sorted(curve)],
            [curve[x] for x in sorted(curve)], named=False, width=0.8, alpha=0.35,
        )
        for layer, curve in sorted(curves.items())
    ]  # fmt: skip
    ranks = sorted(set.intersection(*map(set, curves.values())))
    median = {r: statistics.median(curve[r] for curve in curves.values()) for r in ranks}
    lines += filter(None, [curve_line("median", colour, "", median)])
    guides = [Guide(ENERGY, "99 %")]
    if chosen:
        rank = statistics.median(chosen.values())
        guides.append(Guide(rank, f"R {format_number(rank)}", upright=True))
    where = "stacked key and value weights" if name == "weights" else "the same on activations"
    return [
        Panel(
            f"Cumulative energy: {name}",
            f"{where}, each layer and their median",
            "rank (directions)",
            "energy kept (share)",
            lines,
            xscale="log",
            guides=guides,
            ylimits=(0.0, 1.05),
        )
    ]


def _rank_panels(
    spectra: Sequence[Row], ranks: Mapping[int, float], dense: Dense | None
) -> list[Panel]:
    lines = _run_lines(spectra, "effective_rank_99")
    if not lines:
        return []
    chosen = curve_line("chosen", GREY, "D", ranks)
    width = dense.scalars / 2 if dense is not None and dense.scalars else None
    return [
        Panel(
            "Rank that keeps 99 % of the energy",
            "lower converts better" + ("; chosen: R of the recommendation" if chosen else ""),
            "layer (index)",
            "rank (directions)",
            [*lines, *([chosen] if chosen else [])],
            guides=[Guide(width, f"full width {format_number(width)}")] if width else [],
            ylimits=(0.0, 1.1 * max(width or 0.0, *(y for line in lines for y in line.ys))),
        )
    ]


def _run_lines(rows: Sequence[Row], metric: str) -> list[Line]:
    lines: list[Line] = []
    for run, look in SPECTRA_RUNS.items():
        curve = group_medians((r for r in rows if r.run == run), metric, lambda row: row.layer)
        lines += filter(None, [curve_line(*look, curve)])
    return lines


def _chosen_by_layer(
    spectra: Sequence[Row], rows: Sequence[Row], best: Point | None
) -> dict[int, float]:
    """R by layer of the recommended point; empty without one, or where its rows tell none."""
    if best is None:
        return {}
    own = [r for r in rows if point_key(r) == best.key and r.init == best.init]
    ranks = group_medians(own, "kv_lora_rank", lambda row: row.layer)
    if ranks or not best.kv_lora_rank:
        return ranks
    # Rows of a point whose layers share one rank need not repeat it for each.
    return {row.layer: float(best.kv_lora_rank) for row in spectra if row.layer is not None}


def _chosen_ranks(rows: Sequence[Row]) -> dict[tuple[str, str | None, int], float]:
    """R by point, init and layer."""
    return group_medians(
        rows,
        "kv_lora_rank",
        lambda row: None if row.layer is None else (point_key(row), row.init, row.layer),
    )


def _shares(
    learned: Sequence[Row], chosen: Mapping[tuple[str, str | None, int], float]
) -> list[tuple[Row, float]]:
    """Rows of learned operators beside the rank each could fill at most."""
    pairs: list[tuple[Row, float]] = []
    for row in learned:
        rank = chosen.get((point_key(row), row.init, row.layer or 0), row.kv_lora_rank)
        if rank and math.isfinite(row.value):
            pairs.append((row, float(rank)))
    return pairs


def _saturation_panels(
    learned: Sequence[Row], chosen: Mapping[tuple[str, str | None, int], float]
) -> list[Panel]:
    """Share of its rank that each layer fills, at step 0 and at the last step."""
    pairs = _shares(learned, chosen)
    lasts: dict[tuple[str, int], int] = {}
    for row, _ in pairs:
        key = point_key(row), row.seed
        lasts[key] = max(row.step or 0, lasts.get(key, 0))
    before = [pair for pair in pairs if not pair[0].step]
    after = [(r, rank) for r, rank in pairs if r.step and r.step == lasts[point_key(r), r.seed]]
    panels: list[Panel] = []
    lowest = min((row.value / rank for row, rank in pairs), default=1.0)
    for title, now in (("before recovery", before), ("after recovery", after)):
        lines = _share_lines(now)
        if lines:
            panels.append(
                Panel(
                    f"Rank that layers fill, {title}",
                    "99 %-energy rank of the learned operator, over R",
                    "layer (index)",
                    "share of R",
                    lines,
                    guides=[Guide(1.0, "all of R", named=False)],
                    ylimits=(max(0.0, min(0.8, lowest - 0.05)), 1.06),
                )
            )
    return panels


def _share_lines(pairs: Sequence[tuple[Row, float]]) -> list[Line]:
    """A line per init: the median over its settings."""
    shares: defaultdict[str, defaultdict[int, list[float]]]
    shares = defaultdict(lambda: defaultdict(list))
    for row, rank in pairs:
        shares[row.init or ""][row.layer or 0].append(row.value / rank)
    looks = init_looks(shares)
    lines = [
        curve_line(init, *looks[init], {n: statistics.median(v) for n, v in by_layer.items()})
        for init, by_layer in shares.items()
    ]
    return [line for line in lines if line is not None]


def _operator_panels(
    learned: Sequence[Row], chosen: Mapping[tuple[str, str | None, int], float]
) -> list[Panel]:
    """The 99 %-energy rank against R, a marker per layer and setting."""
    pairs = _shares(learned, chosen)
    if not pairs:
        return []
    places: defaultdict[str, set[tuple[float, float]]] = defaultdict(set)
    for row, rank in pairs:
        places[row.init or ""].add((rank, row.value))
    looks = init_looks(places)
    lines = [
        Line(
            init, *looks[init], [x for x, _ in sorted(own)], [y for _, y in sorted(own)],
            named=False, width=0, marker_size=5, alpha=0.7,
        )
        for init, own in sorted(places.items())
    ]  # fmt: skip
    top = max(x for line in lines for x in line.xs)
    full = Line("all of R", GREY, "", [0.0, top], [0.0, top], named=False, width=1, dash="--")
    return [
        Panel(
            "Learned operators fill their rank",
            "a marker per layer and setting, coloured as before; dashed: all of R",
            "R (directions)",
            "99 %-energy rank (directions)",
            [full, *lines],
        )
    ]
