"""Distribution matching: its gradient is DMD's, its critic learns, and it resumes bit for bit."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import EVALUATE, MODEL, PowerCut, PowerCutError, changed, snapshot
from conftest import noise, randomise
from torch import Tensor, nn

from vmla_convert.config import DataConfig, DMDConfig, RecoverConfig, TrainingConfig
from vmla_convert.errors import ConfigError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.flow import per_frame
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.media.clips import open_clips
from vmla_convert.progress import Progress
from vmla_convert.recovery.dmd import (
    DistributionMatching,
    matching_gradient,
    moved_velocity,
    sample_distance,
)
from vmla_convert.recovery.stages import MATCHING, Folders, recover_model
from vmla_convert.recovery.trained import new_names, unfreeze
from vmla_convert.training.loop import train
from vmla_convert.training.losses import Example, flow_matching, streamed_velocity
from vmla_convert.training.processes import ALONE, Share

pytest_plugins = ["checkpoints"]

CONFIG = RecoverConfig(
    layerwise_steps=0,
    training=TrainingConfig(
        steps=0, batch_size=4, lr=1e-3, warmup_steps=1, eval_every=1, checkpoint_every=2
    ),
    dmd=DMDConfig(steps=4, critic_steps=2, critic_lr=1e-3),
    data=DataConfig("demo", frames=4),
)
# A critic that does not train.
STILL = replace(CONFIG, dmd=DMDConfig(steps=1, critic_steps=1, critic_lr=0.0))


@pytest.fixture
def student(student: CausalWanModel) -> CausalWanModel:
    """A conversion with random weights that may train."""
    unfreeze(student, "new")
    return student


def stage(
    student: CausalWanModel,
    dense: CausalWanModel,
    config: RecoverConfig = CONFIG,
    share: Share = ALONE,
) -> DistributionMatching:
    return DistributionMatching(student, dense, open_clips(config.data), config, share)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run(dmd: DistributionMatching, state: Path | None = None, cut: int | None = None) -> None:
    """The stage without its choice of the best weights, so that every step counts."""
    progress = None if cut is None else PowerCut("training", cut)
    config = replace(dmd.training, steps=dmd.dmd.steps)
    measure, extra = (lambda *_: 0.0), [dmd]
    train(dmd.student, dmd.loss, dmd.examples, config, measure, state, progress, extra_state=extra)


# The gradient


def doubles(seed: int) -> Tensor:
    return noise(3, 4, 2, 3, 3, seed=seed).double()


def test_the_loss_has_the_gradient_of_dmd() -> None:
    clean, real, fake, state = (doubles(seed) for seed in range(4))
    sigma = torch.linspace(0.1, 1, 12, dtype=torch.float64).view(3, 4)
    clean.requires_grad_()
    velocity = (state - clean) / per_frame(sigma)
    with torch.no_grad():
        gradient = matching_gradient(clean, real, fake)
        target = moved_velocity(velocity, gradient, sigma)
    loss = sample_distance(velocity, target, sigma)
    (slope,) = torch.autograd.grad(loss, clean)
    torch.testing.assert_close(slope, gradient / clean.numel(), rtol=1e-10, atol=0)
    literally = 0.5 * (clean - (clean - gradient).detach()).square().mean()
    torch.testing.assert_close(loss, literally)
    for clip in range(3):
        scale = (clean[clip] - real[clip]).abs().mean()
        torch.testing.assert_close(gradient[clip], (fake[clip] - real[clip]) / scale)


def test_a_sample_moves_to_where_the_dense_model_sees_it_and_away_from_the_critic() -> None:
    clean, real, fake = (doubles(seed) for seed in range(3))
    step = -matching_gradient(clean, real, fake)
    assert (step * (real - fake)).sum() > 0
    # A critic that knows the sample exactly leaves the dense model's word alone.
    step = -matching_gradient(clean, real, clean)
    assert torch.equal(step.sign(), (real - clean).sign())


def test_there_is_no_gradient_where_both_agree_or_nothing_is_left_to_move() -> None:
    clean, real, fake = (doubles(seed) for seed in range(3))
    assert not matching_gradient(clean, real, real).any()
    real[1] = clean[1]
    gradient = matching_gradient(clean, real, fake)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).any(1).tolist() == [True, False, True]


def test_a_critic_that_equals_the_dense_model_teaches_nothing(
    student: CausalWanModel, dense: CausalWanModel
) -> None:
    dmd = stage(student, dense, STILL)
    (example,) = dmd.examples(0)
    loss = dmd.loss(student, example)
    loss.backward()
    assert loss.item() < 1e-10
    assert dmd.loss(dense, example) > 1e-3
    quiet = max(gradient.abs().max().item() for gradient in gradients(student).values())
    student.zero_grad()
    randomise(dmd.critic, seed=7)
    (example,) = dmd.examples(0)
    loss = dmd.loss(student, example)
    loss.backward()
    loud = max(gradient.abs().max().item() for gradient in gradients(student).values())
    assert loss.item() > 1e-3
    assert quiet < 1e-4 * loud


def test_the_target_comes_from_the_predictions_of_dense_model_and_critic(
    student: CausalWanModel, dense: CausalWanModel
) -> None:
    dmd = stage(student, dense, STILL)
    randomise(dmd.critic, seed=7)
    (example,) = dmd.examples(3)
    number = 3 * 2 + 1
    _, velocity, clean, noised = dmd.sample(number)
    frames = clean.shape[1]
    noisy, sigma = noised.latents[:, frames:], noised.timestep[:, frames:] / 1000
    said = [
        noisy - per_frame(sigma) * streamed_velocity(model, noised) for model in (dense, dmd.critic)
    ]
    gradient = matching_gradient(clean, *said)
    level = per_frame(example.timestep[:, frames:] / 1000)
    torch.testing.assert_close(level * (example.velocity - velocity), gradient)
    # The sample is one step from a state that the rollout met, and is seen after its own past.
    state = example.latents[:, frames:]
    torch.testing.assert_close(clean, state - level * velocity)
    assert torch.equal(noised.latents[:, :frames], example.latents[:, :frames])
    torch.testing.assert_close(noisy, clean + per_frame(sigma) * noised.velocity)


# The critic


def critic_error(dmd: DistributionMatching) -> float:
    """The critic's error on samples that it has not seen."""
    loss = flow_matching(MODEL)
    with torch.no_grad():
        samples = [dmd.sample(number).noised for number in range(1000, 1004)]
        return sum(loss(dmd.critic, sample).item() for sample in samples)


