"""Measure the peak memory of some lines of Python, in a process of their own or in this one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = """
import json, re, threading, time, torch
torch.set_num_threads(1)

def anonymous():
    # Pages of mapped files are left out: the system takes them back when memory is short.
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"RssAnon:\\s*(\\d+)", status.read())[1])

def sample():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

{setup}
peak = before = anonymous()
threading.Thread(target=sample, daemon=True).start()
{work}
print(json.dumps(peak - before))
"""


# The C library keeps freed memory in heaps, up to a third of what tensors occupy, and the amount
# changes from run to run. Blocks above a fixed size are mapped alone and go back when freed.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def peak_above_start(setup: str, work: str, **values: Any) -> int:
    """Peak bytes of anonymous memory in the lines `work`, above those after the lines `setup`.

    Both see `values`, which JSON can hold, as `given`.
    """
    given = f"given = json.loads({json.dumps(json.dumps(values))})\n"
    program = PROGRAM.format(setup=given + setup, work=work)
    environment = os.environ | RETURN_FREED_MEMORY
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.splitlines()[-1])


@dataclass
class Peak:
    """Most bytes of resident memory above those at the start; 0 until the end."""

    nbytes: int = 0


@contextmanager
def own_peak() -> Iterator[Peak]:
    """Measure the lines of a `with` in this process; Linux keeps the peak of a process."""
    peak = Peak()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _resident("VmRSS")
    yield peak
    peak.nbytes = max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
