"""Callbacks after each step, and the number of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_config
from diffusers.callbacks import PipelineCallback
from pipelines import latents_of
from tiny_wan import PROMPT
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.interop.steps import evenly_spaced
from vmla_convert.layers.dit import CausalWanModel

pytest_plugins = ["checkpoints", "tiny_wan", "pipelines"]


def test_even_steps_are_those_of_distilled_models() -> None:
    sampler = tiny_config().sampler
    assert evenly_spaced(sampler, 4) == replace(sampler, denoising_step_list=(1000, 750, 500, 250))
    assert evenly_spaced(sampler, 3).denoising_step_list == (1000, 667, 334)
    assert len(evenly_spaced(sampler, 1000).denoising_step_list) == 1000
    with pytest.raises(ConfigError, match="num_inference_steps 0"):
        evenly_spaced(sampler, 0)


def test_a_callback_sees_every_step(demo_pipe: Any) -> None:
    calls: list[tuple[int, float, tuple[int, ...]]] = []

    def note(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        assert pipe is demo_pipe and pipe.num_timesteps == 2
        calls.append((step, round(timestep.item(), 3), tuple(tensors["latents"].shape)))
        return {}

    watched = latents_of(demo_pipe, callback_on_step_end=note)
    assert torch.equal(latents_of(demo_pipe), watched)
    # Timesteps 1000 and 500 under a shift of 2.
    expected = [(0, 1000.0), (1, 666.667), (2, 1000.0), (3, 666.667)]
    assert calls == [(step, timestep, (1, 12, 2, 12, 12)) for step, timestep in expected]


def test_after_a_callback_the_transformer_is_moved_back(
    wan_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preview uses the VAE, for which an offloaded transformer has to make room."""
    place, streamed = ["device"], list[str]()
    stream = CausalWanModel.stream

    def ready(self: Any) -> Any:
        place[0] = "device"
        return self.wan

    def preview(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.vae.decode(torch.zeros(1, 16, 1, 4, 6))
        place[0] = "host"
        return {}

    def spied(self: CausalWanModel, *args: Any, **kwargs: Any) -> Any:
        streamed.append(place[0])
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(type(wan_pipe.transformer), "ready", ready)
    monkeypatch.setattr(CausalWanModel, "stream", spied)
    latents_of(wan_pipe, PROMPT, 9, callback_on_step_end=preview)
    assert len(streamed) > 4 and set(streamed) == {"device"}


def test_a_callback_may_replace_latents_and_prompt(demo_pipe: Any) -> None:
    def steered(change: Callable[[int, dict[str, Tensor]], dict[str, Tensor]]) -> Tensor:
        return latents_of(
            demo_pipe,
            callback_on_step_end=lambda _, step, __, tensors: change(step, tensors),
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )

    plain = steered(lambda _, tensors: tensors)
    zeroed = steered(lambda step, t: {"latents": 0 * t["latents"]} if step == 3 else {})
    assert torch.equal(zeroed[:, :, :2], plain[:, :, :2])
    assert not zeroed[:, :, 2:].any()
    moved = steered(
        lambda step, t: {"prompt_embeds": t["prompt_embeds"].flip(-1)} if step == 0 else {}
    )
    assert torch.equal(moved[:, :, :2], plain[:, :, :2])
    assert not torch.equal(moved[:, :, 2:], plain[:, :, 2:])


def test_a_callback_may_stop_the_video(demo_pipe: Any) -> None:
    def stop(pipe: Any, step: int, _: Tensor, __: dict[str, Tensor]) -> None:
        pipe._interrupt = step == 2

    # The first chunk is whole, the second one is as far as it came.
    assert latents_of(demo_pipe, frames=8, callback_on_step_end=stop).shape[2] == 4
    assert latents_of(demo_pipe, frames=8).shape[2] == 8


def test_diffusers_callback_objects_work(demo_pipe: Any) -> None:
    class Count(PipelineCallback):
        seen = 0

        @property
        def tensor_inputs(self) -> list[str]:
            return ["prompt_embeds"]

        def callback_fn(self, *given: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            assert given[-1].keys() == {"prompt_embeds"}
            self.seen += 1
            return given[-1]

    counted = Count(cutoff_step_ratio=1.0)
    latents_of(demo_pipe, callback_on_step_end=counted)
    assert counted.seen == 4
