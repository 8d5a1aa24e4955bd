"""Rows of a model: its errors, its cache, its layers, and what its conversion took."""

from __future__ import annotations

import cmath
from typing import Any, NamedTuple

import torch

from vmla_convert.config import DENSE_BITS, DENSE_ITEMSIZE, MLAConfig, ModelConfig, RuntimeConfig
from vmla_convert.fitting.convert import Conversion
from vmla_convert.layers.memory import streams_on
from vmla_convert.maths.rope3d import axis_pairs
from vmla_convert.media.base import latent_frames_per_second
from vmla_convert.results import Metric, Row

MEMORY_SECONDS = (5.0, 30.0, 60.0)
MEMORY_BATCHES = (1, 4, 16)
CARDS_GB = (24, 48, 80, 141)
"""Memory of one GPU: RTX 4090, L40S, H100 and H200."""
AXES = ("time", "height", "width")


class Errors(NamedTuple):
    """Held-out errors over the chunks that have a past.

    Attributes:
        velocity_error: Squared distance to the dense velocity, relative to the dense square.
        flow_loss: Mean squared distance to the true velocity.
    """

    velocity_error: float
    flow_loss: float


def run_name(config: ModelConfig, runtime: RuntimeConfig | None = None) -> str:
    """Name of a model in rows: `dense`, `dense int4`, `codec`, or `mla` with init and sizes."""
    mla = config.mla
    if mla is None:
        quantised = runtime and runtime.cache_dtype in DENSE_BITS
        name = "codec" if config.codec else "dense"
        return f"{name} {runtime.cache_dtype}" if runtime and quantised else name
    rank, rope = _uniform_sizes(mla)
    numbers = config.cache_bytes_per_token() / DENSE_ITEMSIZE
    sizes = f"{numbers:.4g}" if rank is None else f"{rank}+{rope}"
    return f"mla-{mla.init}-{sizes}-{mla.latent}"


