"""Compute results ahead in threads, while the caller uses the current one."""

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
    """Yield results in the order of the items, at most `workers` results ahead."""
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
    """Workers that cores and free memory allow, at least one, when each needs `nbytes`.

    Linear algebra uses a few cores well by itself; further cores are better used side by side.
    """
    cores = (os.cpu_count() or 1) // CORES_PER_WORKER
    # Half of the free memory: the block being written and the page cache need memory too.
    room = psutil.virtual_memory().available // (2 * max(nbytes, 1))
    return max(1, min(cores, room))
