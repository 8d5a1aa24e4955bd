"""Locks between processes that write the same output. A lock ends with its process, killed or not.

The system keeps a lock (flock) on an open file and drops it when the process ends, so no lock is
ever left over. The file beside the output only says who holds the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from vmla_convert.errors import OutputError


def lock_file(out: Path) -> Path:
    """The file that is locked while `out` is written."""
    return out.with_name(f"{out.name}.lock")


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Keep other processes from writing the same output until the context ends.

    Args:
        out: The file or folder that is made; need not exist.

    Raises:
        OutputError: Another process writes `out`, or the place cannot be written.
    """
    with _locked(lock_file(out), out, wait=False):
        yield


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait until no other process changes a file, and keep others from it until the context ends.

    Raises:
        OutputError: The place cannot be written.
    """
    with _locked(lock_file(path), path, wait=True):
        yield


@contextmanager
def _locked(file: Path, out: Path, wait: bool) -> Iterator[None]:
    made = [folder for folder in file.absolute().parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = _take(file, wait)
    except BlockingIOError:
        raise OutputError(
            f"{out} is being written by {_holder(file)}",
            "wait until that process ends, or choose another -o",
        ) from None
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}",
            "check the space and rights there, or choose another -o",
        ) from error
    try:
        yield
    finally:
        # Removed while the lock is held: see _take. A disk that refuses leaves an unlocked file.
        with suppress(OSError):
            file.unlink(missing_ok=True)
        held.close()
        for folder in made:
            with suppress(OSError):  # the output is in there now
                folder.rmdir()


def _take(file: Path, wait: bool) -> IO[str]:
    """Open and lock a file.

    Raises:
        BlockingIOError: Another process holds the lock, and `wait` is False.
    """
    while True:
        held = file.open("a")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The holder before may have removed the file after this process opened the file.
            if file.exists() and os.path.samestat(file.stat(), os.fstat(held.fileno())):
                held.truncate(0)
                held.write(json.dumps(_self()))
                held.flush()
                return held
        except BaseException:
            held.close()
            raise
        held.close()


def _self() -> dict[str, str | int]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _holder(file: Path) -> str:
    """The process that holds a lock, in words."""
    try:
        who = json.loads(file.read_text())
        return f"process {who['process']} on {who['host']} ({who['command']}) since {who['since']}"
    except (OSError, ValueError, LookupError, TypeError):  # it is just being written
        return "another process"
