"""Output folders that appear whole or not at all, and the checks of the place before any work.

A folder `out` is filled as `<out>.partial/checkpoint/` and then renamed, which is one step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vmla_convert.errors import OutputError, refuse_existing

IDENTITY_NAME, STATE_NAME = "identity.json", "state.json"
PARTS, UNFINISHED = "parts", "checkpoint"
_NEW = ".new"
OTHER_PLACE = "check the space and rights there, or choose another -o"


def partial_folder(out: Path) -> Path:
    """The folder that holds `out` until `out` is complete."""
    return out.with_name(f"{out.name}.partial")


def unfinished_folder(out: Path) -> Path:
    """The folder that is renamed to `out`."""
    return partial_folder(out) / UNFINISHED


def is_resumable(out: Path) -> bool:
    """Whether an interrupted run left work in `partial_folder` that `--resume` can continue."""
    identity = partial_folder(out) / IDENTITY_NAME
    return identity.is_file() and identity.read_text("utf-8") != "null"


def refuse_taken(out: Path, resume: bool = False) -> None:
    """Refuse, before any work, a folder that cannot be written.

    Args:
        out: The folder to make.
        resume: Whether to continue an interrupted run.

    Raises:
        OutputError: `out` is taken, or an interrupted run or somebody's files are in the way.
    """
    refuse_existing(out)
    place = next(path for path in out.absolute().parents if path.exists())
    if not place.is_dir():
        raise OutputError(f"{out} cannot be written: {place} is a file", "choose another -o")
    partial = partial_folder(out)
    ours = {UNFINISHED, PARTS, IDENTITY_NAME, STATE_NAME}
    if partial.exists() and not (
        partial.is_dir() and {path.name.removesuffix(_NEW) for path in partial.iterdir()} <= ours
    ):
        raise OutputError(
            f"{partial} is in the way: it holds other files", "choose another -o or move it"
        )
    if is_resumable(out) and not resume:
        raise OutputError(
            f"{partial} holds an interrupted conversion",
            "continue it with vmla convert --resume, remove it, or choose another -o",
        )


def check_place(out: Path, nbytes: int, resume: bool) -> None:
    """Refuse, before any work, what `refuse_taken` does, and a disk without room for `nbytes`.

    Raises:
        OutputError: The folder cannot be written.
    """
    refuse_taken(out, resume)
    if not partial_folder(out).exists():
        require_room(out, nbytes)


def require_room(
    out: Path, nbytes: int, hint: str = "make room there, or choose another -o"
) -> None:
    """Refuse a disk on which fewer than `nbytes` are free.

    Raises:
        OutputError: Space is lacking.
    """
    place = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OutputError(
            f"{out} needs {nbytes / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free",
            hint,
        )


@contextmanager
def new_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """Yield an empty folder, which becomes `out` after a clean exit and is removed after an error.

    Raises:
        OutputError: `out` is taken or cannot be written, or space is lacking.
    """
    refuse_taken(out)
    folder = unfinished_folder(out)
    try:
        with reported(out):
            discard(out)
            require_room(out, nbytes)
            folder.mkdir(parents=True)
            yield folder
            publish(out)
    finally:
        discard(out)


def publish(out: Path) -> None:
    """Rename the unfinished folder to `out`, after all of it is on the disk."""
    folder = unfinished_folder(out)
    for path in (*folder.rglob("*"), folder):
        sync(path)
    os.rename(folder, out)
    sync(out.parent)


def discard(out: Path) -> None:
    """Remove the partial folder of `out`."""
    # A disk that refuses has already said so, or says so at the next write.
    with suppress(OSError):
        # The identity first: half a folder must not look like one to continue.
        (partial_folder(out) / IDENTITY_NAME).unlink(missing_ok=True)
        shutil.rmtree(partial_folder(out), ignore_errors=True)


@contextmanager
def reported(place: Path, hint: str = OTHER_PLACE) -> Iterator[None]:
    """Turn the errors of a disk into one sentence.

    Raises:
        OutputError: The disk refuses.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{place} cannot be written: {error}", hint) from error


def write_files(folder: Path, files: Mapping[str, str | dict[str, Any]]) -> None:
    """Write texts and JSON tables, by their paths in the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        path.write_text(content, "utf-8")


def copied_bytes(copies: Mapping[str, Path]) -> int:
    """Bytes of folders that are to be copied."""
    files = (path for folder in copies.values() for path in folder.rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all, and stays there after a power cut."""
    draft = draft_of(path)
    draft.write_text(text, "utf-8")
    rename_synced(draft, path)


def draft_of(path: Path) -> Path:
    """The file that `write_whole` writes before it takes the place of `path`."""
    return path.with_name(f"{path.name}{_NEW}")


def rename_synced(draft: Path, path: Path) -> None:
    """Put a finished file in its place."""
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
