"""Distribution matching, the heavy last stage (DMD2, arXiv 2405.14867; Self-Forcing, 2506.08009).

The other stages ask the student for the dense model's answer at every state. This stage asks for
samples that are as likely under the dense model as under the student: a critic learns the student's
distribution, and the student moves its clean latents to where the dense model finds them likelier
than the critic does. Dense model and critic judge each chunk after the student's own clean past,
without guidance.

The stage is for clusters. The critic is as large as the dense model, with gradients and moments (16
bytes a parameter), and each step of the student takes `critic_steps` + 1 rollouts of the whole
batch. `training.ema = 0.99` is usual.

The dense model must know the noise levels of pretraining. A model that was distilled to a few
steps, such as Self-Forcing's, answers only at those levels: use a flow-matching model of the same
geometry instead. Samples may move away from the dense model's own while the distributions come
nearer, so the held-out velocity error shows only a part of the gain. The best weights are still
chosen by that error, because no stage may end worse than it began.

Shapes: B clips of this process, F frames, C channels.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmla_convert.config import RecoverConfig
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.flow import interpolate, per_frame, predict_clean, sample_training_sigma
from vmla_convert.media.clips import ClipSource, seeded
from vmla_convert.recovery.on_policy import rollout_examples
from vmla_convert.training.losses import Example, flow_matching, predicted_velocity
from vmla_convert.training.processes import ALONE, Share, average_gradients, own_device, precision


class Sample(NamedTuple):
    """A rollout of the student, and a clean sample predicted from a state of the rollout.

    Attributes:
        rollout: Past and states.
        velocity: The student's velocity at the states (B, F, C, height, width).
        clean: The sample that the velocity points to, of the same shape.
        noised: The sample under fresh noise after the rollout's past, as the critic sees it.
    """

    rollout: Example
    velocity: Tensor
    clean: Tensor
    noised: Example


class DistributionMatching:
    """Examples, loss and critic of the stage.

    A step depends only on its number, the student, the critic and the critic's optimiser, so a run
    that restores these resumes exactly.
    Processes share a batch and hold equal critics.

    Clips give the prompts and the length of rollouts. `share` is this process's part of a batch.
    """

    def __init__(
        self,
        student: CausalWanModel,
        teacher: CausalWanModel,
        clips: ClipSource,
        config: RecoverConfig,
        share: Share = ALONE,
    ) -> None:
        self.training, self.dmd, self.share = config.training, config.dmd, share
        self.student, self.teacher = student, teacher.to(own_device())
        self.critic = deepcopy(self.teacher).requires_grad_(True)
        if self.training.gradient_checkpointing:
            self.critic.checkpoint_blocks(self.training.offload_activations)
        # No momentum, as in Self-Forcing: the critic's target moves with every step.
        self.optimiser = torch.optim.AdamW(
            self.critic.parameters(), self.dmd.critic_lr, betas=(0.0, 0.999), weight_decay=0.0
        )
        self._rollouts = rollout_examples(student, clips, self.training, share)

    def examples(self, step: int) -> list[Example]:
        """Train the critic on fresh samples, then judge one more.

        Returns:
            The student's rollout with the velocity that it should have had.
        """
        first = step * (self.dmd.critic_steps + 1)
        last = first + self.dmd.critic_steps
        for number in range(first, last):
            self._train_critic(self.sample(number).noised)
        rollout, velocity, clean, noised = self.sample(last)
        real, fake = (
            predict_clean(noised.noisy, self._velocity(model, noised), noised.sigma)
            for model in (self.teacher, self.critic)
        )
        gradient = matching_gradient(clean, real, fake)
        return [rollout._replace(velocity=moved_velocity(velocity, gradient, rollout.sigma))]

    def loss(self, model: nn.Module, example: Example) -> Tensor:
        """Distance of a model's samples from the targets of `examples`."""
        velocity = predicted_velocity(model, self.student.config, example)
        return sample_distance(velocity, example.velocity, example.sigma)

    def state_dict(self) -> dict[str, Any]:
        """State of the critic and its optimiser."""
        return {"critic": self.critic.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.critic.load_state_dict(state_dict["critic"])
        self.optimiser.load_state_dict(state_dict["optimiser"])

    def sample(self, number: int) -> Sample:
        """The student's sample of a given number.

        The sample is the student's prediction from a state of its rollout, not the rollout's end:
        the student's step has a gradient of this prediction (Self-Forcing's exit step), and the
        critic must learn the same distribution.
        """
        (rollout,) = self._rollouts(number)
        velocity = self._velocity(self.student, rollout)
        clean = predict_clean(rollout.noisy, velocity, rollout.sigma)
        return Sample(rollout, velocity, clean, self._noised(rollout, clean, number))

    def _noised(self, rollout: Example, clean: Tensor, number: int) -> Example:
        """A flow-matching example of clean samples (B, F, C, height, width)."""
        frames, size = clean.shape[1], self.student.config.chunk_frames
        sigmas, noises = list[Tensor](), list[Tensor]()
        for clip in range(self.share.rank, self.training.batch_size, self.share.world):
            # Noise is drawn per clip, so it does not depend on the number of processes.
            generator = seeded(self.training.seed, number, f"renoise {clip}")
            sigmas.append(sample_training_sigma(1, frames // size, size, generator))
            noises.append(torch.randn(clean.shape[1:], generator=generator))
        sigma, noise = torch.cat(sigmas).to(clean), torch.stack(noises).to(clean)
        noisy = interpolate(clean, noise, sigma)
        return Example.build(rollout.past, noisy, sigma, noise - clean, rollout.context)

    def _train_critic(self, example: Example) -> None:
        """Update the critic once, by flow matching."""
        self.optimiser.zero_grad()
        loss, accumulate = flow_matching(self.critic.config), self.training.accumulate
        for part in example.split(accumulate):
            with precision(self.training):
                value = loss(self.critic, part) / accumulate
            value.backward()
        average_gradients(list(self.critic.parameters()))
        nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
        self.optimiser.step()

    @torch.no_grad()
    def _velocity(self, model: CausalWanModel, example: Example) -> Tensor:
        """A model's predicted velocity (B, F, C, height, width)."""
        parts = example.split(self.training.accumulate)
        with precision(self.training):
            return torch.cat([predicted_velocity(model, model.config, part) for part in parts])


def matching_gradient(clean: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Gradient of the distribution distance with respect to clean samples (B, F, C, height, width).

    `real` and `fake` are the predictions of the samples, under noise, by dense model and critic.
    The gradient is fake − real, divided by each clip's mean distance to `real`, so that clips under
    much noise do not outweigh the others (equations 7 and 8 of DMD, arXiv 2311.18828).
    """
    distance = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    # A distance of 0 means that the dense model would not move the sample.
    return torch.where(distance > 0, (fake - real) / distance, 0.0)


def moved_velocity(velocity: Tensor, gradient: Tensor, sigma: Tensor) -> Tensor:
    """The velocity whose predicted clean latents are moved by −gradient; sigma must be above 0."""
    return velocity + gradient / per_frame(sigma)


def sample_distance(velocity: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """Half the mean squared distance of the clean latents that two velocities point to.

    If `moved_velocity` made the target from a gradient, the derivative of this loss with respect to
    the clean latents is that gradient, divided by the number of elements.
    """
    return 0.5 * (per_frame(sigma) * (velocity - target)).square().mean()
