"""Division of a budget against brute force."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.maths.ranks import budget

Problem = tuple[list[Tensor], int, int]
repeatable = settings(derandomize=True, deadline=None, max_examples=30)


def curve(*errors: float) -> Tensor:
    return torch.tensor(errors, dtype=torch.float64)


def total_error(curves: Sequence[Tensor], sizes: Sequence[int]) -> float:
    return sum(errors[size].item() for errors, size in zip(curves, sizes, strict=True))


def tail_sums(spectrum: list[float], impossible: int) -> Tensor:
    """Truncation errors of a spectrum, with no possible size below some."""
    energies = sorted(spectrum, reverse=True)
    errors = [math.fsum(energies[size:]) for size in range(len(energies) + 1)]
    return curve(*[math.inf] * impossible, *errors[impossible:])


def possible_sizes(errors: Tensor, step: int) -> list[int]:
    return [size for size in range(0, len(errors), step) if errors[size].isfinite()]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """(curves, total, step): a few convex curves and a total that the smallest equal sizes fit."""
    step = draw(st.integers(1, 3))
    spectra = st.lists(st.floats(0, 100), min_size=2 * step, max_size=12)
    impossible = st.integers(0, step)
    curves = [tail_sums(draw(spectra), draw(impossible)) for _ in range(draw(st.integers(1, 3)))]
    return curves, draw(st.integers(step * len(curves), 40)), step


def least_error(curves: list[Tensor], total: int, step: int) -> float:
    divisions = product(*(possible_sizes(errors, step) for errors in curves))
    return min(total_error(curves, sizes) for sizes in divisions if sum(sizes) <= total)


def greedy_by_loops(curves: list[Tensor], total: int, step: int) -> list[int]:
    """The promise of `budget`, with every jump of every layer tried each time."""
    options = [possible_sizes(errors, step) for errors in curves]
    sizes = [option[0] for option in options]
    while True:
        jumps = [
            ((errors[here] - errors[there]).item() / (there - here), layer, there)
            for layer, (errors, here) in enumerate(zip(curves, sizes, strict=True))
            for there in options[layer]
            if 0 < there - here <= total - sum(sizes)
        ]
        gain, layer, there = max(jumps, default=(0.0, 0, 0))
        if gain <= 0:
            return sizes
        sizes[layer] = there


def many_layers(layers: int, sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    falls = torch.rand(layers, sizes, generator=generator, dtype=torch.float64) ** 3
    falls *= torch.logspace(0, 2, layers, dtype=torch.float64)[:, None]
    return list(falls.flip(1).cumsum(1).flip(1))


@repeatable
@given(problems())
def test_budget_is_optimal_on_convex_curves(problem: Problem) -> None:
    curves, total, step = problem
    error = total_error(curves, budget(curves, total, step))
    assert error == pytest.approx(least_error(curves, total, step), rel=1e-9, abs=1e-9)


@repeatable
@given(problem=problems())
def test_sizes_are_possible_multiples_of_step_within_the_total(problem: Problem) -> None:
    curves, total, step = problem
    sizes = budget(curves, total, step)
    assert sum(sizes) <= total
    for size, errors in zip(sizes, curves, strict=True):
        assert size in possible_sizes(errors, step)


@repeatable
@given(problem=problems(), more=st.integers(1, 12))
def test_error_falls_with_the_total(problem: Problem, more: int) -> None:
    curves, total, step = problem
    error = total_error(curves, budget(curves, total, step))
    assert total_error(curves, budget(curves, total + more, step)) <= error + 1e-9


def test_room_for_everything_is_used() -> None:
    curves = [curve(9, 4, 1, 0), curve(5, 3, 2, 0)]
    assert budget(curves, 100, 1) == [3, 3]


@pytest.mark.parametrize("total", [20, 111])
def test_budget_takes_the_best_of_all_jumps_on_any_curve(total: int) -> None:
    curves = many_layers(4, 60)
    for step in (1, 2, 5):
        assert budget(curves, total, step) == greedy_by_loops(curves, total, step)


def test_a_gain_that_comes_after_two_steps_is_seen() -> None:
    late, early = curve(10, 10, 0), curve(10, 8, 6, 4)
    assert budget([late, early], 2, 1) == [2, 0]
    assert budget([late, early], 3, 1) == [2, 1]


def test_a_long_jump_that_does_not_fit_leaves_room_for_short_ones() -> None:
    late, early = curve(10, 9, 8, 0), curve(10, 8.5, 7)
    assert budget([late, early], 2, 1) == [0, 2]
    assert budget([late, late], 4, 1) == [3, 1]


def test_nothing_is_bought_that_saves_nothing() -> None:
    assert budget([curve(5, 0, 0, 0), curve(2, 2, 2)], 6, 1) == [1, 0]


def test_impossible_sizes_are_passed_over() -> None:
    curves = [curve(math.inf, math.inf, 8, math.inf, 2, 1), curve(math.inf, 3, 2, 1, 0.5, 0.25)]
    assert budget(curves, 4, 1) == [2, 2]
    for total in range(4, 11):
        assert math.isfinite(total_error(curves, budget(curves, total, 1)))


def test_a_budget_below_the_smallest_sizes_is_refused() -> None:
    curves = [curve(math.inf, math.inf, 3, 1), curve(math.inf, math.inf, 2, 0)]
    assert budget(curves, 4, 2) == [2, 2]
    with pytest.raises(ConfigError) as caught:
        budget(curves, 3, 2)
    assert "3" in caught.value.message
    assert "--bytes-per-token" in caught.value.hint


def test_a_step_with_no_possible_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer 1"):
        budget([curve(2, 1, 0), curve(math.inf, 1, 0)], 10, 3)
