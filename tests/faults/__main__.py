"""Run the long fault suite and write its table: `make faults`.

    python -m faults [--damaged N] [--kills N] [--stages N]

The exit code is 1 where an input crashed a command, or an interrupted command did not go on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from faults.damage import poisoned, readers, run_damage, write_inputs
from faults.jobs import failed, killed, models
from faults.kills import Faults, Killed, commands

from vmla_convert.errors import VmlaError

DAMAGE = (
    "## Damaged inputs",
    """\
Half of the files are sound ones with a flipped bit, a zeroed page, a cut, an insertion or another
number; hypothesis draws the other half. `refused` ends in one sentence. `accepted` reads the input
in spite of the damage, such as a flipped bit of a picture, of a comment, or of a file without a
hash; a codec is accepted only if all its tensors are as they were. `crashed` is any other end, more
than 60 s, or more than 1 GB.""",
)
KILLS = (
    "## Killed commands",
    """\
A command ends by a signal within 5 ms after one of its file events (a file opened, renamed,
removed), spread over all of them, partly twice in a row. The command is then started again until
its end. The result is compared with that of an uninterrupted run: files, tensors, configs, rows
each once; for `push` the files on the Hub (a stub on the loopback).""",
)
FAULTS = (
    "## Disks and inputs that fail",
    """\
From one of its file events on, a command meets a full disk, a read-only disk, or an input that was
moved away. On a small disk (tmpfs) the room really ends, at 20, 50, 80 and 95 % of what the command
needs. `done` needed nothing more. Then the fault is mended and the command started again:
`unmended` counts ends other than the usual one, and other results.""",
)
TABLE = Path(__file__).with_name("RESULTS.md")


class Page:
    """The table, written again after every row: a run that is stopped keeps what it measured.

    Attributes:
        problems: Everything that went wrong.
    """

    def __init__(self) -> None:
        words = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        made = " ".join(["python -m faults", *sys.argv[1:]])
        self.problems: list[str] = []
        head = f"Made by `{made}` on {date.today()} at commit {commit}."
        self._lines = ["# Results of the fault suite", "", head]

    def problem(self, text: str) -> None:
        """Tell what went wrong, apart from the table."""
        self.problems.append(text)
        print(text, file=sys.stderr, flush=True)

    def text(self, *lines: str) -> None:
        """Add paragraphs."""
        for line in lines:
            self._add("", line)

    def table(self, *cells: str) -> None:
        """Begin a table."""
        self._add("")
        self.row(*cells)
        self.row(*["---"] * len(cells))

    def row(self, *cells: Any) -> None:
        """Add a row to the table."""
        self._add(f"| {' | '.join(map(str, cells))} |")

    def _add(self, *lines: str) -> None:
        self._lines += lines
        TABLE.write_text("\n".join([*self._lines, ""]))
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def main() -> int:
    """Run everything, write the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="faults")
    parser.add_argument("--damaged", type=int, default=20, help="damaged and drawn, of each kind")
    parser.add_argument("--kills", type=int, default=50, help="kills of each command")
    parser.add_argument("--stages", type=int, default=8, help="stages of each fault and command")
    parser.add_argument("--jobs", type=int, default=2, help="commands that are tested at once")
    asked = parser.parse_args()
    page = Page()
    with (
        TemporaryDirectory() as folder,
        ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool,
    ):
        place = Path(folder)
        teacher, codec = models(place)
        names = list(commands(place / "commands", teacher, codec))
        kills = {n: pool.submit(killed, place / f"kills-{n}", n, asked.kills) for n in names}
        faults = {n: pool.submit(failed, place / f"faults-{n}", n, asked.stages) for n in names}
        _damage(page, place / "inputs", teacher, codec, asked.damaged)
        _code(page, place, teacher)
        _kills(page, kills)
        _faults(page, faults)
    return int(bool(page.problems))


def _damage(page: Page, inputs: Path, teacher: Path, codec: Path, count: int) -> None:
    found = run_damage(write_inputs(inputs, teacher, codec), inputs, count)
    page.text(*DAMAGE)
    page.table("damaged input", "inputs", "refused", "accepted", "crashed", "slowest (s)", "MB")
    for name, outcome in found.items():
        counts = [outcome.ended[word] for word in ("refused", "accepted", "crashed")]
        measured = f"{outcome.slowest:.1f}", outcome.largest // 10**6
        page.row(name, sum(counts), *counts, *measured)
        for crash in outcome.crashes:
            page.problem(f"{name}: {crash}")
    total = sum(sum(outcome.ended.values()) for outcome in found.values())
    page.text(f"{total} inputs. MB: most memory that an input took while it was read.")


def _code(page: Page, place: Path, teacher: Path) -> None:
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
    page.text(f"{ways}: {refused} of {tries} refused, and no code ran.")


def _kills(page: Page, ran: dict[str, Future[tuple[int, Killed]]]) -> None:
    page.text(*KILLS)
    columns = ("events", "kills", "run to the end", "different result", "stuck", "slowest (s)")
    page.table("killed command", *columns)
    for name, future in ran.items():
        events, found = future.result()
        ends = (found.kills, found.finished, len(found.different), len(found.stuck))
        page.row(name, events, *ends, f"{found.slowest:.1f}")
        for each in found.stuck + found.different:
            page.problem(f"{name}: {each}")


def _faults(page: Page, ran: dict[str, Future[dict[str, Faults | None]]]) -> None:
    page.text(*FAULTS)
    page.table("command", "fault", "stages", "refused", "done", "crashed", "unmended")
    for name, future in ran.items():
        for kind, found in future.result().items():
            if found is None:
                page.row(name, kind, "not run: no right to mount", *[""] * 4)
                continue
            ends = (found.refused, found.done, len(found.crashed), len(found.unmended))
            page.row(name, kind, sum(ends[:3]), *ends)
            for each in found.crashed + found.unmended:
                page.problem(f"{name}, {kind}: {each}")


if __name__ == "__main__":
    sys.exit(main())
