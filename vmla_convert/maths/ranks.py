"""Divide one budget of cached numbers among layers by their predicted errors.

Truncation error is convex in the rank, so the best number to buy next is always the one that gains
most. Buying until the budget is spent puts one threshold on the weighted energies w·sigma² of all
layers (Method: rank allocation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from torch import Tensor

from vmla_convert.errors import ConfigError


def budget(curves: Sequence[Tensor], total: int, step: int) -> list[int]:
    """Buy sizes one jump at a time, the jump with the largest gain per number first.

    The result is optimal on convex curves. On others, jumps of several steps count too, so that a
    layer that gains late is not passed over.

    Args:
        curves: Error of each layer at 0, 1, … numbers; `inf` where a size is impossible.
        total: Numbers of all layers together.
        step: Sizes are multiples of this.

    Raises:
        ConfigError: The smallest possible sizes do not fit the total.
    """
    possible = _possible(curves, step)
    smallest = sum(points[0].size for points in possible)
    if smallest > total:
        raise ConfigError(
            f"the smallest sizes of {len(possible)} layers take {smallest} numbers of {total}",
            "raise --bytes-per-token",
        )
    room = total - smallest
    paths = [_hull(points) for points in possible]  # each starts at its layer's size
    jumps = [(-_gain(*path[:2]), layer) for layer, path in enumerate(paths) if len(path) > 1]
    heapify(jumps)
    while jumps and jumps[0][0] < 0:
        _, layer = heappop(jumps)
        here, there = paths[layer][:2]
        if there.size - here.size <= room:
            room -= there.size - here.size
            del paths[layer][0]
        else:  # a jump gains no more when less room is left, so it is shortened only when it leads
            ahead = [p for p in possible[layer] if 0 <= p.size - here.size <= room]
            paths[layer] = _hull(ahead)
        if len(paths[layer]) > 1:
            heappush(jumps, (-_gain(*paths[layer][:2]), layer))
    return [path[0].size for path in paths]


class _Point(NamedTuple):
    size: int
    error: float


def _possible(curves: Sequence[Tensor], step: int) -> list[list[_Point]]:
    """The possible sizes of each layer, ascending."""
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


def _hull(points: list[_Point]) -> list[_Point]:
    """Corners of the lower convex hull; the next corner is the jump that gains most."""
    hull: list[_Point] = []
    for point in points:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) < _gain(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _gain(here: _Point, there: _Point) -> float:
    """Error saved per number."""
    return (here.error - there.error) / (there.size - here.size)
