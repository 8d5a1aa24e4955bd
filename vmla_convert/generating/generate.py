"""Generate video chunk by chunk, from prompts that may change on the way.

B clips, F latent frames, F' pixel frames, C latent channels.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import ModelConfig, RuntimeConfig
from vmla_convert.errors import ConfigError
from vmla_convert.generating.prefix import check_prefix
from vmla_convert.generating.rollout import NewPrompt, RolloutState, rollout
from vmla_convert.generating.stream import Stream, read_stream
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.media.base import Media, TextEncoder
from vmla_convert.media.clips import seeded
from vmla_convert.media.open import open_media
from vmla_convert.progress import Progress, Silent


class Switch(NamedTuple):
    """New prompts from a frame on.

    Attributes:
        frame: Latent frame. The next chunk that starts there or later gets the new prompts.
        prompts: One for each clip.
        keep_sink: Keep the sink that was written under the first prompts. Otherwise the oldest
            frames in the window become the sink.
    """

    frame: int
    prompts: list[str]
    keep_sink: bool = True


def generate(
    model: CausalWanModel,
    prompt: str | list[str],
    frames: int,
    seed: int = 0,
    runtime: RuntimeConfig | None = None,
    switches: Sequence[Switch] = (),
    text: TextEncoder | None = None,
    prefix: Tensor | None = None,
) -> Stream:
    """Yield chunks of clean latents (B, F, C, height, width).

    The cache holds the model's window, so memory does not grow with the length. Noise depends on
    the seed and the chunk alone, so a dense model and its conversion start from the same noise.

    Args:
        model: From `load`.
        prompt: One prompt, or one for each clip.
        frames: Latent frames in all; the last chunk is cut to fit.
        seed: Seed of all noise.
        runtime: Size, precision and place of the cache.
        switches: New prompts on the way. The window is written again under the new prompts.
        text: Encodes the prompts. Default: the model's own text encoder.
        prefix: Clean latents (1 or B, P, C, height, width) of P frames that the video begins with.
            They are yielded first, and count among `frames`.

    Raises:
        ConfigError: `frames`, the prefix, a switch or the runtime does not fit.
        VmlaError: The text encoder does not understand a prompt.
    """
    prompts, config = [prompt] if isinstance(prompt, str) else prompt, model.config
    runtime = runtime or RuntimeConfig()
    if prefix is not None:
        check_prefix(prefix, config, len(prompts))
        prefix = prefix.expand(len(prompts), -1, -1, -1, -1)
    given = 0 if prefix is None else prefix.shape[1]
    if frames <= given:
        raise ConfigError(
            f"frames {frames} must be at least {given + 1}",
            "ask for more frames than the prefix has" if given else "",
        )
    starts = range(given, frames, config.chunk_frames)
    switches = sorted(switches, key=lambda switch: switch.frame)
    _check_switches(switches, len(prompts), starts)
    text = text or open_media(config, device=model.patch_embedding.weight.device)
    first, new_prompt = _prompt_schedule(prompts, switches, text)
    if now := new_prompt(0):
        first = now.context
    del text  # frees an encoder that was opened here before the first chunk
    size = config.chunk_frames
    state = RolloutState.new(model, first, runtime, given + len(starts) * size)
    chunks = _chunks(model, state, frames, new_prompt, seed, prefix)
    return Stream(model, chunks, state, seed, runtime)


def resume(
    model: CausalWanModel,
    file: Path,
    frames: int,
    runtime: RuntimeConfig | None = None,
    switches: Sequence[Switch] = (),
    text: TextEncoder | None = None,
) -> Stream:
    """Continue a video that `Stream.save` wrote; the result equals a video that was never stopped.

    Several calls can continue from one file, each with its own prompts.

    Args:
        model: The model that the stream was saved with.
        file: From `Stream.save`.
        frames: Latent frames of the whole video, those before the pause included.
        runtime: Size and precision of the cache, as when the stream was saved.
        switches: New prompts, at frames of the whole video.
        text: Encodes the new prompts. Default: the model's own text encoder.

    Raises:
        ConfigError: The file is damaged or of another model, or `frames` or a switch does not fit.
        VmlaError: The text encoder does not understand a prompt.
    """
    config, runtime = model.config, runtime or RuntimeConfig()
    state, seed, shown, past = read_stream(file, model, runtime, frames + config.chunk_frames)
    if frames <= shown:
        raise ConfigError(
            f"frames {frames} must be at least {shown + 1}: {file} holds {shown}",
            "give the length of the whole video",
        )
    made = state.given + state.index * config.chunk_frames
    starts = range(made, max(frames, made + 1), config.chunk_frames)
    switches = sorted(switches, key=lambda switch: switch.frame)
    _check_switches(switches, len(state.context), starts)
    new_prompt: Callable[[int], NewPrompt | None] = _keep_prompt
    if switches:
        text = text or open_media(config, device=model.patch_embedding.weight.device)
        _, new_prompt = _prompt_schedule([], switches, text)
    chunks = _chunks(model, state, frames, new_prompt, seed, shown=shown)
    return Stream(model, chunks, state, seed, runtime, shown, past)


def _keep_prompt(_: int) -> None:
    return None


def _chunks(
    model: CausalWanModel,
    state: RolloutState,
    frames: int,
    new_prompt: Callable[[int], NewPrompt | None],
    seed: int,
    prefix: Tensor | None = None,
    shown: int = 0,
) -> Iterator[Tensor]:
    """Yield all chunks of a video after the frames that were shown."""
    size, given = model.config.chunk_frames, 0 if prefix is None else prefix.shape[1]
    made = given + state.given + state.index * size
    if shown < min(made, frames) and state.past:  # the last chunk was cut
        yield state.past[-1][:, shown - made :][:, : frames - shown]
    done = made - given
    for chunk in rollout(
        model,
        max(0, -(-(frames - made) // size)),
        new_prompt,
        lambda index: [seeded(seed, index, "rollout")],
        prefix=prefix,
        state=state,
    ):
        yield chunk[:, : frames - done]
        done += chunk.shape[1]


def _prompt_schedule(
    prompts: list[str], switches: list[Switch], text: TextEncoder
) -> tuple[Tensor, Callable[[int], NewPrompt | None]]:
    """Encode all prompts in one call; return the first context, and which one takes over when.

    One call moves an encoder that waits in host memory to the device only once.
    """
    named = [*prompts, *(prompt for switch in switches for prompt in switch.prompts)]
    encoded, waiting = text.encode_prompts(named), deque[tuple[int, NewPrompt]]()
    parts = encoded.split([len(prompts), *(len(switch.prompts) for switch in switches)])
    # Memory of their own: matrix products round differently where memory starts at odd places.
    first, *others = (part.clone() for part in parts)
    for switch, context in zip(switches, others, strict=True):
        waiting.append((switch.frame, NewPrompt(context, keep_sink=switch.keep_sink)))

    def due(frame: int) -> NewPrompt | None:
        latest = None
        while waiting and waiting[0][0] <= frame:
            _, latest = waiting.popleft()
        return latest

    return first, due


def _check_switches(switches: list[Switch], clips: int, starts: range) -> None:
    for switch in switches:
        if len(switch.prompts) != clips:
            raise ConfigError(
                f"{len(switch.prompts)} prompts from frame {switch.frame} on, {clips} before",
                "give as many prompts as there are clips",
            )
        if switch.frame > starts[-1]:
            raise ConfigError(
                f"a switch at frame {switch.frame} comes after the start of the last chunk, "
                f"{starts[-1]}",
                f"switch at frame {starts[-1]} or before, or ask for more frames",
            )


def generate_pixels(
    model: CausalWanModel,
    prompts: list[str],
    frames: int,
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "generating",
    media: Media | None = None,
    runtime: RuntimeConfig | None = None,
) -> Tensor:
    """Return a whole video as pixels (B, F', 3, H, W) in −1 … 1; arguments as in `generate`."""
    config = model.config
    media = media or open_media(config, device=model.patch_embedding.weight.device)
    chunks = generate(model, prompts, frames, seed, runtime, text=media)
    return decoded(track_chunks(progress or Silent(), chunks, label, config, frames), media)


def decoded(chunks: Iterable[Tensor], media: Media) -> Tensor:
    """Decode all chunks of a video to pixels (B, F', 3, H, W) in −1 … 1 on the CPU."""
    return media.decode(torch.cat(list(chunks), dim=1)).float().cpu().clamp(-1, 1)


def track_chunks(
    progress: Progress,
    chunks: Iterable[Tensor],
    label: str,
    config: ModelConfig,
    frames: int,
    prefix: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the chunks of `generate` with a progress bar; arguments as in `generate`."""
    size = config.chunk_frames
    given = 0 if prefix is None else prefix.shape[1]
    total = -(-given // size) + -((given - frames) // size)
    return progress.track(chunks, label, total)


def clip_frames(seconds: float | None, frames: int | None, rate: float) -> int:
    """Return the latent frames of a clip whose length is given in seconds or frames; default 20."""
    if seconds is None:
        return 20 if frames is None else frames
    if frames is not None:
        raise ConfigError("--seconds and --frames both say how long", "give one of them")
    if not seconds > 0 or seconds == float("inf"):
        raise ConfigError(f"{seconds:g} seconds are no time", "try --seconds 60")
    return max(1, round(seconds * rate))


def parse_switch(text: str, clips: int, keep_sink: bool, rate: float) -> Switch:
    """Parse `FRAME:PROMPT` or `SECONDSs:PROMPT` into a switch of all clips to one prompt.

    `rate` counts latent frames per second.
    """
    match = re.fullmatch(r"\s*(?:(\d+)|(\d+(?:\.\d+)?)\s*s)\s*:(.*)", text, re.DOTALL)
    if match is None or not match[3].strip():
        raise ConfigError(
            f"'{text}' is not FRAME:PROMPT or SECONDSs:PROMPT",
            'try --prompt-at "20s:a bouncing three"',
        )
    frame = int(match[1]) if match[1] else round(float(match[2]) * rate)
    return Switch(frame, [match[3].strip()] * clips, keep_sink)
