"""The rollout loop: denoise a video chunk by chunk through the model's own cache.

`generate`, the diffusers pipeline and on-policy training all run this loop. Latents have the shape
(B, F, C, height, width): B clips, F frames, C channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import RuntimeConfig
from vmla_convert.generating.prefix import prefix_chunks
from vmla_convert.generating.sampler import State, sample_chunk
from vmla_convert.layers.cache import KVCache
from vmla_convert.layers.dit import CausalWanModel, Prompt


class NewPrompt(NamedTuple):
    """A prompt that takes over at the start of a chunk.

    Attributes:
        context: Text encoder output (B, text_len, text_dim).
        recache: Write the window again under this prompt (LongLive's re-cache).
        keep_sink: Keep the sink when the window is written again.
    """

    context: Tensor
    recache: bool = True
    keep_sink: bool = True


@dataclass
class RolloutState:
    """Everything that the next chunk of a rollout depends on, between two chunks.

    Attributes:
        cache: The cache.
        context: Text encoder output of the current prompt (B, text_len, text_dim).
        past: The newest clean chunks, as many as the window holds, for a new prompt.
        given: Frames of the prefix.
        index: Number of sampled chunks.
    """

    cache: KVCache
    context: Tensor
    past: deque[Tensor]
    given: int = 0
    index: int = 0

    @classmethod
    def new(
        cls, model: CausalWanModel, context: Tensor, runtime: RuntimeConfig | None, frames: int
    ) -> RolloutState:
        """The start of a video of so many frames."""
        cache, config = model.new_cache(len(context), runtime, frames), model.config
        past = deque[Tensor](maxlen=-(-config.cache.window_frames // config.chunk_frames))
        return cls(cache, context.to(model.patch_embedding.weight), past)


@torch.no_grad()
def rollout(
    model: CausalWanModel,
    chunks: int,
    new_prompt: Callable[[int], NewPrompt | None],
    generators: Callable[[int], list[torch.Generator]],
    runtime: RuntimeConfig | None = None,
    prefix: Tensor | None = None,
    noise: Tensor | None = None,
    before_step: Callable[[State], None] | None = None,
    after_step: Callable[[State], Tensor] | None = None,
    state: RolloutState | None = None,
) -> Iterator[Tensor]:
    """Yield the chunks of a prefix, then clean chunks sampled from the model.

    Args:
        model: Dense or converted.
        chunks: Number of chunks to sample, without the prefix.
        new_prompt: Returns the prompt that takes over at a frame, the first frame of a chunk. None
            keeps the current prompt. Frame 0 needs a prompt.
        generators: Returns the sources of noise for a chunk, by the chunk's number. Each source
            draws for an equal share of the B clips.
        runtime: Size, precision and place of the cache.
        prefix: Clean latents that the video begins with.
        noise: Noise to start from, in place of the first draws. Frames after its end are drawn.
        before_step: Called before each step; see `sample_chunk`.
        after_step: Called after each step; see `sample_chunk`.
        state: Where to continue; advanced before each chunk is yielded.
    """
    config, weight = model.config, model.patch_embedding.weight
    size = config.chunk_frames
    if state is None:
        first = new_prompt(0)
        assert first is not None, "a rollout begins with a prompt"
        frames = chunks * size + (0 if prefix is None else prefix.shape[1])
        state = RolloutState.new(model, first.context, runtime, frames)
    cache, prompt = state.cache, model.project_prompt(state.context)
    for chunk in [] if prefix is None else prefix_chunks(prefix.to(weight), size):
        write_clean(model, chunk, prompt, cache)
        state.past.append(chunk)
        state.given += chunk.shape[1]
        yield chunk
    shape = (len(state.context), size, config.geometry.in_dim, *config.latent_size)
    for _ in range(chunks):
        start = state.index * size
        if state.given + start and (new := new_prompt(state.given + start)):
            state.context = new.context.to(weight)
            prompt = model.project_prompt(state.context)
            if new.recache:
                recache(model, list(state.past), prompt, cache, new.keep_sink)
        draw = _noise_source(shape, generators(state.index))
        x = draw()
        if noise is not None:
            part = noise[:, start : start + size]
            x[:, : part.shape[1]] = part.to(x)
        cache.open_chunk(size)
        chunk = sample_chunk(model, x.to(weight), prompt, cache, draw, before_step, after_step)
        state.past.append(chunk)
        state.index += 1
        yield chunk


@torch.no_grad()
def write_clean(model: CausalWanModel, chunk: Tensor, prompt: Prompt, cache: KVCache) -> None:
    """Write a clean chunk to the cache as its next frames."""
    cache.open_chunk(chunk.shape[1])
    model.stream(chunk, chunk.new_zeros(chunk.shape[:2]), prompt, cache)


@torch.no_grad()
def recache(
    model: CausalWanModel,
    chunks: list[Tensor],
    prompt: Prompt,
    cache: KVCache,
    keep_sink: bool = True,
) -> None:
    """Write the window again under another prompt, from clean chunks (LongLive's re-cache).

    Args:
        model: Dense or converted.
        chunks: The newest clean chunks, oldest first. Frames outside the window, and frames of a
            kept sink, are skipped.
        prompt: From `model.project_prompt`.
        cache: Holds the chunks under the old prompt.
        keep_sink: Keep the sink's entries. Otherwise the oldest rewritten frames become the sink.
    """
    window, sizes = cache.window, [chunk.shape[1] for chunk in chunks]
    oldest = window.next_frame - window.policy.window_frames
    if keep_sink:
        oldest = max(oldest + window.policy.sink_frames, window.sink_end)
    skipped = max(0, oldest - (window.next_frame - sum(sizes)))
    cache.rewind(max(0, sum(sizes) - skipped), keep_sink)
    for chunk, size in zip(chunks, sizes, strict=True):
        part, skipped = chunk[:, skipped:], max(0, skipped - size)
        if part.shape[1]:
            write_clean(model, part, prompt, cache)


def _noise_source(
    shape: tuple[int, ...], generators: list[torch.Generator]
) -> Callable[[], Tensor]:
    share = (shape[0] // len(generators), *shape[1:])
    return lambda: torch.cat([torch.randn(share, generator=one) for one in generators])
