"""Distribution matching, the heavy last stage (DMD2, arXiv 2405.14867; Self-Forcing, 2506.08009).

The other stages ask the student for the dense model's answer at every state. This one asks that
what the student makes be as likely under the dense model as under the student itself: a critic
learns the student's own distribution, and the student moves its clean latents to where the dense
model finds them likelier than the critic does. The dense model is all that is needed; it judges
each chunk by the student's own clean past, without guidance.

It is an option for clusters. Beside student and dense model there is the critic, as large as the
dense model, with its gradients and moments (16 bytes a parameter), and each step of the student
takes `critic_steps` + 1 rollouts of the whole batch. `training.ema = 0.99` is usual here.

The dense model has to know the noise levels at which it judges, those of pretraining. One that was
distilled to a few steps, Self-Forcing's for one, answers only at those few, and is no judge: use a
flow-matching model of the same geometry then. Each sample may move away from the dense model's own
as the distribution comes nearer, so the held-out velocity error sees only half of what this stage
does; the weights that measured best by it are kept all the same, because no stage may end worse
than it began.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmla_convert.config import RecoverConfig
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import compute_device
from vmla_convert.maths.flow import (
    TRAIN_TIMESTEPS,
    interpolate,
    per_frame,
    predict_clean,
    sample_training_sigma,
)
from vmla_convert.media.clips import ClipSource, seeded
from vmla_convert.recovery.on_policy import ALONE, Share, rollout_examples
from vmla_convert.training.losses import Example, flow_matching, predicted_velocity
from vmla_convert.training.processes import average_gradients, precision


class Sample(NamedTuple):
    """What the student makes in one rollout; b clips, those of this process.

    Attributes:
        rollout: From `roll_out`, of all B clips.
        velocity: The student's at the states of the rollout (b, F, C, height, width).
        clean: What it points to: the sample, of the same shape.
        noised: The sample under fresh noise, beside the rollout's past; what dense model and critic
            are shown.
    """

    rollout: Example
    velocity: Tensor
    clean: Tensor
    noised: Example


class DistributionMatching:
    """The stage: examples, their loss, and a critic that is part of the state of a run.

    A step is a function of its number, the student, the critic and the critic's optimiser.
    Processes share its batch, and hold equal critics.
    """

    def __init__(
        self,
        student: CausalWanModel,
        teacher: CausalWanModel,
        clips: ClipSource,
        config: RecoverConfig,
        share: Share = ALONE,
    ) -> None:
        """Set up a critic that knows what the dense model knows.

        Args:
            student: Converted; the training loop trains it.
            teacher: Its dense source, which stays as it is.
            clips: Whose prompts and length rollouts have.
            config: Batch, precision, seed and the critic's steps.
            share: Clips of a batch that this process takes.
        """
        self.training, self.dmd, self.share = config.training, config.dmd, share
        self.device = compute_device()
        self.student, self.teacher = student, teacher.to(self.device)
        self.critic = deepcopy(self.teacher).requires_grad_(True)
        if self.training.gradient_checkpointing:
            self.critic.checkpoint_blocks()
        # No momentum, as in Self-Forcing: what the critic learns moves with every step.
        self.optimiser = torch.optim.AdamW(
            self.critic.parameters(), self.dmd.critic_lr, betas=(0.0, 0.999), weight_decay=0.0
        )
        self._rollouts = rollout_examples(student, clips, self.training, share)

    def examples(self, step: int) -> list[Example]:
        """Let the critic learn from fresh samples, then judge one more.

        Returns:
            The student's rollout; `velocity` is the one that it should have had.
        """
        first = step * (self.dmd.critic_steps + 1)
        last = first + self.dmd.critic_steps
        for number in range(first, last):
            self._teach_critic(self.sample(number).noised)
        rollout, velocity, clean, noised = self.sample(last)
        level = _noisy(noised)
        real, fake = (
            predict_clean(level.latents, self._velocity(model, noised), level.sigma)
            for model in (self.teacher, self.critic)
        )
        gradient, sigma = matching_gradient(clean, real, fake), _noisy(self._own(rollout)).sigma
        target = moved_velocity(velocity, gradient, sigma)
        rollout.velocity[self.share.rank :: self.share.world] = target
        return [rollout]

    def loss(self, model: nn.Module, example: Example) -> Tensor:
        """How far a model's samples are from where those of `examples` should move."""
        velocity = predicted_velocity(model, self.student.config, example)
        return sample_distance(velocity, example.velocity, _noisy(example).sigma)

    def state_dict(self) -> dict[str, Any]:
        """Critic and optimiser, as accelerate saves them."""
        return {"critic": self.critic.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.critic.load_state_dict(state["critic"])
        self.optimiser.load_state_dict(state["optimiser"])

    def sample(self, number: int) -> Sample:
        """The student's sample of a given number.

        What is sampled is not where the rollout ended but what the student predicts from a state on
        the way there, because that is what its step has a gradient of (Self-Forcing's exit step);
        the critic has to learn the same.
        """
        (rollout,) = self._rollouts(number)
        mine = self._own(rollout)
        velocity, state = self._velocity(self.student, mine), _noisy(mine)
        clean = predict_clean(state.latents, velocity, state.sigma)
        return Sample(rollout, velocity, clean, self._noised(mine, clean, number))

    def _noised(self, rollout: Example, clean: Tensor, number: int) -> Example:
        """A flow-matching example of samples (b, F, C, height, width)."""
        frames, size = clean.shape[1], self.student.config.chunk_frames
        sigmas, noises = list[Tensor](), list[Tensor]()
        for clip in range(self.share.rank, self.training.batch_size, self.share.world):
            # Each clip has its own noise, whoever made it.
            generator = seeded(self.training.seed, number, f"renoise {clip}")
            sigmas.append(sample_training_sigma(1, frames // size, size, generator))
            noises.append(torch.randn(clean.shape[1:], generator=generator))
        sigma, noise = torch.cat(sigmas).to(clean), torch.stack(noises).to(clean)
        past, noisy = rollout.latents[:, :frames], interpolate(clean, noise, sigma)
        return Example(
            latents=torch.cat([past, noisy], dim=1),
            timestep=torch.cat([torch.zeros_like(sigma), TRAIN_TIMESTEPS * sigma], dim=1),
            velocity=noise - clean,
            context=rollout.context,
        )

    def _teach_critic(self, example: Example) -> None:
        """One update of the critic, by flow matching."""
        self.optimiser.zero_grad()
        loss, parts = flow_matching(self.critic.config), self._parts(example)
        for part in parts:
            with precision(self.training):
                value = loss(self.critic, part) / len(parts)
            value.backward()
        # The mean over all processes, so that critics stay equal.
        average_gradients(list(self.critic.parameters()))
        torch.nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
        self.optimiser.step()

    @torch.no_grad()
    def _velocity(self, model: CausalWanModel, example: Example) -> Tensor:
        """A model's prediction (b, F, C, height, width), part after part."""
        with precision(self.training):
            parts = self._parts(example)
            return torch.cat([predicted_velocity(model, model.config, part) for part in parts])

    def _own(self, example: Example) -> Example:
        """This process's clips of a batch."""
        return Example(*(tensor[self.share.rank :: self.share.world] for tensor in example))

    def _parts(self, example: Example) -> list[Example]:
        """As many parts as the loop makes of a process's clips, to take as little memory."""
        parts = (tensor.chunk(self.training.accumulate) for tensor in example)
        return [Example(*part) for part in zip(*parts, strict=True)]


def matching_gradient(clean: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Where a sample should not go: from what the dense model sees in it to what the critic sees.

    Args:
        clean: Samples (B, F, C, height, width).
        real: What the dense model predicts of them under noise.
        fake: What the critic does.

    Returns:
        fake − real, over the mean distance of each clip to `real`, so that clips under much noise
        do not outweigh the others (equations 7 and 8 of DMD, arXiv 2311.18828).
    """
    distance = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    # A sample that the dense model gives back as it is has nowhere to go.
    return torch.where(distance > 0, (fake - real) / distance, 0.0)


def moved_velocity(velocity: Tensor, gradient: Tensor, sigma: Tensor) -> Tensor:
    """The velocity that points one step down a gradient of the clean latents.

    Args:
        velocity: At states of level `sigma` (B, F, C, height, width).
        gradient: Of the clean latents that it points to, of the same shape.
        sigma: (B, F), above 0.
    """
    return velocity + gradient / per_frame(sigma)


def sample_distance(velocity: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """Half the mean squared distance () of the clean latents that two velocities point to.

    With a target from `moved_velocity` its gradient by these latents is the one that moved the
    target, over their number.

    Args:
        velocity: At states of level `sigma` (B, F, C, height, width).
        target: At the same states.
        sigma: (B, F).
    """
    return 0.5 * (per_frame(sigma) * (velocity - target)).square().mean()


class _Noisy(NamedTuple):
    """The noisy clip of an example (B, F, C, height, width), and its levels (B, F)."""

    latents: Tensor
    sigma: Tensor


def _noisy(example: Example) -> _Noisy:
    frames = example.velocity.shape[1]
    return _Noisy(example.latents[:, frames:], example.timestep[:, frames:] / TRAIN_TIMESTEPS)