def test_the_critic_learns_the_students_samples(
    student: CausalWanModel, dense: CausalWanModel
) -> None:
    config = replace(CONFIG, dmd=DMDConfig(steps=4, critic_steps=5, critic_lr=1e-3))
    dmd = stage(student, dense, config)
    before, known = critic_error(dmd), snapshot(dense)
    for step in range(4):
        dmd.examples(step)
    assert critic_error(dmd) < 0.8 * before
    assert not changed(dense, known)


def test_every_rollout_is_a_fresh_one(student: CausalWanModel, dense: CausalWanModel) -> None:
    dmd = stage(student, dense, STILL)
    past = [dmd.examples(step)[0].latents for step in range(2)]
    past += [dmd.sample(number).rollout.latents for number in (0, 2)]
    for index, one in enumerate(past):
        for other in past[:index]:
            assert not torch.isclose(one, other).flatten(1).all(1).any()
    assert torch.equal(past[1], dmd.examples(1)[0].latents)


# Trainable weights and their training


def test_only_what_the_conversion_made_changes(
    student: CausalWanModel, dense: CausalWanModel
) -> None:
    before, known = snapshot(student), snapshot(dense)
    dmd = stage(student, dense)
    run(dmd)
    assert changed(student, before) == new_names(student)
    assert not changed(dense, known)
    assert changed(dmd.critic, known) == known.keys()
    steps = {int(state["step"]) for state in dmd.optimiser.state.values()}
    assert steps == {CONFIG.dmd.steps * CONFIG.dmd.critic_steps}


