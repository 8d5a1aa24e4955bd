"""Run the long fault suite and write its table: `make faults`.

    python -m faults [--damaged N] [--kills N] [--minutes M]

The exit code is 1 where an input crashed a command, or a killed command did not go on.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoints import MODEL
from codec_files import MADE
from conftest import tiny_model
from faults.damage import poisoned, run_damage, write_inputs
from faults.kills import commands, run_kills

from vmla_convert.errors import VmlaError
from vmla_convert.fitting.convert import convert
from vmla_convert.loading.load import load
from vmla_convert.training.pretrain import save_self_forcing

WORDS = """\
`refused` ends in one sentence. `accepted` reads the input in spite of the damage, such as a flipped
bit of a picture, of a comment, or of a file without a hash. `crashed` is any other exception, or
damage that a hash should have shown. A command is killed (SIGKILL) at a random time, up to twice in
a row, and started again. Its result is compared with that of an uninterrupted one: files, tensors,
rows."""
HEADS = {
    "damage": "| damaged input | inputs | refused | accepted | crashed | slowest (s) |",
    "kills": "| killed command | kills | run to the end | different result | stuck |",
}
TABLE = Path(__file__).with_name("RESULTS.md")


def main() -> int:
    """Run everything, write the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="faults")
    parser.add_argument("--damaged", type=int, default=40, help="damaged inputs of each kind")
    parser.add_argument("--kills", type=int, default=50, help="kills of each command")
    parser.add_argument("--minutes", type=float, default=10, help="most minutes for each command")
    asked = parser.parse_args()
    with TemporaryDirectory() as folder:
        place = Path(folder)
        teacher, codec = place / "teacher", place / "codec"
        save_self_forcing(tiny_model(MODEL).state_dict(), MODEL, teacher)
        convert(teacher, codec, MADE)
        damaged, crashed = _damage(place / "inputs", teacher, codec, asked.damaged)
        run = _pickles(place)
        killed, failed = _kills(place, teacher, codec, asked.kills, asked.minutes)
    TABLE.write_text(_page([*damaged, "", run, "", *killed]))
    return int(failed or crashed)


def _damage(inputs: Path, teacher: Path, codec: Path, count: int) -> tuple[list[str], bool]:
    found = run_damage(write_inputs(inputs, teacher, codec), inputs, count)
    lines = [HEADS["damage"], _RULE * 6 + "|"]
    for name, outcome in found.items():
        counts = [outcome.ended[word] for word in ("refused", "accepted", "crashed")]
        cells = [name, sum(counts), *counts, f"{outcome.slowest:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        for crash in outcome.crashes:
            print(f"{name}: {crash}", file=sys.stderr)
    print(*lines, sep="\n", file=sys.stderr)
    total = sum(sum(outcome.ended.values()) for outcome in found.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines += ["", f"{total} inputs; largest resident size of the process: {peak / 1e9:.2f} GB."]
    return lines, any(outcome.crashes for outcome in found.values())


def _pickles(place: Path) -> str:
    refused = 0
    with poisoned(place) as files:
        for file in files:
            try:
                load(file)
            except VmlaError:
                refused += 1
    return f"Pickles that would run code: {refused} of {len(files)} refused, and no code ran."


def _kills(
    place: Path, teacher: Path, codec: Path, kills: int, minutes: float
) -> tuple[list[str], bool]:
    lines = [HEADS["kills"], _RULE * 5 + "|"]
    failed = False
    for number, (name, command) in enumerate(commands(place, teacher, codec).items()):
        work = place / f"kills-{number}"
        work.mkdir()
        found = run_kills(command, work, kills, 60 * minutes)
        cells = [name, found.kills, found.finished, found.different, found.stuck]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1], file=sys.stderr)
        if found.different or found.stuck:
            failed = True
            print((work / "log.txt").read_text()[-2000:], file=sys.stderr)
    return lines, failed


_RULE = "| --- "


def _page(lines: list[str]) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    made = " ".join(["python -m faults", *sys.argv[1:]])
    head = f"Made by `{made}` on {date.today()} at commit {commit.stdout.strip()}."
    return "\n".join(["# Results of the fault suite", "", head, "", WORDS, "", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
