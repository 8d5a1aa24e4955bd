"""How long a converted layer and step take beside the dense ones, at equal window.

    python -m evals.speed --shapes wan-1.3b|demo --out rows.jsonl

One layer with random weights and a full cache, one denoising pass of one chunk (B = 1). In every
round each variant runs beside a dense layer of its own; figures are medians over the rounds.

`attention_seconds` is the core: from projected queries and what the cache holds to what the heads
gather, positions and rebuilding within. `layer_seconds` is the self-attention with its projections.
`step_seconds` is the block's, with cross-attention and feed-forward, times the model's layers.
`seconds_ratio` is over `dense`, the fastest way known to run the source: keys are rotated when
they are written, as in Self-Forcing; `dense, keys rotated when read` is this package's, whose
positions may change. `flops_share` is the core's rate of operations over that of a large product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from torch import Tensor

from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import (
    DENSE_BITS,
    CachePolicy,
    CacheSize,
    CodecConfig,
    Geometry,
    MLAConfig,
    ModelConfig,
    RuntimeConfig,
    SamplerConfig,
)
from vmla_convert.console import out
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.fitting.codec import default_channels
from vmla_convert.layers.attention import (
    AttendedTokens,
    AttentionMetadata,
    DenseSelfAttention,
    attend_with_past,
    split_heads,
)
from vmla_convert.layers.cache import CodecStore, Storage, Store
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.layers.dit import Block
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.layers.quantised import QuantisedStore
from vmla_convert.layers.sdpa import attend
from vmla_convert.loading.load import compute_device
from vmla_convert.maths.cost import absorbed_flops, materialised_flops
from vmla_convert.maths.quantise import distortions, gaussian_samples, gaussian_tables
from vmla_convert.maths.rates import allocate
from vmla_convert.maths.rope3d import Rotary, grid_table, rotate
from vmla_convert.measuring.rows import row_fields
from vmla_convert.results import Metric, Row, append_rows

WAN = Geometry(1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16)
DEMO = Geometry(
    160, ffn_dim=640, num_heads=5, num_layers=6, in_dim=12, out_dim=12, freq_dim=128,
    text_dim=10, text_len=1,
)  # fmt: skip
Backend = Literal["auto", "materialised", "absorbed"]
Latent = Literal["joint", "split"]


@dataclass(frozen=True)
class Shapes:
    """What is measured.

    Attributes:
        geometry: Of the model.
        latent_size: Of a frame.
        chunk_frames: Of a chunk.
        windows: In frames, the chunk among them.
        rounds: Of all variants.
    """

    geometry: Geometry
    latent_size: tuple[int, int]
    chunk_frames: int
    windows: tuple[int, ...]
    rounds: int


SHAPES = {
    "wan-1.3b": Shapes(WAN, (60, 104), 3, (7, 21), 3),
    "demo": Shapes(DEMO, (12, 12), 2, (10,), 100),
}


@dataclass(frozen=True)
class Variant:
    """A converted layer and how it is read.

    Attributes:
        latent: Whether keys and values share the latent.
        key_share: R over the width; of split latents what keys read.
        value_share: Of split latents what values read.
        backend: How latents are read.
        tile_mib: Most MiB that are rebuilt at a time.
    """

    latent: Latent
    key_share: float
    value_share: float = 0.0
    backend: Backend = "auto"
    tile_mib: int | None = None

    def mla(self, geometry: Geometry) -> MLAConfig:
        """Sizes of every layer; the norm takes one of the numbers that keys read."""
        key, value = (round(geometry.dim * share) for share in (self.key_share, self.value_share))
        pairs = tuple(range(geometry.head_dim // 8))
        layers, split = geometry.num_layers, self.latent == "split"
        return MLAConfig(
            (key + value - 1,) * layers,
            (pairs,) * layers,
            "none",
            self.latent,
            (key - 1,) * layers * split,
        )


# 192 + 32, 96 + 32, 96 + 96 + 32 and 64 + 64 + 32 numbers for Wan 1.3B, the norm among them.
PAPERS, HALF, SMALL = 1 / 8, 1 / 16, 1 / 24
SIZES = [
    Variant("joint", PAPERS),
    Variant("joint", HALF),
    Variant("split", HALF, HALF),
    Variant("split", SMALL, SMALL),
]
BACKENDS: tuple[Backend, ...] = ("materialised", "absorbed", "auto")
CUTS = (0.95, 0.975)
DTYPES: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
VARIANTS = [replace(variant, backend=backend) for variant in SIZES for backend in BACKENDS]


Run = Callable[[Tensor], tuple[float, float]]
"""Seconds of the core and of the whole layer, on the chunk's input (1, T, d)."""


