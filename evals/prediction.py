"""Measure how far the stored channels of a token predict those of another layer or frame.

    python -m evals.prediction --out evals/results/prediction.jsonl

A channel that others predict with an error of a share e of its variance needs ½·log2(1/e) bits less
at the same error (Cover and Thomas, "Elements of Information Theory", 10.3), at most the bits that
it has. `bits_saved` is the sum over the stored channels, as a share of the stored bits. Predictors
are linear, fitted to three quarters of the clips and measured on the rest: the channels of the
layer below, of both layers below, of the same place in the frame before, and of all of these.

Shapes: N clips, F frames, L tokens of a frame, r stored channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from evals.codec import fitted
from evals.worlds.worlds import open_world
from vmla_convert.config import ConvertConfig, RuntimeConfig, Sizes
from vmla_convert.console import out
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.runtime import codec_rates
from vmla_convert.loading.load import load
from vmla_convert.maths.rates import Rate
from vmla_convert.measuring.rows import row_fields
from vmla_convert.media.clips import Batch, seeded
from vmla_convert.results import Metric, Row, put_rows
from vmla_convert.training.losses import make_example, predicted_velocity

CUTS = (11 / 12, 23 / 24, 47 / 48)
FITTED_SHARE = 0.75
RIDGE = 1e-3
CALIBRATION_CLIPS = 24


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    world: Annotated[str, typer.Option(help="digits or photographs.")] = "digits",
    clips: Annotated[int, typer.Option(min=4, help="Number of held-out clips.")] = 24,
) -> None:
    """Measure what prediction between layers and frames would save."""
    scenery = open_world(world)
    teacher = load(scenery.checkpoint)
    frames = teacher.config.cache.window_frames
    with out.progress() as progress:
        config = ConvertConfig(calibration_clips=CALIBRATION_CLIPS, dtype="float32")
        model = fitted(teacher, config, scenery.clips(frames, 0), progress)
        entries = past_entries(teacher, scenery.clips(frames, 1).batch(0, clips, "held_out"))
        rows: list[Row] = []
        for cut in progress.track(CUTS, "sizes"):
            rows += saved_rows(model, entries, Sizes(cut=cut))
    put_rows(rows_file, rows)
    header = ["predicted from", "bytes per token", "share of bits saved"]
    out.table(world, header, [[r.note, r.bytes_per_token, r.value] for r in rows])


@torch.no_grad()
def past_entries(model: CausalWanModel, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Normed keys and values of each layer's clean tokens, both (N, F, L, d)."""
    frames = batch.latents.shape[1]
    found: list[dict[str, Tensor]] = [{} for _ in model.all_blocks()]
    tokens = model.config.tokens_per_frame

    def keeping(layer: int, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_: nn.Module, __: object, output: Tensor) -> None:
            found[layer][name] = output[:, : frames * tokens].unflatten(1, (frames, tokens))

        return keep

    with ExitStack() as hooks:
        for layer, block in enumerate(model.all_blocks()):
            for name, module in (("key", block.self_attn.norm_k), ("value", block.self_attn.v)):
                assert isinstance(module, nn.Module)
                hooks.callback(module.register_forward_hook(keeping(layer, name)).remove)
        example = make_example(batch, model.config.chunk_frames, seeded(0, 0, "prediction"))
        predicted_velocity(model, model.config, example)
    return [(each["key"], each["value"]) for each in found]


def saved_rows(
    model: CausalWanModel, entries: Sequence[tuple[Tensor, Tensor]], size: Sizes
) -> list[Row]:
    """Rows of every predictor at one size."""
    codecs = [block.codec for block in model.all_blocks()]
    assert all(isinstance(codec, LayerCodec) for codec in codecs)
    known = [codec for codec in codecs if codec is not None]
    rates = codec_rates(model.config, known, size)
    channels = [
        codec.channels(key, value, rate)
        for codec, (key, value), rate in zip(known, entries, rates, strict=True)
    ]
    stored = float(sum(sum(rate.widths) for rate in rates))
    saved = dict[str, float]()
    for layer, (target, rate) in enumerate(zip(channels, rates, strict=True)):
        before = _frame_before(target)
        inputs = {
            "layer below": channels[max(0, layer - 1) : layer],
            "two layers below": channels[max(0, layer - 2) : layer],
            "frame before": [before],
            "all of these": [*channels[max(0, layer - 2) : layer], before],
        }
        for name, parts in inputs.items():
            bits = saved_bits(torch.cat(parts, -1), target, rate) if parts else 0.0
            saved[name] = saved.get(name, 0.0) + bits
    fields = row_fields(model.config, runtime=RuntimeConfig(size))
    return [
        Row(Metric.BITS_SAVED, bits / stored, "share of stored bits", **fields, note=name)
        for name, bits in saved.items()
    ]


def saved_bits(inputs: Tensor, target: Tensor, rate: Rate) -> float:
    """Bits of a token that a linear prediction saves.

    Args:
        inputs: (N, F, L, n).
        target: (N, F, L, r).
        rate: Bits of each of the r channels.
    """
    clips = round(FITTED_SHARE * len(target))
    x, y = (t.flatten(1, 2).double() for t in (inputs, target))
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    past, rest = (x[:clips].flatten(0, 1), y[:clips].flatten(0, 1)), (x[clips:], y[clips:])
    square = past[0].mT @ past[0]
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    weights = torch.linalg.solve(square + ridge, past[0].mT @ past[1])
    left = (rest[1] - rest[0] @ weights).square().mean((0, 1))
    share = left / rest[1].var((0, 1)).clamp_min(1e-12)
    bits = torch.tensor(rate.widths, dtype=share.dtype)
    return (-0.5 * share.clamp(1e-12, 1).log2()).minimum(bits).sum().item()


def _frame_before(channels: Tensor) -> Tensor:
    """Channels of the same place one frame earlier; zeros for the first frame."""
    return torch.cat([torch.zeros_like(channels[:, :1]), channels[:, :-1]], 1)


if __name__ == "__main__":
    typer.run(main)
