"""Progress that is timed: everything passes, and seconds add up by label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import sleep
from typing import TypeVar

import pytest

from vmla_convert import progress
from vmla_convert.progress import Joint, OneBar, Silent, Timed

T = TypeVar("T")


class Told(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.tracked: list[tuple[str, int | None]] = []
        self.notes: list[str] = []

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        self.tracked.append((label, total))
        yield from items

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_silence_gives_the_items() -> None:
    silent = Silent()
    assert list(silent.track(iter("ab"), "x", 2)) == ["a", "b"]
    silent.note("said to nobody")


def test_everything_is_passed_on() -> None:
    told = Told()
    timed = Timed(told)
    assert list(timed.track(iter("ab"), "x", 2)) == ["a", "b"]
    assert list(timed.track([], "y")) == []
    timed.note("0.5")
    assert told.tracked == [("x", 2), ("y", None)]
    assert told.notes == ["0.5"]


def test_one_bar_is_drawn_for_all_and_nothing_after_it() -> None:
    class Counted(Told):
        """Remembers each step of each bar, and what is full."""

        def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
            for item in super().track(items, label, total):
                steps.append(f"{label} {item}")
                yield item
            steps.append("full")

    steps: list[str] = []
    told = Counted()
    bar = OneBar(told, "all", 3)
    assert steps == ["all 0"]
    assert list(bar.track("ab", "x")) == ["a", "b"]
    assert steps == ["all 0", "all 1", "all 2"]
    assert list(bar.track("c", "y", 1)) == ["c"]
    assert list(bar.track("d", "z")) == ["d"]
    assert steps == ["all 0", "all 1", "all 2", "full"]
    bar.note("0.5")
    bar.close()
    assert told.notes == ["0.5"]
    left = OneBar(told, "left", 3)
    left.close()
    assert steps[-1] == "left 0"


def test_seconds_add_up_by_label_and_the_consumers_count() -> None:
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


def test_what_goes_wrong_within_passes_through() -> None:
    timed = Timed(Told())

    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(timed.track(broken(), "x"))


class Bar(Silent):
    """How far each bar is."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self.ended: list[str] = []

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        self.at[label] = 0
        try:
            for item in super().track(items, label, total):
                yield item
                self.at[label] += 1
        finally:
            self.ended.append(label)


def test_a_joint_bar_moves_by_what_all_have_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "GLANCE", 0.0)
    bar, done = Bar(), [0]
    joint = Joint(bar, "all", 3, lambda: done[0])
    assert bar.at == {"all": 0}
    seen: list[tuple[int, int]] = []
    for index in joint.track(range(3), "own"):
        done[0] = index
        seen.append((bar.at["all"], bar.at["own"]))
    assert seen == [(0, 0), (0, 1), (1, 2)]
    assert (bar.at, bar.ended) == ({"all": 2, "own": 3}, ["own"])
    done[0] = 5  # more than there is
    joint.note("x")
    assert (bar.at["all"], bar.ended) == (3, ["own", "all"])
    joint.look()
    joint.close()
    assert (bar.at["all"], bar.ended) == (3, ["own", "all"])


def test_a_joint_bar_never_hinders_work() -> None:
    def gone() -> int:
        raise RuntimeError("the store is gone")

    bar = Bar()
    joint = Joint(bar, "all", 3, gone)
    joint.look()
    assert list(joint.track("ab", "own")) == ["a", "b"]
    joint.close()
    assert (bar.at["all"], bar.ended) == (0, ["own", "all"])
    empty = Joint(bar, "none", 0, lambda: 0)
    empty.look()
    assert bar.at["none"] == 0
