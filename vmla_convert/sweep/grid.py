"""The points of a sweep: every conversion of the grid, with every recovery; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from vmla_convert.config import (
    ConvertConfig,
    Recipe,
    RecoverConfig,
    RuntimeConfig,
    Sizes,
    SweepConfig,
)
from vmla_convert.tables import changes, from_dict, merged, to_dict


@dataclass(frozen=True)
class SweepPoint:
    """One conversion and its recovery.

    Attributes:
        conversion: The conversion; its seed is the recovery's too.
        recovery: None where only step 0 is measured.
        runtimes: Sizes and dtypes of the cache that a codec is measured with; empty for MLA.
    """

    conversion: ConvertConfig
    recovery: RecoverConfig | None
    runtimes: tuple[RuntimeConfig, ...] = ()

    @property
    def seed(self) -> int:
        """Seed of conversion and recovery."""
        return self.conversion.seed

    @property
    def key(self) -> str:
        """Name of the settings, all but the seed."""
        recovery = to_dict(_seeded(self.recovery, 0)) if self.recovery else None
        runtimes = [to_dict(runtime) for runtime in self.runtimes]
        return digest([to_dict(replace(self.conversion, seed=0)), recovery, runtimes])


def digest(settings: Any) -> str:
    """A short name of JSON-able settings."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sweep_points(
    config: SweepConfig, shared: ConvertConfig, recovery: RecoverConfig
) -> list[SweepPoint]:
    """Every point, product by product, smallest caches first."""
    lengths = config.recovery_steps or (recovery.training.steps,)
    points: list[SweepPoint] = []
    for conversion in grid(config, shared):
        is_codec = conversion.product == "codec"
        runtimes = _runtimes(config) if is_codec else ()
        # One recovered codec serves all cuts; with a single one it has that size anyway.
        cuts = tuple(size.cut for size in config.sizes if size.cut is not None)
        nested = cuts if is_codec and len(cuts) > 1 else ()
        own = _seeded(replace(recovery, nested=nested), conversion.seed)
        recoveries = [_lasting(own, steps) for steps in lengths] if config.recover else [None]
        points += [SweepPoint(conversion, each, runtimes) for each in recoveries]
    return points


def point_recipe(key: str, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """Tables of a recipe that makes one point of a run, with the first of the point's seeds.

    Args:
        key: `SweepPoint.key`, from a row.
        recipe: Recipe of the run, as `recipe.json` holds it.

    Returns:
        Values that differ from the defaults; None where the recipe has no such point.
    """
    run = from_dict(Recipe, dict(recipe))
    convert, recover = run.convert or ConvertConfig(), run.recover or RecoverConfig()
    points = sweep_points(run.sweep, convert, recover) if run.sweep else []
    points.append(SweepPoint(convert, run.recover))  # the stages before a sweep are a point too
    point = next((point for point in points if point.key == key), None)
    if point is None:
        return None
    conversion = point.conversion
    if conversion.init != "random":
        # Seeds of points are seeds of recoveries; calibration noise is drawn once for all points.
        conversion = replace(conversion, seed=convert.seed)
    tables = changes(Recipe(source=run.source, model=run.model, media=run.media))
    # The source is named even where it is the default: else [recover.data] would give it.
    evaluate = merged(changes(run.evaluate), {"data": {"source": run.evaluate.data.source}})
    recovery = {} if point.recovery is None else {"recover": changes(point.recovery)}
    return {**tables, "evaluate": evaluate, "convert": changes(conversion), **recovery}


def grid(config: SweepConfig, shared: ConvertConfig) -> list[ConvertConfig]:
    """Every conversion: a codec for each seed, whatever the sizes, and MLA at every size."""
    made = {"codec": _codecs, "mla": _mla}
    return [each for name in config.products for each in made[name](config, shared)]


def _codecs(config: SweepConfig, shared: ConvertConfig) -> list[ConvertConfig]:
    """A codec for each seed; its default size is the one in the middle of the list."""
    sizes = _sorted(config.sizes)
    if not sizes:
        return []
    plain = ConvertConfig()
    base = replace(shared, product="codec", init=plain.init, latent=plain.latent)
    size = sizes[len(sizes) // 2]
    return [replace(base, size=size, seed=seed) for seed in config.seeds]


def _mla(config: SweepConfig, shared: ConvertConfig) -> list[ConvertConfig]:
    """MLA layers of every size, latent, init and seed, smallest caches first."""
    base = replace(shared, product="mla", channels=None)
    sizes = _sorted(config.mla_sizes or config.sizes)
    return [
        replace(base, size=size, init=init, latent=latent, seed=seed)
        for size, latent, init, seed in product(sizes, config.latents, config.inits, config.seeds)
    ]


def _sorted(sizes: Iterable[Sizes]) -> list[Sizes]:
    """Sizes of each form from small to large."""

    def key(size: Sizes) -> tuple[float, ...]:
        cut = 0.0 if size.cut is None else -size.cut
        numbers = size.bytes_per_token, size.rank, size.kv_lora_rank, size.qk_rope_head_dim
        return cut, *(number or 0.0 for number in numbers)

    return sorted(sizes, key=key)


def _runtimes(config: SweepConfig) -> tuple[RuntimeConfig, ...]:
    """Sizes that a codec is measured at, and the same with unquantised channels if asked for."""
    quantised = [RuntimeConfig(size=size) for size in _sorted(config.sizes)]
    if not config.unquantised:
        return tuple(quantised)
    return (*quantised, *(replace(each, cache_dtype="model") for each in quantised))


def _lasting(recovery: RecoverConfig, steps: int) -> RecoverConfig:
    return replace(recovery, training=replace(recovery.training, steps=steps))


def _seeded(recovery: RecoverConfig, seed: int) -> RecoverConfig:
    return replace(recovery, training=replace(recovery.training, seed=seed))
