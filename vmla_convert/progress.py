"""How a pipeline tells of its progress without knowing a terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from time import perf_counter
from typing import Protocol, TypeVar

T = TypeVar("T")

GLANCE = 1.0
"""Seconds between two looks at what others have done."""


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


class OneBar:
    """Draws what is tracked one after the other as one bar, and nothing more once that is full.

    Args:
        progress: Where to draw.
        label: Of the bar, in place of those that are given.
        total: Items of all that belongs to it.
    """

    def __init__(self, progress: Progress, label: str, total: int) -> None:
        self._progress = progress
        # A bar moves when it is asked for its next item; asked for its first it is there, empty.
        self._bar = iter(progress.track(range(total), label))
        next(self._bar, None)

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:  # noqa: ARG002
        """Yield the items, advancing the one bar."""
        for item in items:
            yield item
            next(self._bar, None)

    def note(self, text: str) -> None:
        """Show the latest figure, drawn by the other."""
        self._progress.note(text)

    def close(self) -> None:
        """Leave the bar as it is."""
        if isinstance(self._bar, Generator):
            self._bar.close()


class Joint:
    """Passes everything on, below one bar that shows what several processes have done together.

    Args:
        progress: Where to draw.
        label: Of the bar.
        total: How much there is to do.
        count: Tells how much all of them have done. Where it fails, the bar stays as it is.
    """

    def __init__(
        self, progress: Progress, label: str, total: int, count: Callable[[], int]
    ) -> None:
        self._progress, self._total, self._count = progress, total, count
        # A bar moves when it is asked for its next item, whoever did the one before.
        self._bar, self._drawn = iter(progress.track(range(total), label)), -1
        self._looked, self._done = perf_counter(), 0
        self._draw(0)

    def look(self) -> None:
        """Ask how much is done, and draw it."""
        self._looked = perf_counter()
        with suppress(Exception):  # work goes on without a bar
            self._done = self._count()
        self._draw(self._done)

    def close(self) -> None:
        """Leave the bar as it is."""
        if isinstance(self._bar, Generator):
            self._bar.close()

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, drawn by the other, with a glance at the joint bar."""
        for item in self._progress.track(items, label, total):
            yield item
            self._glance()

    def note(self, text: str) -> None:
        """Show the latest figure, drawn by the other."""
        self._progress.note(text)
        self._glance()

    def _glance(self) -> None:
        if perf_counter() - self._looked > GLANCE:
            self.look()

    def _draw(self, done: int) -> None:
        while self._drawn < min(done, self._total):
            next(self._bar, None)
            self._drawn += 1
