"""The console: which words go where, in which form, and with which exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import NoReturn

import pytest

import vmla_convert
from vmla_convert.__main__ import main
from vmla_convert.config import CachePolicy
from vmla_convert.console import Console
from vmla_convert.errors import MissingExtraError, VmlaError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def plain_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "VMLA_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@dataclass(frozen=True)
class Case:
    """One call, in both modes: expected stdout for people, for programs, and stderr for both."""

    call: Callable[[Console], None]
    human: str = ""
    json: str = ""
    stderr: str = ""


CASES = {
    "table": Case(
        lambda out: out.table("Layers", ["layer", "rank"], [["0", "8"], ["1", "[red]10"]]),
        human="Layers\nlayer   rank\n───\n0       8\n1       [red]10\n",
        json='[{"layer": "0", "rank": "8"}, {"layer": "1", "rank": "[red]10"}]\n',
    ),
    "table of numbers": Case(
        lambda out: out.table("", ["step", "loss"], [[0, 0.123456789], [None, float("nan")]]),
        human="step   loss\n───\n0      0.123457\n-      -\n",
        json='[{"step": 0, "loss": 0.123456789}, {"step": null, "loss": null}]\n',
    ),
    "mapping": Case(
        lambda out: out.data({"cut": 0.875, "ranks": (8, 10), "mla": None, "at": Path("a/b")}),
        human="cut    0.875\nranks  8, 10\nmla    -\nat     a/b\n",
        json='{"cut": 0.875, "ranks": [8, 10], "mla": null, "at": "a/b"}\n',
    ),
    "dataclass": Case(
        lambda out: out.data({"cache": CachePolicy(4), "rows": [{"a": 1}, {"a": 2}]}),
        human="cache.window_frames        4\ncache.sink_frames          0\n"
        "cache.frame_positions      absolute\ncache.dense_recent_frames  0\n"
        "rows[0].a                  1\nrows[1].a                  2\n",
        json='{"cache": {"window_frames": 4, "sink_frames": 0, "frame_positions": "absolute", '
        '"dense_recent_frames": 0}, '
        '"rows": [{"a": 1}, {"a": 2}]}\n',
    ),
    "not a number": Case(
        lambda out: out.data({"loss": float("nan"), "peak": float("inf")}),
        human="loss  -\npeak  -\n",
        json='{"loss": null, "peak": null}\n',
    ),
    "path": Case(
        lambda out: out.path("wrote", Path("runs/a")),
        human="wrote: runs/a\n",
        json='{"wrote": "runs/a"}\n',
    ),
    "say": Case(lambda out: out.say("reading [0] of 2"), stderr="reading [0] of 2\n"),
    "fail": Case(
        lambda out: out.fail(MissingExtraError("video", "video")),
        stderr="Error: packages for video are not installed\n"
        'hint: pip install "vmla-convert[video]"\n',
    ),
    "fail without a hint": Case(
        lambda out: out.fail(VmlaError("no such file")), stderr="Error: no such file\n"
    ),
}


def squeezed(text: str) -> str:
    """Without the padding of cells and with rules of one length: looks are not tested."""
    lines = (line.rstrip() for line in text.splitlines())
    return "".join(("───" if set(line) == {"─"} else line) + "\n" for line in lines)


@pytest.mark.parametrize("name", CASES)
def test_streams_of_both_modes(name: str, capsys: Capture) -> None:
    case = CASES[name]
    case.call(Console())
    human = capsys.readouterr()
    case.call(Console(json=True))
    machine = capsys.readouterr()
    assert squeezed(human.out).strip() == case.human.strip()
    assert machine.out == case.json
    assert human.err == machine.err == case.stderr


def test_long_lines_are_not_wrapped_in_a_pipe(capsys: Capture) -> None:
    long = "word " * 100
    out = Console()
    out.say(long)
    out.table("", ["a"], [[long]])
    captured = capsys.readouterr()
    assert captured.err == long + "\n"
    assert long.strip() in captured.out


def test_every_piece_of_json_is_a_line_of_its_own(capsys: Capture) -> None:
    out = Console(json=True)
    out.data({"text": "two\nlines, ≤ 1"})
    out.path("wrote", "a")
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "two\nlines, ≤ 1"}, {"wrote": "a"}]


def test_colour_follows_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    Console().fail(VmlaError("no"))
    assert "\x1b[1;31mError: " in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    Console().fail(VmlaError("no"))
    assert "31m" not in capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def run() -> NoReturn:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (VmlaError("a is taken", "choose b"), 2, "Error: a is taken\nhint: choose b\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(130), 130, "interrupted\n"),
        (
            RuntimeError("shape (1,)\nC++ frames"),
            1,
            "Error: RuntimeError: shape (1,)\nhint: set VMLA_DEBUG=1 for the traceback\n",
        ),
        (
            ValueError(),
            1,
            "Error: ValueError\nhint: set VMLA_DEBUG=1 for the traceback\n",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error: BaseException, code: int, stderr: str, capsys: Capture) -> None:
    assert main(raising(error)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == stderr


def test_who_is_asked_to_end_cleans_up_first(tmp_path: Path) -> None:
    """As by schedulers, containers and `timeout`, which send SIGTERM."""
    video = tmp_path / "a.mp4"
    command = ["generate", "demo", "--prompt", "7", "--frames", "4000", "-o", str(video)]
    with subprocess.Popen([sys.executable, "-m", "vmla_convert", *command]) as running:
        while not video.with_suffix(".png").exists():
            assert running.poll() is None
            sleep(0.05)
        running.terminate()
    assert running.returncode == 143
    assert not list(tmp_path.iterdir())


def test_done_is_zero_and_silent(capsys: Capture) -> None:
    assert main(lambda: 3) == 0
    assert capsys.readouterr() == ("", "")


def test_other_exit_codes_pass_through() -> None:
    with pytest.raises(SystemExit) as caught:
        main(raising(SystemExit(2)))
    assert caught.value.code == 2


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMLA_DEBUG", "1")
    with pytest.raises(RuntimeError, match="boom"):
        main(raising(RuntimeError("boom")))


def timeless(text: str) -> str:
    return re.sub(r" in [\d.]+ s", " in TIME", text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times that the console's clock will tell, in turn."""
    readings: list[float] = []
    monkeypatch.setattr("vmla_convert.console.monotonic", lambda: readings.pop(0))
    return readings


