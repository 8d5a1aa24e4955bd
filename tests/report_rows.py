"""Planted rows of everything that a report can show, as a sweep would write them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from vmla_convert.results import Row

DENSE_LOSS, DENSE_SCALARS, DENSE_STEP = 0.04, 256, 0.080
LATENT = {"latent": "joint"}
QUALITY = {"calibrated": 1.0, "spectral": 12.0, "random": 30.0}
STEPS = (0, 20, 40, 60)


def full_rows(
    ranks: Sequence[tuple[int, int]] = ((8, 4), (16, 8), (32, 16)),
    layers: int = 6,
    pairs: int = 16,
    seeds: int = 2,
) -> list[Row]:
    """A whole sweep: three inits, several sizes, seeds, quantised caches, every further metric."""
    points = [
        row
        for rank, rope in ranks
        for init in QUALITY
        for seed in range(seeds)
        for row in whole_point(init, rank, rope, seed, layers, pairs)
    ]
    failed = Row(
        "failed", 1.0, "point", "random-2+2", point="random-2+2", init="random", seed=1,
        note="training diverged at step 12",
    )  # fmt: skip
    sweep = [
        Row("sweep_seconds", 12.5, "s", "sweep", note="calibrate"),
        Row("sweep_seconds", 3.5, "s", "sweep", note="factor"),
    ]
    return [*dense_model_rows(), *weight_spectra(layers), *points, failed, *sweep]


def dense_model_rows() -> list[Row]:
    rows = [
        Row("flow_loss", DENSE_LOSS, "squared velocity", "dense"),
        Row("flow_loss_other_past", 0.4, "squared velocity", "dense"),
        Row("cache_scalars_per_token", DENSE_SCALARS, "numbers per token and layer", "dense"),
        Row("cache_bytes_per_token", 2 * DENSE_SCALARS, "bytes per token and layer", "dense"),
        Row("step_seconds", DENSE_STEP, "s", "dense"),
    ]
    return [*rows, *rollout("dense", 0.0, {}), *memory(DENSE_SCALARS, {"run": "dense"})]


def whole_point(
    init: str, rank: int, rope: int, seed: int, layers: int, pairs: int
) -> Iterator[Row]:
    key = f"{init}-{rank}+{rope}"
    fields: dict[str, Any] = {
        "run": key, "point": key, "seed": seed, "init": init, "kv_lora_rank": rank,
        "qk_rope_head_dim": rope, "recovery_steps": STEPS[-1], **LATENT,
    }  # fmt: skip
    scalars = rank + rope + 1
    yield Row("cache_scalars_per_token", scalars, "numbers per token and layer", **fields)
    yield Row("cache_bytes_per_token", 2 * scalars, "bytes per token and layer", **fields)
    yield Row("convert_seconds", 1.5, "s", **fields)
    yield Row("recover_seconds", 20.0, "s", **fields)
    yield Row("step_seconds", DENSE_STEP * (0.5 + scalars / 100), "s", **fields)
    yield Row("seconds_ratio", 0.5 + scalars / 100, "step, over dense", **fields)
    error = 0.5 * QUALITY[init] / scalars**1.5 * (1 + 0.1 * seed)
    for step in STEPS:
        now = min(0.9, error) * 0.2 ** (step / STEPS[-1])
        yield from errors(now, fields, step)
    last = min(0.9, error) * 0.2
    for dtype, share, worse in (("int8", 1.0, 1.02), ("int4", 0.5, 1.5)):
        kept = {**fields, "cache_dtype": dtype}
        yield from errors(last * worse, kept, STEPS[-1])
        nbytes = rank * share + 2 * rope + 2
        yield Row("cache_bytes_per_token", nbytes, "bytes per token and layer", **kept)
        yield from memory(nbytes / 2, kept)
    yield from learned_spectra(init, fields, layers)
    yield from positions(fields, layers, pairs)
    yield from rollout(key, 40 * last, fields)
    yield from memory(scalars, fields)


def errors(error: float, fields: dict[str, Any], step: int) -> Iterator[Row]:
    loss = DENSE_LOSS * (1 + 20 * error)
    yield Row("velocity_error", error, "relative", step=step, **fields)
    yield Row("flow_loss", loss, "squared velocity", step=step, **fields)


def learned_spectra(init: str, fields: dict[str, Any], layers: int) -> Iterator[Row]:
    for layer in range(layers):
        rank = fields["kv_lora_rank"] + layer % 3 - 1
        own = {**fields, "layer": layer}
        yield Row("kv_lora_rank", rank, "numbers", **own)
        for step, share in ((0, 0.93), (STEPS[-1], 0.97)):
            wide = math.ceil(rank * (share + 0.03 * (init == "random")))
            yield Row("effective_rank_99", wide, "directions", step=step, **own)


def positions(fields: dict[str, Any], layers: int, pairs: int) -> Iterator[Row]:
    rope = fields["qk_rope_head_dim"] // 2
    for layer in range(layers):
        for pair in range(pairs):
            axis = ("time", "height", "width")[min(2, 3 * pair // pairs)]
            own = {**fields, "layer": layer, "pair": pair, "note": axis}
            place = (pair * 7 + layer * 3) % pairs
            if place < rope:
                count = 2.0 if place == 0 and layer % 2 else 1.0
                yield Row("rope_pair", count, "rope keys", **own)
            length = math.exp(-place / 6)
            yield Row("phase_length", length, "mean of |phase|", **own)
            yield Row("phase_angle", math.pi * math.sin(place), "radians", **own)


def rollout(run: str, loss: float, fields: dict[str, Any]) -> Iterator[Row]:
    own = {**fields, "run": run, "frames": 240}
    for segment in range(4):
        fall = segment * (0.5 + loss)
        for metric, value, unit in (
            ("background_psnr", 40 - fall - 3 * loss, "dB"),
            ("digit_accuracy", max(0.1, 1 - 0.1 * fall), "share of frames"),
            ("motion_error", 0.1 + 0.05 * fall, "pixels"),
            ("drift", 0.02 * fall, "share"),
        ):
            yield Row(metric, value, unit, segment=segment, **own)
    yield Row("background_psnr", 38 - loss, "dB", **own)


def memory(scalars: float, fields: dict[str, Any]) -> Iterator[Row]:
    for batch in (1, 4):
        whole = 2 * scalars * 6 * 36 * batch
        for seconds, frames in ((5.0, 20), (30.0, 120), (60.0, 240)):
            own = {**fields, "batch": batch, "frames": frames, "clip_seconds": seconds}
            yield Row("cache_bytes", whole * frames, "bytes", **own)
        yield Row("cache_bytes", whole * 12, "bytes", **{**fields, "batch": batch, "frames": 12})


def weight_spectra(layers: int, width: int = 128) -> Iterator[Row]:
    """Cumulative spectra at about twenty ranks, flat for weights, steep on activations."""
    ranks = sorted({round(width ** (i / 19)) for i in range(20)})
    for layer in range(layers):
        for run, scale in (("weights", 0.6 * width), ("weights_x_activations", 5 + layer)):
            whole = 1 - math.exp(-width / scale)
            wanted = -scale * math.log(1 - 0.99 * whole)
            yield Row("effective_rank_99", math.ceil(wanted), "directions", run, layer=layer)
            for rank in ranks:
                kept = (1 - math.exp(-rank / scale)) / whole
                yield Row("energy_at_rank", kept, "share", run, layer=layer, kv_lora_rank=rank)


def without_points(rows: Sequence[Row]) -> list[Row]:
    """The same rows as conversions by themselves write them, whose points have no key."""
    return [replace(row, point=None) for row in rows]
