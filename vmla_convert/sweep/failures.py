"""What one point of a sweep may die of alone, and what would stop every other point too."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vmla_convert.errors import OutputError, VmlaError, first_line

FAILURES = (
    VmlaError,
    RuntimeError,
    ArithmeticError,
    ValueError,
    MemoryError,
    OSError,
    SafetensorError,
)
"""What a point may die of without taking the others along: no memory, numbers, convergence, a file
that is lost to it. A full disk is of these kinds too: see `is_full_disk`."""

# Of a disk, or a share of one. A failed row may still fit, so that each point would fail in turn.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full_disk(error: BaseException) -> bool:
    """Whether the points to come would fail of the same.

    What wrapped an error says nothing of its kind, so those below it are asked too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if _number(seen) in _FULL:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def keeping(rows_file: Path) -> Iterator[None]:
    """Say in one sentence why a sweep cannot go on, and that nothing measured is lost.

    Raises:
        OutputError: A disk is full, or a file that all points share, their rows for one, is lost.
    """
    hint = f"then start the same command again: what was measured is kept in {rows_file}"
    try:
        yield
    except FAILURES as error:
        if is_full_disk(error):
            told = f"the sweep stopped, as the disk is full: {first_line(error)}"
            raise OutputError(told, f"make room there, {hint}") from error
        if isinstance(error, OSError):
            told = f"the sweep stopped: {first_line(error)}"
            raise OutputError(told, f"put that right, {hint}") from error
        raise


def _number(error: BaseException) -> int | None:
    """The system's number of an error; safetensors tells it in words."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None
