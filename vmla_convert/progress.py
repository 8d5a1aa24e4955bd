"""How a pipeline tells of its progress without knowing a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """What `console` draws; pipelines only call it."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, advancing a bar named `label`."""
        ...

    def note(self, text: str) -> None:
        """Show the latest figure beside the bar that is running."""
        ...


class Silent:
    """No terminal: libraries, tests, and all processes but the first."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:  # noqa: ARG002
        """Yield the items and say nothing."""
        yield from items

    def note(self, text: str) -> None:
        """Say nothing."""


class Timed:
    """Passes everything on, and adds up how long each label took.

    Attributes:
        seconds: By label; what the consumer did with an item counts.
    """

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, drawn by the other."""
        started = perf_counter()
        yield from self._progress.track(items, label, total)
        self.seconds[label] = self.seconds.get(label, 0.0) + perf_counter() - started

    def note(self, text: str) -> None:
        """Show the latest figure, drawn by the other."""
        self._progress.note(text)
