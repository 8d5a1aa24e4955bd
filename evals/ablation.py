"""Which part of the calibration brings what, before any training?

    python -m evals.ablation --out rows.jsonl [--checkpoint demo]

Each run takes one piece of knowledge away from `calibrated` and converts again at the same cache
size. `no output gradient` weighs a layer's errors at its own output; `one-sided` does not weigh
them, as whitening does; `white inputs` does not know the inputs; `uncentred` spends rank on their
mean; `real mixes` mixes heads by real numbers; `window phases`, `attention phases` and `unfolded`
stand for a rotation with the mean phase over the window alone, over measured attention alone, and
with none; `uniform ranks` and `ranks by energy` divide the numbers among layers otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import typer
from torch import Tensor

from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import ConvertConfig, EvaluateConfig, LayerConfig
from vmla_convert.console import out
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths import factor
from vmla_convert.maths.projections import Evidence, KVWeights, key_square
from vmla_convert.pipelines import calibrate as calibration
from vmla_convert.pipelines.calibrate import (
    LayerReads,
    deployed_phases,
    measure_attention,
    model_blocks,
)
from vmla_convert.pipelines.data import open_clips
from vmla_convert.pipelines.evaluate import HeldOut, dense_rows
from vmla_convert.pipelines.factoring import convert_model, layer_evidence, layer_weights
from vmla_convert.pipelines.load import load
from vmla_convert.pipelines.rows import cache_rows, error_rows
from vmla_convert.results import Row, append_rows

RECONSTRUCTED = LayerConfig()
DECOUPLED = LayerConfig(positions="decoupled")

Change = Callable[[Evidence], Evidence]


def whole(evidence: Evidence) -> Evidence:
    return evidence


def uncentred(evidence: Evidence) -> Evidence:
    square = evidence.covariance + torch.outer(evidence.mean, evidence.mean)
    return evidence._replace(mean=torch.zeros_like(evidence.mean), covariance=square)


def white_inputs(evidence: Evidence) -> Evidence:
    width = len(evidence.mean)
    scale = evidence.covariance.diagonal().mean()
    return evidence._replace(covariance=scale * torch.eye(width, dtype=torch.float64))


def one_sided(evidence: Evidence) -> Evidence:
    """Every error of a key counts alike, and every one of a value; keys against values as before.

    The cost of a pair's position stays, so that the rope branch is the same.
    """
    heads, dim, _ = evidence.key_metric.shape
    eye = torch.eye(dim, dtype=torch.float64).expand(heads, dim, dim)

    def flat(metric: Tensor) -> Tensor:
        return eye * metric.diagonal(dim1=-2, dim2=-1).mean()

    value = torch.eye(heads * dim, dtype=torch.float64)
    return evidence._replace(
        key_metric=flat(evidence.key_metric),
        turned_key_metric=flat(evidence.turned_key_metric),
        value_metric=value * evidence.value_metric.diagonal().mean(),
    )


def unfolded(evidence: Evidence) -> Evidence:
    """A key without its rotation stays as it is, which costs |1 − exp(i·angle)|² of it."""
    almost = 1e-6  # the cost is a multiple of 1 − |phase|²
    cost = evidence.query_pairs * (2 - 2 * evidence.phases.real).clamp_min(0)
    return evidence._replace(
        phases=torch.full_like(evidence.phases, 1 - almost), query_pairs=cost / (2 * almost)
    )


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL to append rows to.")],
    checkpoint: Annotated[str, typer.Option(help="The dense checkpoint, or 'demo'.")] = "demo",
    cut: Annotated[float, typer.Option(help="Share of the dense cache to save.")] = 0.92,
    clips: Annotated[int, typer.Option(min=2, help="Held-out clips.")] = 24,
) -> None:
    """Measure, append the rows and print them."""
    teacher = load(checkpoint)
    held_out = HeldOut(teacher, EvaluateConfig(clips))
    rows = dense_rows(teacher, held_out)
    with out.progress() as progress:
        measured = measure(teacher)
        with patch.object(calibration, "measure_attention", measure_own_output):
            local = measure(teacher)
        runs = list(ablations(teacher, measured, local))
        for label, layer, ranks, reads, change, patched in progress.track(runs, "ablating"):
            config = ConvertConfig(cut=cut, layer=layer, ranks=ranks)
            with patched:
                student = convert_model(teacher, config, changed(teacher, reads, layer, change))
            errors = error_rows(held_out.measure(student), student.config, 0)
            named = [*errors, *cache_rows(student.config)]
            rows += [replace(row, run=f"{layer.positions}, {label}") for row in named]
    append_rows(rows_file, rows)
    show(rows)


class Ablation(NamedTuple):
    label: str
    layer: LayerConfig
    ranks: Literal["uniform", "energy", "budget"]
    reads: list[LayerReads]
    change: Change
    patched: AbstractContextManager[object]


def ablations(
    teacher: CausalWanModel, measured: list[LayerReads], local: list[LayerReads]
) -> Iterator[Ablation]:
    window = deployed_phases(teacher.config)

    def window_phases(evidence: Evidence) -> Evidence:
        return evidence._replace(phases=window.expand_as(evidence.phases))

    def attention_phases(evidence: Evidence) -> Evidence:
        share = factor.WINDOW_SHARE
        return evidence._replace(phases=(evidence.phases - share * window) / (1 - share))

    for layer in (RECONSTRUCTED, DECOUPLED):
        yield Ablation("whole", layer, "budget", measured, whole, nullcontext())
        yield Ablation("no output gradient", layer, "budget", local, whole, nullcontext())
        yield Ablation("one-sided", layer, "budget", measured, one_sided, nullcontext())
        yield Ablation("uncentred", layer, "budget", measured, uncentred, nullcontext())
        yield Ablation("white inputs", layer, "budget", measured, white_inputs, nullcontext())
        yield Ablation("ranks by energy", layer, "energy", measured, whole, nullcontext())
        yield Ablation("uniform ranks", layer, "uniform", measured, whole, nullcontext())
    for label, change in (("window phases", window_phases), ("attention phases", attention_phases)):
        yield Ablation(label, DECOUPLED, "budget", measured, change, nullcontext())
    yield Ablation("unfolded", DECOUPLED, "budget", measured, unfolded, nullcontext())
    real = patch.object(factor, "key_square", real_key_square)
    yield Ablation("real mixes", DECOUPLED, "budget", measured, whole, real)


def measure(teacher: CausalWanModel) -> list[LayerReads]:
    config = ConvertConfig()
    clips = open_clips(config.data, teacher.config.cache.sink_frames)
    blocks = model_blocks(teacher)
    reads = calibration.calibrate(teacher, blocks, clips, config.calibration_clips, config.seed)
    return [reads(layer) for layer in range(teacher.config.geometry.num_layers)]


def measure_own_output(
    attention: DenseSelfAttention, x: Tensor, pull: Tensor, *rest: Any
) -> LayerReads:
    """As if every direction of the layer's own output mattered alike."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randn(pull.shape, generator=generator).to(pull)
    return measure_attention(attention, x, anything, *rest)


def real_key_square(weights: KVWeights, mean: Tensor, covariance: Tensor) -> Tensor:
    return key_square(weights, mean, covariance).real.to(torch.complex128)


def changed(
    teacher: CausalWanModel, reads: list[LayerReads], layer: LayerConfig, change: Change
) -> list[Evidence]:
    state, heads = teacher.state_dict(), teacher.config.geometry.num_heads
    weights = [layer_weights(state.__getitem__, i, heads) for i in range(len(reads))]
    pairs = zip(reads, weights, strict=True)
    phases = deployed_phases(teacher.config)
    return [change(layer_evidence(part, own, layer, phases)) for part, own in pairs]


def show(rows: list[Row]) -> None:
    values = {(row.run, row.metric): row.value for row in rows}
    dense = values["dense", "flow_loss"]
    cells = [
        [
            run,
            f"{values[run, 'cache_cut']:.1%}",
            f"{values[run, 'velocity_error']:.3g}",
            f"{values[run, 'flow_loss'] / dense - 1:+.1%}",
        ]
        for run in dict.fromkeys(row.run for row in rows if row.run != "dense")
    ]
    out.table("Ablation", ["run", "cache cut", "velocity_error", "flow loss above dense"], cells)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
