"""The base model of a codec: name it, find it again, and open it together with the codec.

A codec depends on the tensors that make keys and values, and names its base by the SHA-256 of these
tensors in bfloat16. A copy of the base in another precision is then the same base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.hub import is_repo
from vmla_convert.checkpoint.keymap import listed
from vmla_convert.checkpoint.lora import parse_lora
from vmla_convert.checkpoint.source import TensorSource
from vmla_convert.errors import CheckpointError
from vmla_convert.progress import Progress

# Prefixes of tensor names that say which of two sources holds a tensor.
_BASE, _CODEC = "base:", "codec:"

PRECISION = "bfloat16"
"""Dtype of hashed tensors, as a record names it. Records without a name hash tensors as stored."""

_KEYS_AND_VALUES = ("k.weight", "k.bias", "norm_k.weight", "v.weight", "v.bias")


def base_tensors(num_layers: int) -> list[str]:
    """Names of the tensors of a base model that a codec depends on."""
    return [
        f"blocks.{layer}.self_attn.{part}"
        for layer in range(num_layers)
        for part in _KEYS_AND_VALUES
    ]


def tensor_hash(tensor: torch.Tensor, precision: str | None = PRECISION) -> str:
    """SHA-256 in hex of the bytes of a tensor, row by row.

    Args:
        tensor: The tensor.
        precision: Dtype that the tensor is rounded to; None hashes the tensor as it is stored.
    """
    if precision is not None:
        tensor = tensor.to(getattr(torch, precision))
    tensor = tensor.detach().cpu()
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def find_base(codec: Path, record: Mapping[str, Any]) -> tuple[str, str | None]:
    """Find the base model of a codec: at its recorded path, beside the codec, or on the Hub.

    Args:
        codec: The codec's folder.
        record: The table `base` of the codec's conversion.json.

    Returns:
        A path, `demo`, or a Hub id with its revision; and the file in that repository.

    Raises:
        CheckpointError: The base model is at none of these places.
    """
    repo, name = record.get("repo"), str(record.get("name", ""))
    if repo == "demo":
        return repo, None
    if name and (place := _kept_place(codec, Path(record.get("path", name)))):
        return str(place), None
    if repo and is_repo(repo):
        revision = record.get("revision")
        return f"{repo}@{revision}" if revision else repo, record.get("file")
    raise CheckpointError(
        f"the base model '{name}' of {codec} is not where it was, nor beside the codec",
        "give its path: --base-model PATH, in eval and recover --teacher PATH",
    )


def find_loras(codec: Path, record: Mapping[str, Any]) -> tuple[str, ...]:
    """Find the LoRAs that were merged into the base model: at recorded paths or beside the codec.

    Args:
        codec: The codec's folder.
        record: The table `base` of the codec's conversion.json.
    """
    found: list[str] = []
    for option in record.get("loras", ()):
        path, scale = parse_lora(option)
        found.append(f"{_kept_place(codec, path) or path}:{scale!r}")
    return tuple(found)


def _kept_place(codec: Path, path: Path) -> Path | None:
    """A recorded path, or a file of the same name in the codec's folder or the folder above."""
    beside = (codec / path.name, codec.parent / path.name)
    # A pushed record has only a bare name, which must not mean a file of the working folder.
    places = (path, *beside) if path.is_absolute() else beside
    return next((place for place in places if place.exists()), None)


def check_base(
    base: OpenCheckpoint, record: Mapping[str, Any], codec: Path, progress: Progress
) -> None:
    """Refuse a base model other than the one that a codec was made for.

    Args:
        base: The model that was found.
        record: The table `base` of the codec's conversion.json.
        codec: The codec's folder, for messages.
        progress: Where to draw.

    Raises:
        CheckpointError: Tensors differ; the message names them.
    """
    plain = replace(base, loras=())
    other = differing(
        record, lambda name: plain.read(name) if name in plain.names else None, progress
    )
    if other:
        raise CheckpointError(
            f"{base.source.path} is not the base model of {codec}: "
            f"{len(other)} of {len(record['tensors'])} tensors differ: {listed(other)}",
            "give the model that the codec was made for: --base-model PATH or --teacher PATH",
        )


def differing(
    record: Mapping[str, Any],
    read: Callable[[str], torch.Tensor | None],
    progress: Progress,
) -> list[str]:
    """Names of the tensors that are not those of a codec's base model.

    Args:
        record: The table `base` of the codec's conversion.json.
        read: Gives a tensor by native name, None where there is none.
        progress: Where to draw.
    """
    hashes, precision = record["tensors"], record.get("precision")

    def same(name: str) -> bool:
        tensor = read(name)
        return tensor is not None and tensor_hash(tensor, precision) == hashes[name]

    return [n for n in progress.track(list(hashes), "checking base model") if not same(n)]


def join(base: OpenCheckpoint, codec: OpenCheckpoint) -> OpenCheckpoint:
    """Make one checkpoint of a codec and its base model, with the codec's settings.

    Raises:
        CheckpointError: The two have different sizes.
    """
    if base.config.geometry != codec.config.geometry:
        raise CheckpointError(
            f"{base.source.path} has other sizes than the base model of {codec.source.path}",
            "give the model that the codec was made for: --base-model PATH or --teacher PATH",
        )
    sources = {_BASE: base.source, _CODEC: codec.source}
    specs = {f"{of}{name}": spec for of, s in sources.items() for name, spec in s.specs().items()}

    def read(name: str) -> torch.Tensor:
        of, _, stored = name.partition(":")
        return sources[f"{of}:"].read(stored)

    names = {native: f"{_BASE}{stored}" for native, stored in base.names.items()}
    names |= {native: f"{_CODEC}{stored}" for native, stored in codec.names.items()}
    return OpenCheckpoint(
        source=TensorSource(codec.source.path, base.source.key, specs, read),
        family=codec.family,
        names=names,
        # LoRAs that are merged at load time may bring their own licence.
        config=replace(
            codec.config, licence=base.config.licence if base.loras else codec.config.licence
        ),
        known=base.known,
        loras=base.loras,
        conditioning={native: f"{_BASE}{name}" for native, name in base.conditioning.items()},
        base=base.source.path,
    )
