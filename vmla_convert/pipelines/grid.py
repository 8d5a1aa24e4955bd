"""The points of a sweep: every conversion of the grid, with every recovery; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from vmla_convert.config import ConvertConfig, RecoverConfig, SweepConfig
from vmla_convert.tables import from_dict, to_dict


@dataclass(frozen=True)
class SweepPoint:
    """One conversion and its recovery.

    Attributes:
        conversion: Its seed is the recovery's too.
        recovery: None where only step 0 is measured.
    """

    conversion: ConvertConfig
    recovery: RecoverConfig | None

    @property
    def seed(self) -> int:
        """Of conversion and recovery."""
        return self.conversion.seed

    @property
    def key(self) -> str:
        """Names the settings, all but the seed."""
        recovery = to_dict(_seeded(self.recovery, 0)) if self.recovery else None
        return digest([to_dict(replace(self.conversion, seed=0)), recovery])


def digest(settings: Any) -> str:
    """A short name of JSON-able settings."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sweep_points(
    config: SweepConfig, shared: ConvertConfig, recovery: RecoverConfig
) -> list[SweepPoint]:
    """Every point, smallest caches first."""
    if not config.recover:
        return [SweepPoint(conversion, None) for conversion in grid(config, shared)]
    lengths = config.recovery_steps or (recovery.training.steps,)
    return [
        SweepPoint(conversion, _seeded(_lasting(recovery, steps), conversion.seed))
        for conversion in grid(config, shared)
        for steps in lengths
    ]


def find_point(key: str, recipe: Mapping[str, Any]) -> SweepPoint | None:
    """The point that a run's rows call by a key, with the first of its seeds.

    Args:
        key: `SweepPoint.key`.
        recipe: Of the run, as its `recipe.json` holds it.

    Returns:
        None where the recipe has no such point.
    """
    convert = from_dict(ConvertConfig, recipe.get("convert") or {})
    recover = from_dict(RecoverConfig, recipe.get("recover") or {})
    sweep = from_dict(SweepConfig, recipe["sweep"]) if recipe.get("sweep") else None
    points = sweep_points(sweep, convert, recover) if sweep else []
    # What the stages before a sweep made has a key too.
    points.append(SweepPoint(convert, recover if recipe.get("recover") else None))
    found = next((point for point in points if point.key == key), None)
    if found is None or found.conversion.init == "random":
        return found
    # Seeds are of recoveries; noise to calibrate with is drawn once, for all.
    return replace(found, conversion=replace(found.conversion, seed=convert.seed))


def grid(config: SweepConfig, shared: ConvertConfig) -> list[ConvertConfig]:
    """Every conversion, smallest caches first."""
    sizes: list[dict[str, Any]] = [{"cut": cut} for cut in sorted(config.cuts, reverse=True)]
    sizes += [{"kv_lora_rank": rank} for rank in sorted(config.kv_lora_ranks)]
    bare = replace(shared, cache_scalars=None, cut=None, plan=None)
    bare = replace(bare, kv_lora_rank=None, qk_rope_head_dim=None)
    points: list[ConvertConfig] = []
    for size, latent, init, seed in product(sizes, config.latents, config.inits, config.seeds):
        point = replace(bare, init=init, latent=latent, seed=seed, **size)
        ropes = config.qk_rope_head_dims if point.kv_lora_rank is not None else ()
        points += [replace(point, qk_rope_head_dim=rope) for rope in ropes] or [point]
    return points


def _lasting(recovery: RecoverConfig, steps: int) -> RecoverConfig:
    return replace(recovery, training=replace(recovery.training, steps=steps))


def _seeded(recovery: RecoverConfig, seed: int) -> RecoverConfig:
    return replace(recovery, training=replace(recovery.training, seed=seed))
