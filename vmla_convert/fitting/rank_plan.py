"""Sizes of MLA layers: given ones, or one budget that layers share so that errors are least."""

from __future__ import annotations

from collections.abc import Callable

from vmla_convert.config import (
    DENSE_ITEMSIZE,
    ConvertConfig,
    ModelConfig,
    RankPlan,
    Sizes,
    default_rope_dim,
)
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.maths.evidence import Evidence
from vmla_convert.maths.factor import INITS, PAIR_COUNTS, ErrorCurve, predict_errors
from vmla_convert.maths.projections import KVWeights, LayerShape
from vmla_convert.maths.ranks import budget
from vmla_convert.progress import Progress, Silent

LayerInputs = Callable[[int], tuple[KVWeights, Evidence | None]]
"""Gives a layer's dense weights, and the layer's evidence where the init needs it, by index."""

# 32 of 224 numbers in VideoMLA.
ROPE_SHARE = 1 / 7


def check_sizes(model: ModelConfig, config: ConvertConfig) -> None:
    """Refuse an init or sizes that do not fit the model.

    Raises:
        ConfigError: The message names the setting.
    """
    if config.init not in INITS:
        raise ConfigError(f"unknown init '{config.init}'", did_you_mean(config.init, INITS))
    _check_rope(model, _size(model, config))
    plan = uniform_plan(model, config)
    _check_plan(model, plan, config)
    _check_pairs(model, plan, config.init)


