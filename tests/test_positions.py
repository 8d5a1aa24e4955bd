"""The rope branch: what complex mixing across heads captures, and what phases stand for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vmla_convert.config import CachePolicy
from vmla_convert.maths.moments import Moments, as_pairs, measure_moments
from vmla_convert.maths.positions import (
    RopeBranch,
    expected_phases,
    highest_frequency_branch,
    principal_branch,
)
from vmla_convert.maths.rope3d import axis_pairs, pair_frequencies, token_positions

HEADS, HEAD_DIM, TOKENS = 3, 14, 400
SOURCES = 2


def correlated_moments(seed: int = 0) -> tuple[Tensor, Moments]:
    """Keys whose heads are complex mixes of fewer sources, so that sharing can work."""
    generator = torch.Generator().manual_seed(seed)
    half = HEAD_DIM // 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.complex128)

    sources = normal(TOKENS, SOURCES, half) * torch.tensor([1.0, 0.3])[:, None]
    mixed = torch.einsum("nsf,hsf->nhf", sources, normal(HEADS, SOURCES, half))
    keys = torch.view_as_real(mixed).flatten(-2)
    queries = torch.randn(TOKENS, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    queries = queries * torch.tensor([2.0, 1.0, 0.5])[:, None]
    inputs = torch.randn(TOKENS, 4, generator=generator, dtype=torch.float64)
    return keys, measure_moments(inputs, keys, torch.ones(TOKENS), queries)


def no_phases() -> Tensor:
    return torch.zeros(HEAD_DIM // 2, dtype=torch.complex128)


def weighted_error(keys: Tensor, moments: Moments, branch: RopeBranch) -> float:
    """E Σ |u_h|² |z_h − ẑ_h|² over all pairs, the norm in which the branch is optimal."""
    z = as_pairs(keys)
    rebuilt = torch.zeros_like(z)
    for pair, gather, mix in zip(branch.pairs, branch.gather, branch.mix, strict=True):
        rebuilt[:, :, pair] += mix * (z[:, :, pair] @ gather)[:, None]
    square = moments.query_square.diagonal(dim1=-2, dim2=-1) / moments.queries
    weight = square.unflatten(-1, (-1, 2)).sum(-1)
    return (weight * (z - rebuilt).abs().square()).sum().item() / TOKENS


def real_branch(moments: Moments, pair: int) -> RopeBranch:
    """The best real mix across heads of one pair: real and imaginary parts taken as samples."""
    square = moments.query_square.diagonal(dim1=-2, dim2=-1) / moments.queries
    weight = square.unflatten(-1, (-1, 2)).sum(-1)[:, pair].sqrt()
    cross = moments.key_pairs[pair].real * weight[:, None] * weight[None, :]
    vector = torch.linalg.eigh(cross).eigenvectors[:, -1]
    return RopeBranch(
        torch.tensor([pair]),
        (vector * weight)[None].to(torch.complex128),
        (vector / weight)[None].to(torch.complex128),
    )


def single_head_branch(pair: int, head: int) -> RopeBranch:
    one = torch.zeros(1, HEADS, dtype=torch.complex128)
    one[0, head] = 1
    return RopeBranch(torch.tensor([pair]), one, one)


@pytest.mark.parametrize("pair", range(HEAD_DIM // 2))
def test_complex_mix_beats_real_mix_beats_single_head(pair: int) -> None:
    keys, moments = correlated_moments()
    only_this = torch.ones(HEAD_DIM // 2, dtype=torch.complex128)
    only_this[pair] = 0
    branch = principal_branch(moments, only_this, 1)
    assert branch.pairs.tolist() == [pair]
    complex_error = weighted_error(keys, moments, branch)
    real_error = weighted_error(keys, moments, real_branch(moments, pair))
    best_head = min(
        weighted_error(keys, moments, single_head_branch(pair, head)) for head in range(HEADS)
    )
    assert complex_error <= real_error * (1 + 1e-9)
    assert real_error <= best_head * (1 + 1e-9)


def test_error_falls_with_every_rope_key_and_vanishes_with_all() -> None:
    keys, moments = correlated_moments()
    total = HEADS * HEAD_DIM // 2
    errors = [
        weighted_error(keys, moments, principal_branch(moments, no_phases(), count))
        for count in range(1, total + 1)
    ]
    assert all(after <= before + 1e-9 for before, after in pairwise(errors))
    assert errors[-1] < 1e-20 * errors[0]


def test_one_budget_takes_the_largest_gains_first() -> None:
    _, moments = correlated_moments()
    few = principal_branch(moments, no_phases(), 3).pairs.tolist()
    more = principal_branch(moments, no_phases(), 6).pairs.tolist()
    assert more[:3] == few


def test_a_pair_that_keeps_its_phase_needs_no_rope_key() -> None:
    _, moments = correlated_moments()
    phases = torch.ones(HEAD_DIM // 2, dtype=torch.complex128)
    phases[4] = 0
    assert set(principal_branch(moments, phases, SOURCES).pairs.tolist()) == {4}


def test_branch_commutes_with_rope() -> None:
    keys, moments = correlated_moments()
    branch = principal_branch(moments, no_phases(), 5)
    turn = torch.polar(torch.ones(5, dtype=torch.float64), torch.linspace(0, 3, 5).double())
    z = as_pairs(keys)[:, :, branch.pairs]
    rotated_first = torch.einsum("mh,nhm->nm", branch.gather, z * turn)
    rotated_last = torch.einsum("mh,nhm->nm", branch.gather, z) * turn
    torch.testing.assert_close(rotated_first, rotated_last)


def test_highest_frequencies_of_wan_are_six_five_five() -> None:
    branch = highest_frequency_branch(128, 12, 16)
    starts = (0, 22, 43)
    expected = [start + i for start, n in zip(starts, (6, 5, 5), strict=True) for i in range(n)]
    assert branch.pairs.tolist() == expected


@pytest.mark.parametrize("head_dim", [6, 14, 32, 48, 128])
def test_highest_frequencies_can_take_every_pair_of_a_head(head_dim: int) -> None:
    branch = highest_frequency_branch(head_dim, 1, head_dim // 2)
    assert sorted(branch.pairs.tolist()) == list(range(head_dim // 2))
    assert sum(axis_pairs(head_dim)) == head_dim // 2


def test_phase_is_the_mean_over_all_query_key_pairs_of_the_window() -> None:
    policy, grid = CachePolicy(window_frames=6, sink_frames=2), (2, 3)
    phases = expected_phases(policy, 2, grid, HEAD_DIM)
    keys = token_positions(torch.arange(6), *grid).double()
    queries = token_positions(torch.arange(4, 6), *grid).double()
    axes, frequencies = pair_frequencies(HEAD_DIM)
    angles = (keys[None, :, axes] - queries[:, None, axes]) * frequencies
    expected = torch.polar(torch.ones_like(angles), angles).mean((0, 1))
    torch.testing.assert_close(phases, expected)


def test_folding_the_phase_beats_dropping_the_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, grid = CachePolicy(window_frames=8), (3, 3)
    phases = expected_phases(policy, 2, grid, HEAD_DIM)
    keys = token_positions(torch.arange(8), *grid).double()
    queries = token_positions(torch.arange(6, 8), *grid).double()
    axes, frequencies = pair_frequencies(HEAD_DIM)
    angles = (keys[None, :, axes] - queries[:, None, axes]) * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)

    def normal(tokens: int) -> Tensor:
        return torch.randn(tokens, HEAD_DIM // 2, generator=generator, dtype=torch.complex128)

    content = (normal(len(queries)).conj()[:, None] * normal(len(keys))[None]).abs()

    def error(stand_in: Tensor) -> float:
        return (content * (turn - stand_in).abs()).square().mean().item()

    removed = error(torch.ones_like(phases))
    assert error(phases) < removed
    assert error(phases) < error(torch.zeros_like(phases))


@pytest.mark.parametrize("head_dim", [6, 12, 14, 32, 128])
def test_the_papers_pairs_are_all_different_and_of_their_axis(head_dim: int) -> None:
    for count in range(1, head_dim // 2 + 1):
        pairs = highest_frequency_branch(head_dim, 2, count).pairs.tolist()
        assert len(set(pairs)) == count
        assert max(pairs) < head_dim // 2
