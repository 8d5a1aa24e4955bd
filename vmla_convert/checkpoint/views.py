"""Split fused projections: one stored tensor that holds query, key and value, or key and value."""

from __future__ import annotations

import re

import torch

from vmla_convert.checkpoint.source import TensorSource, TensorSpec
from vmla_convert.errors import CheckpointError

# Fused layer, and the layers whose rows are stacked in it: Krea's in native names, then diffusers.
FUSED = (
    ("self_attn.to_qkv", ("self_attn.q", "self_attn.k", "self_attn.v")),
    ("attn1.to_qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("attn2.to_kv", ("attn2.to_k", "attn2.to_v")),
)


def unfuse(source: TensorSource) -> TensorSource:
    """Return a source in which every tensor of `FUSED` is replaced by its parts.

    Raises:
        CheckpointError: A fused tensor does not divide, or its parts are stored as well.
    """
    specs = source.specs()
    parts: dict[str, tuple[str, int, int]] = {}  # name: stored name, place, number of parts
    for name, spec in source.specs().items():
        for fused, layers in FUSED:
            if not (match := re.fullmatch(rf"(.*){re.escape(fused)}\.(weight|bias)", name)):
                continue
            if not spec.shape or spec.shape[0] % len(layers):
                raise CheckpointError(
                    f"{source.path} has {name} of shape {spec.shape}, which is not {len(layers)} "
                    "projections in one",
                    "check that it is a Wan video model",
                )
            rows = (spec.shape[0] // len(layers), *spec.shape[1:])
            for place, layer in enumerate(layers):
                part = f"{match[1]}{layer}.{match[2]}"
                if part in specs:
                    raise CheckpointError(
                        f"{source.path} has '{part}' and, fused, '{name}'",
                        "keep one of the two; in diffusers, unfuse_qkv_projections() before you "
                        "save",
                    )
                parts[part] = name, place, len(layers)
                specs[part] = TensorSpec(rows, spec.dtype)
            del specs[name]

    def read(name: str) -> torch.Tensor:
        if name not in parts:
            return source.read(name)
        stored, place, count = parts[name]
        # The copy lets the other parts leave memory.
        return source.read(stored).chunk(count)[place].clone()

    return TensorSource(source.path, source.key, specs, read) if parts else source
