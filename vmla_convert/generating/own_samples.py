"""Clips that the dense model samples from prompts.

B clips, F latent frames, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmla_convert.config import DataConfig, ModelConfig
from vmla_convert.demo.world import Split
from vmla_convert.errors import ConfigError
from vmla_convert.generating.clip_sets import set_folder
from vmla_convert.generating.rollout import NewPrompt, rollout
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.media.base import Media
from vmla_convert.media.clips import seeded
from vmla_convert.media.open import check_prompts, default_prompts
from vmla_convert.progress import Advance, Progress
from vmla_convert.storage.tensor_store import FolderStore
from vmla_convert.tables import to_dict

FORMAT = 1
CLIPS_AT_ONCE = 8
CACHE_BYTES_AT_ONCE = 8 << 30
"""Limit for the caches of clips that are sampled together. One clip of Wan 1.3B takes 6 GiB."""
HELD_OUT_PROMPTS = 4
"""One prompt in so many is held out, the last ones of the list."""


@dataclass
class OwnSamples:
    """A set of samples of the dense model; a set grows when a later stage needs more clips.

    Attributes:
        data: Frames, latent size, seed and prompts, all settled.
        split: Split that the clips are for, which decides the prompts and the noise.
        clips: Number of clips.
        spare: How many of them are held out beside the training clips.
        model: Configuration of the dense model.
        root: Folder of all sets.
        weights: Hashes of the dense model's weights, as JSON data.
        parts: Text encoder that encodes the prompts, as JSON data.
    """

    data: DataConfig
    split: Split
    clips: int
    model: ModelConfig
    root: Path
    weights: Any
    parts: Any
    spare: int = 0
    _contexts: dict[int, Tensor] = field(default_factory=dict[int, Tensor], init=False)

    @property
    def sized(self) -> ModelConfig:
        """The model's configuration with the latent size of the clips."""
        return replace(self.model, latent_size=self.data.latent_size or self.model.latent_size)

    @property
    def frames(self) -> int:
        """Latent frames of a clip."""
        assert self.data.frames is not None
        return self.data.frames

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the clips depend on, but for their number."""
        model = self.sized
        return {
            "format": FORMAT,
            "kind": "self",
            "split": self.split,
            "frames": self.frames,
            "seed": self.data.seed,
            "prompts": split_prompts(self.data.prompts or default_prompts(model), self.split),
            "latent_size": model.latent_size,
            "model": to_dict(model),
            "weights": self.weights,
            "parts": self.parts,
        }

    @cached_property
    def folder(self) -> Path:
        """Folder of this set, named by the hash of its identity."""
        return set_folder(self.root, self.identity)

    @cached_property
    def store(self) -> FolderStore:
        """One file for each clip."""
        return FolderStore(self.folder, self.identity)

    def ready(self) -> DataConfig:
        """The clips as latents."""
        return replace(self.data, source=str(self.folder), clips=self.clips - self.spare)

    def is_done(self) -> bool:
        """Whether all clips are there."""
        return not self.missing()

    def missing(self) -> list[int]:
        """Numbers of the clips that are not there."""
        return [clip for clip in range(self.clips) if not self.store.has(_name(clip))]

    def nbytes(self) -> int:
        """Bytes of the clips that are missing, as float32."""
        geometry, (height, width) = self.model.geometry, self.sized.latent_size
        latents = self.frames * geometry.in_dim * height * width
        return 4 * len(self.missing()) * (latents + geometry.text_len * geometry.text_dim)

    def check(self) -> None:
        """Refuse prompts that the text encoder does not understand."""
        check_prompts(self.model, self.identity["prompts"])

    def encode_prompts(self, media: Media, progress: Progress) -> None:
        """Encode the prompts of the groups of clips that are missing."""
        needed = [clip for group in self._groups() for clip in group]
        prompts = {clip: self._prompt(clip) for clip in needed}
        for unique in progress.track([list(dict.fromkeys(prompts.values()))], "encoding prompts"):
            contexts = dict(zip(unique, media.encode_prompts(unique), strict=True))
            self._contexts = {clip: contexts[prompt] for clip, prompt in prompts.items()}

    def make(self, dense: CausalWanModel, progress: Progress) -> None:
        """Sample the missing clips, several at once."""
        groups, chunks = self._groups(), -(-self.frames // self.model.chunk_frames)
        try:
            with progress.bar("sampling clips", chunks * len(groups)) as advance:
                for group in groups:
                    self._make_group(dense, group, chunks, advance)
        except KeyboardInterrupt:
            progress.note(f"finished clips are kept in {self.folder}; the same command goes on")
            raise

    def _make_group(
        self, dense: CausalWanModel, group: Sequence[int], chunks: int, advance: Advance
    ) -> None:
        """Sample a group as a whole, so that resumed work gives the same clips."""
        context = torch.stack([self._contexts[clip] for clip in group])
        parts: list[Tensor] = []
        for chunk in self._rollout(dense, group, context, chunks):
            parts.append(chunk.cpu())
            advance(1)
        latents = torch.cat(parts, dim=1)[:, : self.frames]
        for clip, one, its_context in zip(group, latents, context, strict=True):
            if not self.store.has(_name(clip)):
                tensors = {"latents": one[None], "context": its_context[None]}
                self.store.put(_name(clip), tensors)

    def _rollout(
        self, dense: CausalWanModel, group: Sequence[int], context: Tensor, chunks: int
    ) -> Iterator[Tensor]:
        seeds = [
            seeded(self.data.seed, clip, f"{self.split} clip").initial_seed() for clip in group
        ]
        config = dense.config
        dense.config = self.sized
        try:
            yield from rollout(
                dense,
                chunks,
                lambda frame: NewPrompt(context) if frame == 0 else None,
                lambda index: [seeded(seed, index, "rollout") for seed in seeds],
            )
        finally:
            dense.config = config

    def _groups(self) -> list[list[int]]:
        """Clips that are sampled together, where one of them is missing."""
        missing = set(self.missing())
        size = clips_at_once(self.sized)
        groups = [
            list(range(start, min(start + size, self.clips)))
            for start in range(0, self.clips, size)
        ]
        return [group for group in groups if not missing.isdisjoint(group)]

    def _prompt(self, clip: int) -> str:
        """The prompts take turns, each time in another order."""
        prompts: Sequence[str] = self.identity["prompts"]
        turn, place = divmod(clip, len(prompts))
        order = torch.randperm(len(prompts), generator=seeded(self.data.seed, turn, "prompts"))
        return prompts[int(order[place])]


def split_prompts(prompts: Sequence[str], split: Split) -> tuple[str, ...]:
    """The prompts of a split: the last quarter of a list is held out.

    Raises:
        ConfigError: The list has one prompt only.
    """
    if len(prompts) < 2:
        raise ConfigError(
            f"samples of the model need two prompts, one of them to hold out, not {len(prompts)}",
            "name a file with more: --prompts FILE, one prompt a line",
        )
    kept = len(prompts) - max(1, len(prompts) // HELD_OUT_PROMPTS)
    return tuple(prompts[:kept] if split == "train" else prompts[kept:])


def clips_at_once(model: ModelConfig) -> int:
    """Clips that are sampled together.

    The number does not depend on free memory, because the last bits of a clip depend on it.
    """
    each = model.cache_bytes(model.cache.window_frames)
    return max(1, min(CLIPS_AT_ONCE, CACHE_BYTES_AT_ONCE // each))


def _name(clip: int) -> str:
    return f"clips-{clip:05d}"
