"""Split fused projections: one stored tensor that holds query, key and value, or key and value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from vmla_convert.checkpoint.source import TensorSource, TensorSpec
from vmla_convert.errors import CheckpointError

# Fused layer, and the layers whose rows are stacked in it: Krea's in native names, then diffusers.
FUSED = (
    ("self_attn.to_qkv", ("self_attn.q", "self_attn.k", "self_attn.v")),
    ("attn1.to_qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("attn2.to_kv", ("attn2.to_k", "attn2.to_v")),
)


class _Part(NamedTuple):
    """One of `parts` equal groups of rows of a stored tensor."""

    stored: str
    place: int
    parts: int


@dataclass(frozen=True)
class _Unfused:
    source: TensorSource
    parts: dict[str, _Part]

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def key(self) -> str | None:
        return self.source.key

    def specs(self) -> dict[str, TensorSpec]:
        stored = self.source.specs()
        whole = {part.stored for part in self.parts.values()}
        apart = {
            name: TensorSpec(
                (stored[part.stored].shape[0] // part.parts, *stored[part.stored].shape[1:]),
                stored[part.stored].dtype,
            )
            for name, part in self.parts.items()
        }
        return {name: spec for name, spec in stored.items() if name not in whole} | apart

    def read(self, name: str) -> torch.Tensor:
        if name not in self.parts:
            return self.source.read(name)
        stored, place, parts = self.parts[name]
        # The copy lets the other parts leave memory.
        return self.source.read(stored).chunk(parts)[place].clone()


def unfuse(source: TensorSource) -> TensorSource:
    """Return a source in which every tensor of `FUSED` is replaced by its parts.

    Raises:
        CheckpointError: A fused tensor does not divide, or its parts are stored as well.
    """
    stored = source.specs()
    parts: dict[str, _Part] = {}
    for name, spec in stored.items():
        for fused, layers in FUSED:
            if not (match := re.fullmatch(rf"(.*){re.escape(fused)}\.(weight|bias)", name)):
                continue
            if not spec.shape or spec.shape[0] % len(layers):
                raise CheckpointError(
                    f"{source.path} has {name} of shape {spec.shape}, which is not {len(layers)} "
                    "projections in one",
                    "check that it is a Wan video model",
                )
            for place, layer in enumerate(layers):
                parts[f"{match[1]}{layer}.{match[2]}"] = _Part(name, place, len(layers))
    if twice := sorted(parts.keys() & stored.keys()):
        raise CheckpointError(
            f"{source.path} has '{twice[0]}' and, fused, '{parts[twice[0]].stored}'",
            "keep one of the two; in diffusers, unfuse_qkv_projections() before you save",
        )
    return _Unfused(source, parts) if parts else source
