"""The base model of a codec: how a codec names it, finds it again, and is read together with it.

A codec depends on what makes keys and values, and on nothing else: it names its base by the SHA-256
of exactly these tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.hub import is_repo
from vmla_convert.checkpoint.keymap import listed
from vmla_convert.checkpoint.lora import parse_lora
from vmla_convert.checkpoint.source import TensorSource, TensorSpec
from vmla_convert.errors import CheckpointError

_KEYS_AND_VALUES = ("k.weight", "k.bias", "norm_k.weight", "v.weight", "v.bias")


def base_tensors(num_layers: int) -> list[str]:
    """Names of the tensors of its base that a codec depends on."""
    return [
        f"blocks.{layer}.self_attn.{part}"
        for layer in range(num_layers)
        for part in _KEYS_AND_VALUES
    ]


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 in hex of a tensor's bytes, row by row."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def find_base(codec: Path, record: Mapping[str, Any]) -> tuple[str, str | None]:
    """Where the base model of a codec is: where it was, beside the codec, or on the Hub.

    Args:
        codec: The codec's folder.
        record: What its record says of the base.

    Returns:
        A path, `demo`, or a Hub id with its revision; and the file in that repository.

    Raises:
        CheckpointError: It is at none of these places.
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
        "name it: --base-model PATH (--teacher PATH in recover and eval)",
    )


def find_loras(codec: Path, record: Mapping[str, Any]) -> tuple[str, ...]:
    """The LoRAs that were merged into the base model of a codec, each where it was or beside it.

    Args:
        codec: The codec's folder.
        record: What its record says of the base.
    """
    found: list[str] = []
    for option in record.get("loras", ()):
        path, scale = parse_lora(option)
        found.append(f"{_kept_place(codec, path) or path}:{scale!r}")
    return tuple(found)


def _kept_place(codec: Path, path: Path) -> Path | None:
    """A path, or what is of its name in a codec's folder or the one above."""
    beside = (codec / path.name, codec.parent / path.name)
    # A bare name is all that a pushed record has, and means nothing where a program runs.
    places = (path, *beside) if path.is_absolute() else beside
    return next((place for place in places if place.exists()), None)


def check_base(
    base: OpenCheckpoint, hashes: Mapping[str, str], codec: Path, shown: Callable[[Any], Any]
) -> None:
    """Refuse another base model than the one that a codec was made for.

    Args:
        base: The model that was found.
        hashes: SHA-256 of each tensor that the codec depends on.
        codec: The codec's folder, for messages.
        shown: Wraps the names that are read, to draw progress.

    Raises:
        CheckpointError: Naming the tensors that differ.
    """
    plain = replace(base, loras=())
    other = [
        name
        for name in shown(list(hashes))
        if name not in plain.names or tensor_hash(plain.read(name)) != hashes[name]
    ]
    if other:
        raise CheckpointError(
            f"{base.source.path} is not the base model of {codec}: "
            f"{len(other)} of {len(hashes)} tensors differ: {listed(other)}",
            "name its base model: --base-model PATH (--teacher PATH in recover and eval)",
        )


def join(base: OpenCheckpoint, codec: OpenCheckpoint) -> OpenCheckpoint:
    """A codec and its base model as one checkpoint, under the codec's settings.

    Raises:
        CheckpointError: They are of different sizes.
    """
    if base.config.geometry != codec.config.geometry:
        raise CheckpointError(
            f"{base.source.path} is of other sizes than the base model of {codec.source.path}",
            "name its base model: --base-model PATH (--teacher PATH in recover and eval)",
        )
    names = {native: f"{_BASE}{stored}" for native, stored in base.names.items()}
    names |= {native: f"{_CODEC}{stored}" for native, stored in codec.names.items()}
    conditioning = {native: f"{_BASE}{name}" for native, name in base.conditioning.items()}
    # LoRAs at load time may bring a licence of their own.
    licence = base.config.licence if base.loras else codec.config.licence
    return OpenCheckpoint(
        source=_Joined(base.source, codec.source),
        family=codec.family,
        names=names,
        config=replace(codec.config, licence=licence),
        known=base.known,
        loras=base.loras,
        conditioning=conditioning,
        base=base.source.path,
    )


_BASE, _CODEC = "base:", "codec:"


@dataclass(frozen=True)
class _Joined:
    """Two sources as one; names say which they are of."""

    base: TensorSource
    codec: TensorSource

    @property
    def path(self) -> Path:
        """Where the codec is."""
        return self.codec.path

    @property
    def key(self) -> str | None:
        """State dict of the base."""
        return self.base.key

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        parts = ((_BASE, self.base), (_CODEC, self.codec))
        return {f"{of}{name}": s for of, source in parts for name, s in source.specs().items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        if name.startswith(_BASE):
            return self.base.read(name.removeprefix(_BASE))
        return self.codec.read(name.removeprefix(_CODEC))
