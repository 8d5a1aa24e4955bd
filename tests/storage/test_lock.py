"""Two processes never write one output, and a lock ends with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmla_convert.errors import OutputError
from vmla_convert.storage.lock import lock_file, sole_writer

HOLD = """
import sys, time
from pathlib import Path
from vmla_convert.storage.lock import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(out: Path) -> subprocess.Popen[str]:
    """A process that writes an output."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_told_who_writes_and_a_killed_holder_leaves_no_lock(
    tmp_path: Path,
) -> None:
    out = tmp_path / "kv"
    process = holder(out)
    try:
        with pytest.raises(OutputError, match=rf"kv .*process {process.pid} on"), sole_writer(out):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert lock_file(out).exists()
    with sole_writer(out):
        pass
    assert not lock_file(out).exists()


def test_a_lock_leaves_nothing_behind_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), sole_writer(tmp_path / "new" / "folder" / "kv"):
        raise RuntimeError
    assert not any(tmp_path.iterdir())


def test_different_outputs_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "a"), sole_writer(tmp_path / "b"):
        pass


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"), sole_writer(tmp_path / "file" / "kv"):
        pass
