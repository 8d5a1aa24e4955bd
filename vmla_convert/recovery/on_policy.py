"""On-policy examples: what the student itself rolled out, and the noisy states on the way there.

A rollout leaves clean chunks in the student's own cache. The teacher-forced pass reads the same
chunks masked, which equals streaming them, so that a state met in the rollout becomes an example
like any other, and the gradient reaches the latents of the past too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import TrainingConfig
from vmla_convert.generating.rollout import NewPrompt, rollout
from vmla_convert.generating.sampler import State
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.flow import TRAIN_TIMESTEPS, per_frame
from vmla_convert.media.clips import ClipSource, seeded
from vmla_convert.training.losses import Example
from vmla_convert.training.processes import precision


class Share(NamedTuple):
    """Which clips of a batch are this process's: every `world`-th, from `rank` on."""

    rank: int
    world: int


ALONE = Share(0, 1)


def rollout_examples(
    student: CausalWanModel,
    clips: ClipSource,
    config: TrainingConfig,
    share: Share = ALONE,
) -> Callable[[int], list[Example]]:
    """Examples of a student's rollouts, for the prompts and of the length of training clips."""

    def examples(step: int) -> list[Example]:
        latents, context = clips.batch(step, config.batch_size)
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
    """Roll a student out and pick, for every chunk, one state that it was denoised from.

    Args:
        student: Streams through its own cache.
        context: Prompts (B, text_len, text_dim).
        frames: Of a clip; a last part of a chunk is left out.
        seed: Of all noise and of the picks: of the run, and which rollout it is.
        share: Clips that are rolled out; the others are zeros, for another process to fill in.

    Returns:
        The student's clean chunks as past, the picked states as noisy clip; `velocity` points from
        where the rollout ended to each state.
    """
    config, mine = student.config, range(share.rank, len(context), share.world)
    asked = context[mine.start :: mine.step].to(student.patch_embedding.weight)
    states: list[State] = []
    generators: list[torch.Generator] = []

    def clip_generators(chunk: int) -> list[torch.Generator]:
        # Each clip has its own noise, whichever process rolls it out.
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
    example = Example(
        latents=torch.cat([past, state], dim=1),
        timestep=torch.cat([torch.zeros_like(sigma), TRAIN_TIMESTEPS * sigma], dim=1),
        velocity=(state - past) / per_frame(sigma),
        context=asked,
    )
    return Example(*(_spread(part, len(context), share) for part in example))


def _spread(part: Tensor, batch: int, share: Share) -> Tensor:
    """Rows of one process at their places in the batch."""
    whole = part.new_zeros(batch, *part.shape[1:])
    whole[share.rank :: share.world] = part
    return whole
