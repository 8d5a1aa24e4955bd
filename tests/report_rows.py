"""Planted rows of everything that a report can show, made as a sweep makes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from vmla_convert.config import (
    CachePolicy,
    CodecConfig,
    Geometry,
    MLAConfig,
    ModelConfig,
    RuntimeConfig,
    SamplerConfig,
    Sizes,
)
from vmla_convert.measuring.rows import (
    Errors,
    cache_rows,
    error_rows,
    memory_rows,
    row_fields,
)
from vmla_convert.results import Metric, Row, bytes_at_error

DENSE_LOSS, DENSE_BYTES, DENSE_STEP = 0.04, 512.0, 0.080
GEOMETRY = Geometry(dim=128, ffn_dim=256, num_heads=4, num_layers=6, in_dim=16, out_dim=16)
STEPS = (0, 20, 40, 60)
SIZES = (12.0, 20.0, 32.0, 51.2, 80.0, 128.0)
RANKS = ((8, 4), (16, 8), (32, 16))
# Errors are compared with the error of the codec at the same bytes.
QUALITY = {"model": 2.5, "calibrated": 4.0, "spectral": 30.0}
DENSE_ERRORS = {"int8": 1e-5, "int4": 4e-3, "int3": 0.03, "int2": 0.3}
CODEC_POINT = "c0dec0000000"


def dense_config() -> ModelConfig:
    """A model of six layers whose dense cache takes 512 bytes per token and layer."""
    return ModelConfig(
        geometry=GEOMETRY,
        latent_size=(12, 12),
        chunk_frames=2,
        cache=CachePolicy(12, 2, "relative"),
        sampler=SamplerConfig(),
        media="demo",
    )


def codec_config() -> ModelConfig:
    return replace(dense_config(), codec=CodecConfig(128, Sizes(20.0)))


def mla_config(init: str, rank: int, rope: int) -> ModelConfig:
    layers = GEOMETRY.num_layers
    pairs = tuple(range(rope // 2))
    return replace(dense_config(), mla=MLAConfig((rank,) * layers, (pairs,) * layers, init))


def full_rows(seeds: int = 2) -> list[Row]:
    """A whole sweep: a codec at several sizes, MLA of two inits, quantised dense caches."""
    return [
        *dense_rows(),
        *weight_spectra(),
        *(row for seed in range(seeds) for row in codec_rows(seed)),
        *(
            row
            for seed in range(seeds)
            for init in ("calibrated", "spectral")
            for rank, rope in RANKS
            for row in mla_rows(init, rank, rope, seed)
        ),
        Row(Metric.FAILED, 1.0, "point", "mla-random-2+2", point="f", note="diverged at step 12"),
        Row(Metric.SWEEP_SECONDS, 12.5, "s", "sweep", note="calibrating"),
        Row(Metric.SWEEP_SECONDS, 3.5, "s", "sweep", note="converting"),
    ]


def dense_rows() -> list[Row]:
    """The dense model, as it is and quantised."""
    config = dense_config()
    rows = [
        *error_rows(Errors(0.0, DENSE_LOSS), config, None),
        Row(Metric.FLOW_LOSS_OTHER_PAST, 0.4, "squared velocity", **row_fields(config)),
        *cache_rows(config),
        *memory_rows(config),
        Row(Metric.STEP_SECONDS, DENSE_STEP, "s", **row_fields(config)),
        *rollout(config, 0.0),
    ]
    for dtype, error in DENSE_ERRORS.items():
        runtime = RuntimeConfig(cache_dtype=dtype)  # pyright: ignore[reportArgumentType]
        rows += measured(config, error, None, runtime=runtime)
        rows += memory_rows(config, runtime=runtime)
    return rows


def measured(
    config: ModelConfig,
    error: float,
    step: int | None,
    seed: int = 0,
    runtime: RuntimeConfig | None = None,
) -> list[Row]:
    """One measurement, whose flow loss grows with the error, and what a token costs."""
    errors = Errors(error, DENSE_LOSS * (1 + 20 * error))
    return [
        *error_rows(errors, config, step, seed, runtime),
        *cache_rows(config, seed, runtime),
    ]


def codec_error(nbytes: float) -> float:
    """Falls by half with every eight bytes."""
    return 0.2 * 2 ** (-nbytes / 8)


def recovered(error: float, step: int) -> float:
    """A fifth of the error is left at the last step."""
    return error * 0.2 ** (step / STEPS[-1])


def codec_rows(seed: int = 0) -> list[Row]:
    config, rows = codec_config(), list[Row]()
    for nbytes in SIZES:
        for dtype in ("auto", "model"):
            runtime = RuntimeConfig(Sizes(nbytes), cache_dtype=dtype)
            error = codec_error(nbytes) * QUALITY.get(dtype, 1.0) * (1 + 0.1 * seed)
            steps = STEPS if dtype == "auto" else (0, STEPS[-1])
            for step in steps:
                rows += measured(config, recovered(error, step), step, seed, runtime)
            rows += memory_rows(config, seed, runtime)
    fields = row_fields(config, seed)
    rows += [
        Row(Metric.CONVERT_SECONDS, 1.5, "s", **fields),
        Row(Metric.RECOVER_SECONDS, 20.0, "s", **fields),
        Row(Metric.LEARNING_RATE, 1e-3, "per step", **fields),
        *rollout(config, 2.0),
    ]
    for dtype, error in DENSE_ERRORS.items():
        for step in (0, STEPS[-1]):
            curve = [(size, recovered(codec_error(size), step)) for size in SIZES]
            if (nbytes := bytes_at_error(curve, error)) is not None:
                own = {**fields, "cache_dtype": dtype}
                rows.append(Row(Metric.BYTES_AT_ERROR, nbytes, "bytes", step=step, **own))
    labels = {"point": CODEC_POINT, "recovery_steps": STEPS[-1]}
    return [replace(row, seed=seed, **labels) for row in rows]


def mla_rows(init: str, rank: int, rope: int, seed: int = 0) -> list[Row]:
    config, rows = mla_config(init, rank, rope), list[Row]()
    fields, nbytes = row_fields(config, seed), config.cache_bytes_per_token()
    error = codec_error(nbytes / 4) * QUALITY[init] / 4
    for step in STEPS:
        rows += measured(config, recovered(error, step), step, seed)
    rows += memory_rows(config, seed)
    rows += [
        Row(Metric.CONVERT_SECONDS, 1.5, "s", **fields),
        Row(Metric.STEP_SECONDS, DENSE_STEP * (0.5 + nbytes / 400), "s", **fields),
        Row(Metric.SECONDS_RATIO, 0.5 + nbytes / 400, "converted / dense", **fields),
        *rollout(config, 40 * error),
        *learned_spectra(config, seed),
    ]
    point = f"{init}-{rank}+{rope}"
    return [replace(row, point=point, seed=seed, recovery_steps=STEPS[-1]) for row in rows]


def learned_spectra(config: ModelConfig, seed: int) -> Iterator[Row]:
    """Layers that fill nearly all of R, more so after recovery."""
    fields = row_fields(config, seed)
    for layer in range(GEOMETRY.num_layers):
        for step, share in ((0, 0.85), (STEPS[-1], 0.95)):
            wide = math.ceil(fields["kv_lora_rank"] * (share - 0.01 * layer))
            yield Row(
                Metric.EFFECTIVE_RANK_99, wide, "directions", layer=layer, step=step, **fields
            )


def rollout(config: ModelConfig, loss: float) -> Iterator[Row]:
    """Quality that falls from segment to segment."""
    fields = {**row_fields(config), "frames": 240}
    for segment in range(4):
        fall = segment * (0.5 + loss)
        for metric, value, unit in (
            (Metric.BACKGROUND_PSNR, 40 - fall - 3 * loss, "dB"),
            (Metric.DIGIT_ACCURACY, max(0.1, 1 - 0.02 * fall), "share of frames"),
            (Metric.DRIFT, 0.02 * fall, "squared, relative to the spread"),
        ):
            yield Row(metric, value, unit, segment=segment, **fields)
    yield Row(Metric.BACKGROUND_PSNR, 38 - loss, "dB", **fields)


def weight_spectra(layers: int = GEOMETRY.num_layers, width: int = 128) -> Iterator[Row]:
    """Cumulative spectra at about twenty ranks, flat for weights, steep on activations."""
    ranks = sorted({round(width ** (i / 19)) for i in range(20)})
    for layer in range(layers):
        for run, scale in (("weights", 0.6 * width), ("weights_x_activations", 5 + layer)):
            whole = 1 - math.exp(-width / scale)
            wanted = -scale * math.log(1 - 0.99 * whole)
            yield Row(Metric.EFFECTIVE_RANK_99, math.ceil(wanted), "directions", run, layer=layer)
            for rank in ranks:
                kept = (1 - math.exp(-rank / scale)) / whole
                yield Row(Metric.ENERGY_AT_RANK, kept, "share", run, layer=layer, kv_lora_rank=rank)


def point_rows(
    errors: Sequence[float], init: str = "calibrated", rank: int = 16, rope: int = 8, seed: int = 0
) -> list[Row]:
    """An MLA model measured at steps 0, 10, 20, … of recovery."""
    config = mla_config(init, rank, rope)
    rows = [row for i, error in enumerate(errors) for row in measured(config, error, 10 * i, seed)]
    return [replace(row, point=f"{init}-{rank}+{rope}") for row in rows]
