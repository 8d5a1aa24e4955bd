"""Draw the seeds of videos from diffusers' generators."""

from __future__ import annotations

import torch

from vmla_convert.errors import ConfigError


def seeds_of(generator: torch.Generator | list[torch.Generator] | None, clips: int) -> list[int]:
    """Return one seed for all videos, or one for each.

    Raises:
        ConfigError: The number of generators is not the number of videos.
    """
    if generator is None:
        return [_draw_seed(None)]
    if isinstance(generator, torch.Generator):
        return [_fresh_seed(generator)]
    if len(generator) != clips:
        raise ConfigError(f"{len(generator)} generators for {clips} videos", "give one for each")
    return [_fresh_seed(one) for one in generator]


def _fresh_seed(generator: torch.Generator) -> int:
    """Return a fresh generator's own seed, or a used one's next number; advance it."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed).get_state()
    is_fresh = torch.equal(fresh, generator.get_state())
    drawn = _draw_seed(generator)
    return seed if is_fresh else drawn


def _draw_seed(generator: torch.Generator | None) -> int:
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**62, (), generator=generator, device=device))
