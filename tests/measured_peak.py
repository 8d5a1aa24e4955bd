"""Measure the peak memory of some lines of Python in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
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


def peak_above_start(setup: str, work: str, **values: Any) -> int:
    """Peak bytes of anonymous memory in the lines `work`, above those after the lines `setup`.

    Both see `values`, which JSON can hold, as `given`.
    """
    given = f"given = json.loads({json.dumps(json.dumps(values))})\n"
    program = PROGRAM.format(setup=given + setup, work=work)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout.splitlines()[-1])
