"""Run the long fault suite and write its table: `make faults`.

    python -m faults [--damaged N] [--kills N] [--stages N]

The exit code is 1 where an input crashed a command, or an interrupted command did not go on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from checkpoints import MODEL
from codec_files import MADE
from conftest import tiny_model
from faults.damage import poisoned, readers, run_damage, write_inputs
from faults.kills import (
    Command,
    Faults,
    Reference,
    commands,
    run_faults,
    run_kills,
    run_small_disks,
)
from hub_stub import served

from vmla_convert.errors import VmlaError
from vmla_convert.fitting.convert import convert
from vmla_convert.training.pretrain import save_self_forcing

DAMAGE = """\
## Damaged inputs

Half of the files are sound ones with a flipped bit, a zeroed page, a cut, an insertion or another
number; hypothesis draws the other half. `refused` ends in one sentence. `accepted` reads the input
in spite of the damage, such as a flipped bit of a picture, of a comment, or of a file without a
hash; a codec is accepted only if all its tensors are as they were. `crashed` is any other end, more
than 60 s, or more than 1 GB."""
KILLS = """\
## Killed commands

A command ends by a signal within 5 ms after one of its file events (a file opened, renamed,
removed), spread over all of them, partly twice in a row. The command is then started again until
its end. The result is compared with that of an uninterrupted run: files, tensors, configs, rows
each once; for `push` the files on the Hub (a stub on the loopback)."""
FAULTS = """\
## Disks and inputs that fail

From one of its file events on, a command meets a full disk, a read-only disk, or an input that was
moved away. On a small disk (tmpfs) the room really ends, at 20, 50, 80 and 95 % of what the command
needs. `done` needed nothing more. Then the fault is mended and the command started again:
`unmended` counts ends other than the usual one, and other results."""
SHARES = (0.2, 0.5, 0.8, 0.95)
KINDS = ("full disk", "read-only disk", "vanished input")
TABLE = Path(__file__).with_name("RESULTS.md")


def main() -> int:
    """Run everything, write the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="faults")
    parser.add_argument("--damaged", type=int, default=25, help="damaged and drawn, of each kind")
    parser.add_argument("--kills", type=int, default=50, help="kills of each command")
    parser.add_argument("--stages", type=int, default=8, help="stages of each fault and command")
    asked = parser.parse_args()
    commit = _commit()
    problems: list[str] = []
    with (
        TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        served(Path(folder) / "hf-home", patch) as hub,
    ):
        place = Path(folder)
        teacher, codec = place / "teacher", place / "codec"
        save_self_forcing(tiny_model(MODEL).state_dict(), MODEL, teacher)
        convert(teacher, codec, MADE)
        tested = commands(place / "commands", teacher, codec, hub)
        lines = [
            *(DAMAGE, "", *_damage(place / "inputs", teacher, codec, asked.damaged, problems)),
            *("", *_code(place, teacher)),
            *("", KILLS, "", *_kills(place, tested, asked.kills, problems)),
            *("", FAULTS, "", *_faults(place, tested, asked.stages, problems)),
        ]
    TABLE.write_text(_page(lines, commit))
    print(*problems, sep="\n", file=sys.stderr)
    return int(bool(problems))


def _damage(inputs: Path, teacher: Path, codec: Path, count: int, problems: list[str]) -> list[str]:
    found = run_damage(write_inputs(inputs, teacher, codec), inputs, count)
    lines = _head("damaged input", "inputs", "refused", "accepted", "crashed", "slowest (s)", "MB")
    for name, outcome in found.items():
        counts = [outcome.ended[word] for word in ("refused", "accepted", "crashed")]
        cells = (name, sum(counts), *counts, f"{outcome.slowest:.1f}", outcome.largest // 10**6)
        lines.append(_line(*cells))
        problems += [f"{name}: {crash}" for crash in outcome.crashes]
    total = sum(sum(outcome.ended.values()) for outcome in found.values())
    return [*lines, "", f"{total} inputs. MB: most memory that an input took while it was read."]


def _code(place: Path, teacher: Path) -> list[str]:
    """Read every poisoned file in every way; `poisoned` checks that no code has run."""
    refused = tries = 0
    with poisoned(place) as files:
        for read in readers(teacher).values():
            for file in files:
                tries += 1
                try:
                    read(file)
                except VmlaError:
                    refused += 1
    ways = f"{len(files)} files that would run code, read in {len(readers(teacher))} ways"
    return [f"{ways}: {refused} of {tries} refused, and no code ran."]


def _kills(place: Path, tested: dict[str, Command], kills: int, problems: list[str]) -> list[str]:
    lines = _head(
        *("killed command", "events", "kills", "run to the end", "different result", "stuck"),
        "slowest (s)",
    )
    for name, command in tested.items():
        reference = Reference(command, place / "kills" / "work")
        found = run_kills(reference, kills)
        ends = (found.kills, found.finished, found.different, len(found.stuck))
        lines.append(_line(name, reference.events, *ends, f"{found.slowest:.1f}"))
        _tell(lines[-1])
        problems += [f"{name}: {stuck}" for stuck in found.stuck]
        problems += [f"{name}: {found.different} different results"] * bool(found.different)
        shutil.rmtree(place / "kills")
    return lines


def _faults(place: Path, tested: dict[str, Command], stages: int, problems: list[str]) -> list[str]:
    lines = _head("command", "fault", "stages", "refused", "done", "crashed", "unmended")

    def add(name: str, kind: str, found: Faults | None) -> None:
        if found is None:
            lines.append(_line(name, kind, "not run: no right to mount", *[""] * 4))
            return
        ends = (found.refused, found.done, len(found.crashed), len(found.unmended))
        lines.append(_line(name, kind, sum(ends[:3]), *ends))
        _tell(lines[-1])
        problems.extend(f"{name}, {kind}: {each}" for each in (*found.crashed, *found.unmended))

    for name, command in tested.items():
        reference = Reference(command, place / "faults" / "work")
        for kind in KINDS:
            add(name, kind, run_faults(reference, kind, stages))
        if command.hub is None:
            add(name, "small disk", run_small_disks(command, place / "small" / "work", SHARES))
        shutil.rmtree(place / "faults")
    return lines


def _head(*cells: str) -> list[str]:
    return [_line(*cells), _line(*["---"] * len(cells))]


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def _page(lines: list[str], commit: str) -> str:
    made = " ".join(["python -m faults", *sys.argv[1:]])
    head = f"Made by `{made}` on {date.today()} at commit {commit}."
    return "\n".join(["# Results of the fault suite", "", head, "", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