class Case(NamedTuple):
    """One thing that is timed.

    Attributes:
        fields: Of its rows.
        run: Times it once.
        flops: Of its core.
    """

    fields: dict[str, Any]
    run: Run
    flops: int


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL to append rows to.")],
    shapes: Annotated[str, typer.Option(help="wan-1.3b or demo.")] = "wan-1.3b",
    rounds: Annotated[int | None, typer.Option(min=1, help="Of all variants.")] = None,
) -> None:
    """Measure, append the rows and print them."""
    if shapes not in SHAPES:
        raise ConfigError(f"no shapes '{shapes}'", did_you_mean(shapes, SHAPES))
    chosen = SHAPES[shapes]
    chosen = replace(chosen, rounds=rounds or chosen.rounds)
    rows: list[Row] = []
    for window in chosen.windows:
        measured = measure(chosen, window)
        append_rows(rows_file, measured)  # a window takes minutes, and an interruption keeps it
        rows += measured
    cells = [[r.run, r.backend or "", r.frames, r.metric, r.value, r.unit] for r in rows]
    out.table("Speed", ["run", "backend", "frames", "metric", "value", "unit"], cells)


@torch.no_grad()
def measure(shapes: Shapes, window: int) -> list[Row]:
    """All variants at one window."""
    torch.manual_seed(0)
    bench = Bench(shapes, window)
    cases = [bench.dense(rotated=True), bench.dense(rotated=False)]
    cases += [bench.codec(cut) for cut in CUTS]
    cases += [bench.quantised(dtype) for dtype in DTYPES]
    cases += [bench.converted(variant) for variant in VARIANTS]
    for case in cases:
        case.run(bench.chunk)
    dense = cases[0]
    timings: dict[int, list[Timing]] = {index: [] for index in range(len(cases))}
    rounds = range(shapes.rounds)
    with out.progress() as progress:
        for _ in progress.track(rounds, f"window of {window}", len(rounds)):
            rate, rest = bench.gemm_rate(), bench.rest_seconds()
            for index, case in enumerate(cases):
                # Each beside a dense run of its own: a busy machine changes from one to the next.
                beside = dense.run(bench.chunk)
                timings[index].append(Timing(case.run(bench.chunk), beside, rest, rate))
    layers = shapes.geometry.num_layers
    rows = [row for i, case in enumerate(cases) for row in case_rows(case, timings[i], layers)]
    return rows + auto_rows(cases, timings)


class Timing(NamedTuple):
    """One round of one variant.

    Attributes:
        mine: Seconds of its core and of its layer.
        dense: The same of the dense layer, just before.
        rest: Seconds of what else is in a block.
        rate: Operations a second of a large product.
    """

    mine: tuple[float, float]
    dense: tuple[float, float]
    rest: float
    rate: float


def case_rows(case: Case, timings: list[Timing], layers: int) -> list[Row]:
    """Rows of one variant: medians over the rounds."""
    rows: list[Row] = []
    parts: dict[str, Callable[[tuple[float, float], float], float]] = {
        "attention": lambda run, _: run[0],
        "layer": lambda run, _: run[1],
        "step": lambda run, rest: layers * (run[1] + rest),
    }
    for name, part in parts.items():
        seconds = median(part(t.mine, t.rest) for t in timings)
        ratio = median(part(t.mine, t.rest) / part(t.dense, t.rest) for t in timings)
        rows.append(Row(f"{name}_seconds", seconds, "s", **case.fields))
        rows.append(Row(Metric.SECONDS_RATIO, ratio, f"{name}, over dense", **case.fields))
    share = median(case.flops / t.mine[0] / t.rate for t in timings)
    return [*rows, Row(Metric.FLOPS_SHARE, share, "of a large product's rate", **case.fields)]


