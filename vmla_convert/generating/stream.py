"""A video that can be paused on disk between two chunks, and continued or branched later.

The state of a stream is its cache, the newest clean chunks, the prompt and the place in the noise.
A codec's cache is small enough to keep many of them. A continued stream equals one that was never
stopped, bit for bit, in latents and in pixels.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vmla_convert.checkpoint.integrity import bytes_hash
from vmla_convert.config import RuntimeConfig
from vmla_convert.errors import ConfigError
from vmla_convert.generating.rollout import RolloutState
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.storage.limits import opened_safetensors
from vmla_convert.storage.output import rename_synced, reported
from vmla_convert.storage.tensor_store import save_tensors
from vmla_convert.tables import first_difference, parse_json, to_dict

_TABLE, _SHOWN = "stream", "shown"

DECODER_FRAMES = 40
"""Latent frames before a frame that its pixels depend on. The causal convolutions of Wan's decoders
(2.1 and 2.2) reach 37.5 latent frames back, so a decoder that has seen these frames continues as
one that has seen all. 40 frames of 480p take 8 MB in bfloat16.
"""


class Stream(Iterator[Tensor]):
    """Chunks of clean latents (B, F, C, height, width), from `generate`.

    Attributes:
        frames: Latent frames yielded so far, over all parts of the video.
        past: The newest frames (B, F, C, height, width) of the earlier part, as many as a decoder
            has to see before it continues; None for a new video.
    """

    def __init__(
        self,
        model: CausalWanModel,
        chunks: Iterator[Tensor],
        state: RolloutState,
        seed: int,
        runtime: RuntimeConfig,
        frames: int = 0,
        past: Tensor | None = None,
    ) -> None:
        self._model, self._chunks, self._state = model, chunks, state
        self._seed, self._runtime = seed, runtime
        self.frames, self.past = frames, past
        self._shown = deque[Tensor]() if past is None else deque([past])

    def __next__(self) -> Tensor:
        """The next chunk; the last one is cut to the length of the video."""
        chunk = next(self._chunks)
        self.frames += chunk.shape[1]
        self._shown.append(chunk)
        while (
            sum(part.shape[1] for part in self._shown) >= DECODER_FRAMES + self._shown[0].shape[1]
        ):
            self._shown.popleft()
        return chunk

    def save(self, file: Path) -> None:
        """Write the state after the last chunk that was yielded; the file appears whole or not.

        Raises:
            OutputError: The file cannot be written.
        """
        state = self._state
        entries = state.cache.state()  # each of several processes gives its heads
        if self._model.parallel.rank:
            return
        table = {
            **_identity(self._model, self._runtime),
            "window": state.cache.window.state(),
            "seed": self._seed,
            "given": state.given,
            "index": state.index,
            "frames": self.frames,
        }
        tensors = {"context": state.context, **entries}
        tensors |= {f"past.{number:04d}": chunk for number, chunk in enumerate(state.past)}
        tensors[_SHOWN] = torch.cat(list(self._shown), 1)[:, -DECODER_FRAMES:]
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        draft = file.with_name(f"{file.name}.partial")
        with reported(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            # Views of one buffer, such as a cache of one slot, need memory of their own.
            copies = {name: tensor.clone() for name, tensor in held.items()}
            save_tensors(copies, draft, {_TABLE: json.dumps(table)})
            rename_synced(draft, file)


def read_stream(
    file: Path, model: CausalWanModel, runtime: RuntimeConfig, frames: int
) -> tuple[RolloutState, int, int, Tensor]:
    """Read the state of a stream for a video of so many frames.

    Returns:
        The state, the seed, the number of frames that were yielded, and the newest of them.

    Raises:
        ConfigError: The file is damaged, or belongs to another model or runtime.
    """
    table, tensors = _read(file)
    if difference := first_difference(
        {name: table.get(name) for name in _identity(model, runtime)},
        json.loads(json.dumps(_identity(model, runtime))),
    ):
        name, there, here = difference
        raise ConfigError(
            f"{file} is a stream of another model or runtime: {name} is {there} there and {here} "
            "here",
            "use the checkpoint and the options that the stream was saved with",
        )
    try:
        state = RolloutState.new(model, tensors["context"], runtime, frames)
        state.cache.restore(table["window"], tensors)
        weight = model.patch_embedding.weight
        past = sorted(name for name in tensors if name.startswith("past."))
        state.past.extend(tensors[name].to(weight) for name in past)
        state.given, state.index = int(table["given"]), int(table["index"])
        shown, size = tensors[_SHOWN].to(weight), model.config.latent_size
        if shown.shape[0] != len(state.context) or shown.shape[2:] != (weight.shape[1], *size):
            raise ValueError(f"frames of shape {tuple(shown.shape)}")
        return state, int(table["seed"]), int(table["frames"]), shown
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{file} is not a whole stream: {type(error).__name__} {error}", "save it again"
        ) from error


def stream_clips(file: Path) -> int:
    """Number of clips of a saved stream.

    Raises:
        ConfigError: The file is damaged, or no saved stream.
    """
    context = _read(file)[1].get("context")
    return 0 if context is None else len(context)


def _read(file: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    try:
        with opened_safetensors(file) as stored:
            table = parse_json((stored.metadata() or {})[_TABLE])
            names = stored.keys()
            return dict(table), {name: stored.get_tensor(name) for name in names}
    except (SafetensorError, OSError, LookupError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} is not a saved stream: {error}", "save one: --save-stream FILE"
        ) from error


def _identity(model: CausalWanModel, runtime: RuntimeConfig) -> dict[str, Any]:
    """Settings that a stream cannot change: the model, and the content of the cache."""
    weight = model.head.head.weight
    return {
        "model": to_dict(model.config),
        "size": None if runtime.size is None else to_dict(runtime.size),
        "cache_dtype": runtime.cache_dtype,
        "dtype": str(weight.dtype),
        "weights": bytes_hash(weight.cpu()),
    }
