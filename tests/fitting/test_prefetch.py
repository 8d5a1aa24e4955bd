"""Results computed ahead come in order, no further ahead than asked, and stop on errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from threading import Event, Timer
from time import sleep
from types import SimpleNamespace
from typing import NoReturn

import psutil
import pytest

from vmla_convert.fitting.prefetch import CORES_PER_WORKER, ahead, workers_for

GB = 10**9


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 8])
def test_results_come_in_order_and_at_most_one_per_worker_is_ahead(
    workers: int, count: int
) -> None:
    started: list[int] = []

    def slow_first(item: int) -> int:
        started.append(item)
        sleep(0.002 * (count - item))
        return 10 * item

    for item, result in enumerate(ahead(slow_first, range(count), workers)):
        assert result == 10 * item
        assert len(started) <= item + 1 + workers


def test_the_next_result_is_computed_while_one_is_used() -> None:
    computed = Event()

    def compute(item: int) -> int:
        if item == 1:
            computed.set()
        return item

    results = ahead(compute, range(3))
    assert next(results) == 0
    assert computed.wait(5)
    assert list(results) == [1, 2]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_is_raised_at_its_item_and_ends_the_work(error: BaseException) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise error
        return item

    results, got = ahead(work, range(50)), list[int]()
    with pytest.raises(type(error)) as caught:
        got.extend(results)
    assert caught.value is error
    assert got == [0, 1]
    assert max(begun) <= 4


def test_closing_early_waits_for_running_work_and_starts_no_more() -> None:
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


def test_ctrl_c_while_waiting_starts_no_other_item(monkeypatch: pytest.MonkeyPatch) -> None:
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
        (CORES_PER_WORKER - 1, 64 * GB, GB, 1),
        (4 * CORES_PER_WORKER, 64 * GB, GB, 4),
        (4 * CORES_PER_WORKER, 6 * GB, GB, 3),
        (4 * CORES_PER_WORKER, 6 * GB, 4 * GB, 1),
        (4 * CORES_PER_WORKER, 6 * GB, 0, 4),
    ],
)
def test_cores_and_free_memory_limit_the_workers(
    cores: int | None, free: int, nbytes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert workers_for(nbytes) == workers
