"""How much each layer may cache: sizes asked for, or one budget divided by predicted error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmla_convert.config import ConvertConfig, ModelConfig, RankPlan
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.maths.evidence import Evidence
from vmla_convert.maths.factor import INITS, PAIR_COUNTS, ErrorCurve, predict_errors
from vmla_convert.maths.projections import KVWeights, LayerShape
from vmla_convert.maths.ranks import budget
from vmla_convert.progress import Progress, Silent

ReadWeights = Callable[[int], KVWeights]
"""The dense weights of a layer by its index."""

ReadEvidence = Callable[[int], Evidence]
"""What is known of a layer by its index."""

# The paper's 32 of 224 numbers.
ROPE_SHARE = 1 / 7


def check_sizes(model: ModelConfig, config: ConvertConfig) -> None:
    """Refuse an init or sizes that do not fit the model.

    Raises:
        ConfigError: Naming the setting.
    """
    if config.init not in INITS:
        raise ConfigError(f"unknown init '{config.init}'", did_you_mean(config.init, INITS))
    named = {
        "plan": config.plan is not None,
        "kv_lora_rank": config.kv_lora_rank is not None or config.qk_rope_head_dim is not None,
        "cache_scalars": config.cache_scalars is not None,
        "cut": config.cut is not None,
    }
    given = [name for name, there in named.items() if there]
    if len(given) > 1:
        raise ConfigError(f"sizes are given twice, as {' and as '.join(given)}", "keep one of them")
    _check_explicit(model, config)
    plan = uniform_plan(model, config)
    _check_plan(model, plan, config)
    _check_pairs(model, plan, config.init)


def uniform_plan(model: ModelConfig, config: ConvertConfig) -> RankPlan:
    """The plan that was given, or the same sizes for every layer; needs no weights."""
    if config.plan is not None:
        return config.plan
    geometry = model.geometry
    if config.kv_lora_rank is not None or config.qk_rope_head_dim is not None:
        rank = geometry.dim // 8 if config.kv_lora_rank is None else config.kv_lora_rank
        rope = config.qk_rope_head_dim
        rope = 2 * (geometry.head_dim // 8) if rope is None else rope
    else:
        size = total_numbers(model, config) // geometry.num_layers
        pairs = min(max(1, round(ROPE_SHARE * size / 2)), geometry.head_dim // 2)
        rope = 2 * pairs
        rank = size - rope
    shape = LayerShape(config.latent, rank, rope // 2)
    layers = geometry.num_layers
    key_ranks = (shape.ranks()[0],) * layers if config.latent == "split" else ()
    return RankPlan((rank,) * layers, (rope // 2,) * layers, key_ranks)


def plan_ranks(
    model: ModelConfig,
    config: ConvertConfig,
    read_weights: ReadWeights,
    evidence: ReadEvidence | None,
    progress: Progress | None = None,
) -> RankPlan:
    """The sizes of every layer.

    Args:
        model: The dense model.
        config: Init and sizes.
        read_weights: Gives the layers' weights.
        evidence: Of every layer; `calibrated` divides a budget, and a split latent, by it.
        progress: Where to draw.

    Raises:
        ConfigError: The budget is too small.
    """
    wanted = wanted_curves(model, config)
    if wanted is None:
        return uniform_plan(model, config)
    assert evidence is not None
    layers = range(model.geometry.num_layers)
    curves = [
        predict_errors(read_weights(layer), config.latent, evidence(layer), *wanted)
        for layer in (progress or Silent()).track(layers, "predicting errors")
    ]
    return divide(model, config, curves)


class Curves(NamedTuple):
    """Which predictions a division asks for.

    Attributes:
        most: The largest size.
        pair_counts: Numbers of rope pairs to choose from.
    """

    most: int
    pair_counts: tuple[int, ...]


def wanted_curves(model: ModelConfig, config: ConvertConfig) -> Curves | None:
    """The predictions that sizes depend on; None where sizes are given, or nothing is predicted."""
    explicit = _is_explicit(config)
    joint = config.latent == "joint"
    if config.init != "calibrated" or config.plan is not None or (explicit and joint):
        return None
    if explicit:
        uniform = uniform_plan(model, config)
        pairs = uniform.rope_pairs[0]
        return Curves(uniform.kv_lora_rank[0] + 2 * pairs, (pairs,))
    # No layer is worth more than a few times its fair share, and spectra of all sizes cost time.
    total, layers = total_numbers(model, config), model.geometry.num_layers
    return Curves(min(2 * model.geometry.dim, 6 * total // layers), PAIR_COUNTS)


def divide(model: ModelConfig, config: ConvertConfig, curves: Sequence[ErrorCurve]) -> RankPlan:
    """Sizes by predicted error.

    Args:
        model: The dense model.
        config: Init and sizes.
        curves: Of every layer, as `wanted_curves` asks for them.

    Raises:
        ConfigError: The budget is too small.
    """
    uniform = uniform_plan(model, config)
    sizes = [r + 2 * p for r, p in zip(uniform.kv_lora_rank, uniform.rope_pairs, strict=True)]
    if not _is_explicit(config):
        total = total_numbers(model, config)
        sizes = budget([curve.errors for curve in curves], total, rank_step(model))
    pairs = [curve.rope_pairs[size] for curve, size in zip(curves, sizes, strict=True)]
    return RankPlan(
        kv_lora_rank=tuple(s - 2 * p for s, p in zip(sizes, pairs, strict=True)),
        rope_pairs=tuple(pairs),
        key_ranks=()
        if config.latent == "joint"
        else tuple(curve.key_ranks[size] for curve, size in zip(curves, sizes, strict=True)),
    )


def total_numbers(model: ModelConfig, config: ConvertConfig) -> int:
    """Numbers that all layers together may cache per token, norms aside."""
    geometry, scalars = model.geometry, config.cache_scalars
    if config.cut is not None:
        scalars = (1 - config.cut) * geometry.dense_cache_scalars
    if scalars is None:
        scalars = default_scalars(model)
    # A cut of 0.9 of 320 numbers leaves 32, whatever floating point makes of it.
    return int((scalars - 1) * geometry.num_layers + 1e-6)


def _is_explicit(config: ConvertConfig) -> bool:
    return config.kv_lora_rank is not None or config.qk_rope_head_dim is not None


def default_scalars(model: ModelConfig) -> int:
    """What a token costs by default: 224 numbers for Wan 1.3B, and one for the norm."""
    geometry = model.geometry
    return geometry.dim // 8 + 2 * (geometry.head_dim // 8) + 1


def rank_step(model: ModelConfig) -> int:
    """What ranks are rounded to: 16 for Wan 1.3B, less for narrower models."""
    return max(1, model.geometry.dim // 96)


def _check_explicit(model: ModelConfig, config: ConvertConfig) -> None:
    rope, head_dim = config.qk_rope_head_dim, model.geometry.head_dim
    if rope is not None and (rope % 2 or not 2 <= rope <= head_dim):
        raise ConfigError(
            f"qk_rope_head_dim {rope} is not an even number between 2 and {head_dim}",
            f"try --qk-rope-head-dim {2 * (head_dim // 8)}",
        )
    if config.cut is not None and not 0 < config.cut < 1:
        raise ConfigError(f"cut {config.cut:g} is not between 0 and 1", "try --cut 0.92")


def _check_plan(model: ModelConfig, plan: RankPlan, config: ConvertConfig) -> None:
    geometry = model.geometry
    lengths = {len(plan.kv_lora_rank), len(plan.rope_pairs)}
    if lengths != {geometry.num_layers}:
        raise ConfigError(
            f"the plan has not one size for each of {geometry.num_layers} layers",
            "use the plan of a conversion of this very model",
        )
    # Each part of a split latent has at least one number.
    parts = 1 if config.latent == "joint" else 2
    least, most = parts, parts * geometry.dim
    for rank in plan.kv_lora_rank:
        if not least <= rank <= most:
            raise ConfigError(
                f"{_asked(config, rank)} is not between {least} and {most}, what this model's "
                f"{config.latent} latent can use",
                f"try --kv-lora-rank {geometry.dim // 8}"
                if config.cut is None and config.cache_scalars is None
                else f"try --cache-scalars {default_scalars(model)}",
            )
    plan.check_fits(config.latent)


def _asked(config: ConvertConfig, rank: int) -> str:
    """A rank that does not fit, with the setting that it follows from."""
    if config.cache_scalars is not None:
        return f"cache_scalars {config.cache_scalars} makes a kv_lora_rank of {rank}, which"
    if config.cut is not None:
        return f"cut {config.cut:g} makes a kv_lora_rank of {rank}, which"
    return f"kv_lora_rank {rank}"


def _check_pairs(model: ModelConfig, plan: RankPlan, init: str) -> None:
    """A pair of a head is one rope key at most; only `calibrated` keeps several for all heads."""
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
