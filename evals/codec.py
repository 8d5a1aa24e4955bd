"""Measure the cache codec at many sizes, beside the dense cache quantised in place.

    python -m evals.codec --out rows.jsonl

Errors are those on held-out clips, streamed through the cache, without training:

* `velocity_error` and `flow_loss_above_dense` of the codec at each size, of the codec without
  quantisation (`cache_dtype` = `model`), and of the dense cache in int8, int4, int3 and int2;
* the same two of a codec that was fitted without calibration (`init` = `assumed`);
* `bytes_ratio_at_error`: bytes of a quantised dense cache over bytes of the codec at the same
  velocity error, found by bisection;
* `nested_difference`: the largest relative difference in velocity error between one codec at
  eight ranks and eight codecs of exactly these ranks;
* `lora_error_ratio`: the error of a codec that was fitted before a LoRA and is used with the LoRA,
  over the error of a codec that was fitted with the LoRA merged. Two LoRAs are trained here. One
  makes mirrored clips. The other makes negatives, whose pixels no clip of the demo model has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    RuntimeConfig,
    Sizes,
)
from vmla_convert.console import out
from vmla_convert.fitting.calibrate import calibrate, model_blocks
from vmla_convert.fitting.codec import fit_model
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.maths.quantise import WHOLE_BITS
from vmla_convert.maths.rates import Rate
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.measuring.rows import device_name, row_fields
from vmla_convert.media.clips import (
    Batch,
    ClipSource,
    DemoClips,
    Split,
    open_clips,
    seeded,
    settled,
)
from vmla_convert.progress import Progress
from vmla_convert.results import Metric, Row, put_rows
from vmla_convert.training.losses import flow_matching, make_example

SIZES = (6.0, 8.0, 10.0, 12.0, 16.3, 20.0, 24.0, 31.5, 40.0, 51.2, 64.0)
"""Bytes per token and layer for the demo model, whose dense cache has `DEMO_BYTES`."""
DEMO_BYTES = 640
UNQUANTISED_CUTS = (0.96, 11 / 12, 0.85)
NESTED_RANKS = (4, 8, 12, 16, 24, 32, 48, 64)
ASSUMED_SIZES = (16.3, 31.5, 64.0)
BISECTIONS = 9
RATIO_DTYPES = ("int4", "int3", "int2")
LORA_SIZES = (16.3, 31.5)
LORA_RANK, LORA_STEPS, LORA_RATE = 8, 120, 2e-3


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    checkpoint: Annotated[str, typer.Option(help="Dense checkpoint, or 'demo'.")] = "demo",
    clips: Annotated[int, typer.Option(min=2, help="Number of held-out clips.")] = 48,
    data: Annotated[str, typer.Option(help="Clips: 'demo', or a safetensors file.")] = "demo",
    calibration_clips: Annotated[int, typer.Option(min=1, help="Clips to fit to.")] = 48,
    short: Annotated[
        bool, typer.Option("--short", help="Only sizes, dense caches and equal errors.")
    ] = False,
) -> None:
    """Measure errors of the cache codec at many sizes, beside quantised dense caches.

    The command fits a codec to the checkpoint. On held-out clips it measures
    the codec and the dense cache in int8, int4, int3 and int2, and finds the
    sizes of equal error. For the demo model, without --short, it also trains two
    LoRAs, and measures codecs that were fitted without and with them.
    """
    teacher = load(checkpoint)
    config = ConvertConfig(
        dtype="float32", calibration_clips=calibration_clips, data=DataConfig(data)
    )
    evaluate = EvaluateConfig(clips, DataConfig(data, seed=1))
    with out.progress() as progress:
        model = fitted(teacher, config, progress=progress)
        held_out = HeldOut(teacher, evaluate, streamed=True)
        rows = size_rows(model, held_out, progress)
        rows += dense_rows(teacher, held_out, progress)
        rows += ratio_rows(model, held_out, rows, progress)
        put_rows(rows_file, rows)  # what follows takes minutes
        if not short:
            more = assumed_rows(teacher, config, held_out)
            more.append(nested_row(teacher, model, config, held_out, progress))
            put_rows(rows_file, more)
            rows += more
        if not short and teacher.config.media == "demo":
            adapted = lora_rows(teacher, config, clips, progress)
            put_rows(rows_file, adapted)
            rows += adapted
    cells = [
        [row.run, row.metric, row.bytes_per_token, row.cache_dtype, row.value, row.note]
        for row in rows
    ]
    header = ["run", "metric", "bytes per token", "dtype", "value", "note"]
    out.table("Codec", header, [["" if c is None else c for c in line] for line in cells])


def fitted(
    teacher: CausalWanModel,
    config: ConvertConfig,
    clips: ClipSource | None = None,
    progress: Progress | None = None,
) -> CausalWanModel:
    """A model with a codec that was calibrated on clips, by default those of the config."""
    clips = clips or open_clips(settled(config.data, teacher.config))
    blocks, count = model_blocks(teacher), config.calibration_clips
    statistics = calibrate(teacher, blocks, clips, count, config.seed, progress)
    return fit_model(teacher, config, statistics)


def size_rows(model: CausalWanModel, held_out: HeldOut, progress: Progress) -> list[Row]:
    """Errors of the codec at each size, quantised and not."""
    share = model.config.geometry.dense_token_bytes / DEMO_BYTES
    runtimes = [RuntimeConfig(Sizes(bytes_per_token=size * share)) for size in SIZES]
    runtimes += [RuntimeConfig(Sizes(cut=cut), cache_dtype="model") for cut in UNQUANTISED_CUTS]
    tracked = progress.track(runtimes, "sizes")
    return [row for runtime in tracked for row in error_rows(model, held_out, runtime)]


def dense_rows(teacher: CausalWanModel, held_out: HeldOut, progress: Progress) -> list[Row]:
    """Errors of the dense cache quantised in place."""
    runtimes = [RuntimeConfig(cache_dtype=dtype) for dtype in ("int8", "int4", "int3", "int2")]
    tracked = progress.track(runtimes, "dense cache quantised")
    return [row for runtime in tracked for row in error_rows(teacher, held_out, runtime)]


def assumed_rows(teacher: CausalWanModel, config: ConvertConfig, held_out: HeldOut) -> list[Row]:
    """Errors of a codec that was fitted to the weights alone."""
    model = fit_model(teacher, replace(config, calibrate=False))
    runtimes = [RuntimeConfig(Sizes(bytes_per_token=size)) for size in ASSUMED_SIZES]
    return [row for runtime in runtimes for row in error_rows(model, held_out, runtime)]


def error_rows(model: CausalWanModel, held_out: HeldOut, runtime: RuntimeConfig) -> list[Row]:
    """Velocity error of one cache, and its flow loss above the dense model's."""
    errors, fields = held_out.measure(model, runtime), row_fields(model.config, runtime=runtime)
    above = errors.flow_loss / held_out.teacher_errors().flow_loss - 1
    return [
        Row(Metric.VELOCITY_ERROR, errors.velocity_error, "relative", **fields),
        Row(Metric.FLOW_LOSS_ABOVE_DENSE, above, "share of the dense model's", **fields),
    ]


