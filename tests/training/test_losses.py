"""Examples are put together as a rollout meets them; losses are zero at their targets only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import EITHER_LATENT, TINY_MLA, tiny_clip, tiny_config, tiny_mla, tiny_model
from torch import Tensor, nn

from vmla_convert.config import CachePolicy, CodecConfig, Sizes
from vmla_convert.maths.flow import predict_clean
from vmla_convert.maths.masks import teacher_forcing_mask
from vmla_convert.media.clips import Batch
from vmla_convert.recovery.trained import new_parameters
from vmla_convert.training.losses import (
    Example,
    Levels,
    flow_matching,
    make_example,
    predicted_velocity,
    teacher_forcing_inputs,
    velocity_distillation,
)

FRAMES, CHUNK = 6, 2
CONFIG = tiny_config(cache=CachePolicy(4, 1))


def example(context_noise: float = 0.0, batch: int = 2, seed: int = 0) -> tuple[Batch, Example]:
    clips = Batch(*tiny_clip(CONFIG, FRAMES, batch))
    generator = torch.Generator().manual_seed(seed)
    return clips, make_example(clips, CHUNK, generator, context_noise)


class Oracle(nn.Module):
    """Returns the same answer to every input."""

    def __init__(self, past: Tensor, noisy: Tensor) -> None:
        super().__init__()
        self.answer = torch.cat([past, noisy], dim=1)

    def forward(self, *_: Tensor) -> Tensor:
        return self.answer


def test_an_example_is_the_clean_past_beside_the_noisy_clip() -> None:
    clips, made = example()
    assert torch.equal(made.past, clips.latents)
    assert not made.timestep[:, :FRAMES].any()
    assert torch.equal(made.context, clips.context)
    recovered = predict_clean(made.noisy, made.velocity, made.sigma)
    torch.testing.assert_close(recovered, clips.latents, atol=1e-5, rtol=0)
    added = made.velocity + clips.latents
    assert abs(added.std() - 1) < 0.1
    assert abs((added * clips.latents).mean()) < 0.1


def test_frames_of_a_chunk_share_their_noise_level() -> None:
    time = example()[1].timestep[:, FRAMES:].unflatten(1, (-1, CHUNK))
    assert torch.equal(time[..., 0], time[..., 1])
    assert len(time.unique()) == 2 * FRAMES // CHUNK
    assert ((time > 0) & (time < 1000)).all()


def test_the_generator_decides_the_example() -> None:
    first, again, other = (example(0.2, seed=seed)[1] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.latents, other.latents)


def test_context_noise_is_light_and_falls_on_half_of_the_pasts() -> None:
    clips, made = example(context_noise=0.1, batch=64)
    past = made.latents[:, :FRAMES]
    difference = (past - clips.latents).unflatten(1, (-1, CHUNK)).square().mean(dim=(2, 3, 4, 5))
    touched = difference > 0
    assert torch.equal(touched.any(1), touched.all(1))
    assert 0.3 < touched.any(1).float().mean() < 0.7
    assert difference.max() < 2.5 * 0.1**2
    assert torch.equal(made.timestep[:, :FRAMES], torch.zeros(64, FRAMES))


def test_examples_take_the_noise_levels_of_a_sampler() -> None:
    sigmas, clips = torch.tensor([0.9, 0.5, 0.2]), Batch(*tiny_clip(CONFIG, FRAMES, 64))

    def shares_of(share: float) -> Tensor:
        """Share of frames at each of the sampler's levels."""
        generator = torch.Generator().manual_seed(0)
        made = make_example(clips, CHUNK, generator, levels=Levels(sigmas, share))
        assert torch.equal(made.sigma[:, ::2], made.sigma[:, 1::2])
        recovered = predict_clean(made.noisy, made.velocity, made.sigma)
        torch.testing.assert_close(recovered, clips.latents, atol=1e-5, rtol=0)
        return ((made.sigma[..., None] - sigmas).abs() < 1e-6).float().mean((0, 1))

    assert shares_of(0.0).sum() == 0
    assert shares_of(1.0).sum() == 1
    assert shares_of(1.0).min() > 0.2
    assert 0.35 < shares_of(0.5).sum() < 0.65


def test_a_pass_repeats_the_positions_and_masks_by_the_policy() -> None:
    positions, mask = teacher_forcing_inputs(CONFIG, example()[1])
    assert positions.tolist() == [*range(FRAMES), *range(FRAMES)]
    tokens = CONFIG.tokens_per_frame
    windowed = teacher_forcing_mask(FRAMES, CHUNK, tokens, CONFIG.cache)
    assert torch.equal(mask.visible, windowed.visible)
    assert torch.equal(mask.dense, windowed.dense)
    assert not torch.equal(mask.visible, teacher_forcing_mask(FRAMES, CHUNK, tokens).visible)


CONVERTED: dict[str, dict[str, Any]] = {
    **{latent: {"mla": tiny_mla(latent)} for latent in EITHER_LATENT},
    "codec": {"codec": CodecConfig(30, Sizes(12))},
}


@pytest.mark.parametrize("kind", [{}, *CONVERTED.values()], ids=["dense model", *CONVERTED])
@torch.no_grad()
def test_a_prediction_depends_on_the_past_of_its_chunk_only(kind: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(cache=CONFIG.cache, **kind))
    made = example()[1]
    before = predicted_velocity(model, CONFIG, made)
    latents = made.latents.clone()
    latents[:, 2:4] += 1  # the clean second chunk
    after = predicted_velocity(model, CONFIG, made._replace(latents=latents))
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-2


def test_flow_matching_is_zero_at_the_truth_of_the_noisy_half() -> None:
    loss, made = flow_matching(CONFIG), example()[1]
    elsewhere = made.velocity + 7
    assert loss(Oracle(elsewhere, made.velocity), made) == 0
    torch.testing.assert_close(
        loss(Oracle(made.velocity, made.velocity + 2), made), torch.tensor(4.0)
    )


def test_distillation_is_zero_for_the_teacher_and_not_for_another_model() -> None:
    teacher = tiny_model(CONFIG)
    loss, made = velocity_distillation(teacher), example()[1]
    assert loss(tiny_model(CONFIG), made) == 0
    assert loss(tiny_model(tiny_config(cache=CONFIG.cache, mla=TINY_MLA), seed=1), made) > 1e-2


@pytest.mark.parametrize("kind", CONVERTED)
def test_distillation_moves_every_parameter_that_a_conversion_makes(kind: str) -> None:
    teacher = tiny_model(CONFIG)
    student = tiny_model(tiny_config(cache=CONFIG.cache, **CONVERTED[kind]), seed=1)
    student.requires_grad_(False)
    new: set[Tensor] = set()
    for block in student.all_blocks():
        new |= {p.requires_grad_(True) for p in new_parameters(block)}
    velocity_distillation(teacher)(student, example()[1]).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-7 for p in new)
    assert {p for p in student.parameters() if p.grad is not None} == new
    assert all(p.grad is None for p in teacher.parameters())
    # The conversion leaves the other attention weights, such as the norm's key projection.
    others = {
        name for name, p in student.named_parameters() if "self_attn" in name and p not in new
    }
    modules = {name.split("self_attn.")[1].split(".")[0] for name in others}
    dense = {"k", "v", "norm_k"} if kind == "codec" else {"k_norm_proj"}
    assert modules == {"q", "o", "norm_q"} | dense
