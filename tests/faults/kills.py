"""Commands that are interrupted at any stage end, started again, as if nothing had happened.

PYTEST_DONT_REWRITE, because the runner imports this module without pytest.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from checkpoints import untimed
from faults.events import (
    Act,
    Ended,
    Event,
    full_disk_from,
    kill_at,
    nothing,
    read_only_from,
    run_watched,
    vanish_at,
)
from hub_stub import Hub
from safetensors.torch import load_file

from vmla_convert.checkpoint.integrity import bytes_hash
from vmla_convert.results import read_rows

RECIPE = """
[recipe]
name = "kills"
description = "A sweep to kill"
[source]
checkpoint = "{teacher}"
[convert]
calibration_clips = 2
data = {{ frames = 4 }}
[evaluate]
clips = 2
data = {{ frames = 4, seed = 1 }}
[sweep]
products = ["codec"]
sizes = [{{ cut = 0.9 }}]
seeds = [0, 1]
recover = false
timed = false
rollout_frames = 0
dense_dtypes = []
"""
REPO = "user/kv"


@dataclass(frozen=True)
class Command:
    """A command under test.

    Attributes:
        words: Words after `vmla`; `{out}` stands for the output.
        inputs: Folders that the command reads.
        hub: The Hub that the command writes to, in place of a folder.
    """

    words: tuple[str, ...]
    inputs: tuple[Path, ...]
    hub: Hub | None = None

    def run(self, out: Path, act: Act) -> Ended:
        """Run the command; events are those of the output's folder and of the inputs."""
        words = [word.replace("{out}", str(out)) for word in self.words]
        return run_watched(words, out.parent, act)

    def content(self, out: Path) -> Mapping[str, Any]:
        """Everything that two equal results share."""
        if self.hub is not None:
            repo = self.hub.repos.get(REPO)
            return {} if repo is None else {n: blob.oid for n, blob in repo.files.items()}
        # A kill between the last step and the clean-up leaves working files beside the output.
        places = (out, out.with_name(f"{out.name}-clips"))
        # A killed process holds no lock, and the file that named the holder may stay.
        files = (
            file
            for place in places
            for file in place.rglob("*")
            if file.is_file() and file.suffix != ".lock"
        )
        return {file.relative_to(out.parent).as_posix(): _content(file) for file in files}

    def clear(self, out: Path) -> None:
        """Remove what a run has left."""
        for left in (*out.parent.glob(f"{out.name}*"), out.parent / "tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        if self.hub is not None:
            self.hub.repos.clear()
            self.hub.large.clear()


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return {name: bytes_hash(tensor) for name, tensor in sorted(load_file(file).items())}
    if file.name == "rows.jsonl":
        rows = read_rows(file)
        # Figures each once, and values but for times.
        return Counter(row.figure for row in rows), {r.figure: r.value for r in untimed(rows)}
    if file.name == "config.json":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return None


def commands(place: Path, teacher: Path, codec: Path, hub: Hub | None = None) -> dict[str, Command]:
    """Commands by name; `push` where there is a Hub."""
    place.mkdir(parents=True, exist_ok=True)
    recipe = place / "recipe.toml"
    recipe.write_text(RECIPE.format(teacher=teacher))
    clips = ("--set", "convert.calibration_clips=2", "--set", "convert.data.frames=4")
    steps = {
        "recover.layerwise_steps": 1,
        "recover.data.frames": 4,
        "recover.training.eval_every": 1,
        "recover.training.checkpoint_every": 1,
        "evaluate.clips": 2,
        "evaluate.data.frames": 4,
        "evaluate.data.seed": 1,
    }
    settings = [word for key, value in steps.items() for word in ("--set", f"{key}={value}")]
    trained = ("--steps", "2", "--lr", "1e-3", "--batch-size", "2", *settings)
    to = ("-o", "{out}")
    base, both = (teacher,), (codec, teacher)
    convert = ("convert", str(teacher), "--resume")
    sampled = ("--data", "self", "--clips-dir", "{out}-clips")
    return {
        "convert": Command((*convert, *clips, *to), base),
        "convert, sampling clips": Command((*convert, *clips, *sampled, *to), base),
        "export": Command(("export", str(codec), "--layout", "native", *to), both),
        "recover": Command(("recover", str(codec), *trained, *to), both),
        "sweep": Command(("sweep", str(recipe), *to), base),
        "push": Command(("push", str(codec), REPO), (codec,), hub),
    }


@dataclass
class Killed:
    """Ends of a command that was killed again and again.

    Attributes:
        kills: Number of kills.
        finished: Number of times that the command was started until its end.
        different: Descriptions of results that differ from those of an uninterrupted command.
        stuck: Messages of commands that could not continue.
        slowest: Seconds of the slowest start.
    """

    kills: int = 0
    finished: int = 0
    different: list[str] = field(default_factory=list[str])
    stuck: list[str] = field(default_factory=list[str])
    slowest: float = 0.0


@dataclass
class Faults:
    """Ends of a command whose disk or input failed at some stage.

    Attributes:
        refused: Ends in a sentence.
        done: Ends without an error: the command had no need any more.
        crashed: Messages of other ends.
        unmended: Messages of commands that did not end as usual after the fault was mended.
        slowest: Seconds of the slowest start.
    """

    refused: int = 0
    done: int = 0
    crashed: list[str] = field(default_factory=list[str])
    unmended: list[str] = field(default_factory=list[str])
    slowest: float = 0.0


class Reference:
    """A command in an empty folder, with the result of an uninterrupted run.

    Args:
        command: The command.
        place: An empty folder for outputs.
    """

    def __init__(self, command: Command, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.command, self.out = command, place / "out"
        self._whole: Mapping[str, Any] | None = None
        ended = self.start(nothing)
        assert ended.code == 0, ended.said
        self.events, self._whole = ended.events, command.content(self.out)
        assert self._whole
        command.clear(self.out)

    def start(self, act: Act) -> Ended:
        """Start the command once."""
        started = perf_counter()
        ended = self.command.run(self.out, act)
        self.seconds = perf_counter() - started
        return ended

    @property
    def is_whole(self) -> bool:
        """Whether the output is that of the uninterrupted run."""
        shutil.rmtree(self.out.parent / "tmp", ignore_errors=True)
        return self.command.content(self.out) == self._whole

    def complete(self) -> str | None:
        """Start the command until its end; return an error where the end is not the usual one."""
        ended = self.start(nothing)
        # A fault behind the finished output leaves nothing to do, which the command refuses.
        if ended.code != 0 and not (ended.refused and self.is_whole):
            return f"exit {ended.code}: {ended.said[-600:]}"
        return None


def run_kills(reference: Reference, kills: int, seed: int = 0) -> Killed:
    """Kill a command at stages spread over its run, up to twice in a row, until `kills` kills."""
    draw, found = random.Random(seed), Killed()
    while found.kills < kills:
        for stage in _stages(reference.events, kills - found.kills, draw)[: kills - found.kills]:
            _kill(reference, stage, draw, found)
    return found


def _kill(reference: Reference, stage: int, draw: random.Random, found: Killed) -> None:
    ended = reference.start(kill_at(stage, draw.uniform(0, 0.005)))
    found.kills += ended.code is None
    if ended.code is None and draw.random() < 0.4:
        again = reference.start(kill_at(draw.randint(1, reference.events), draw.uniform(0, 0.005)))
        found.kills += again.code is None
    problem = reference.complete()
    found.finished += 1
    found.slowest = max(found.slowest, reference.seconds)
    if problem:
        found.stuck.append(f"killed at event {stage} of {reference.events}: {problem}")
    elif not reference.is_whole:
        found.different.append(f"killed at event {stage}: another result")
    reference.command.clear(reference.out)


def _stages(events: int, count: int, draw: random.Random) -> list[int]:
    """So many numbers from 1 to `events`, spread evenly, in random order."""
    spread = [1 + int((i + draw.random()) * events / count) for i in range(count)]
    draw.shuffle(spread)
    return spread


def run_faults(reference: Reference, kind: str, stages: int, seed: int = 0) -> Faults:
    """Let the disk or an input fail at some stages of a command, then mend it and start again.

    Args:
        reference: The command.
        kind: `full disk`, `read-only disk` or `vanished input`.
        stages: Number of stages.
        seed: Seed of the stages.
    """
    draw, found = random.Random(seed), Faults()
    for number, stage in enumerate(_stages(reference.events, stages, draw)):
        folder = reference.command.inputs[number % len(reference.command.inputs)]
        act = {
            "full disk": full_disk_from(stage),
            "read-only disk": read_only_from(stage),
            "vanished input": vanish_at(stage, folder),
        }[kind]
        ended = reference.start(act)
        with suppress(OSError):
            folder.with_name(f"{folder.name}.gone").rename(folder)
        _judge(reference, ended, f"event {stage} of {reference.events}", found)
    return found


def run_small_disks(command: Command, place: Path, shares: tuple[float, ...]) -> Faults | None:
    """Run a command on file systems of some shares of the size that it needs, then make room.

    Returns:
        None where the user may not mount file systems.
    """
    place.mkdir(parents=True, exist_ok=True)
    if not _mount(place, "size=1g"):
        return None
    try:
        reference, found = Reference(command, place), Faults()
        need = _peak_bytes(reference)
        for share in shares:
            _mount(place, f"remount,size={max(int(share * need), 4096)}")
            ended = reference.start(nothing)
            _mount(place, "remount,size=1g")
            _judge(reference, ended, f"a disk of {share:.0%} of {need:,} bytes", found)
        return found
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _peak_bytes(reference: Reference) -> int:
    """Most bytes that an uninterrupted run has on its disk at events."""
    most = 0
    # The process that runs the command is forked, so it reports through a file.
    report = reference.out.parent.with_name(f"{reference.out.parent.name}.peak")

    def act(_: int, __: Event) -> None:
        nonlocal most
        usage = shutil.disk_usage(reference.out.parent).used
        if usage > most:
            most = usage
            report.write_text(str(most))

    assert reference.start(act).code == 0
    left = shutil.disk_usage(reference.out.parent).used
    reference.command.clear(reference.out)
    return max(left, int(report.read_text()))


def _mount(place: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def _judge(reference: Reference, ended: Ended, stage: str, found: Faults) -> None:
    found.slowest = max(found.slowest, reference.seconds)
    if ended.refused:
        found.refused += 1
    elif ended.code == 0:
        found.done += 1
    else:
        found.crashed.append(f"{stage}: exit {ended.code}, {ended.said[-600:]}")
    problem = reference.complete()
    if problem:
        found.unmended.append(f"{stage}: {problem}")
    elif not reference.is_whole:
        found.unmended.append(f"{stage}: another result")
    reference.command.clear(reference.out)
