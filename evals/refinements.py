"""Measure ways to make the codec better that the package does not use.

    python -m evals.refinements --out evals/results/refinements.jsonl

`velocity_error` on held-out clips, streamed, at each size, of

* the codec as `vmla convert` fits it;
* a codec whose layers are calibrated behind layers that a codec serves already, at that size;
* the first codec after its encoder and decoder learned each layer's output together (the
  layer-wise stage of recovery, here without a later stage).

`bits_saved` is the share of the stored bits that an own allocation for each position in a chunk
would save at the same error: the energy of a channel is scaled by the channel's variance at the
position, and the bytes are found that reach the error of the common allocation.

Shapes: N clips, F frames, L tokens of a frame, r stored channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from evals.codec import fitted
from evals.prediction import past_entries
from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    RecoverConfig,
    RuntimeConfig,
    Sizes,
)
from vmla_convert.console import out
from vmla_convert.fitting.calibrate import calibrate, model_blocks
from vmla_convert.fitting.codec import fit_model
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.maths.quantise import WIDTHS
from vmla_convert.maths.rates import Rate, allocate, purchases
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.measuring.rows import row_fields
from vmla_convert.media.clips import open_clips, settled
from vmla_convert.progress import Progress
from vmla_convert.recovery.layerwise import fit_layers
from vmla_convert.results import Metric, Row, put_rows

CUTS = (11 / 12, 23 / 24, 47 / 48)
CALIBRATION_CLIPS, LAYERWISE_STEPS = 24, 40
AS_FITTED, BEHIND, REFINED = "as fitted", "behind converted layers", "refined on layer outputs"
BY_POSITION = "own bits for each position in the chunk"


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    checkpoint: Annotated[str, typer.Option(help="Dense checkpoint, or 'demo'.")] = "demo",
    data: Annotated[str, typer.Option(help="Clips: 'demo', or a safetensors file.")] = "demo",
    clips: Annotated[int, typer.Option(min=2, help="Number of held-out clips.")] = 24,
    cuts: Annotated[list[float] | None, typer.Option("--cut", help="Sizes of the codec.")] = None,
) -> None:
    """Measure what other ways of fitting a codec would gain."""
    teacher = load(checkpoint)
    config = ConvertConfig(
        dtype="float32", calibration_clips=CALIBRATION_CLIPS, data=DataConfig(data)
    )
    with out.progress() as progress:
        held_out = HeldOut(teacher, EvaluateConfig(clips, DataConfig(data, seed=1)), streamed=True)
        model = fitted(teacher, config, progress=progress)
        rows: list[Row] = []
        for cut in progress.track(cuts or CUTS, "sizes"):
            size = Sizes(cut=cut)
            ways = {
                AS_FITTED: model,
                BEHIND: fitted_behind(model, teacher, config, size, progress),
                REFINED: refined(model, teacher, config.data, size, progress),
            }
            rows += [error_row(each, held_out, size, name) for name, each in ways.items()]
            rows.append(position_row(model, teacher, config.data, size, clips))
    put_rows(rows_file, rows)
    header = ["way", "bytes per token", "metric", "value"]
    out.table("Refinements", header, [[r.note, r.bytes_per_token, r.metric, r.value] for r in rows])


def error_row(model: CausalWanModel, held_out: HeldOut, size: Sizes, name: str) -> Row:
    """Velocity error of a codec at a size."""
    runtime = RuntimeConfig(size)
    error = held_out.measure(model, runtime).velocity_error
    fields = row_fields(model.config, runtime=runtime)
    return Row(Metric.VELOCITY_ERROR, error, "relative", **fields, note=name)


def fitted_behind(
    model: CausalWanModel,
    teacher: CausalWanModel,
    config: ConvertConfig,
    size: Sizes,
    progress: Progress,
) -> CausalWanModel:
    """A codec fitted to the activations of a model that a codec serves at a size."""
    model.resize(size)
    clips, count = open_clips(settled(config.data, model.config)), config.calibration_clips
    statistics = calibrate(model, model_blocks(model), clips, count, config.seed, progress)
    return fit_model(teacher, config, statistics)


def refined(
    model: CausalWanModel,
    teacher: CausalWanModel,
    data: DataConfig,
    size: Sizes,
    progress: Progress,
) -> CausalWanModel:
    """A codec whose encoders and decoders are trained together on the outputs of their layers."""
    student = CausalWanModel(model.config)
    student.load_state_dict(model.state_dict())
    student.resize(size)
    recover = RecoverConfig(layerwise_steps=LAYERWISE_STEPS, data=settled(data, model.config))
    fit_layers(student, teacher, model_blocks(teacher), recover, None, progress)
    return student


def position_row(
    model: CausalWanModel, teacher: CausalWanModel, data: DataConfig, size: Sizes, clips: int
) -> Row:
    """Share of the bits that an allocation for each position in a chunk saves."""
    batch = open_clips(settled(data, model.config)).batch(0, clips, "held_out")
    entries = past_entries(teacher, batch)
    codecs = [block.codec for block in model.all_blocks() if block.codec is not None]
    rates, chunk = model.rates(size), model.config.chunk_frames
    shares: list[Tensor] = []
    for codec, (key, value) in zip(codecs, entries, strict=True):
        every = Rate((16,) * len(codec.energies), quantised=False)
        channels = codec.channels(key, value, every).unflatten(1, (-1, chunk))
        moments = channels.square().mean((0, 1, 3))  # of each position, (chunk, R)
        shares.append(moments / moments.mean(0).clamp_min(1e-12))
    tables = [codec.distortions for codec in codecs]
    energies = [
        [share[position] * codec.energies for share, codec in zip(shares, codecs, strict=True)]
        for position in range(chunk)
    ]
    common = sum(rest(each, tables, rates) for each in energies)
    # An allocation wants the most energetic channels first.
    own = [energy.sort(descending=True).values for each in energies for energy in each]
    whole = chunk * sum(sum(rate.widths) for rate in rates)
    nbytes = bytes_for(common, own, tables * chunk, whole)
    saved = max(0.0, 1 - 8 * nbytes / whole)  # the common allocation is one of its own
    fields = row_fields(model.config, runtime=RuntimeConfig(size))
    return Row(Metric.BITS_SAVED, saved, "share of stored bits", **fields, note=BY_POSITION)


def bytes_for(error: float, energies: Sequence[Tensor], tables: Sequence[Tensor], bits: int) -> int:
    """Fewest bytes of all layers and positions whose error is at most `error`; about `bits`."""
    steps = [purchases(*each) for each in zip(energies, tables, strict=True)]
    few, many = len(steps), -(-bits // 8) + len(steps)
    while few < many:
        middle = (few + many) // 2
        if rest(energies, tables, allocate(steps, middle)) <= error:
            many = middle
        else:
            few = middle + 1
    return many


def rest(energies: Sequence[Tensor], tables: Sequence[Tensor], rates: Sequence[Rate]) -> float:
    """Error that the rates of some layers leave, by their energies and distortions."""
    total = 0.0
    for energy, table, rate in zip(energies, tables, rates, strict=True):
        stored = torch.tensor([WIDTHS.index(width) for width in rate.widths])
        left = torch.ones_like(energy)
        left[: len(stored)] = table[stored]
        total += (energy * left).sum().item()
    return total


if __name__ == "__main__":
    typer.run(main)
