"""Rope keys: what complex mixing across heads captures, and what phases stand for."""

from __future__ import annotations

from math import isclose

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.latent import TOYS, Toy, dense_key, toy
from torch import Tensor

from vmla_convert.config import CachePolicy
from vmla_convert.maths.moments import as_pairs
from vmla_convert.maths.projections import key_square
from vmla_convert.maths.rope3d import axis_pairs, pair_frequencies, token_positions
from vmla_convert.maths.rope_keys import (
    RopeMix,
    expected_phases,
    fastest_rope_mix,
    pairs_per_axis,
    position_cost,
    principal_rope_mix,
    rope_tail,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=8)
HEAD_DIMS = st.sampled_from((6, 8, 10, 14, 16))


def square_of(toy: Toy) -> Tensor:
    return key_square(toy.weights, toy.evidence.mean, toy.evidence.covariance)


def cost_of(toy: Toy) -> Tensor:
    return position_cost(toy.evidence.query_pairs, toy.evidence.phases)


def shared_sources(seed: int) -> Toy:
    """A toy whose heads are complex mixes of one source at each pair, and a little of their own."""
    data = toy(3, 14, seed)
    weights = data.weights
    key, bias = weights.key_pairs()
    mix = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)
    key = mix[..., None] * key[:1] + 0.1 * key
    raw = torch.view_as_real(key).movedim(-1, 2).flatten(0, 2) / weights.key_gain[:, None]
    bias = torch.view_as_real(mix * bias[:1]).flatten() / weights.key_gain
    return data._replace(weights=weights._replace(raw_key=raw, raw_key_bias=bias))


def missed(toy: Toy, mix: RopeMix, cost: Tensor) -> float:
    """E of cost · |z − ẑ|² over the tokens, all heads and pairs."""
    z = as_pairs(dense_key(toy.weights, toy.inputs))
    rebuilt = torch.zeros_like(z)
    for pair, gather, share in zip(mix.pairs, mix.gather, mix.mix, strict=True):
        rebuilt[:, :, pair] += share * (z[:, :, pair] @ gather)[:, None]
    return (cost * (z - rebuilt).abs().square()).sum().item() / len(z)


def one_head(pair: int, head: int, heads: int) -> RopeMix:
    one = torch.zeros(1, heads, dtype=torch.complex128)
    one[0, head] = 1
    return RopeMix(torch.tensor([pair]), one, one)


@repeatable
@given(TOYS)
def test_a_complex_mix_beats_a_real_one_and_that_the_best_head(toy: Toy) -> None:
    square, heads = square_of(toy), toy.weights.num_heads
    for pair in range(len(square)):
        cost = torch.zeros_like(toy.evidence.query_pairs)
        cost[:, pair] = toy.evidence.query_pairs[:, pair]
        best = principal_rope_mix(square, cost, 1)
        assert best.pairs.tolist() == [pair]
        # The best real mix sees real and imaginary parts as samples of their own.
        real = principal_rope_mix(square.real.to(square.dtype), cost, 1)
        assert real.mix.imag.abs().max() < 1e-9 * real.mix.abs().max()
        heads_alone = [missed(toy, one_head(pair, head, heads), cost) for head in range(heads)]
        complex_error, real_error = missed(toy, best, cost), missed(toy, real, cost)
        assert complex_error <= real_error * (1 + 1e-9) + 1e-12
        assert real_error <= min(heads_alone) * (1 + 1e-9) + 1e-12


@repeatable
@given(TOYS)
def test_the_best_keys_lose_the_tail_which_falls_to_nothing(toy: Toy) -> None:
    """Twice the tail: the mean product of two pairs is half that of their squared lengths."""
    square, cost = square_of(toy), cost_of(toy)
    tail = rope_tail(square, cost)
    assert len(tail) == toy.all_pairs + 1
    assert (tail.diff() <= 0).all()
    assert tail[-1] < 1e-12 * tail[0]
    for count in range(0, toy.all_pairs + 1, 3):
        mix = principal_rope_mix(square, cost, count)
        error = missed(toy, mix, cost) / 2
        assert isclose(error, tail[count].item(), rel_tol=1e-9, abs_tol=1e-12 * tail[0].item())