def test_it_is_the_last_stage_and_ends_no_worse(
    student: CausalWanModel, dense: CausalWanModel
) -> None:
    curve: dict[int, float] = {}
    held_out = HeldOut(dense, EVALUATE)
    student.requires_grad_(False)
    recovered = recover_model(
        student,
        dense,
        replace(CONFIG, on_policy_steps=1),
        held_out,
        lambda step, errors: curve.__setitem__(step, errors.velocity_error),
    )
    assert list(curve) == [0, 1, 2, 3, 4, 5]
    assert list(recovered.best_steps) == ["on policy", MATCHING]
    start = curve[recovered.best_steps["on policy"]]
    best = recovered.best_steps[MATCHING]
    left = held_out.measure(student).velocity_error
    assert left == (curve[1 + best] if best else start)
    assert left <= min(start, *(curve[step] for step in range(2, 6)))


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_never_stopped(
    student: CausalWanModel, dense: CausalWanModel, tmp_path: Path
) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, ema=0.9))

    def once(state: Path | None = None, cut: int | None = None) -> list[nn.Module]:
        dmd = stage(deepcopy(student), dense, config)
        run(dmd, state, cut)
        return [dmd.student, dmd.critic]

    whole, state = once(), tmp_path / "state.pt"
    with pytest.raises(PowerCutError):
        once(state, 3)
    torch.manual_seed(1)  # global noise is no part of the state
    for one, other in zip(whole, once(state), strict=True):
        assert not changed(one, other.state_dict())


@pytest.mark.slow
def test_a_recovery_resumes_with_its_critic(
    student: CausalWanModel, dense: CausalWanModel, tmp_path: Path
) -> None:
    def curve(folder: Path, progress: Progress | None = None) -> dict[int, float]:
        errors: dict[int, float] = {}
        recover_model(
            deepcopy(student).requires_grad_(False),
            dense,
            CONFIG,
            HeldOut(dense, EVALUATE),
            lambda step, measured: errors.__setitem__(step, measured.velocity_error),
            Folders.beside(folder),
            progress,
        )
        return errors

    whole = curve(tmp_path / "whole")
    with pytest.raises(PowerCutError):
        curve(tmp_path / "cut", PowerCut(MATCHING, 3))
    resumed = curve(tmp_path / "cut")
    assert list(resumed) == [0, 3, 4]  # the start of every recovery is measured
    assert resumed == {step: whole[step] for step in resumed}


# Shares, parts and precision


def learned(dmd: DistributionMatching) -> tuple[Example, dict[str, Tensor]]:
    """The example of the first step, and the gradient that the critic had there, unclipped."""
    randomise(dmd.critic, seed=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)
        (example,) = dmd.examples(0)
    return example, gradients(dmd.critic)


def test_two_shares_are_the_whole_batch(student: CausalWanModel, dense: CausalWanModel) -> None:
    whole, *shares = (
        learned(stage(student, dense, STILL, share))[0]
        for share in (ALONE, Share(0, 2), Share(1, 2))
    )
    for tensor, *parts in zip(whole, *shares, strict=True):
        for rank, part in enumerate(parts):
            torch.testing.assert_close(part, tensor[rank::2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parts_are_the_whole_batch(
    checkpointing: bool, student: CausalWanModel, dense: CausalWanModel
) -> None:
    training = replace(CONFIG.training, accumulate=2, gradient_checkpointing=checkpointing)
    whole, critic = learned(stage(student, dense, STILL))
    parted, same = learned(stage(student, dense, replace(STILL, training=training)))
    for one, other in zip(whole, parted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert critic.keys() == same.keys()
    for name, gradient in critic.items():
        torch.testing.assert_close(gradient, same[name], rtol=1e-3, atol=1e-6)


def test_bfloat16_computes_and_float32_learns(
    student: CausalWanModel, dense: CausalWanModel
) -> None:
    training = replace(CONFIG.training, mixed_precision="bf16")
    narrow = stage(deepcopy(student), dense, replace(STILL, training=training))
    wide = stage(student, dense, STILL)
    (example, critic), (exact, expected) = learned(narrow), learned(wide)
    assert {p.dtype for p in narrow.critic.parameters()} == {torch.float32}
    assert not torch.equal(example.latents, exact.latents)
    error = (example.latents - exact.latents).square().mean() / exact.latents.square().mean()
    assert error < 1e-3
    wrong = sum((critic[name] - expected[name]).square().sum() for name in expected)
    assert wrong < 1e-2 * sum(gradient.square().sum() for gradient in expected.values())


def test_fp16_is_refused() -> None:
    training = TrainingConfig(mixed_precision="fp16")
    with pytest.raises(ConfigError, match="fp16"):
        RecoverConfig(training=training, dmd=DMDConfig(steps=1))
    RecoverConfig(training=training)