def auto_rows(cases: list[Case], timings: dict[int, list[Timing]]) -> list[Row]:
    """What `auto` took over the better of the two ways, in the core."""
    cores: dict[tuple[str, str | None], float] = {}
    for index, case in enumerate(cases):
        key = case.fields["run"], case.fields.get("backend")
        cores[key] = median(t.mine[0] / t.dense[0] for t in timings[index])
    rows: list[Row] = []
    for case in cases:
        run = case.fields["run"]
        if case.fields.get("backend") == "auto":
            ratio = cores[run, "auto"] / min(cores[run, "materialised"], cores[run, "absorbed"])
            rows.append(
                Row(Metric.AUTO_RATIO, ratio, "attention, over the faster way", **case.fields)
            )
    return rows


class Bench:
    """Inputs and positions that all variants share."""

    def __init__(self, shapes: Shapes, window: int) -> None:
        self.shapes, self.window, self.device = shapes, window, compute_device()
        geometry = shapes.geometry
        self.tokens = geometry.tokens_per_frame(shapes.latent_size)
        past = window - shapes.chunk_frames
        self.chunk = self._random(shapes.chunk_frames * self.tokens, geometry.dim)
        self.past = self._random(past * self.tokens, geometry.dim)
        self.config = ModelConfig(
            geometry, shapes.latent_size, shapes.chunk_frames, CachePolicy(window), SamplerConfig()
        )
        self.block = Block(self.config, 0).to(self.device)
        self.prompt = self.block.cross_attn.project_prompt(
            self._random(geometry.text_len, geometry.dim)
        )
        self.time = self._random(shapes.chunk_frames, 6 * geometry.dim).unflatten(-1, (6, -1))
        self.square = self._random(4096, geometry.dim)[0]

    def dense(self, rotated: bool) -> Case:
        """The source; its cache keeps keys rotated, or rotates them when they are read."""
        attention = self.block.self_attn
        assert isinstance(attention, DenseSelfAttention)
        heads, whole, own = attention.num_heads, self._table(0), self._table(-1)
        key, value = (
            torch.cat([old, new], 1)
            for old, new in zip(
                attention.project(self.past),
                attention.project(self.chunk),
                strict=True,
            )
        )
        key, value = split_heads(key, heads), split_heads(value, heads)
        key, start = (rotate(key, whole) if rotated else key), self.past.shape[1]

        def run(x: Tensor) -> tuple[float, float]:
            started = self._now()
            new_key, new_value = (split_heads(e, heads) for e in attention.project(x))
            key[:, start:] = rotate(new_key, own) if rotated else new_key
            value[:, start:] = new_value
            q = split_heads(attention.norm_q(attention.q(x)), heads)
            read = self._now()
            y = attend(rotate(q, own), key if rotated else rotate(key, whole), value)
            gathered = self._now()
            attention.o(y.flatten(2))
            return gathered - read, self._now() - started

        fields = row_fields(self.config) | {"frames": self.window}
        if not rotated:
            fields["run"] = "dense, keys rotated when read"
        return Case(fields, run, 4 * self.chunk.shape[1] * key.shape[1] * attention.o.in_features)

    def converted(self, variant: Variant) -> Case:
        """A converted layer."""
        mla = variant.mla(self.shapes.geometry)
        attention = LatentSelfAttention(self.shapes.geometry, mla, 0).to(self.device)
        torch.nn.init.normal_(attention.q_rope_map, std=0.05)
        runtime = RuntimeConfig(backend=variant.backend, tile_mib=variant.tile_mib)
        past = attention.project(self.past)
        metadata = AttentionMetadata(self._table(-1), self._table(0), runtime=runtime)

        def run(x: Tensor) -> tuple[float, float]:
            started = self._now()
            q, attended = prepared(x)
            read = self._now()
            y = attention.attend_latents(q, attended, metadata)
            gathered = self._now()
            attention.o(y.flatten(2))
            return gathered - read, self._now() - started

        def prepared(x: Tensor) -> tuple[Tensor, AttendedTokens]:
            entries = attention.project(x)
            q = split_heads(attention.norm_q(attention.q(x)), attention.num_heads)
            pairs = zip(past, entries, strict=True)
            return q, AttendedTokens(tuple(torch.cat(pair, 1) for pair in pairs))

        q, attended = prepared(self.chunk)
        way = (
            attention.faster_backend(q, attended, metadata)
            if variant.backend == "auto"
            else variant.backend
        )
        shape = attention.attention_shape(q, attended)
        flops = absorbed_flops(shape) if way == "absorbed" else materialised_flops(shape)
        config = replace(self.config, mla=mla)
        fields = row_fields(config) | {"backend": variant.backend, "frames": self.window}
        return Case(fields, run, flops)

    def compressed(self, store: Store, config: ModelConfig, runtime: RuntimeConfig) -> Case:
        """The dense layer with a compressed past, rebuilt at each pass."""
        attention = self.block.self_attn
        assert isinstance(attention, DenseSelfAttention)
        heads, past = attention.num_heads, self.window - self.shapes.chunk_frames
        slots = range(past)
        for start in range(0, past, self.shapes.chunk_frames):
            chunk = list(range(start, min(start + self.shapes.chunk_frames, past)))
            tokens = slice(chunk[0] * self.tokens, (chunk[-1] + 1) * self.tokens)
            store.write(chunk, *attention.project(self.past[:, tokens]))
        metadata = AttentionMetadata(
            self._table(-1), self._table(-1), self._table(1), runtime=runtime
        )

        def run(x: Tensor) -> tuple[float, float]:
            started = self._now()
            key, value = (split_heads(entry, heads) for entry in attention.project(x))
            q = split_heads(attention.norm_q(attention.q(x)), heads)
            projected = self._now()
            q, key = rotate(q, metadata.query_positions), rotate(key, metadata.key_positions)
            y = attend_with_past(q, key, value, store.past(slots), metadata)
            gathered = self._now()
            attention.o(y.flatten(2))
            return gathered - projected, self._now() - started

        fields = row_fields(config, runtime=runtime) | {"frames": self.window}
        tokens = self.window * self.tokens
        return Case(fields, run, 4 * self.chunk.shape[1] * tokens * attention.o.in_features)

    def codec(self, cut: float) -> Case:
        """The codec at a size, with random maps and energies that halve every eight channels."""
        geometry = self.shapes.geometry
        rank = default_channels(geometry)
        codec = LayerCodec(geometry.dim, geometry.num_heads, rank).to(self.device)
        torch.nn.init.normal_(codec.encode, std=(2 * geometry.dim) ** -0.5)
        torch.nn.init.normal_(codec.decode, std=rank**-0.5)
        codec.energies.copy_(torch.exp2(-torch.arange(rank) / 8))
        codec.tables.copy_(gaussian_tables())
        codec.distortions.copy_(distortions(gaussian_tables(), gaussian_samples()))
        config = replace(self.config, codec=CodecConfig(rank))
        runtime = RuntimeConfig(size=CacheSize(cut=cut))
        asked = int(config.cache_bytes_per_token(runtime))
        (rate,) = allocate([codec.purchases()], asked)
        store = CodecStore(codec, rate, self.window, self._storage())
        return self.compressed(store, config, runtime)

    def quantised(self, dtype: Literal["int8", "int4"]) -> Case:
        """The dense cache quantised in place."""
        geometry, runtime = self.shapes.geometry, RuntimeConfig(cache_dtype=dtype)
        store = QuantisedStore(
            geometry.num_heads, geometry.dim, DENSE_BITS[dtype], self.window, self._storage()
        )
        return self.compressed(store, self.config, runtime)

    def _storage(self) -> Storage:
        return Storage(1, self.tokens, device=self.device)

    def gemm_rate(self) -> float:
        """Operations a second of one large product."""
        started = self._now()
        weight = self.block.self_attn.q.weight
        torch.mm(self.square, weight.mT)
        return 2 * len(self.square) * weight.numel() / (self._now() - started)

    def rest_seconds(self) -> float:
        """Of a block without its self-attention."""
        started = self._now()
        self.block(self.chunk, self.time, self.prompt, lambda _, x: x)
        return self._now() - started

    def _table(self, part: int) -> Rotary:
        """Positions of the whole window (0), of the past (1), or of the chunk (−1)."""
        frames, edge = torch.arange(self.window), self.window - self.shapes.chunk_frames
        chosen = {0: frames, 1: frames[:edge], -1: frames[edge:]}[part]
        _, rows, columns = self.shapes.geometry.patch_size
        height, width = self.shapes.latent_size
        return grid_table(
            chosen,
            height // rows,
            width // columns,
            self.shapes.geometry.head_dim,
            self.device,
        )

    def _random(self, tokens: int, width: int) -> Tensor:
        return torch.randn(1, tokens, width, device=self.device)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