def uniform_plan(model: ModelConfig, config: ConvertConfig) -> RankPlan:
    """Return the given plan, or the same sizes for every layer."""
    size, geometry = _size(model, config), model.geometry
    if size.plan is not None:
        return size.plan
    if size.kv_lora_rank is not None:
        rank = size.kv_lora_rank
        rope = size.qk_rope_head_dim or default_rope_dim(geometry)
    else:
        numbers = total_numbers(model, config) // geometry.num_layers
        rope = 2 * min(max(1, round(ROPE_SHARE * numbers / 2)), geometry.head_dim // 2)
        rank = numbers - rope
    shape = LayerShape(config.latent, rank, rope // 2)
    layers = geometry.num_layers
    key_ranks = (shape.ranks()[0],) * layers if config.latent == "split" else ()
    return RankPlan((rank,) * layers, (rope // 2,) * layers, key_ranks)


def plan_ranks(
    model: ModelConfig,
    config: ConvertConfig,
    inputs: LayerInputs,
    progress: Progress | None = None,
) -> RankPlan:
    """Choose the sizes of every layer (Method: rank allocation).

    With the init `calibrated`, layers share a budget so that the predicted error is least, and each
    split latent is shared between keys and values.

    Args:
        model: Config of the dense model.
        config: Init and sizes.
        inputs: Gives weights and evidence of a layer.
        progress: Where progress is drawn.

    Raises:
        ConfigError: The budget is too small.
    """
    uniform, size = uniform_plan(model, config), _size(model, config)
    is_given = size.plan is not None or (not size.is_budget and config.latent == "joint")
    if config.init != "calibrated" or is_given:
        return uniform
    sizes = [r + 2 * p for r, p in zip(uniform.kv_lora_rank, uniform.rope_pairs, strict=True)]
    layers, total = model.geometry.num_layers, sum(sizes)
    if not size.is_budget:
        most, pair_counts = sizes[0], (uniform.rope_pairs[0],)
    else:
        # A layer is never worth more than a few times the average, and large spectra cost time.
        total = total_numbers(model, config)
        most, pair_counts = min(2 * model.geometry.dim, 6 * total // layers), PAIR_COUNTS
    curves: list[ErrorCurve] = []
    for layer in (progress or Silent()).track(range(layers), "predicting errors"):
        weights, evidence = inputs(layer)
        curves.append(predict_errors(weights, config.latent, evidence, most, pair_counts))
    if size.is_budget:
        sizes = budget([curve.errors for curve in curves], total, rank_step(model))
    chosen = list(zip(curves, sizes, strict=True))
    pairs = [curve.rope_pairs[numbers] for curve, numbers in chosen]
    is_split = config.latent == "split"
    return RankPlan(
        kv_lora_rank=tuple(s - 2 * p for s, p in zip(sizes, pairs, strict=True)),
        rope_pairs=tuple(pairs),
        key_ranks=tuple(curve.key_ranks[numbers] for curve, numbers in chosen) if is_split else (),
    )


def total_numbers(model: ModelConfig, config: ConvertConfig) -> int:
    """Numbers that all layers together may cache per token, without norms."""
    numbers = _size(model, config).token_bytes(model.geometry) / DENSE_ITEMSIZE
    # Floating point must not turn the 32 numbers that a cut of 0.9 leaves of 320 into 31.
    return int((numbers - 1) * model.geometry.num_layers + 1e-6)


def _size(model: ModelConfig, config: ConvertConfig) -> Sizes:
    return config.size or Sizes.default_mla(model.geometry)


def rank_step(model: ModelConfig) -> int:
    """Step between sizes: 16 for Wan 1.3B, 48 for 14B, less for narrower models.

    Steps of wide models are multiples of 16, in which GPUs multiply matrices.
    """
    step = max(1, model.geometry.dim // 96)
    return step if step < 16 else step // 16 * 16


def _check_rope(model: ModelConfig, size: Sizes) -> None:
    """Refuse sizes that only codecs have, and impossible widths of the rope key."""
    if size.rank is not None:
        raise ConfigError(
            f"rank {size.rank} is a size of codecs, and this makes MLA layers",
            "use --bytes-per-token, --cut, or --set convert.size.kv_lora_rank=R",
        )
    rope, head_dim = size.qk_rope_head_dim, model.geometry.head_dim
    if rope is not None and (rope % 2 or not 2 <= rope <= head_dim):
        raise ConfigError(
            f"qk_rope_head_dim {rope} is not an even number between 2 and {head_dim}",
            f"try --set convert.size.qk_rope_head_dim={default_rope_dim(model.geometry)}",
        )


def _check_plan(model: ModelConfig, plan: RankPlan, config: ConvertConfig) -> None:
    geometry = model.geometry
    lengths = {len(plan.kv_lora_rank), len(plan.rope_pairs)}
    if lengths != {geometry.num_layers}:
        raise ConfigError(
            f"the plan has sizes for {sorted(lengths)} layers, the model has "
            f"{geometry.num_layers} layers",
            "use the plan of a conversion of this very model",
        )
    # Each part of a split latent has at least one number.
    parts = 1 if config.latent == "joint" else 2
    least, most = parts, parts * geometry.dim
    for rank in plan.kv_lora_rank:
        if not least <= rank <= most:
            raise ConfigError(
                f"{_asked(config, rank)} is not between {least} and {most}, the ranks that a "
                f"{config.latent} latent of this model can have",
                f"try --set convert.size.kv_lora_rank={geometry.dim // 8}"
                if config.size is not None and config.size.kv_lora_rank is not None
                else f"try --bytes-per-token {Sizes.default_mla(geometry).token_bytes(geometry):g}",
            )
    plan.check_fits(config.latent)


def _asked(config: ConvertConfig, rank: int) -> str:
    """Name a rank that does not fit, and the setting that the rank follows from."""
    size = config.size
    if size is not None and size.bytes_per_token is not None:
        return f"bytes_per_token {size.bytes_per_token:g} makes a kv_lora_rank of {rank}, which"
    if size is not None and size.cut is not None:
        return f"cut {size.cut:g} makes a kv_lora_rank of {rank}, which"
    return f"kv_lora_rank {rank}"


def _check_pairs(model: ModelConfig, plan: RankPlan, init: str) -> None:
    """Refuse more than D/2 rope keys in a layer; with `calibrated`, more than D/2 per head."""
    geometry = model.geometry
    most = geometry.head_dim // 2
    if init == "calibrated":
        most *= geometry.num_heads
    if max(plan.rope_pairs) > most:
        raise ConfigError(
            f"the plan gives a layer {max(plan.rope_pairs)} rope pairs, the init '{init}' can use "
            f"{most}",
            "use the plan of a conversion with the same init",
        )
