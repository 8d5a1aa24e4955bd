"""`vmla` and `python -m vmla_convert`: run the CLI and turn what goes wrong into exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from vmla_convert.console import out
from vmla_convert.errors import VmlaError, first_line

INTERRUPTED = 130  # 128 + SIGINT, as shells count
DISK_ERRORS = frozenset((errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO))


def main(run: Callable[[], object] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        run: What to run in place of the typer app.

    Returns:
        0 when done, 2 for a mistake the user can mend, 130 when interrupted, 1 for anything else.

    Raises:
        SystemExit: With 143 where the process was asked to end (SIGTERM).
    """
    try:
        with _stopped_in_order():
            if run is None:
                from vmla_convert.cli import app

                run = app
            run()
    except VmlaError as error:
        out.fail(error)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        # typer turns Ctrl-C into this code without a word.
        if stop.code == INTERRUPTED:
            return _interrupted()
        raise
    except Exception as error:
        if os.environ.get("VMLA_DEBUG") == "1":
            raise
        if (known := _of_the_machine(error)) is not None:
            out.fail(known)
            return 2
        # torch appends whole stack traces to its messages.
        out.fail(VmlaError(first_line(error), "set VMLA_DEBUG=1 for the traceback"))
        return 1
    return 0


def _of_the_machine(error: Exception) -> VmlaError | None:
    """An error for the user where memory, a disk or a file is lacking."""
    if _lacks_memory(error):
        reason = f"memory is lacking: {first_line(error)}"
        return VmlaError(reason, "see 'Out of memory' in docs/troubleshooting.md")
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return VmlaError(
            f"{error.filename or 'a file'} cannot be written: {error.strerror}",
            "check the space and rights there; temporary files go where TMPDIR says",
        )
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return VmlaError(f"{error.filename} is no longer there", "put it back, then start again")
    return None


def _lacks_memory(error: Exception) -> bool:
    """Whether memory was refused; torch raises a type of its own on a GPU only."""
    refused = ("can't allocate memory", "calculation overflowed", "out of memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in refused)


@contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Clean up on SIGTERM too, by which schedulers, containers and `timeout` stop a program."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Only the main thread may.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted() -> int:
    out.say("interrupted")
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
