"""How one budget of cached numbers is divided among layers whose predicted errors are known.

Truncation error is convex in the rank, so the number that gains most is always the best one to buy
next, and buying until the budget is spent puts one threshold on the weighted energies w·sigma² of
all layers (METHOD 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from torch import Tensor

from vmla_convert.errors import ConfigError


def uniform(curves: Sequence[Tensor], total: int, step: int) -> list[int]:
    """The same size for every layer, as large as fits.

    Raises:
        ConfigError: No size is possible for every layer within the total.
    """
    common = set.intersection(*({p.size for p in points} for points in _possible(curves, step)))
    fitting = [size for size in common if size * len(curves) <= total]
    if not fitting:
        raise ConfigError(
            f"no one size suits all {len(curves)} layers within {total} numbers",
            "raise --cache-scalars, or let sizes differ between layers",
        )
    return [max(fitting)] * len(curves)


def budget(curves: Sequence[Tensor], total: int, step: int) -> list[int]:
    """Sizes bought one jump at a time, the one with the largest gain per number first.

    Optimal on convex curves. On others, jumps of several steps are weighed too, so that a layer
    that gains late is not passed over.

    Raises:
        ConfigError: The smallest possible sizes do not fit the total.
    """
    possible = _possible(curves, step)
    room = total - _check_smallest(possible, total)
    paths = [_hull(points) for points in possible]  # each starts where its layer stands
    offers = [(-_gain(*path[:2]), layer) for layer, path in enumerate(paths) if len(path) > 1]
    heapify(offers)
    while offers and offers[0][0] < 0:
        _, layer = heappop(offers)
        here, there = paths[layer][:2]
        if there.size - here.size <= room:
            room -= there.size - here.size
            del paths[layer][0]
        else:  # an offer gains no more when less room is left, so mending it when it leads is exact
            ahead = [p for p in possible[layer] if 0 <= p.size - here.size <= room]
            paths[layer] = _hull(ahead)
        if len(paths[layer]) > 1:
            heappush(offers, (-_gain(*paths[layer][:2]), layer))
    return [path[0].size for path in paths]


class _Point(NamedTuple):
    size: int
    error: float


def _possible(curves: Sequence[Tensor], step: int) -> list[list[_Point]]:
    """The sizes that each layer may take, ascending, never none."""
    layers = []
    for layer, curve in enumerate(curves):
        multiples = enumerate(curve[::step].tolist())
        points = [_Point(i * step, error) for i, error in multiples if math.isfinite(error)]
        if not points:
            raise ConfigError(
                f"no multiple of {step} is a possible size of layer {layer}", "take a smaller step"
            )
        layers.append(points)
    return layers


def _check_smallest(possible: list[list[_Point]], total: int) -> int:
    """What the smallest sizes take together."""
    smallest = sum(points[0].size for points in possible)
    if smallest > total:
        raise ConfigError(
            f"the smallest sizes of {len(possible)} layers take {smallest} numbers of {total}",
            "raise --cache-scalars",
        )
    return smallest


def _hull(points: list[_Point]) -> list[_Point]:
    """The corners of the lower convex hull: from each, the next is the jump that gains most."""
    hull: list[_Point] = []
    for point in points:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) < _gain(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _gain(here: _Point, there: _Point) -> float:
    """Error saved per number."""
    return (here.error - there.error) / (there.size - here.size)