def test_progress_in_a_log(capsys: Capture) -> None:
    out = Console()
    with out.progress() as progress:
        progress.note("before")
        seen: list[tuple[str, int]] = []
        for outer in progress.track("ab", "blocks"):
            for inner in progress.track(iter(range(2)), "steps", total=2):
                progress.note(f"loss {inner}")
                seen.append((outer, inner))
            progress.note(f"block {outer}")
    assert seen == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert timeless(captured.err).splitlines() == [
        "before",
        "steps: 2 in TIME, loss 1",
        "steps: 2 in TIME, loss 1",
        "blocks: 2 in TIME, block b",
    ]


def test_a_broken_off_bar_is_not_reported_as_done(capsys: Capture) -> None:
    with Console().progress() as progress:
        for item in progress.track(range(5), "steps"):
            progress.note("half way")
            if item == 2:
                break
        for _ in progress.track(range(1), "after"):
            pass
    assert timeless(capsys.readouterr().err) == "after: 1 in TIME\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "1 min 0 s"), (12.4, "12 s"), (3725.0, "62 min 5 s")],
)
def test_durations(seconds: float, text: str, capsys: Capture, clock: list[float]) -> None:
    clock[:] = [0.0, seconds]
    with Console().progress() as progress:
        list(progress.track([1], "steps"))
    assert capsys.readouterr().err == f"steps: 1 in {text}\n"


PROGRAM = """
from vmla_convert.console import Console
out = Console(json=True)
with out.progress() as progress:
    for outer in progress.track(range(3), "blocks"):
        for _ in progress.track(range(2), "[steps]"):
            progress.note("loss 0.5")
        progress.note(f"block [{outer}]")
        out.say("said")
        out.data(outer)
    for _ in progress.track(iter(()), "nothing"):
        pass
    progress.note("free note")
"""


def test_progress_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
    try:
        program = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=environment,
            text=True,
        )
        os.close(theirs)
        drawn = "".join(read_terminal(ours))
        stdout, _ = program.communicate(timeout=60)
    finally:
        os.close(ours)
    assert program.returncode == 0
    assert stdout == "0\n1\n2\n"
    assert drawn.count("said") == 3
    assert "free note" in drawn
    last = drawn[drawn.rindex("blocks") :].splitlines()[0]
    assert "3/3" in last
    assert "block [2]" in last
    assert "[steps]" not in drawn[drawn.rindex("blocks") :]


def read_terminal(descriptor: int) -> Iterator[str]:
    """The bytes that arrive until the other side closes, which Linux reports as an error."""
    while True:
        try:
            data = os.read(descriptor, 4096)
        except OSError:
            return
        if not data:
            return
        yield data.decode(errors="replace")


def test_importing_is_light() -> None:
    program = (
        "import sys, vmla_convert, vmla_convert.__main__, vmla_convert.config\n"
        "print(sorted({'torch', 'numpy', 'typer', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_the_package_lists_its_lazy_names() -> None:
    assert {"convert", "generate", "inspect", "load", "open_media"} <= set(dir(vmla_convert))
    with pytest.raises(AttributeError, match="has no attribute 'convrt'"):
        _ = vmla_convert.convrt  # pyright: ignore[reportAttributeAccessIssue]
