"""Check everything that can go wrong with the files of a checkpoint, and name the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmla_convert.checkpoint.base import check_base
from vmla_convert.checkpoint.families import OpenCheckpoint, open_checkpoint
from vmla_convert.checkpoint.integrity import (
    bytes_hash,
    file_hash,
    is_finite,
    recorded_files,
)
from vmla_convert.checkpoint.source import weight_files
from vmla_convert.errors import CheckpointError
from vmla_convert.loading.load import (
    Source,
    base_of,
    check_whole,
    is_codec,
    locate,
    read_provenance,
)
from vmla_convert.progress import Progress, Silent


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        place: A file, or a tensor by its name in the file.
        what: The fault, in a few words.
    """

    place: str
    what: str


@dataclass(frozen=True)
class Verified:
    """The result of a check.

    Attributes:
        path: The checkpoint.
        files: For each weight file, whom its SHA-256 agrees with: its record, the Hub, or nobody
            where no hash is known.
        tensors: Number of tensors that were read.
        base: Path of a codec's base model.
        faults: Everything that is wrong; empty for a sound checkpoint.
    """

    path: Path
    files: dict[str, str]
    tensors: int
    base: Path | None
    faults: tuple[Fault, ...]


def verify(source: Source, progress: Progress | None = None) -> Verified:
    """Check hashes, shapes and finiteness of all weights, and the base model of a codec.

    Args:
        source: A file or folder, `demo`, or a Hub id, which is downloaded.
        progress: Where progress is drawn.

    Raises:
        CheckpointError: The files are missing, cut short, or do not make a model: nothing further
            can be checked.
    """
    progress = progress or Silent()
    path, how = locate(source)
    checkpoint = open_checkpoint(path, replace(how, loras=(), base_model=None, verify=False))
    check_whole(checkpoint)
    record = read_provenance(path)
    hashes: dict[str, str] = record.get("weights", {}).get("tensors", {})
    files, faults = _files(path, record, progress)
    faults += _tensors(checkpoint, hashes, progress)
    tensors, base = len(checkpoint.names), None
    if is_codec(path):
        opened = open_checkpoint(*locate(replace(base_of(path, how), loras=(), verify=False)))
        base = opened.source.path
        try:
            check_base(opened, record.get("base", {}), path, progress)
        except CheckpointError as error:
            faults.append(Fault(str(base), error.message))
        faults += _tensors(opened, {}, progress)
        tensors += len(opened.names)
    return Verified(path, files, tensors, base, tuple(faults))


def _files(
    path: Path, record: dict[str, Any], progress: Progress
) -> tuple[dict[str, str], list[Fault]]:
    """Records that each weight file agrees with, and the files that differ."""
    recorded, agrees, faults = recorded_files(path, record), dict[str, str](), list[Fault]()
    for file in progress.track(weight_files(path), "hashing files"):
        known = {"its record": recorded.get(file), "the Hub": _hub_hash(file)}
        found = file_hash(file)
        for name, text in known.items():
            if text not in (None, found):
                faults.append(Fault(str(file), f"its SHA-256 is not that of {name}"))
        same = [name for name, text in known.items() if text == found]
        agrees[file.name] = ", ".join(same) or "nobody"
    return agrees, faults


def _hub_hash(file: Path) -> str | None:
    """SHA-256 of a large file in the Hub's cache, which is the name of its blob."""
    blob = file.resolve()
    is_hash = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
    return blob.name if is_hash else None


def _tensors(
    checkpoint: OpenCheckpoint, hashes: dict[str, str], progress: Progress
) -> Iterator[Fault]:
    """Tensors that are not finite, or not the recorded ones."""
    source = checkpoint.source
    for name in progress.track(sorted(checkpoint.names.values()), "checking tensors"):
        tensor = source.read(name)
        if hashes and bytes_hash(tensor) != hashes.get(name):
            yield Fault(name, "its bytes are not those of the record")
        if not is_finite(tensor):
            odd = int((~tensor.isfinite()).sum())
            yield Fault(name, f"{odd:,} of {tensor.numel():,} numbers are NaN or infinite")
