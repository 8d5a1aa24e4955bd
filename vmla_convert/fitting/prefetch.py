"""Work ahead in threads: the next results are made while one is used."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import psutil

T = TypeVar("T")
R = TypeVar("R")

CORES_PER_WORKER = 8


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int = 1) -> Iterator[R]:
    """Results of a function in the order of its items, as many made ahead as there are workers."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def workers_for(nbytes: int) -> int:
    """How many workers, each in need of so many bytes, cores and free memory allow: at least one.

    Linear algebra spreads over a few cores by itself; more than those are better used side by side.
    """
    cores = (os.cpu_count() or 1) // CORES_PER_WORKER
    # Half of what is free: the block that is written and the page cache want some too.
    room = psutil.virtual_memory().available // (2 * max(nbytes, 1))
    return max(1, min(cores, room))