def ratio_rows(
    model: CausalWanModel, held_out: HeldOut, rows: list[Row], progress: Progress
) -> list[Row]:
    """Bytes of the dense cache over bytes of the codec, at equal error."""
    found: list[Row] = []
    dense = [r for r in rows if r.metric == Metric.VELOCITY_ERROR and r.cache_dtype in RATIO_DTYPES]
    for row in progress.track(dense, "equal error"):
        assert row.bytes_per_token is not None and row.cache_dtype is not None
        nbytes = bytes_at(model, held_out, row.value)
        ratio, unit = row.bytes_per_token / nbytes, "dense bytes over codec bytes"
        found.append(
            Row(Metric.BYTES_RATIO_AT_ERROR, ratio, unit, row.cache_dtype, bytes_per_token=nbytes)
        )
    return found


def bytes_at(model: CausalWanModel, held_out: HeldOut, error: float) -> float:
    """Smallest bytes per token and layer at which the codec has at most this velocity error."""
    layers = model.config.geometry.num_layers
    largest = max(SIZES) * model.config.geometry.dense_token_bytes / DEMO_BYTES
    few, many = layers, round(largest) * layers
    for _ in range(BISECTIONS):
        middle = (few + many) // 2
        size = Sizes(bytes_per_token=middle / layers)
        if held_out.measure(model, RuntimeConfig(size=size)).velocity_error <= error:
            many = middle
        else:
            few = middle
    return many / layers


