"""Check on a GPU what formulas and tests without one predict: one table, in at most ten minutes.

    python -m evals.gpu_check            Wan 1.3B's width, 480p, bfloat16
    python -m evals.gpu_check --toy      a tiny width, on a CPU in seconds

Layers of random weights stream with a full window. The table has, for each kind of layer, the
kernel of its attention, its time as a share of the dense layer's, its peak memory beside the
formula's, its error in bfloat16 against float32, and whether it compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Annotated

import torch
import typer
from torch import Tensor

from evals.scale import SIZES, random_weight
from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import (
    CachePolicy,
    CodecConfig,
    MLAConfig,
    ModelConfig,
    RuntimeConfig,
    SamplerConfig,
    Sizes,
)
from vmla_convert.console import out
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.memory import streaming_memory
from vmla_convert.maths.rates import Rate

LAYERS, PASSES = 2, 5
BUDGET_SECONDS = 540.0
"""Kinds of layers that are not begun by then are left out."""


def main(
    toy: Annotated[bool, typer.Option(help="A tiny width, for a CPU.")] = False,
) -> None:
    """Measure every kind of layer, and print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, dense = perf_counter(), None
    lines: list[list[str]] = []
    for name, (config, runtime) in kinds(toy).items():
        if perf_counter() - started > BUDGET_SECONDS:
            lines.append([name, *["left out: no time"] * 5])
            continue
        found = Check(config, runtime, device)
        seconds = found.seconds()
        dense = dense or seconds
        lines.append(
            [
                name,
                found.kernel(),
                f"{seconds / dense:.2f}",
                found.memory(),
                f"{found.error():.1e}",
                found.compiles(),
            ]
        )
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    header = ["layer", "kernel", "time of dense", "peak of formula", "bf16 error", "compiled"]
    out.table(f"{where}, torch {torch.__version__}", header, lines)


def kinds(toy: bool) -> dict[str, tuple[ModelConfig, RuntimeConfig]]:
    """Models of every kind of layer, and their settings."""
    geometry, frame = replace(SIZES["1.3b"], num_layers=LAYERS), (60, 104)
    channels, rank = 256, 192
    if toy:
        geometry = replace(geometry, dim=96, ffn_dim=128, num_heads=2, text_dim=32, text_len=8)
        frame, channels, rank = (8, 12), 24, 16
    dense = ModelConfig(geometry, frame, 3, CachePolicy(21), SamplerConfig())
    codec = replace(dense, codec=CodecConfig(channels, Sizes(cut=0.9)))
    mla = MLAConfig((rank,) * LAYERS, (tuple(range(8)),) * LAYERS, "spectral")
    return {
        "dense": (dense, RuntimeConfig()),
        "dense int8": (dense, RuntimeConfig(cache_dtype="int8")),
        "codec": (codec, RuntimeConfig()),
        "MLA materialised": (replace(dense, mla=mla), RuntimeConfig(backend="materialised")),
        "MLA absorbed": (replace(dense, mla=mla), RuntimeConfig(backend="absorbed")),
    }


class Check:
    """One kind of layer with a full window."""

    def __init__(self, config: ModelConfig, runtime: RuntimeConfig, device: torch.device) -> None:
        self.config, self.runtime, self.device = config, runtime, device
        torch.manual_seed(0)
        with torch.device("meta"):
            model = CausalWanModel(config)
        self.state = {n: random_weight(n, tuple(t.shape)) for n, t in model.state_dict().items()}
        self.peak = 0
        self.step = self._stream(torch.bfloat16)

    def seconds(self) -> float:
        """Shortest time of a pass over a chunk."""
        times: list[float] = []
        for _ in range(PASSES):
            self._settle()
            started = perf_counter()
            self.step()
            self._settle()
            times.append(perf_counter() - started)
        return min(times)

    def kernel(self) -> str:
        """The longest operators of a pass whose names say attention."""
        activity = torch.profiler.ProfilerActivity
        which = [activity.CUDA] if self.device.type == "cuda" else [activity.CPU]
        with torch.profiler.profile(activities=which) as profile:
            self.step()
            self._settle()
        words = ("flash", "fmha", "attention", "cudnn", "sage")
        names = [e.key for e in profile.key_averages() if any(w in e.key.lower() for w in words)]
        return names[-1][:48] if names else "none"

    def memory(self) -> str:
        """Peak of filling the window, as a share of the formula's; a CPU does not tell."""
        if self.device.type != "cuda":
            return "–"
        return f"{self.peak / streaming_memory(self.config, self.runtime, 2).device:.2f}"

    def error(self) -> float:
        """Relative error of a pass in bfloat16 against float32."""
        narrow, exact = self.step().float(), self._stream(torch.float32)().float()
        return ((narrow - exact).norm() / exact.norm()).item()

    def compiles(self) -> str:
        """Whether compiled blocks give the same, with the relative difference."""
        plain = self.step().float()
        try:
            compiled = self._stream(torch.bfloat16, compiled=True)().float()
        except Exception as error:
            return f"no: {type(error).__name__}"
        return f"{((compiled - plain).norm() / plain.norm()).item():.1e}"

    @torch.no_grad()
    def _stream(self, dtype: torch.dtype, compiled: bool = False) -> Callable[[], Tensor]:
        """Fill a window; return a pass over one more chunk."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model, latents, levels = self._model(dtype), self._latents(dtype), self._levels()
        if compiled:
            model.compile_blocks()
        geometry = self.config.geometry
        shape = (1, geometry.text_len, geometry.text_dim)
        prompt = model.project_prompt(torch.zeros(shape, device=self.device, dtype=dtype))
        cache = model.new_cache(1, self.runtime)
        for _ in range(self.config.cache.window_frames // self.config.chunk_frames + 1):
            cache.open_chunk(self.config.chunk_frames)
            model.stream(latents, levels, prompt, cache)
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())

        def step() -> Tensor:
            with torch.no_grad():
                return model.stream(latents, levels, prompt, cache, keep=False)

        cache.open_chunk(self.config.chunk_frames)
        return step

    def _model(self, dtype: torch.dtype) -> CausalWanModel:
        with torch.device("meta"):
            model = CausalWanModel(self.config)
        precise = {name for name, _ in model.named_buffers()}
        kinds = {n: torch.float32 if n in precise else dtype for n in self.state}
        state = {n: t.to(self.device, kinds[n]) for n, t in self.state.items()}
        model.load_state_dict(state, assign=True)
        for block in model.all_blocks():
            if block.codec is not None:
                block.codec.rate = Rate((8,) * (block.codec.encode.shape[0] // 2), quantised=True)
        return model.eval().requires_grad_(False)

    def _latents(self, dtype: torch.dtype) -> Tensor:
        shape = (1, self.config.chunk_frames, self.config.geometry.in_dim, *self.config.latent_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return noise.to(self.device, dtype)

    def _levels(self) -> Tensor:
        return torch.full((1, self.config.chunk_frames), 500.0, device=self.device)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(run_reporting_errors(lambda: typer.run(main)))
