"""Which RoPE pairs the shared rope key carries, and what position-free keys make of the rest.

METHOD 5 and 6. RoPE multiplies pair f of every head by the same exp(i·w_f·p), so any complex mix
across heads commutes with it: z_h ≈ mix_h · r with r one number shared by all heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import CachePolicy
from vmla_convert.maths.rope3d import axis_pairs, pair_frequencies, token_positions


class RopeBranch(NamedTuple):
    """m shared rope keys.

    Attributes:
        pairs: Which of the D/2 pairs each one rotates as, (m,).
        gather: r = sum_h gather_h · z_h, (m, H) complex.
        mix: z_h ≈ mix_h · r, (m, H) complex.
    """

    pairs: Tensor
    gather: Tensor
    mix: Tensor


def expected_phases(
    policy: CachePolicy, chunk_frames: int, grid: tuple[int, int], head_dim: int
) -> Tensor:
    """Mean of exp(i·w_f·(key position − query position)) over a full window, (D/2,) complex.

    It is the best constant in place of a rotation that a key no longer gets: near 1 for pairs that
    hardly turn within the window, near 0 for fast ones. Attention is taken as uniform, and the sink
    as re-indexed to the front of the window.
    """
    frames = torch.arange(policy.window_frames)
    keys = token_positions(frames, *grid)
    queries = token_positions(frames[-chunk_frames:], *grid)
    axes, frequencies = pair_frequencies(head_dim)

    def mean_phase(positions: Tensor) -> Tensor:
        angles = positions.double()[:, axes] * frequencies
        return torch.polar(torch.ones_like(angles), angles).mean(0)

    return mean_phase(keys) * mean_phase(queries).conj()


def pairs_per_axis(head_dim: int, count: int) -> tuple[int, int, int]:
    """How the paper divides rope pairs over time, height and width: 16 of Wan are 6, 5, 5."""
    time, _, _ = axis_pairs(head_dim)
    # Time may have too few pairs for what does not divide by three; height and width then take it.
    across = max(count // 3, -(-(count - time) // 2))
    return count - 2 * across, across, across


def highest_frequency_branch(head_dim: int, num_heads: int, count: int) -> RopeBranch:
    """The paper's choice: the fastest pairs of each axis, the key averaged over heads.

    VideoMLA, appendix D.
    """
    sizes, per_axis = axis_pairs(head_dim), pairs_per_axis(head_dim, count)
    starts, start = [], 0
    for size in sizes:
        starts.append(start)
        start += size
    pairs = [s + i for s, n in zip(starts, per_axis, strict=True) for i in range(n)]
    ones = torch.ones(count, num_heads, dtype=torch.complex128)
    return RopeBranch(torch.tensor(pairs, dtype=torch.long), ones / num_heads, ones)


def principal_branch(key_square: Tensor, weight: Tensor, count: int) -> RopeBranch:
    """The best shared keys: complex PCA across heads at each frequency, weighted by the reads.

    One list of all eigenvalues over all pairs; the largest `count` are kept. A pair may be kept
    more than once. With the cost of `position_cost` as weight an eigenvalue is what a position-free
    key would lose of it (METHOD 5 and 6).

    Args:
        key_square: E[z zᴴ] over heads for each pair of the keys, (D/2, H, H) complex.
        weight: What an error costs in each head and pair, (H, D/2).
        count: m.
    """
    values, vectors, root = _weighted_components(key_square, weight)
    best = values.flatten().topk(count).indices
    pairs, rank = best // values.shape[1], best % values.shape[1]
    principal = vectors[pairs, :, rank]
    # The weights' unit is arbitrary; a rope key has that of the keys that it stands for.
    relative = root[pairs] / root[pairs].norm(dim=1, keepdim=True)
    return RopeBranch(pairs, principal.conj() * relative, principal / relative)


def branch_tail(key_square: Tensor, weight: Tensor) -> Tensor:
    """What the best m shared keys leave, for m = 0, 1, … H·D/2: (H·D/2 + 1,).

    The mean of |u|²|z|² of pairs is twice that of their product squared, hence the half.
    """
    values, _, _ = _weighted_components(key_square, weight)
    ranked = values.clamp_min(0).flatten().sort(descending=True).values
    total = ranked.sum()
    return torch.cat([total[None], (total - ranked.cumsum(0)).clamp_min(0)]) / 2


def position_cost(query_pairs: Tensor, phases: Tensor) -> Tensor:
    """What an error costs that is the rotation's departure from its expected phase, (H, D/2).

    Args:
        query_pairs: Weighted squared query of each pair, (H, D/2).
        phases: Expected phase, (H, D/2) complex.
    """
    return query_pairs * (1 - phases.abs().square()).clamp_min(0)


def _weighted_components(key_square: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (D/2, H), eigenvectors (D/2, H, H) and the weights' roots (D/2, H)."""
    # A pair that nothing reads must not be divided by zero.
    least = max(1e-6 * weight.amax().sqrt().item(), 1e-30)
    root = weight.mT.sqrt().clamp_min(least)
    values, vectors = torch.linalg.eigh(root[:, :, None] * key_square * root[:, None, :])
    return values, vectors, root
