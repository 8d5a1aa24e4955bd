"""What each plot shows, as panels of labelled lines; no drawing here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vmla_convert.pipelines.report.points import (
    Point,
    format_number,
    format_sizes,
    group_medians,
    read_dense,
    size_groups,
)
from vmla_convert.results import Row

# Okabe-Ito without its yellow, which is too pale for lines on white.
INIT_COLOURS = {
    "calibrated": "#0072B2",
    "spectral": "#D55E00",
    "random": "#009E73",
    "transmla": "#CC79A7",
    "mha2mla": "#E69F00",
    "xecomla": "#56B4E9",
}
OTHER_COLOURS = ["#000000"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
SPECTRA_RUNS = {
    "weights": ("weights", "#D55E00", "o"),
    "weights_x_activations": ("on activations", "#0072B2", "s"),
}
ROLLOUT_METRICS = {
    "background_psnr": "background PSNR",
    "digit_accuracy": "digit accuracy",
    "motion_error": "motion error",
    "drift": "drift",
}


@dataclass(frozen=True)
class Line:
    """One labelled line of a panel."""

    label: str
    colour: str
    marker: str
    xs: list[float]
    ys: list[float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what it shows and its lines.

    Attributes:
        title: What is shown; a second line becomes the subtitle.
        xlabel: With its unit.
        ylabel: With its unit.
        yscale: As matplotlib names it.
        lines: At least one, each with at least one point.
        reference: Height of a dashed line, which the title explains.
    """

    title: str
    xlabel: str
    ylabel: str
    yscale: str
    lines: list[Line]
    reference: float | None = None


def recovery_panels(points: Sequence[Point], bound: float) -> list[Panel]:
    """For each cache size and layer: velocity_error, then flow loss above dense, by step."""
    recovered = [point for point in points if point.last_step > 0]
    layers = list(dict.fromkeys(point.layer for point in recovered))
    groups = [
        [point for point in same_size if point.layer == layer]
        for same_size in size_groups(recovered)
        for layer in layers
    ]
    panels: list[Panel] = []
    for here in filter(None, groups):
        where = (
            f"{format_sizes(here)} scalars per token"
            if math.isfinite(here[-1].size)
            else "cache of unknown size"
        )
        layer = f", {here[0].layer}" if len(layers) > 1 else ""
        steps = "recovery (optimiser steps)"
        errors = _init_lines(here, lambda p: {s: e for s, e in p.errors.items() if e > 0})
        losses = _init_lines(here, lambda p: {s: 100 * loss for s, loss in p.losses.items()})
        if errors:
            title = f"Velocity{layer}\n{where}"
            panels.append(Panel(title, steps, "velocity error (share)", "log", errors))
        if losses:
            bound_percent = f"{100 * bound:g} %"
            title = f"Flow loss{layer}\n{where}; dashed: {bound_percent} bound"
            ylabel = "flow loss above dense (%)"
            panels.append(Panel(title, steps, ylabel, "symlog", losses, 100 * bound))
    return panels


def spectra_panels(rows: Sequence[Row]) -> list[Panel]:
    """Per layer: directions needed for 99 % of the energy, and energy kept at each rank."""
    spectra = [row for row in rows if row.run in SPECTRA_RUNS and row.layer is not None]
    dense = read_dense(rows)
    width = dense.scalars / 2 if dense is not None and dense.scalars else None
    dashed = f"; dashed: full width {format_number(width)}" if width is not None else ""
    ranks = _spectra_lines(spectra, "effective_rank_99")
    panels: list[Panel] = []
    if ranks:
        title = f"Rank that keeps 99 % of the energy\nlower converts better{dashed}"
        ylabel = "effective rank (directions)"
        panels.append(Panel(title, "layer (index)", ylabel, "linear", ranks, width))
    energies = [row for row in spectra if row.metric == "energy_at_rank"]
    for rank in sorted({row.kv_lora_rank or 0 for row in energies}):
        at_rank = [row for row in energies if (row.kv_lora_rank or 0) == rank]
        lines = _spectra_lines(at_rank, "energy_at_rank")
        where = f"rank {rank}" if rank else "the chosen rank"
        title = f"Energy kept at {where}\nhigher converts better"
        if lines:
            ylabel = f"energy kept ({at_rank[0].unit})"
            panels.append(Panel(title, "layer (index)", ylabel, "linear", lines))
    return panels


def rollout_panels(rows: Sequence[Row]) -> list[Panel]:
    """Per segment of a rollout, dense beside converted: one panel for each measured metric."""
    segments = [row for row in rows if row.segment is not None]
    runs = list(dict.fromkeys(row.run for row in segments))
    palette = [*INIT_COLOURS.values(), *OTHER_COLOURS]
    converted = [run for run in runs if run != "dense"]
    looks = {run: (palette[i % 6], MARKERS[i % len(MARKERS)]) for i, run in enumerate(converted)}
    looks["dense"] = ("#000000", "X")
    # Init and sizes name a run, unless layers differ.
    short = {run: "-".join(run.split("-")[:2]) for run in runs}
    labels = short if len(set(short.values())) == len(runs) else {run: run for run in runs}
    panels: list[Panel] = []
    for metric, name in ROLLOUT_METRICS.items():
        measured = [row for row in segments if row.metric == metric]
        lines: list[Line] = []
        for run in runs:
            of_run = _last_step_rows([row for row in measured if row.run == run])
            curve = group_medians(of_run, metric, lambda row: row.segment)
            lines += filter(None, [_line(labels[run], *looks[run], curve)])
        if lines:
            ylabel = f"{name} ({measured[0].unit})"
            title = f"Rollout: {name}"
            panels.append(Panel(title, "segment (index in the rollout)", ylabel, "linear", lines))
    return panels


def _init_lines(points: Sequence[Point], curve: Callable[[Point], dict[int, float]]) -> list[Line]:
    """A line per init: its best split, named in the label where the points differ in it."""
    looks = init_looks(point.init for point in points)
    several = len({point.split for point in points}) > 1
    best: dict[str, Point] = {}
    for point in sorted(points, key=lambda point: point.final_error):
        best.setdefault(point.init, point)
    lines = [
        _line(f"{init} {p.split}" if several else init, *looks[init], curve(p))
        for init, p in best.items()
    ]
    return [line for line in lines if line is not None]


def _spectra_lines(rows: Sequence[Row], metric: str) -> list[Line]:
    lines: list[Line] = []
    for run, look in SPECTRA_RUNS.items():
        curve = group_medians((r for r in rows if r.run == run), metric, lambda row: row.layer)
        lines += filter(None, [_line(*look, curve)])
    return lines


def _line(label: str, colour: str, marker: str, curve: Mapping[int, float]) -> Line | None:
    """A line through the finite values of a curve; None when there are none."""
    finite = sorted((x, y) for x, y in curve.items() if math.isfinite(y))
    if not finite:
        return None
    return Line(label, colour, marker, [float(x) for x, _ in finite], [y for _, y in finite])


def init_looks(inits: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each init; the known ones look the same in every report."""
    names = sorted(set(inits))
    others = [name for name in names if name not in INIT_COLOURS]
    known = [*INIT_COLOURS, *others]
    colours = {n: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, n in enumerate(others)}
    return {
        name: ((INIT_COLOURS | colours)[name], MARKERS[known.index(name) % len(MARKERS)])
        for name in names
    }


def _last_step_rows(rows: list[Row]) -> list[Row]:
    last = max((row.step or 0 for row in rows), default=0)
    return [row for row in rows if (row.step or 0) == last]
