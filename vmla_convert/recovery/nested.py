"""Train a codec at several sizes at once, so that one recovered file serves all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from vmla_convert.config import Sizes
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.rates import Rate
from vmla_convert.media.clips import seeded
from vmla_convert.training.losses import Example, Examples


class NestedSizes:
    """The sizes that a codec trains at. Without a list of sizes, all methods keep its own size.

    Args:
        student: The model, at the size that it is measured at.
        nested: Sizes as shares of the dense cache to remove: 0.95 leaves 5 %.
        seed: Seed of the draws.
    """

    def __init__(self, student: CausalWanModel, nested: Sequence[float], seed: int) -> None:
        codecs = [block.codec for block in student.all_blocks()]
        self._codecs = [codec for codec in codecs if codec is not None]
        self._seed, self._own = seed, [codec.rate for codec in self._codecs]
        self._sizes = [student.rates(Sizes(cut=cut)) for cut in nested]

    def draw(self, step: int) -> None:
        """Set the size of a step, which depends on the step's number only."""
        if self._sizes:
            generator = seeded(self._seed, step, "nested size")
            self._set(self._sizes[int(torch.randint(len(self._sizes), (), generator=generator))])

    def restore(self) -> None:
        """Set the size that the model is measured at."""
        self._set(self._own)

    def examples(self, examples: Examples) -> Examples:
        """The same examples; each step draws its size first."""

        def drawn(step: int) -> Sequence[Example]:
            self.draw(step)
            return examples(step)

        return drawn

    def mean_error(self, measure: Callable[[], float]) -> float:
        """Geometric mean of an error over all sizes; it weighs relative improvements equally."""
        errors: list[float] = []
        for rates in self._sizes or [self._own]:
            self._set(rates)
            errors.append(measure())
        self.restore()
        return math.exp(sum(math.log(max(error, 1e-30)) for error in errors) / len(errors))

    def _set(self, rates: Sequence[Rate]) -> None:
        for codec, rate in zip(self._codecs, rates, strict=True):
            codec.rate = rate
