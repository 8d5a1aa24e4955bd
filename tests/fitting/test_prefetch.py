"""Work ahead: in order, no further than asked, and over when something goes wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from threading import Event, Lock, Timer, get_ident
from time import sleep
from types import SimpleNamespace
from typing import NoReturn

import psutil
import pytest

from vmla_convert.fitting import prefetch as parallel
from vmla_convert.fitting.prefetch import CORES_PER_WORKER, ahead, workers_for

GB = 10**9


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 12])
def test_results_come_in_the_order_of_their_items(workers: int, count: int) -> None:
    def slow_first(item: int) -> int:
        sleep(0.002 * (count - item))
        return 10 * item

    assert list(ahead(slow_first, range(count), workers)) == [10 * item for item in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_no_more_is_made_ahead_than_there_are_workers(workers: int) -> None:
    started: list[int] = []

    def note(item: int) -> int:
        started.append(item)
        return item

    for item in ahead(note, range(8), workers):
        sleep(0.02)
        assert len(started) == min(8, item + 1 + workers)


def test_the_next_is_made_while_one_is_used() -> None:
    made = Event()

    def make(item: int) -> int:
        if item == 1:
            made.set()
        return item

    results = ahead(make, range(3))
    assert next(results) == 0
    assert made.wait(5)
    assert list(results) == [1, 2]


def test_workers_work_side_by_side_and_not_in_the_callers_thread() -> None:
    seen: set[int] = set()
    lock, both = Lock(), Event()

    def meet(item: int) -> int:
        with lock:
            seen.add(get_ident())
            if len(seen) == 2:
                both.set()
        assert both.wait(5)
        return item

    assert list(ahead(meet, range(2), 2)) == [0, 1]
    assert get_ident() not in seen


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_comes_at_its_items_turn_and_ends_the_work(error: BaseException) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise error
        return item

    results, got = ahead(work, range(50)), list[int]()
    with pytest.raises(type(error)) as caught:
        for item in results:
            got.append(item)
    assert caught.value is error
    assert got == [0, 1]
    assert max(begun) <= 4


def test_an_error_of_the_items_comes_through() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(ahead(str, items()))


def test_closing_early_waits_for_what_runs_and_starts_nothing_more() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        sleep(0.02)
        ended.append(item)
        return item

    results = ahead(work, range(50), 1)
    assert isinstance(results, Iterator)
    next(results)
    results.close()  # pyright: ignore[reportAttributeAccessIssue]
    so_far = len(begun)
    assert begun == ended
    assert so_far <= 3
    sleep(0.05)
    assert len(begun) == so_far


def test_ctrl_c_while_one_is_awaited_starts_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, started, release = list[int](), Event(), Event()

    def work(item: int) -> int:
        begun.append(item)
        started.set()
        assert release.wait(5)
        return item

    def pressed(_: object) -> NoReturn:
        assert started.wait(5)
        Timer(0.05, release.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", pressed)
    with pytest.raises(KeyboardInterrupt):
        list(ahead(work, range(9)))
    assert begun == [0]


@pytest.mark.parametrize(
    ("cores", "free", "nbytes", "workers"),
    [
        (None, 64 * GB, GB, 1),
        (2, 64 * GB, GB, 1),
        (CORES_PER_WORKER - 1, 64 * GB, GB, 1),
        (4 * CORES_PER_WORKER, 64 * GB, GB, 4),
        (4 * CORES_PER_WORKER, 6 * GB, GB, 3),
        (4 * CORES_PER_WORKER, 6 * GB, 4 * GB, 1),
        (4 * CORES_PER_WORKER, 6 * GB, 0, 4),
    ],
)
def test_cores_and_free_memory_say_how_many_workers(
    cores: int | None, free: int, nbytes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parallel.psutil is psutil
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert workers_for(nbytes) == workers