def nested_row(
    teacher: CausalWanModel,
    model: CausalWanModel,
    config: ConvertConfig,
    held_out: HeldOut,
    progress: Progress,
) -> Row:
    """Largest difference between one codec at eight ranks and eight codecs of these ranks."""
    differences: list[float] = []
    for rank in progress.track(NESTED_RANKS, "one codec against many"):
        errors: list[float] = []
        for each in (model, fitted(teacher, replace(config, channels=rank))):
            set_rank(each, rank)
            errors.append(held_out.measure(each).velocity_error)
        differences.append(abs(errors[0] / errors[1] - 1))
    return Row(
        Metric.NESTED_DIFFERENCE, max(differences), "relative", "codec", device=device_name()
    )


def set_rank(model: CausalWanModel, rank: int) -> None:
    """Store the same number of channels in every layer, unquantised."""
    for block in model.all_blocks():
        assert block.codec is not None
        block.codec.rate = Rate((WHOLE_BITS,) * rank, quantised=False)


class ChangedClips:
    """Clips of the demo model with changed pixels, which a LoRA is trained to make."""

    def __init__(self, clips: DemoClips, change: Callable[[Tensor], Tensor]) -> None:
        self.clips, self.change = clips, change

    def batch(self, start: int, size: int, split: Split = "train") -> Batch:
        """Return `size` clips from number `start` on."""
        clips, media = self.clips.clips(start // size, size, split), self.clips.media
        return Batch(media.encode(self.change(clips.video)), media.encode_labels(clips.labels))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "mirrored": lambda video: video.flip(-1),
    "negative": lambda video: -video,
}


def lora_rows(
    teacher: CausalWanModel, config: ConvertConfig, count: int, progress: Progress
) -> list[Row]:
    """Errors of a codec fitted before a LoRA was trained, and of one fitted with the LoRA."""
    demo = open_clips(config.data, teacher.config.cache.sink_frames)
    assert isinstance(demo, DemoClips)
    evaluate, rows = EvaluateConfig(count, DataConfig("demo", seed=1)), list[Row]()
    for name, change in CHANGES.items():
        own = ChangedClips(demo, change)
        adapted = train_lora(teacher, own, progress)
        before, after = fitted(teacher, config, demo), fitted(adapted, config, own)
        before.load_state_dict(before.state_dict() | adapted.state_dict(), assign=True)
        unseen = ChangedClips(DemoClips(evaluate.data), change)
        held_out = HeldOut(adapted, evaluate, streamed=True, clips=unseen)
        rows += _lora_rows(name, before, after, held_out)
    return rows


def _lora_rows(
    name: str, before: CausalWanModel, after: CausalWanModel, held_out: HeldOut
) -> list[Row]:
    rows: list[Row] = []
    for size in LORA_SIZES:
        runtime = RuntimeConfig(Sizes(bytes_per_token=size))
        old, new = (held_out.measure(each, runtime).velocity_error for each in (before, after))
        fields = row_fields(before.config, runtime=runtime)
        for metric, value, unit, note in (
            (Metric.VELOCITY_ERROR, old, "relative", f"{name}: fitted before the LoRA"),
            (Metric.VELOCITY_ERROR, new, "relative", f"{name}: fitted with the LoRA"),
            (Metric.LORA_ERROR_RATIO, old / new, "before over with", name),
        ):
            rows.append(Row(metric, value, unit, **fields, note=note))
    return rows


def train_lora(teacher: CausalWanModel, clips: ClipSource, progress: Progress) -> CausalWanModel:
    """A copy of the teacher with a LoRA merged; flow matching trained the LoRA."""
    from peft import LoraConfig, LoraModel

    model = CausalWanModel(teacher.config)
    model.load_state_dict(teacher.state_dict())
    targets = r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])"
    adapted = LoraModel(
        model,
        {"default": LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets)},
        "default",
    )
    loss = flow_matching(teacher.config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=LORA_RATE)
    for step in progress.track(range(LORA_STEPS), "training a LoRA"):
        noise = seeded(0, step, "lora")
        example = make_example(clips.batch(8 * step, 8), teacher.config.chunk_frames, noise)
        optimiser.zero_grad()
        loss(model, example).backward()
        optimiser.step()
    adapted.merge_and_unload()
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
