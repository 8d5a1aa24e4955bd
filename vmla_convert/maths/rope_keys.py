"""The rope keys of an MLA layer: which RoPE pairs all heads share, and what stands for the others.

RoPE multiplies pair f of every head by the same exp(i·w_f·p), so a complex mix across heads
commutes with the rotation: z_h ≈ mix_h · r with r one number that all heads share (Method: rotary
pairs). Keys without a position get the expected phase instead (Method: expected phase).

Shapes: n tokens or weight columns, H heads, D head dim, m rope keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import CachePolicy
from vmla_convert.maths.rope3d import axis_pairs, pair_frequencies, token_positions


class RopeMix(NamedTuple):
    """How m rope keys are mixed from the heads, and the heads from them.

    Attributes:
        pairs: RoPE pair of each rope key, 0 to D/2 − 1, (m,).
        gather: r = sum_h gather_h · z_h, (m, H) complex.
        mix: z_h ≈ mix_h · r, (m, H) complex.
    """

    pairs: Tensor
    gather: Tensor
    mix: Tensor


class RopeKeys(NamedTuple):
    """The rope keys of a layer as linear maps.

    Attributes:
        rows: Complex weights (m, n).
        offsets: Complex biases (m,).
        pairs: RoPE pair of each rope key, (m,).
        query_map: Map C from a head's query to the queries of the rope keys, (H, 2m, D).
    """

    rows: Tensor
    offsets: Tensor
    pairs: Tensor
    query_map: Tensor


def expected_phases(
    policy: CachePolicy, chunk_frames: int, grid: tuple[int, int], head_dim: int
) -> Tensor:
    """Mean of exp(i·w_f·(key position − query position)) over a full window, (D/2,) complex.

    The mean is the best constant in place of the rotation: near 1 for pairs that hardly turn within
    the window, near 0 for fast ones. Attention counts as uniform, and the sink as re-indexed to the
    front of the window.
    """
    frames = torch.arange(policy.window_frames)
    axes, frequencies = pair_frequencies(head_dim)

    def mean_phase(frames: Tensor) -> Tensor:
        angles = token_positions(frames, *grid).double()[:, axes] * frequencies
        return torch.polar(torch.ones_like(angles), angles).mean(0)

    return mean_phase(frames) * mean_phase(frames[-chunk_frames:]).conj()


def pairs_per_axis(head_dim: int, count: int) -> tuple[int, int, int]:
    """How the paper divides rope pairs over time, height and width: 16 of Wan are 6, 5, 5."""
    time, _, _ = axis_pairs(head_dim)
    # Height and width take the pairs that time has no room for.
    across = max(count // 3, -(-(count - time) // 2))
    return count - 2 * across, across, across


def fastest_rope_mix(head_dim: int, num_heads: int, count: int) -> RopeMix:
    """The paper's rope keys: the fastest pairs of each axis, averaged over heads.

    VideoMLA, appendix D.
    """
    time, height, _ = axis_pairs(head_dim)
    starts, per_axis = (0, time, time + height), pairs_per_axis(head_dim, count)
    pairs = [start + i for start, n in zip(starts, per_axis, strict=True) for i in range(n)]
    ones = torch.ones(count, num_heads, dtype=torch.complex128)
    return RopeMix(torch.tensor(pairs, dtype=torch.long), ones / num_heads, ones)


def principal_rope_mix(key_square: Tensor, weight: Tensor, count: int) -> RopeMix:
    """The best rope keys: complex PCA across heads at each frequency, weighted by cost.

    One list holds the eigenvalues of all pairs, and the largest `count` are kept, so a pair may be
    kept more than once. With `position_cost` as the weight, an eigenvalue is what a key without a
    position would lose.

    Args:
        key_square: E[z zᴴ] over heads for each pair of the keys, (D/2, H, H) complex.
        weight: Cost of an error in each head and pair, (H, D/2).
        count: Number of rope keys, m.
    """
    values, vectors, root = _weighted_components(key_square, weight)
    best = values.flatten().topk(count).indices
    pairs, rank = best // values.shape[1], best % values.shape[1]
    principal = vectors[pairs, :, rank]
    # The weights' unit is arbitrary; a rope key gets the unit of the keys it stands for.
    relative = root[pairs] / root[pairs].norm(dim=1, keepdim=True)
    return RopeMix(pairs, principal.conj() * relative, principal / relative)


def rope_tail(key_square: Tensor, weight: Tensor) -> Tensor:
    """Cost that the best m rope keys leave, for m = 0, 1, … H·D/2; arguments as above.

    The mean of |u|²|z|² of pairs is twice the mean of their product squared, hence the half.
    """
    values, _, _ = _weighted_components(key_square, weight)
    ranked = values.clamp_min(0).flatten().sort(descending=True).values
    total = ranked.sum()
    return torch.cat([total[None], (total - ranked.cumsum(0)).clamp_min(0)]) / 2


def position_cost(query_pairs: Tensor, phases: Tensor) -> Tensor:
    """Cost of a rotation's departure from its expected phase, (H, D/2).

    Args:
        query_pairs: Weighted squared query of each pair, (H, D/2).
        phases: Expected phases, (H, D/2) complex.
    """
    return query_pairs * (1 - phases.abs().square()).clamp_min(0)


def gather_rope(mix: RopeMix, key: Tensor, key_bias: Tensor) -> RopeKeys:
    """Rope keys from key weights (H, D/2, n) and biases (H, D/2)."""
    return RopeKeys(
        rows=torch.einsum("mh,hmd->md", mix.gather, key[:, mix.pairs]),
        offsets=torch.einsum("mh,hm->m", mix.gather, key_bias[:, mix.pairs]),
        pairs=mix.pairs,
        query_map=_query_map(mix, 2 * key.shape[1]),
    )


def subtract_rope(
    mix: RopeMix, rope: RopeKeys, key: Tensor, key_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Key weights (H, D/2, n) and biases (H, D/2) without what the rope keys carry."""
    key, key_bias = key.clone(), key_bias.clone()
    # Several rope keys may carry one pair, so their shares are subtracted one by one.
    for pair, share, row, offset in zip(mix.pairs, mix.mix, rope.rows, rope.offsets, strict=True):
        key[:, pair] -= share[:, None] * row
        key_bias[:, pair] -= share * offset
    return key, key_bias


def _query_map(mix: RopeMix, head_dim: int) -> Tensor:
    """Map C (H, 2m, D) that multiplies each query pair by conj(mix), in real numbers."""
    count, heads = mix.mix.shape
    turn = mix.mix.conj().mT
    blocks = torch.zeros(heads, count, 2, head_dim // 2, 2, dtype=torch.float64)
    index = torch.arange(count)
    blocks[:, index, 0, mix.pairs, 0] = turn.real
    blocks[:, index, 0, mix.pairs, 1] = -turn.imag
    blocks[:, index, 1, mix.pairs, 0] = turn.imag
    blocks[:, index, 1, mix.pairs, 1] = turn.real
    return blocks.flatten(3, 4).flatten(1, 2)


def _weighted_components(key_square: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (D/2, H), eigenvectors (D/2, H, H) and the weights' roots (D/2, H)."""
    # No division by zero for a pair that no query uses.
    least = max(1e-6 * weight.amax().sqrt().item(), 1e-30)
    root = weight.mT.sqrt().clamp_min(least)
    values, vectors = torch.linalg.eigh(root[:, :, None] * key_square * root[:, None, :])
    return values, vectors, root
