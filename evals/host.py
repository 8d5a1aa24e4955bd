"""Measure a codec in a program of Self-Forcing's type: errors on the demo model, and costs.

    python -m evals.host --out evals/results/host.jsonl

* `velocity_error` on held-out clips of the codec that `vmla.fit` makes of a running program (`run`
  = `host`, or `host, gradients` with `observe(gradients=True)`), beside that of `vmla convert`
  (`run` = `convert`), at equal size;
* `step_seconds` of one self-attention layer of the program at the shapes of Wan 1.3B, with a full
  cache, and `seconds_ratio` to the layer with its own dense cache. Decoding is part of the step.
  Both take turns. Seconds are those of the processor, because other programs may run;
* `cache_bytes` of the layer's cache between two passes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import Annotated, Any

import torch
import typer

import vmla_convert as vmla
from evals.codec import fitted
from evals.counted_bytes import CountedBytes
from evals.dictionary_host import Attention, Entries, Pipeline
from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import (
    CachePolicy,
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    Geometry,
    ModelConfig,
    RuntimeConfig,
    SamplerConfig,
    Sizes,
)
from vmla_convert.console import out
from vmla_convert.fitting.codec import fit_model
from vmla_convert.fitting.weights import with_tensors
from vmla_convert.interop.attach import attach
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.codec import Codec
from vmla_convert.maths.flow import sampler_sigmas
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.measuring.rows import row_fields
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.open import default_prompts
from vmla_convert.results import Metric, Row, put_rows

SIZES = (16.0, 32.0)
CLIPS_PER_PROMPT, FRAMES = 4, 20
WAN = ModelConfig(
    Geometry(1536, ffn_dim=256, num_heads=12, num_layers=1, in_dim=16, out_dim=16, text_dim=64),
    latent_size=(60, 104),
    chunk_frames=3,
    cache=CachePolicy(21),
    sampler=SamplerConfig(),
)
LAYER_BYTES = 200.0


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each cache.")] = 5,
    errors: Annotated[bool, typer.Option(help="Measure errors on the demo model.")] = True,
    costs: Annotated[bool, typer.Option(help="Time a layer of Wan 1.3B.")] = True,
) -> None:
    """Measure a codec in a program of Self-Forcing's type.

    The demo model runs in the program, is observed there, and gets a codec,
    which is measured on held-out clips beside the codec of vmla convert. Then
    one layer of the shapes of Wan 1.3B is timed with a codec's cache and with
    its own dense cache.
    """
    rows = error_rows() if errors else []
    rows += cost_rows(rounds) if costs else []
    put_rows(rows_file, rows)
    cells = [[r.run, r.metric, r.bytes_per_token or "", r.value, r.unit] for r in rows]
    out.table("Host", ["run", "metric", "bytes per token", "value", "unit"], cells)


def error_rows() -> list[Row]:
    """Errors of a codec that was fitted to a running program, and of that of `vmla convert`."""
    teacher = vmla.load("demo")
    converted = fitted(teacher, ConvertConfig(calibration_clips=48, data=DataConfig("demo")))
    held_out = HeldOut(teacher, EvaluateConfig(48, DataConfig("demo", seed=1)), streamed=True)
    rows: list[Row] = []
    for run, model in (
        ("host", observed(teacher, gradients=False)),
        ("host, gradients", observed(teacher, gradients=True)),
        ("convert", converted),
    ):
        for size in SIZES:
            runtime = RuntimeConfig(Sizes(bytes_per_token=size))
            error = held_out.measure(model, runtime).velocity_error
            fields: dict[str, Any] = {**row_fields(model.config, runtime=runtime), "run": run}
            rows.append(Row(Metric.VELOCITY_ERROR, error, "relative", **fields))
    return rows


def observed(teacher: CausalWanModel, gradients: bool) -> CausalWanModel:
    """The model with a codec that was fitted to the model's clips in a running program."""
    sampler = teacher.config.sampler
    sigmas = sampler_sigmas(sampler.denoising_step_list, sampler.shift).tolist()
    pipeline = Pipeline(teacher, sigmas[:-1])
    prompts = DemoMedia().encode_prompts(list(default_prompts(teacher.config)))
    shape = (len(prompts), FRAMES, teacher.config.geometry.in_dim, *teacher.config.latent_size)
    with vmla.observe(pipeline, gradients=gradients) as seen:
        for seed in range(CLIPS_PER_PROMPT):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            pipeline.inference(noise, prompts)
    return beside(teacher, vmla.fit(seen))


