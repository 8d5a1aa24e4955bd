"""Choose the faster of two backends for MLA attention; both compute the same function.

Operation counts decide alone where they are far apart, where there is little to compute, and in
compiled code. A timing holds for the process: no shape is timed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from vmla_convert.maths.cost import AttentionShape, absorbed_flops, materialised_flops

Backend = Literal["materialised", "absorbed"]

CLEAR_RATIO, SMALL_FLOPS, TIMED_RUNS = 1.6, 10**10, 2
_FASTER: dict[Hashable, Backend] = {}


def faster_backend(
    shape: AttentionShape,
    like: Tensor,
    materialised: Callable[[], object],
    absorbed: Callable[[], object],
) -> Backend:
    """Return the faster backend, by counted operations or by one timing.

    Args:
        shape: Sizes of the attention.
        like: The queries; only dtype and device are used.
        materialised: Runs the materialised backend.
        absorbed: Runs the absorbed backend.
    """
    rebuilding, absorbing = materialised_flops(shape), absorbed_flops(shape)
    fewest, most = sorted((rebuilding, absorbing))
    if most > CLEAR_RATIO * fewest or fewest < SMALL_FLOPS or torch.compiler.is_compiling():
        return "absorbed" if absorbing < rebuilding else "materialised"
    known = (shape, like.dtype, like.device, torch.get_num_threads())
    if known not in _FASTER:
        rebuilt, without = _seconds(materialised, absorbed, like.device)
        _FASTER[known] = "absorbed" if without < rebuilt else "materialised"
    return _FASTER[known]


def _seconds(
    one: Callable[[], object], other: Callable[[], object], device: torch.device
) -> tuple[float, float]:
    """Shortest time of each backend in seconds, after one warm-up."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + TIMED_RUNS):
        for run, seconds in zip((one, other), spent, strict=True):
            _settle(device)
            started = perf_counter()
            run()
            _settle(device)
            seconds.append(perf_counter() - started)
    return min(spent[0][1:]), min(spent[1][1:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
