"""Failures of one point, and failures that would stop every other point too."""

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
"""Failures that may concern one point alone: too little memory, a fit that does not converge, a
missing file. A full disk raises some of these types too: see `is_full_disk`."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or an error that caused it, says that the disk or a quota is full."""
    cause: BaseException | None = error
    while cause is not None:
        # safetensors gives the system's error number in its message only.
        match = re.search(r"\(os error (\d+)\)", str(cause))
        number = cause.errno if isinstance(cause, OSError) else match and int(match[1])
        if number in _FULL:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextmanager
def stopping_failures(rows_file: Path) -> Iterator[None]:
    """Turn errors that stop the whole sweep into one sentence that names the rows file.

    Raises:
        OutputError: The disk is full, or a file that all points share cannot be used.
    """
    hint = f"then start the same command again: {rows_file} keeps what was measured"
    try:
        yield
    except FAILURES as error:
        if is_full_disk(error):
            reason = f"the sweep stopped because the disk is full: {first_line(error)}"
            raise OutputError(reason, f"make room there, {hint}") from error
        if isinstance(error, OSError):
            reason = f"the sweep stopped: {first_line(error)}"
            raise OutputError(reason, f"correct the cause, {hint}") from error
        raise
