"""How long it takes to sample clips and to pass them through a model, before it is done.

One pass of one block is timed. Everything else follows from counts of operations. T query tokens, S
attended tokens, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.config import MediaConfig, ModelConfig
from vmla_convert.generating.clip_sets import clips_folder
from vmla_convert.generating.make_clips import Clips, OwnSamples, like, to_make
from vmla_convert.generating.memory import sampling_memory
from vmla_convert.generating.own_samples import clips_at_once
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.memory import ClipShape, Memory
from vmla_convert.loading.load import compute_device
from vmla_convert.maths.cost import block_flops

TIMED_PASSES, TIMED_SECONDS = 5, 3.0


@dataclass(frozen=True)
class PlannedWork:
    """Work on clips.

    Attributes:
        clips_dir: Folder of clips that are made.
        memory: Peak memory by formula.
        clips_to_sample: Clips that the dense model must sample first; others are there already.
        seconds_per_clip: Seconds that a sample takes, from the time of one block.
        sampling_seconds: Seconds of all samples.
        clip_bytes: Bytes of these samples on the disk, at most.
        passing_seconds: Seconds in which clips pass the model, to calibrate or to train it.
        operations: Multiplications and additions of all of this.
    """

    clips_dir: str
    memory: Memory
    clips_to_sample: int = 0
    seconds_per_clip: float = 0.0
    sampling_seconds: float = 0.0
    clip_bytes: int = 0
    passing_seconds: float = 0.0
    operations: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of all work."""
        return self.sampling_seconds + self.passing_seconds


def plan_work(
    dense: OpenCheckpoint,
    works: Sequence[Clips],
    passes: Sequence[float],
    media: MediaConfig,
    memory: Memory,
) -> PlannedWork:
    """Predict the work on clips.

    Args:
        dense: The dense model.
        works: From `check_needs`.
        passes: For each of them, the forward passes of a clip, clean and noisy. A backward pass
            counts as two.
        media: Where clips lie.
        memory: Peak of the work that the clips are for.
    """
    folder, on_gpu = str(clips_folder(media)), compute_device().type == "cuda"
    if not works:
        return PlannedWork(folder, memory)
    rate = flops_per_second(dense)
    passing = sum(
        count * passing_flops(dense.config, work) for work, count in zip(works, passes, strict=True)
    )
    samples = [work for work in to_make(works) if isinstance(work, OwnSamples)]
    for work in samples:
        together = clips_at_once(work.sized)
        memory = memory.peak(sampling_memory(work.sized, 2 if on_gpu else 4, together, on_gpu))
    left = [(len(work.missing()), work) for work in samples]
    sampling = sum(n * sampling_flops(work.sized, work.frames) for n, work in left)
    count, nbytes = sum(n for n, _ in left), sum(work.nbytes() for work in samples)
    return PlannedWork(
        folder,
        memory,
        count,
        sampling / max(1, count) / rate,
        sampling / rate,
        nbytes,
        passing / rate,
        sampling + passing,
    )


def sampling_flops(model: ModelConfig, frames: int) -> int:
    """Operations to sample a clip of so many latent frames through the model's own cache."""
    tokens, chunk, total = model.tokens_per_frame, model.chunk_frames, 0
    for start in range(0, frames, chunk):
        keys = tokens * min(start + chunk, model.cache.window_frames)
        total += block_flops(model.geometry, tokens * chunk, keys)
    # Every step of the sampler is a pass, and a last one writes the clean chunk to the cache.
    passes = len(model.sampler.denoising_step_list) + 1
    return passes * model.geometry.num_layers * total


def clip_shape(model: ModelConfig, clips: Clips) -> ClipShape:
    """Shape of a clip, made or not."""
    latents = like(clips, model)
    return ClipShape(latents.shape[1], latents.shape[-2], latents.shape[-1])


def passing_flops(model: ModelConfig, clips: Clips) -> int:
    """Operations of one masked forward pass of a clip, clean and noisy."""
    frames, height, width = clip_shape(model, clips)
    tokens = 2 * frames * model.geometry.tokens_per_frame((height, width))
    return model.geometry.num_layers * block_flops(model.geometry, tokens, tokens)


@torch.no_grad()
def flops_per_second(dense: OpenCheckpoint) -> float:
    """Operations per second of this machine in one block that a chunk of the model passes."""
    device = compute_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    geometry = replace(dense.config.geometry, num_layers=1)
    config = replace(dense.config, geometry=geometry)
    with torch.device("meta"):
        model = CausalWanModel(config)
    # A model of one layer has the names of the whole model's first layer.
    state = {name: dense.read(name).to(device, dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    frames = config.chunk_frames
    latents = torch.zeros(1, frames, geometry.in_dim, *config.latent_size, device=device).to(dtype)
    context = torch.zeros(1, geometry.text_len, geometry.text_dim, device=device, dtype=dtype)
    timestep = torch.zeros(1, frames, device=device)
    times: list[float] = []
    # The first passes load libraries. Large models need no second pass, because theirs take long.
    while len(times) < TIMED_PASSES and sum(times) < TIMED_SECONDS:
        started = perf_counter()
        model(latents, timestep, context, torch.arange(frames)).sum().item()
        times.append(perf_counter() - started)
    tokens = frames * config.tokens_per_frame
    return block_flops(geometry, tokens, tokens) / min(times)
