"""Work after each step of a diffusers pipeline: the user's callback, and its requests.

B videos, C latent channels, F latent frames of size h, w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vmla_convert.config import SamplerConfig
from vmla_convert.errors import ConfigError
from vmla_convert.generating.rollout import NewPrompt
from vmla_convert.generating.sampler import State
from vmla_convert.maths.flow import TRAIN_TIMESTEPS, sampler_sigmas

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]


class Interrupted(Exception):
    """A callback asked to stop; carries the chunk's latents (B, F, C, h, w) so far."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


class Steps:
    """Runs the user's callback after every step, and keeps the prompt that it may change.

    Attributes:
        advance: Moves the progress bar by one step.
    """

    def __init__(
        self,
        pipeline: Any,
        callback: Callback | None,
        names: Sequence[str],
        prompt_embeds: Tensor,
    ) -> None:
        self.advance: Callable[[], Any] = lambda: None
        self._pipeline, self._callback, self._names = pipeline, callback, names
        self._step, self._prompt_embeds, self._prompt_changed = 0, prompt_embeds, True
        sampler = pipeline.transformer.wan.config.sampler
        sigmas = sampler_sigmas(sampler.denoising_step_list, sampler.shift)
        self._timesteps = sigmas[:-1] * TRAIN_TIMESTEPS

    def new_prompt(self, frame: int) -> NewPrompt | None:  # noqa: ARG002
        """Return the contexts at the first frame, and after the callback changed them."""
        changed, self._prompt_changed = self._prompt_changed, False
        return NewPrompt(self._prompt_embeds, recache=False) if changed else None

    def after_step(self, state: State) -> Tensor:
        """Return the latents (B, F, C, h, w) to continue with."""
        latents, step = state.latents, self._step
        self._step += 1
        self.advance()
        if self._callback is not None:
            tensors = {"latents": latents.transpose(1, 2), "prompt_embeds": self._prompt_embeds}
            given = {name: tensors[name] for name in self._names}
            timestep = self._timesteps[step % len(self._timesteps)]
            changes = self._callback(self._pipeline, step, timestep, given) or {}
            latents = changes.get("latents", tensors["latents"]).transpose(1, 2)
            embeds = changes.get("prompt_embeds", self._prompt_embeds)
            self._prompt_changed |= embeds is not self._prompt_embeds
            self._prompt_embeds = embeds
            # If the callback used a component, offloading may have moved the transformer away.
            self._pipeline.transformer.ready()
        if self._pipeline.interrupt:
            raise Interrupted(latents)
        return latents


def evenly_spaced(sampler: SamplerConfig, steps: int) -> SamplerConfig:
    """Return the sampler with another number of steps, evenly spaced before the shift."""
    total = int(TRAIN_TIMESTEPS)
    if not 1 <= steps <= total:
        raise ConfigError(f"num_inference_steps {steps} is not between 1 and {total}")
    return replace(
        sampler, denoising_step_list=tuple(total - total * i // steps for i in range(steps))
    )
