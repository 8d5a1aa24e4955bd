"""Progress bars that long work advances, without knowing a terminal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from time import perf_counter
from typing import Any, Self, TypeVar

T = TypeVar("T")

Advance = Callable[[int], None]
"""Moves a bar forward by a number of items."""

LOOK_SECONDS = 1.0
"""Least seconds between two requests for what other processes have done."""


class Progress(ABC):
    """Draws bars and notes. `console` implements it for terminals and for logs."""

    @abstractmethod
    def bar(self, label: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Draw a bar within a `with` block, and give the function that advances the bar."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Show the latest figure beside the bar that is running."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, and advance a bar after each one."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.bar(label, total) as advance:
            for item in items:
                yield item
                advance(1)


class Silent(Progress):
    """Draws nothing: for libraries, tests, and all processes but the first."""

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:  # noqa: ARG002
        """Give a function that does nothing."""
        yield lambda _: None

    def note(self, text: str) -> None:
        """Show nothing."""


class Timed(Progress):
    """Adds up the seconds of the bars that another progress draws.

    Attributes:
        seconds: Seconds between start and end of the bars, by label.
    """

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """Draw and time a bar."""
        started = perf_counter()
        with self._progress.bar(label, total) as advance:
            yield advance
        self.seconds[label] = self.seconds.get(label, 0.0) + perf_counter() - started

    def note(self, text: str) -> None:
        """Show the latest figure."""
        self._progress.note(text)


class OneBar(Progress):
    """Draws one bar for several pieces of work within a `with` block. A full bar ends at once."""

    def __init__(self, progress: Progress, label: str, total: int) -> None:
        self._progress, self._label, self._total = progress, label, total
        self._left, self._open = total, ExitStack()

    def __enter__(self) -> Self:
        self._draw = self._open.enter_context(self._progress.bar(self._label, self._total))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:  # noqa: ARG002
        """Give the function that advances the one bar."""
        yield self.advance

    def note(self, text: str) -> None:
        """Show the latest figure."""
        self._progress.note(text)

    def advance(self, count: int) -> None:
        """Move the bar forward, at most to its end."""
        count = min(count, self._left)
        if count > 0:
            self._left -= count
            self._draw(count)
            if not self._left:
                self._open.close()


class Joint(OneBar):
    """Draws bars below one bar that shows what several processes have done together.

    Args:
        count: Returns how much all processes have done. The bar stays as it is where that fails.
    """

    def __init__(
        self, progress: Progress, label: str, total: int, count: Callable[[], int]
    ) -> None:
        super().__init__(progress, label, total)
        self._count, self._looked = count, perf_counter()

    def look(self) -> None:
        """Ask how much is done, and advance the joint bar to there."""
        self._looked, drawn = perf_counter(), self._total - self._left
        done = drawn
        with suppress(Exception):  # work goes on without a bar
            done = self._count()
        self.advance(done - drawn)

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """Draw a bar, and the joint bar once in a while."""
        with self._progress.bar(label, total) as advance:

            def both(count: int) -> None:
                advance(count)
                self._glance()

            yield both

    def note(self, text: str) -> None:
        """Show the latest figure."""
        super().note(text)
        self._glance()

    def _glance(self) -> None:
        if perf_counter() - self._looked > LOOK_SECONDS:
            self.look()
