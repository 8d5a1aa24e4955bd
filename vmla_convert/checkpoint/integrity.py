"""SHA-256 of weight files and of their tensors: written into a record, checked on every load.

The hash of a file says whether the file is as it was written; the hashes of its tensors say which
tensor is not. conversion.json keeps both under `weights`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vmla_convert.checkpoint.hub import BESIDE
from vmla_convert.checkpoint.source import located, open_source, weight_files
from vmla_convert.errors import CheckpointError
from vmla_convert.storage.output import write_files
from vmla_convert.tables import read_json

CONVERSION_NAME = BESIDE[1]
"""The record of how a converted folder was made, beside its weights."""


class NotFiniteError(CheckpointError):
    """A tensor holds a NaN or an infinite number."""


def seal(folder: Path) -> None:
    """Add the hashes of all weights to the record of a finished folder; no record, no hashes."""
    place = located(folder).parent
    if not (place / CONVERSION_NAME).is_file():
        return
    record, source = read_json(place / CONVERSION_NAME), open_source(folder)
    record["weights"] = {
        "files": {file.name: file_hash(file) for file in weight_files(folder)},
        "tensors": {name: bytes_hash(source.read(name)) for name in source.specs()},
    }
    write_files(place, {CONVERSION_NAME: record})


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


@contextmanager
def checked_meanwhile(hashes: Mapping[Path, str]) -> Iterator[None]:
    """Hash files in other threads while the body reads them.

    A core hashes 1.6 GB a second (SHA instructions of x86), so idle cores hide the cost of files
    that come from a disk. Without idle cores, 2.7 GB cost 1.8 s.

    Raises:
        CheckpointError: After the body, where a file is not the recorded one.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {file: pool.submit(file_hash, file) for file in hashes}
        try:
            yield
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        refuse_changed([file for file, text in hashes.items() if found[file].result() != text])


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
    # A sum needs no second tensor, but may overflow on finite numbers.
    return bool(tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all())


def file_hash(file: Path) -> str:
    """SHA-256 in hex of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def bytes_hash(tensor: torch.Tensor) -> str:
    """SHA-256 in hex of the bytes of a tensor on the CPU, row by row."""
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
