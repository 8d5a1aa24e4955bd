"""Processes that a launcher started to share the points of a sweep, each of which one does alone.

They do not train together, so they form no process group: a store tells them which point is next,
and when what all need is there.
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

# A whole sweep may pass until the slowest point is done.
_PATIENCE = timedelta(days=30)
_PAUSE = 0.5
# What a launcher tells a process of its place; without it, every library takes it to be alone.
_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class Team:
    """One process among its like; alone by default.

    Attributes:
        rank: Its number; 0 leads.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._finished = 0

    @property
    def leads(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def announce(self, milestone: str) -> None:
        """Tell the others that this process has come so far."""
        if self._store is not None:
            self._store.set(f"{milestone}-{self.rank}", "there")

    def await_leader(self, milestone: str) -> None:
        """Wait until the leader has come so far."""
        if self._store is not None:
            self._store.wait([f"{milestone}-0"], _PATIENCE)

    def await_all(self, milestone: str, meanwhile: Callable[[], None]) -> None:
        """Wait until everyone has come so far, and do something small again and again."""
        milestones = [f"{milestone}-{rank}" for rank in range(self.size)]
        while self._store is not None and not self._store.check(milestones):
            meanwhile()
            sleep(_PAUSE)

    def finish(self) -> None:
        """Tell the others that one more item is done."""
        self._finished += 1
        if self._store is not None:
            self._store.add("finished", 1)

    def finished(self) -> int:
        """How many items all processes have done."""
        return self._finished if self._store is None else self._store.add("finished", 0)

    def share(self, items: Sequence[T]) -> Iterator[T]:
        """The items that this process takes: whoever is free takes the next."""
        if self._store is None:
            yield from items
            return
        while (index := self._store.add("taken", 1) - 1) < len(items):
            yield items[index]


def join_team() -> Team:
    """The processes that were started together; from here on this one computes by itself.

    Each keeps one GPU, where there are any. Must be called before CUDA is touched.

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
    for name in _PLACE:
        os.environ.pop(name, None)
    return Team(rank, size, store)