@pytest.mark.parametrize("count", [1, 8])
def test_the_best_keys_beat_perturbations_of_themselves(count: int) -> None:
    data, generator = shared_sources(1), torch.Generator().manual_seed(0)
    square, cost = square_of(data), cost_of(data)
    mix = principal_rope_mix(square, cost, count)
    best = missed(data, mix, cost)
    for size in (0.3, 0.1, 0.03, 0.01) * 10:
        gather, moved = (
            part * (1 + size * torch.randn(part.shape, generator=generator, dtype=part.dtype))
            for part in mix[1:]
        )
        assert missed(data, RopeMix(mix.pairs, gather, moved), cost) > best


def test_a_pair_that_heads_do_not_share_may_be_kept_more_than_once() -> None:
    data = toy()
    cost = torch.zeros_like(data.evidence.query_pairs)
    cost[:, 4] = 1
    assert principal_rope_mix(square_of(data), cost, 3).pairs.tolist() == [4, 4, 4]


def test_a_pair_that_keeps_its_phase_needs_no_rope_key() -> None:
    data = toy()
    phases = torch.polar(torch.ones(3, 7), torch.linspace(0, 3, 7).expand(3, 7))
    phases = phases.to(torch.complex128)
    phases[:, 4] *= 0.5
    cost = position_cost(data.evidence.query_pairs, phases)
    assert set(principal_rope_mix(square_of(data), cost, 3).pairs.tolist()) == {4}
    assert rope_tail(square_of(data), cost)[3] < 1e-5 * rope_tail(square_of(data), cost)[0]


def windows_of(draw: st.DrawFn) -> tuple[CachePolicy, int, tuple[int, int], int]:
    window = draw(st.integers(1, 6))
    sink = draw(st.integers(0, window - 1))
    chunk = draw(st.integers(1, window - sink))
    grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return CachePolicy(window, sink, "relative"), chunk, grid, draw(HEAD_DIMS)


WINDOWS = st.composite(windows_of)()


def rotations(policy: CachePolicy, chunk: int, grid: tuple[int, int], head_dim: int) -> Tensor:
    """exp(i·angle) from each query of the newest chunk to each key of a full window."""
    keys = token_positions(torch.arange(policy.window_frames), *grid).tolist()
    queries = keys[-chunk * grid[0] * grid[1] :]
    turning = list(zip(*(part.tolist() for part in pair_frequencies(head_dim)), strict=True))
    angles = [[[w * (k[axis] - q[axis]) for axis, w in turning] for k in keys] for q in queries]
    return torch.exp(1j * torch.tensor(angles, dtype=torch.float64))


@repeatable
@given(WINDOWS)
def test_a_phase_is_the_mean_over_all_query_key_pairs_of_the_window(
    drawn: tuple[CachePolicy, int, tuple[int, int], int],
) -> None:
    torch.testing.assert_close(expected_phases(*drawn), rotations(*drawn).mean((0, 1)))


@pytest.mark.parametrize("head_dim", [6, 8, 14, 128])
def test_the_papers_pairs_are_all_different_and_the_fastest_of_their_axis(head_dim: int) -> None:
    for count in range(1, head_dim // 2 + 1):
        mix = fastest_rope_mix(head_dim, 2, count)
        pairs = mix.pairs.tolist()
        assert len(set(pairs)) == count
        per_axis = pairs_per_axis(head_dim, count)
        assert sum(per_axis) == count
        start = 0
        for size, taken in zip(axis_pairs(head_dim), per_axis, strict=True):
            assert [p for p in pairs if start <= p < start + size] == [*range(start, start + taken)]
            start += size


def test_the_papers_rope_key_is_the_mean_over_heads() -> None:
    mix = fastest_rope_mix(14, 3, 4)
    z = torch.randn(3, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.einsum("mh,hm->m", mix.gather, z), z.mean(0))
    assert (mix.mix == 1).all()