def beside(teacher: CausalWanModel, codec: Codec) -> CausalWanModel:
    """A model in memory with a codec."""
    tensors = {
        f"blocks.{index}.codec.{name}": tensor
        for index, layer in enumerate(codec.layers)
        for name, tensor in layer.state_dict().items()
    }
    return with_tensors(teacher, replace(teacher.config, codec=codec.config.codec), tensors)


class Layer:
    """A program of one self-attention layer, with a full cache."""

    def __init__(self, dense: DenseSelfAttention) -> None:
        policy, (height, width) = WAN.cache, WAN.latent_size
        self.layer = Attention(dense, policy.window_frames, policy.sink_frames)
        self.grid = torch.tensor([[WAN.chunk_frames, height // 2, width // 2]])
        self.tokens = WAN.chunk_frames * WAN.tokens_per_frame
        self.x = torch.randn(1, self.tokens, WAN.geometry.dim)
        slots = policy.window_frames * WAN.tokens_per_frame
        shape = (1, slots, WAN.geometry.num_heads, WAN.geometry.head_dim)
        self.cache: Entries = {
            "k": torch.zeros(shape),
            "v": torch.zeros(shape),
            "global_end_index": torch.tensor([0]),
            "local_end_index": torch.tensor([0]),
        }

    @torch.no_grad()
    def step(self, chunk: int) -> None:
        """A pass over a chunk."""
        start = chunk * self.tokens
        self.layer(self.x, self.grid, kv_cache=self.cache, current_start=start)


def cost_rows(rounds: int) -> list[Row]:
    """Time and bytes of a layer with a codec's cache and with its own."""
    torch.manual_seed(0)
    model = CausalWanModel(WAN).requires_grad_(False)
    coded = fit_model(model, ConvertConfig(calibrate=False))
    block = coded.all_blocks()[0]
    assert block.codec is not None and isinstance(block.self_attn, DenseSelfAttention)
    codec = Codec(coded.config, (block.codec,), {})
    programs = [Layer(block.self_attn), Layer(block.self_attn)]
    attached = attach(programs[1], codec, bytes_per_token=LAYER_BYTES)
    last = WAN.cache.window_frames // WAN.chunk_frames - 1
    for chunk in range(last + 1):
        for program in programs:
            program.step(chunk)
    steps = [lambda program=program: program.step(last) for program in programs]
    seconds = [[timed(step) for step in steps] for _ in range(rounds)]
    peak_dense, peak_codec = map(peak_of, steps)
    of_dense, of_codec = (median(times) for times in zip(*seconds, strict=True))
    ratio = median(ours / theirs for theirs, ours in seconds)
    dense: dict[str, Any] = row_fields(WAN)
    runtime = RuntimeConfig(Sizes(bytes_per_token=LAYER_BYTES))
    fields: dict[str, Any] = {**row_fields(coded.config, runtime=runtime), "run": "host"}
    window = {"frames": WAN.cache.window_frames}
    return [
        Row(Metric.STEP_SECONDS, of_dense, "s", **window, **dense),
        Row(Metric.STEP_SECONDS, of_codec, "s", **window, **fields),
        Row(Metric.SECONDS_RATIO, ratio, "host / dense", **window, **fields),
        Row(Metric.CACHE_BYTES, float(attached.dense_bytes), "bytes", **window, **dense),
        Row(Metric.CACHE_BYTES, float(attached.nbytes), "bytes", **window, **fields),
        Row(Metric.PEAK_DEVICE_BYTES, float(peak_dense), "bytes of a step", **window, **dense),
        Row(Metric.PEAK_DEVICE_BYTES, float(peak_codec), "bytes of a step", **window, **fields),
    ]


def peak_of(step: Callable[[], None]) -> int:
    """Most bytes of tensors that a step makes and that exist together; no weights, no cache."""
    with CountedBytes() as counted:
        step()
    return counted.peak


def timed(step: Callable[[], None]) -> float:
    """Seconds of the processor."""
    started = process_time()
    step()
    return process_time() - started


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
