"""On-policy examples: the student's own rollouts, and noisy states on the way there.

A rollout leaves clean chunks in the student's own cache. A teacher-forced pass over the same chunks
equals streaming them. A state of the rollout therefore becomes an ordinary example, and gradients
reach the latents of the past too.

Shapes: B batch, F frames, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vmla_convert.config import TrainingConfig
from vmla_convert.generating.rollout import NewPrompt, rollout
from vmla_convert.generating.sampler import State
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.flow import per_frame
from vmla_convert.media.clips import ClipSource, seeded
from vmla_convert.training.losses import Example
from vmla_convert.training.processes import ALONE, Share, precision


def rollout_examples(
    student: CausalWanModel, clips: ClipSource, config: TrainingConfig, share: Share = ALONE
) -> Callable[[int], list[Example]]:
    """Examples of a student's rollouts, with the prompts and the length of training clips."""

    def examples(step: int) -> list[Example]:
        latents, context = clips.batch(step * config.batch_size, config.batch_size)
        with precision(config):
            return [roll_out(student, context, latents.shape[1], (config.seed, step), share)]

    return examples


@torch.no_grad()
def roll_out(
    student: CausalWanModel,
    context: Tensor,
    frames: int,
    seed: tuple[int, int],
    share: Share = ALONE,
) -> Example:
    """Roll a student out over `frames` frames and pick one noisy state for every chunk.

    Args:
        student: Model that streams through its own cache.
        context: Prompts (B, text_len, text_dim) of the clips of all processes.
        frames: Frames of a clip; those after the last whole chunk are dropped.
        seed: Seed of the run, and number of the rollout.
        share: Clips to roll out.

    Returns:
        The clean chunks as past, the states as noisy clip, and the velocity from one to the other.
    """
    config, mine = student.config, range(share.rank, len(context), share.world)
    asked = context[mine.start :: mine.step].to(student.patch_embedding.weight)
    states: list[State] = []
    generators: list[torch.Generator] = []

    def clip_generators(chunk: int) -> list[torch.Generator]:
        # Noise is drawn per clip, so it does not depend on the number of processes.
        generators[:] = [seeded(*seed, f"rollout {chunk} {clip}") for clip in mine]
        return generators

    clean: list[Tensor] = []
    noisy: list[Tensor] = []
    sigmas: list[Tensor] = []
    for chunk in rollout(
        student,
        frames // config.chunk_frames,
        lambda frame: None if frame else NewPrompt(asked),
        clip_generators,
        before_step=states.append,
    ):
        picks = [int(torch.randint(len(states), (), generator=g)) for g in generators]
        clean.append(chunk)
        noisy.append(torch.stack([states[pick].latents[i] for i, pick in enumerate(picks)]))
        sigma = torch.stack([states[pick].sigma for pick in picks])
        sigmas.append(sigma[:, None].expand(-1, config.chunk_frames))
        states.clear()
    past, state, sigma = (torch.cat(parts, dim=1) for parts in (clean, noisy, sigmas))
    velocity = (state - past) / per_frame(sigma)
    return Example.build(past, state, sigma, velocity, asked)
