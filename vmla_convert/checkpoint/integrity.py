"""Hashes of weight files and of their tensors: written into a record, checked on every read.

conversion.json keeps three tables under `weights`: the SHA-256 of every file, the SHA-256 of every
tensor, and a short checksum of every tensor. Reading a tensor compares the checksum, which costs a
twentieth of a SHA-256 and needs no second read. `vmla verify` and `vmla push` compare the hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vmla_convert.checkpoint.hub import BESIDE
from vmla_convert.checkpoint.source import TensorSource, located, open_source, weight_files
from vmla_convert.config import SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.storage.output import write_files
from vmla_convert.tables import from_dict, read_json

CONVERSION_NAME = BESIDE[1]
"""The record of how a converted folder was made, beside its weights."""

_COLUMNS = 4099
"""Words of eight bytes in a row of a checksum. A prime, so that pages that change places show."""


class NotFiniteError(CheckpointError):
    """A tensor holds a NaN or an infinite number."""


def seal(folder: Path) -> None:
    """Add the hashes of all weights to the record of a finished folder; no record, no hashes."""
    place = located(folder).parent
    if not (place / CONVERSION_NAME).is_file():
        return
    record, source = read_json(place / CONVERSION_NAME), open_source(folder)
    hashes, sums = dict[str, str](), dict[str, str]()
    for name in source.specs():
        tensor = source.read(name)
        hashes[name], sums[name] = bytes_hash(tensor), checksum(tensor)
    files = {file.name: file_hash(file) for file in weight_files(folder)}
    record["weights"] = {"files": files, "tensors": hashes, "checksums": sums}
    write_files(place, {CONVERSION_NAME: record})


def read_record(path: Path) -> dict[str, Any]:
    """Read the record beside a checkpoint's weights; empty when there is none.

    Raises:
        CheckpointError: The record is damaged, or there is no checkpoint.
    """
    file = located(path).parent / CONVERSION_NAME
    if not file.is_file():
        return {}
    try:
        record = read_json(file)
        from_dict(SourceConfig, record.get("source", {}).get("asked", {}))
        for table in record.get("weights", {}).values():
            if not all(isinstance(text, str) for text in table.values()):
                raise ValueError("a hash is not a text")
    except (ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{file} is not a record of a conversion", "convert again, or remove it"
        ) from error
    return record


def recorded_files(path: Path, record: Mapping[str, Any]) -> dict[Path, str]:
    """The hash that a record names for each weight file of a checkpoint; empty for old records.

    Raises:
        CheckpointError: The record names other files than those that are there.
    """
    hashes: dict[str, str] = record.get("weights", {}).get("files", {})
    files = {file.name: file for file in weight_files(path)} if hashes else {}
    if odd := sorted(hashes.keys() ^ files.keys()):
        raise CheckpointError(
            f"the record of {path} does not fit its files: {', '.join(odd)}",
            "copy or download the whole folder again",
        )
    return {files[name]: text for name, text in hashes.items()}


def checked(source: TensorSource) -> TensorSource:
    """A source that compares every tensor with the checksum in its record, where there is one.

    Raises:
        CheckpointError: The record is damaged, or names other files or tensors.
    """
    record = read_record(source.path)
    names = {file.name for file in weight_files(source.path)}
    if source.path.is_file() and names.isdisjoint(record.get("weights", {}).get("files", {})):
        return source  # a base model in the folder of its codec, whose record this is
    recorded_files(source.path, record)
    sums: dict[str, str] = record.get("weights", {}).get("checksums", {})
    if odd := sorted(sums.keys() ^ source.specs().keys()) if sums else []:
        raise CheckpointError(
            f"the record of {source.path} does not fit its tensors: {', '.join(odd[:5])}",
            "copy or download the whole folder again",
        )

    def read(name: str) -> torch.Tensor:
        tensor = source.read(name)
        if checksum(tensor) != sums[name]:
            raise CheckpointError(
                f"'{name}' of {source.path} is not as it was written: its checksum is not the "
                "recorded one",
                f"see everything that differs: vmla verify {source.path}; then copy or download "
                "it again",
            )
        return tensor

    return replace(source, _read=read) if sums else source


def refuse_changed(files: list[Path]) -> None:
    """Refuse weight files that are not those of their record.

    Raises:
        CheckpointError: Naming the files.
    """
    if files:
        raise CheckpointError(
            f"{', '.join(map(str, files))} is not as it was written: its SHA-256 is not the "
            "recorded one",
            f"see which tensor: vmla verify {files[0].parent}; then copy or download it again",
        )


def refuse_not_finite(name: str, tensor: torch.Tensor, path: Path) -> None:
    """Refuse a tensor with NaN or infinite numbers.

    Raises:
        NotFiniteError: Naming the tensor.
    """
    if not is_finite(tensor):
        raise NotFiniteError(
            f"'{name}' of {path} holds NaN or infinite numbers",
            "download the checkpoint again; if it is the same, its training had failed",
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number of a tensor is finite."""
    # A sum needs no second tensor, but may overflow on finite numbers. Without a dtype: the sum of
    # bfloat16 runs at 10 GB/s, and at 0.7 GB/s if float32 is asked for.
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def file_hash(file: Path) -> str:
    """SHA-256 in hex of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def bytes_hash(tensor: torch.Tensor) -> str:
    """SHA-256 in hex of the bytes of a tensor on the CPU, row by row."""
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256 in hex of the column sums of a tensor's bytes, as rows of 64-bit integers.

    Damage within 32 KB, such as a flipped bit or a page of zeros, always changes a sum. Other
    damage stays unnoticed with a chance of about 2^-64. Sums run at 19 GB/s on a core that hashes
    1.7 GB/s.

    Args:
        tensor: A tensor on the CPU, contiguous and in memory of its own.
    """
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    whole = data.size - data.size % (8 * _COLUMNS)
    # numpy needs no team of threads, which would compete with those of other programs.
    sums = data[:whole].view(np.int64).reshape(-1, _COLUMNS).sum(0)
    digest = hashlib.sha256(sums.data)
    digest.update(data[whole:].data)
    return digest.hexdigest()
