"""Commands that are killed at any time end, started again, as if they had not been killed.

PYTEST_DONT_REWRITE, because the runner imports this module without pytest.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

import torch
from checkpoints import untimed
from safetensors.torch import load_file

from vmla_convert.__main__ import main
from vmla_convert.results import read_rows

RECIPE = """
[recipe]
name = "kills"
description = "A sweep to kill"
[source]
checkpoint = "{teacher}"
[convert]
calibration_clips = 4
data = {{ frames = 6 }}
[evaluate]
clips = 4
data = {{ frames = 6, seed = 1 }}
[sweep]
products = ["codec"]
sizes = [{{ cut = 0.9 }}]
seeds = [0, 1]
recover = false
timed = false
rollout_frames = 0
dense_dtypes = []
"""


@dataclass
class Killed:
    """Ends of a command that was killed again and again.

    Attributes:
        kills: Number of kills that met the command at work.
        finished: Number of times that the command was started until its end.
        different: Number of results that differ from those of an uninterrupted command.
        stuck: Messages of commands that could not continue.
    """

    kills: int = 0
    finished: int = 0
    different: int = 0
    stuck: int = 0


def commands(place: Path, teacher: Path, codec: Path) -> dict[str, Sequence[str]]:
    """Commands by name, without their output."""
    recipe = place / "recipe.toml"
    recipe.write_text(RECIPE.format(teacher=teacher))
    clips = ["--set", "convert.calibration_clips=4", "--set", "convert.data.frames=6"]
    steps = {
        "recover.layerwise_steps": 1,
        "recover.data.frames": 6,
        "recover.training.eval_every": 1,
        "recover.training.checkpoint_every": 1,
        "evaluate.clips": 4,
        "evaluate.data.frames": 6,
        "evaluate.data.seed": 1,
    }
    settings = [word for key, value in steps.items() for word in ("--set", f"{key}={value}")]
    trained = ["--steps", "3", "--lr", "1e-3", "--batch-size", "2", *settings]
    return {
        "convert": ["convert", str(teacher), "--resume", *clips],
        "convert --preset videomla": [
            *("convert", str(teacher), "--resume", "--preset", "videomla", *clips),
            *("--set", "convert.size.kv_lora_rank=8", "--set", "convert.size.qk_rope_head_dim=4"),
        ],
        "export": ["export", str(codec), "--layout", "native"],
        "recover": ["recover", str(codec), *trained],
        "sweep": ["sweep", str(recipe)],
    }


def run_kills(
    command: Sequence[str], place: Path, kills: int, seconds: float, seed: int = 0
) -> Killed:
    """Kill a command at random times until it was killed so often, or time is up.

    Args:
        command: Words after `vmla`, without `-o`.
        place: An empty folder.
        kills: Number of kills.
        seconds: Time for all of them.
        seed: Seed of the times.
    """
    draw, found, started = random.Random(seed), Killed(), perf_counter()
    reference = place / "whole"
    assert _run(command, reference) == 0
    usual = perf_counter() - started
    out, in_a_row = place / "out", 0
    while found.kills < kills and perf_counter() - started < seconds:
        # Every third start is left alone, so that kills meet all stages.
        limit = None if in_a_row == 2 else draw.uniform(0, usual)
        code = _run(command, out, limit)
        if code is None:
            found.kills, in_a_row = found.kills + 1, in_a_row + 1
            continue
        # A kill between the output and the end of the process leaves a whole output, which the next
        # start refuses to write again.
        complete = code == 0 or (in_a_row > 0 and out.exists())
        in_a_row = 0
        found.finished += 1
        found.stuck += not complete
        found.different += complete and not same(reference, out)
        for left in place.glob("out*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return found


def _run(command: Sequence[str], out: Path, limit: float | None = None) -> int | None:
    """Run a command in a forked process; return its exit code, or None where it was killed."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        log = os.open(out.with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(null, 1)
        os.dup2(log, 2)
        sys.argv = ["vmla", *command, "-o", str(out)]
        os._exit(_exit_code(main))
    started = perf_counter()
    while limit is None or perf_counter() - started < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _exit_code(run: Callable[[], int]) -> int:
    try:
        return run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0


def same(one: Path, other: Path) -> bool:
    """Whether two outputs have the same files, equal tensors, and the same rows, each once."""
    roots = (one, other)
    files = [sorted(f.relative_to(root) for f in root.rglob("*") if f.is_file()) for root in roots]
    if files[0] != files[1]:
        return False
    tensors = (name for name in files[0] if name.suffix == ".safetensors")
    rows = (name for name in files[0] if name.name == "rows.jsonl")
    return all(_same_tensors(one / name, other / name) for name in tensors) and all(
        _same_figures(one / name, other / name) for name in rows
    )


def _same_tensors(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _same_figures(one: Path, other: Path) -> bool:
    """Whether two files have the same figures, each once, and equal values but for times."""
    rows = [read_rows(file) for file in (one, other)]
    figures = [Counter(row.figure for row in each) for each in rows]
    values = [{row.figure: row.value for row in untimed(each)} for each in rows]
    return figures[0] == figures[1] and max(figures[1].values()) == 1 and values[0] == values[1]
