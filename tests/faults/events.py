"""Run a command in a forked process, and let something happen at one of its file events.

Python announces every opened file, rename or removal to audit hooks before it happens. Events are
counted, so that a fault meets a chosen stage of a command and not a chosen time: a busy machine
then tests the same stages.

PYTEST_DONT_REWRITE, because the runner imports this module without pytest.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from vmla_convert.__main__ import main

HUNG = 300.0
"""Seconds after which a command counts as hanging."""

CHANGES = frozenset(("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"))
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Event:
    """One access to a file.

    Attributes:
        name: Name of the audit event.
        path: The file.
        writes: Whether content is written, which a full disk refuses.
    """

    name: str
    path: str
    writes: bool


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code; None where the command was killed.
        events: Number of events.
        said: Text that the command printed to stderr.
        hung: Whether the command had to be stopped.
    """

    code: int | None
    events: int
    said: str
    hung: bool = False

    @property
    def refused(self) -> bool:
        """Whether the command ended in a sentence with a hint."""
        explained = "Error: " in self.said and "Traceback" not in self.said
        return self.code == 2 and explained


Act = Callable[[int, Event], None]
"""Called at every event with its number, counted from 1."""


def run_watched(words: Sequence[str], place: Path, act: Act) -> Ended:
    """Run `vmla` in a forked process.

    Args:
        words: The words after `vmla`.
        place: Folder of the events that count, and of the process's temporary files.
        act: Called at every event, in the forked process.
    """
    counted = mmap.mmap(-1, 8)
    log = place.with_name(f"{place.name}.log")
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            _quiet(log)
            _watch(place, counted, act)
            sys.argv = ["vmla", *words]
            code = _exit_code()
            sys.stderr.flush()
            os._exit(code)
        finally:
            os._exit(99)
    started, hung = perf_counter(), False
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if perf_counter() - started > HUNG and not hung:
            hung = True
            os.kill(child, signal.SIGKILL)
        sleep(0.002)
    code = os.waitstatus_to_exitcode(done[1])
    events = int.from_bytes(counted[:8], "little")
    return Ended(None if code < 0 else code, events, log.read_text(errors="replace"), hung)


def _quiet(log: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    # Pytest puts objects of its own here.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _watch(place: Path, counted: mmap.mmap, act: Act) -> None:
    temporary = place / "tmp"
    temporary.mkdir(exist_ok=True)
    tempfile.tempdir = str(temporary)
    inside, number, busy = str(place), 0, False

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal number, busy
        if busy or not (name == "open" or name in CHANGES):
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | Path) else ""
        if not path.startswith(inside):
            return
        number, busy = number + 1, True
        counted[:8] = number.to_bytes(8, "little")
        try:
            opened = name == "open" and bool((args[2] or 0) & _WRITES)
            act(number, Event(name, path, opened or name == "os.mkdir"))
        finally:
            busy = False

    sys.addaudithook(hook)


def _exit_code() -> int:
    try:
        return main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0


def nothing(_: int, __: Event) -> None:
    """Let a command run."""


def kill_at(at: int, delay: float) -> Act:
    """End the process some seconds after an event.

    The alarm's default action leaves no time to clean up, as SIGKILL does. A delay meets writes
    that are not events, in the middle.
    """
    delay = max(delay, 1e-6)  # 0 would be no alarm

    def act(number: int, _: Event) -> None:
        if number == at:
            signal.setitimer(signal.ITIMER_REAL, delay)

    return act


def full_disk_from(at: int) -> Act:
    """Refuse to write from an event on: the disk is full."""
    return _refuse_from(at, errno.ENOSPC)


def read_only_from(at: int) -> Act:
    """Refuse every change from an event on: the disk is read-only."""
    return _refuse_from(at, errno.EROFS)


def _refuse_from(at: int, code: int) -> Act:
    def act(number: int, event: Event) -> None:
        changes = event.writes or (code == errno.EROFS and event.name in CHANGES)
        if number >= at and changes:
            raise OSError(code, os.strerror(code), event.path)

    return act


def vanish_at(at: int, folder: Path) -> Act:
    """Move an input away at an event."""

    def act(number: int, _: Event) -> None:
        if number == at:
            folder.rename(folder.with_name(f"{folder.name}.gone"))

    return act
