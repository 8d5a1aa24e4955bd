"""Processes that share the points of a sweep. Each computes its points alone.

The processes form no process group. A store of torch's rendezvous tells them which point is next,
and how many points are done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from time import sleep
from typing import TypeVar

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from vmla_convert.errors import ConfigError

T = TypeVar("T")

# Calibration, which the other processes wait for, may take days.
_TIMEOUT = timedelta(days=30)
_PAUSE = 0.5
# Variables by which a launcher tells a process its rank. Libraries must not find them.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class Team:
    """One of the `size` processes of a sweep; the process of rank 0 leads."""

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._finished = 0

    @property
    def leads(self) -> bool:
        """Whether this process does the work that is done once."""
        return self.rank == 0

    def follow_leader(self, milestone: str) -> None:
        """Wait until the leader has made the same call."""
        if self._store is None:
            return
        if self.leads:
            self._store.set(milestone, "")
        else:
            self._store.wait([milestone], _TIMEOUT)

    def share(self, items: Sequence[T]) -> Iterator[T]:
        """Yield the items that this process takes: a free process takes the next one."""
        if self._store is None:
            for item in items:
                yield item
                self._finished += 1
            return
        while (index := self._store.add("taken", 1) - 1) < len(items):
            yield items[index]
            self._store.add("finished", 1)
        self._store.add("left", 1)

    def finished(self) -> int:
        """Number of items that all processes have finished."""
        return self._finished if self._store is None else self._store.add("finished", 0)

    def await_all(self, meanwhile: Callable[[], None]) -> None:
        """Call `meanwhile` again and again until every process has left `share`."""
        while self._store is not None and self._store.add("left", 0) < self.size:
            meanwhile()
            sleep(_PAUSE)


def join_team() -> Team:
    """Find the processes that were started together; afterwards each computes by itself.

    Each process keeps one GPU, if there are any. Call this before CUDA is used.

    Raises:
        ConfigError: There are fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Team()
    store, rank, size = next(rendezvous("env://"))
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if 0 < count <= local:
        raise ConfigError(
            f"there are more processes than the {count} GPUs here",
            f"start {count} of them: torchrun --nproc_per_node {count} …",
        )
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local]
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    return Team(rank, size, store)
