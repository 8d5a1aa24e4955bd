"""Progress: what is timed, and how one bar serves several pieces of work or several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep

import pytest

from vmla_convert import progress
from vmla_convert.progress import Advance, Joint, OneBar, Silent, Timed


class Bars(Silent):
    """Records how far each bar is, which bars have ended, and the notes."""

    def __init__(self) -> None:
        self.totals: dict[str, int | None] = {}
        self.at: dict[str, int] = {}
        self.ended: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        self.totals[label], self.at[label] = total, 0

        def advance(count: int) -> None:
            self.at[label] += count

        try:
            yield advance
        finally:
            self.ended.append(label)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_timed_bars_are_drawn() -> None:
    bars = Bars()
    timed = Timed(bars)
    assert list(timed.track(iter("ab"), "x", 2)) == ["a", "b"]
    assert list(timed.track([], "y")) == []
    assert list(timed.track(iter("c"), "z")) == ["c"]
    timed.note("0.5")
    assert bars.totals == {"x": 2, "y": 0, "z": None}
    assert bars.at == {"x": 2, "y": 0, "z": 1}
    assert bars.notes == ["0.5"]


def test_one_bar_serves_several_loops_and_ends_when_full() -> None:
    bars = Bars()
    with OneBar(bars, "all", 3) as bar:
        assert bars.at == {"all": 0}
        assert list(bar.track("ab", "x")) == ["a", "b"]
        assert (bars.at, bars.ended) == ({"all": 2}, [])
        assert list(bar.track("cd", "y")) == ["c", "d"]
        assert (bars.at, bars.ended) == ({"all": 3}, ["all"])
        bar.note("0.5")
    assert bars.notes == ["0.5"]
    assert bars.ended == ["all"]
    with OneBar(bars, "left", 3):
        pass
    assert (bars.at["left"], bars.ended) == (0, ["all", "left"])


def test_seconds_add_up_by_label_and_include_the_consumers() -> None:
    timed = Timed(Silent())

    def slow() -> Iterator[int]:
        for item in range(2):
            sleep(0.02)
            yield item

    for _ in timed.track(range(2), "used"):
        sleep(0.02)
    list(timed.track(slow(), "made"))
    once = dict(timed.seconds)
    assert list(once) == ["used", "made"]
    assert all(0.04 <= seconds < 1 for seconds in once.values())
    list(timed.track(slow(), "made"))
    assert timed.seconds["used"] == once["used"]
    assert timed.seconds["made"] >= once["made"] + 0.04


def test_errors_of_the_items_pass_through() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(Timed(Bars()).track(broken(), "x"))


def test_a_joint_bar_moves_by_what_all_have_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.0)
    bars, done, seen = Bars(), [0], list[tuple[int, int]]()
    with Joint(bars, "all", 3, lambda: done[0]) as joint:
        for index in joint.track(range(3), "own"):
            done[0] = index
            seen.append((bars.at["all"], bars.at["own"]))
        assert seen == [(0, 0), (0, 1), (1, 2)]
        assert (bars.at, bars.ended) == ({"all": 2, "own": 3}, ["own"])
        done[0] = 5  # more than the total
        joint.note("x")
        assert (bars.at["all"], bars.ended) == (3, ["own", "all"])
        joint.look()
    assert (bars.at["all"], bars.ended) == (3, ["own", "all"])


def test_a_joint_bar_never_hinders_work() -> None:
    def gone() -> int:
        raise RuntimeError("the store is gone")

    bars = Bars()
    with Joint(bars, "all", 3, gone) as joint:
        joint.look()
        assert list(joint.track("ab", "own")) == ["a", "b"]
    assert (bars.at["all"], bars.ended) == (0, ["own", "all"])
    with Joint(bars, "none", 0, lambda: 0) as empty:
        empty.look()
    assert bars.at["none"] == 0