def device_name() -> str:
    """Name of the device that figures are measured on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def row_fields(
    config: ModelConfig, seed: int = 0, runtime: RuntimeConfig | None = None
) -> dict[str, Any]:
    """Fields that all rows of a model with one runtime share."""
    mla, codec = config.mla, config.codec
    fields: dict[str, Any] = {
        "run": run_name(config, runtime),
        "seed": seed,
        "device": device_name(),
        "bytes_per_token": config.cache_bytes_per_token(runtime),
        "cache_dtype": runtime.cache_dtype if runtime else None,
    }
    if codec is not None:
        init = "calibrated" if codec.calibrated else "assumed"
        recent = config.cache.dense_recent_frames or None
        fields |= {"product": "codec", "init": init, "dense_recent_frames": recent}
    if mla is not None:
        rank, rope = _uniform_sizes(mla)
        fields |= {
            "product": "mla",
            "init": mla.init,
            "kv_lora_rank": rank,
            "qk_rope_head_dim": rope,
            "latent": mla.latent,
        }
    return fields


def _uniform_sizes(mla: MLAConfig) -> tuple[int | None, int | None]:
    """Latent rank and width of the rope key, where all layers have the same."""
    sizes = {(r, 2 * len(p)) for r, p in zip(mla.kv_lora_rank, mla.rope_pairs, strict=True)}
    return sizes.pop() if len(sizes) == 1 else (None, None)


def error_rows(
    errors: Errors,
    config: ModelConfig,
    step: int | None,
    seed: int = 0,
    runtime: RuntimeConfig | None = None,
) -> list[Row]:
    """Rows of held-out errors."""
    fields = row_fields(config, seed, runtime)
    rows = [Row(Metric.FLOW_LOSS, errors.flow_loss, "squared velocity", step=step, **fields)]
    if fields["run"] != "dense":
        rows.append(
            Row(Metric.VELOCITY_ERROR, errors.velocity_error, "relative", step=step, **fields)
        )
    return rows


def cache_rows(
    config: ModelConfig, seed: int = 0, runtime: RuntimeConfig | None = None
) -> list[Row]:
    """Rows of the cache's bytes per token; a number that is not quantised counts two bytes.

    Bytes of recent frames that are kept dense too are averaged over the tokens of the window.
    """
    fields = row_fields(config, seed, runtime)
    window, layers = config.cache.window_frames, config.geometry.num_layers
    tokens = window * config.tokens_per_frame * layers
    nbytes = config.cache_bytes(window, runtime=runtime) / tokens
    rows = [Row(Metric.CACHE_BYTES_PER_TOKEN, nbytes, "bytes per token and layer", **fields)]
    if fields["run"] != "dense":
        cut = config.cache_cut(runtime)
        rows.append(Row(Metric.CACHE_CUT, cut, "share of the dense cache", **fields))
    return rows


def memory_rows(
    config: ModelConfig, seed: int = 0, runtime: RuntimeConfig | None = None
) -> list[Row]:
    """Rows of the cache's bytes for whole clips and for the model's window, and of its streams.

    A number that is not quantised counts two bytes. Streaming needs no more than the window,
    however long the clip is. Streams are the clips with a full window that one GPU generates
    together, by formula.
    """
    fields, window = row_fields(config, seed, runtime), config.cache.window_frames
    rows: list[Row] = []
    for batch in MEMORY_BATCHES:
        nbytes = float(config.cache_bytes(window, batch, runtime))
        rows.append(Row(Metric.CACHE_BYTES, nbytes, "bytes", batch=batch, frames=window, **fields))
        for seconds in MEMORY_SECONDS:
            frames = round(seconds * latent_frames_per_second(config))
            nbytes = float(config.cache_bytes(frames, batch, runtime))
            of_clip = {"batch": batch, "frames": frames, "clip_seconds": seconds}
            rows.append(Row(Metric.CACHE_BYTES, nbytes, "bytes", **of_clip, **fields))
    for card in CARDS_GB:
        streams = streams_on(config, runtime or RuntimeConfig(), card * 10**9)
        rows.append(Row(Metric.STREAMS, streams, "streams on one GPU", card_gb=card, **fields))
    return rows


def layer_rows(config: ModelConfig, seed: int = 0) -> list[Row]:
    """Rows of each MLA layer's sizes, rope keys and folded phases."""
    mla, head_dim, rows = config.mla, config.geometry.head_dim, list[Row]()
    if mla is None:
        return rows
    fields = row_fields(config, seed)
    # A row of a layer's size has the size as value, not as field.
    sizes = ("kv_lora_rank", "qk_rope_head_dim")
    shared = {name: value for name, value in fields.items() if name not in sizes}
    axes = [axis for axis, n in zip(AXES, axis_pairs(head_dim), strict=True) for _ in range(n)]
    for layer, (rank, pairs) in enumerate(zip(mla.kv_lora_rank, mla.rope_pairs, strict=True)):
        rows.append(Row(Metric.KV_LORA_RANK, rank, "numbers", layer=layer, **shared))
        rows.append(Row(Metric.QK_ROPE_HEAD_DIM, 2 * len(pairs), "numbers", layer=layer, **shared))
        for pair, axis in enumerate(axes):
            of_pair = {"layer": layer, "pair": pair, "note": axis}
            rows.append(Row(Metric.ROPE_PAIR, pairs.count(pair), "rope keys", **of_pair, **fields))
            if mla.phases:
                heads = [head[pair] for head in mla.phases[layer]]
                mean = sum(cmath.rect(length, angle) for angle, length in heads)
                length = sum(length for _, length in heads) / len(heads)
                rows += [
                    Row(Metric.PHASE_LENGTH, length, "share", **of_pair, **fields),
                    Row(Metric.PHASE_ANGLE, cmath.phase(mean), "radians", **of_pair, **fields),
                ]
    return rows


def conversion_rows(conversion: Conversion, seed: int = 0) -> list[Row]:
    """Rows of the time and memory of a conversion."""
    fields = row_fields(conversion.config, seed)
    return [
        Row(Metric.CONVERT_SECONDS, conversion.convert_seconds, "s", **fields),
        Row(Metric.FACTOR_SECONDS, conversion.factor_seconds, "s", **fields),
        Row(Metric.PEAK_RSS_BYTES, float(conversion.peak_rss_bytes), "bytes", **fields),
    ]
