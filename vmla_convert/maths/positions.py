"""Which RoPE pairs the shared rope key carries, and what position-free keys make of the rest.

METHOD 5 and 6. RoPE multiplies pair f of every head by the same exp(i·w_f·p), so any complex mix
across heads commutes with it: z_h ≈ mix_h · r with r one number shared by all heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import CachePolicy
from vmla_convert.maths.moments import Moments
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


def highest_frequency_branch(head_dim: int, num_heads: int, count: int) -> RopeBranch:
    """The paper's choice: the fastest pairs of each axis, the key averaged over heads.

    VideoMLA, appendix D: 16 pairs of Wan are 6, 5, 5 over time, height, width.
    """
    sizes = axis_pairs(head_dim)
    # Time may have too few pairs for what does not divide by three; height and width then take it.
    across = max(count // 3, -(-(count - sizes[0]) // 2))
    per_axis = (count - 2 * across, across, across)
    starts, start = [], 0
    for size in sizes:
        starts.append(start)
        start += size
    pairs = [s + i for s, n in zip(starts, per_axis, strict=True) for i in range(n)]
    ones = torch.ones(count, num_heads, dtype=torch.complex128)
    return RopeBranch(torch.tensor(pairs, dtype=torch.long), ones / num_heads, ones)


def principal_branch(moments: Moments, phases: Tensor, count: int) -> RopeBranch:
    """The best shared keys: complex PCA across heads at each frequency, weighted by the queries.

    One list of all eigenvalues over all pairs, each times the share 1 − |phi|² of it that a
    position-free key would lose; the largest `count` are kept. A pair may be kept more than once.
    """
    key_square = moments.key_pairs / moments.tokens
    weight = _query_weight(moments)
    weighted = weight[:, :, None] * key_square * weight[:, None, :]
    values, vectors = torch.linalg.eigh(weighted)
    gain = values * (1 - phases.abs().square())[:, None]
    best = gain.flatten().topk(count).indices
    pairs, rank = best // gain.shape[1], best % gain.shape[1]
    principal = vectors[pairs, :, rank]
    return RopeBranch(pairs, principal.conj() * weight[pairs], principal / weight[pairs])


def _query_weight(moments: Moments) -> Tensor:
    """How strongly each head queries each pair: root mean square, (D/2, H)."""
    square = moments.query_square.diagonal(dim1=-2, dim2=-1) / moments.queries
    weight = square.unflatten(-1, (-1, 2)).sum(-1).sqrt().mT
    # A pair that no head queries must not be divided by zero.
    return weight.clamp_min(1e-6 * weight.amax())
