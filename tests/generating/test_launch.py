"""`vmla generate --processes N` makes the video of one process, or says in a sentence why not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import Vmla, refused
from safetensors.torch import load_file

from vmla_convert.errors import VmlaError
from vmla_convert.generating.launch import Group, run_together

pytest_plugins = ["checkpoints"]

CLIP = ("--prompt", "7", "--frames", "10", "--prompt-at", "6:3")


def same(one: Path, two: Path) -> None:
    """Two saved streams hold the same latents and cache, but for rounding."""
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_make_and_continue_the_video_of_one(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    for name, more in (("one", ()), ("two", ("--processes", "2"))):
        output = (*more, "-o", tmp_path / f"{name}.mp4", "--save-stream", tmp_path / name)
        assert vmla("generate", teacher, *CLIP, *output).code == 0
        continued = tmp_path / f"{name}-on"
        output = (*more, "-o", continued.with_suffix(".mp4"), "--save-stream", continued)
        start = ("--resume-stream", tmp_path / name, "--frames", "14")
        assert vmla("generate", teacher, *start, *output).code == 0
    same(tmp_path / "one", tmp_path / "two")
    same(tmp_path / "one-on", tmp_path / "two-on")
    assert not list(tmp_path.glob("*partial*")) + list(tmp_path.glob("*.lock"))


@pytest.mark.slow
def test_processes_of_a_launcher_make_one_video(teacher: Path, tmp_path: Path) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "vmla_convert", "generate", teacher, *CLIP, "-o", tmp_path / "a.mp4"]
    ran = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("wrote: ") == 2  # only process 0 prints: the video and its picture
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.png"}


@pytest.mark.slow
def test_an_error_in_a_process_is_one_sentence(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    ran = vmla("generate", teacher, *CLIP, "-o", tmp_path / "a.mp4", "--processes", "3")
    assert refused(ran) and "--processes 2" in ran.err
    assert not list(tmp_path.iterdir())


def be_killed(group: Group) -> None:
    """End one process as the system does where memory is short."""
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


@pytest.mark.slow
def test_a_killed_process_ends_the_others() -> None:
    with pytest.raises(VmlaError):
        run_together(2, be_killed)


def test_a_dry_run_states_the_shares(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    plan = ("--processes", "2", "--dry-run", "--json")
    ran = vmla("generate", teacher, "--prompt", "7", "-o", tmp_path / "a.mp4", *plan)
    shares = json.loads(ran.out)
    assert (shares["processes"], shares["heads"], shares["tokens"]) == (2, [1, 1], [36, 36])
    whole = json.loads(vmla("generate", teacher, "--prompt", "7", "-o", "a.mp4", *plan[2:]).out)
    assert shares["cache_bytes"] * 2 == whole["cache_bytes"]
    assert shares["sent_bytes"] > whole["sent_bytes"] == 0
    assert not list(tmp_path.iterdir())


def test_more_processes_than_a_launcher_started_are_refused(
    teacher: Path, tmp_path: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = vmla("generate", teacher, *CLIP, "-o", tmp_path / "a.mp4", "--processes", "4")
    assert refused(ran)
