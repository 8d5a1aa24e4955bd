"""Parameters of a dense layer, of its latent twin, and how the twin is put together from parts.

With x the input, the raw key of head h is (W_k x + b_k)_h. Its norm rho is one number for all
heads and D_g the norm's gain, so the key is D_g (W_k x + b_k) / rho. 1/rho is cached (METHOD 3);
everything else here is linear in x.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vmla_convert.maths.moments import as_channels, as_pairs
from vmla_convert.maths.positions import RopeBranch


class KVWeights(NamedTuple):
    """What one dense layer computes queries, keys and values with; float64.

    Attributes:
        query: D_g W_q with the query norm's gain, (H·D, d).
        query_bias: D_g b_q, (H·D,).
        raw_key: W_k, (H·D, d).
        raw_key_bias: b_k, (H·D,).
        key_gain: The key norm's gain, (H·D,).
        value: W_v, (H·D, d).
        value_bias: b_v, (H·D,).
        output: W_o, (d, H·D).
        num_heads: H.
    """

    query: Tensor
    query_bias: Tensor
    raw_key: Tensor
    raw_key_bias: Tensor
    key_gain: Tensor
    value: Tensor
    value_bias: Tensor
    output: Tensor
    num_heads: int

    @property
    def head_dim(self) -> int:
        """D."""
        return len(self.raw_key) // self.num_heads

    @property
    def key(self) -> Tensor:
        """D_g W_k, (H·D, d)."""
        return self.key_gain[:, None] * self.raw_key

    @property
    def key_bias(self) -> Tensor:
        """D_g b_k, (H·D,)."""
        return self.key_gain * self.raw_key_bias

    def key_pairs(self) -> tuple[Tensor, Tensor]:
        """Key weight (H, D/2, d) and bias (H, D/2) by complex RoPE pair."""
        key = self.key.unflatten(0, (self.num_heads, -1))
        bias = self.key_bias.unflatten(0, (self.num_heads, -1))
        return as_pairs(key.mT).mT.clone(), as_pairs(bias).clone()


class LayerShape(NamedTuple):
    """What one latent layer is to be.

    Attributes:
        latent: Whether keys and values share the latent.
        kv_lora_rank: R.
        rope_pairs: Shared rope keys m.
        key_rank: Of a split latent the part of R that keys read; None leaves it to the init.
    """

    latent: Literal["joint", "split"]
    kv_lora_rank: int
    rope_pairs: int
    key_rank: int | None = None

    def parts(self) -> tuple[int, int]:
        """Ranks of the key and the value part of a split latent; halves when left open."""
        key_rank = (self.kv_lora_rank + 1) // 2 if self.key_rank is None else self.key_rank
        return key_rank, self.kv_lora_rank - key_rank


class Evidence(NamedTuple):
    """What is known of one layer: its inputs, and what errors cost.

    Attributes:
        mean: Of the inputs that are cached, (d,).
        covariance: Theirs, (d, d).
        key_metric: Cost of an error of a position-free key, (H, D, D).
        value_metric: Cost of an error of all heads' values, (H·D, H·D).
        query_pairs: Cost of an error of each RoPE pair, (H, D/2).
        phases: Expected phase of each RoPE pair, (H, D/2) complex.
    """

    mean: Tensor
    covariance: Tensor
    key_metric: Tensor
    value_metric: Tensor
    query_pairs: Tensor
    phases: Tensor


class Part(NamedTuple):
    """One latent at every rank up to its own: the first directions are the best of their number.

    Attributes:
        down: (n, d).
        offset: Its bias, (n,).
        up: (rows, n); of a latent that keys and values share, keys' rows first.
        energies: Mean square of each number (n,), by which a cut latent is brought to unit size;
            ones leave it in the unit that it has.
    """

    down: Tensor
    offset: Tensor
    up: Tensor
    energies: Tensor


class RopeKeys(NamedTuple):
    """The shared rope keys of a layer.

    Attributes:
        rows: Complex weights (m, d).
        offsets: Complex biases (m,).
        pairs: Which of the D/2 pairs each rotates as, (m,).
        query_map: C (H, 2m, D).
    """

    rows: Tensor
    offsets: Tensor
    pairs: Tensor
    query_map: Tensor


class Solved(NamedTuple):
    """A layer solved for one size and all smaller ones; `cut` gives it one of them.

    Attributes:
        parts: The latent that keys and values share, or keys' and values' own.
        biases: Of the rebuilt key and value, both (H·D,).
        rope: The rope branch.
        phases: What was folded into the content, (H, D/2) complex; None when nothing was.
    """

    parts: tuple[Part, ...]
    biases: tuple[Tensor, Tensor]
    rope: RopeKeys
    phases: Tensor | None = None


class Factors(NamedTuple):
    """Parameters of the latent layer, under its own names; float64.

    Attributes:
        kv_a_proj, kv_a_bias: (R, d), (R,).
        kv_b_proj_k, kv_b_bias_k: (H·D, R of keys), (H·D,).
        kv_b_proj_v, kv_b_bias_v: (H·D, R of values), (H·D,).
        rope: The rope branch.
        phases: What stands for each pair's rotation in the content key, (H, D/2) complex; None
            when nothing is folded.
    """

    kv_a_proj: Tensor
    kv_a_bias: Tensor
    kv_b_proj_k: Tensor
    kv_b_bias_k: Tensor
    kv_b_proj_v: Tensor
    kv_b_bias_v: Tensor
    rope: RopeKeys
    phases: Tensor | None = None


def white_queries(weights: KVWeights) -> Tensor:
    """Second moment of each head's queries of white inputs, (H, D, D); channels have mean 1."""
    raw = torch.cat([weights.query, weights.query_bias[:, None]], 1)
    query = (raw / raw.square().sum().div(len(raw)).sqrt()).unflatten(0, (weights.num_heads, -1))
    return query @ query.mT


def key_square(weights: KVWeights, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[z zᴴ] of the key pairs over heads, (D/2, H, H); their mean counts, for it turns too."""
    key, bias = (part.movedim(1, 0) for part in weights.key_pairs())
    at_mean = key @ mean.to(key.dtype) + bias
    spread = key @ covariance.to(key.dtype) @ key.mH
    return spread + at_mean[:, :, None] * at_mean[:, None, :].conj()


def real_key(pairs: Tensor) -> Tensor:
    """Complex rows (H, D/2, d) as interleaved rows (H·D, d)."""
    return torch.view_as_real(pairs).movedim(-1, 2).flatten(0, 2)


def real_bias(pairs: Tensor) -> Tensor:
    """Complex biases (H, D/2) as interleaved ones (H·D,)."""
    return as_channels(pairs).flatten()


def gather_rope(branch: RopeBranch, key: Tensor, key_bias: Tensor) -> RopeKeys:
    """The branch applied to key weights (H, D/2, d) and biases (H, D/2)."""
    return RopeKeys(
        rows=torch.einsum("mh,hmd->md", branch.gather, key[:, branch.pairs]),
        offsets=torch.einsum("mh,hm->m", branch.gather, key_bias[:, branch.pairs]),
        pairs=branch.pairs,
        query_map=_query_map(branch, 2 * key.shape[1]),
    )


def subtract_rope(
    branch: RopeBranch, rope: RopeKeys, key: Tensor, key_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """What the rope keys leave of key weights (H, D/2, d) and biases (H, D/2)."""
    key, key_bias = key.clone(), key_bias.clone()
    # A pair may be carried by several rope keys, so their shares are taken off one by one.
    for pair, mix, row, offset in zip(
        branch.pairs, branch.mix, rope.rows, rope.offsets, strict=True
    ):
        key[:, pair] -= mix[:, None] * row
        key_bias[:, pair] -= mix * offset
    return key, key_bias


def cut(solved: Solved, shape: LayerShape) -> Factors:
    """A solved layer at one size.

    Args:
        solved: No smaller than the shape, in any part.
        shape: What is made of it.
    """
    ranks = shape.parts() if len(solved.parts) > 1 else (shape.kv_lora_rank,)
    parts = [_leading(part, rank) for part, rank in zip(solved.parts, ranks, strict=True)]
    ups = [part.up for part in parts]
    up_key, up_value = ups if len(ups) > 1 else ups[0].split(len(solved.biases[0]))
    return Factors(
        kv_a_proj=torch.cat([part.down for part in parts]),
        kv_a_bias=torch.cat([part.offset for part in parts]),
        kv_b_proj_k=up_key,
        kv_b_bias_k=solved.biases[0],
        kv_b_proj_v=up_value,
        kv_b_bias_v=solved.biases[1],
        rope=solved.rope,
        phases=solved.phases,
    )


def _leading(part: Part, rank: int) -> Part:
    """The first R directions in a unit in which the latent's mean square is 1.

    A metric's own unit is that of a gradient, in which an optimiser's steps would be far too large
    for one side and too small for the other.
    """
    size = part.energies[:rank].mean().sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    down, offset = part.down[:rank] / size, part.offset[:rank] / size
    return Part(down, offset, part.up[:, :rank] * size, part.energies[:rank])


def _query_map(branch: RopeBranch, head_dim: int) -> Tensor:
    """C (H, 2m, D): multiplies each query pair by conj(mix), written in real numbers."""
    count, heads = branch.mix.shape
    turn = branch.mix.conj().mT
    blocks = torch.zeros(heads, count, 2, head_dim // 2, 2, dtype=torch.float64)
    index = torch.arange(count)
    blocks[:, index, 0, branch.pairs, 0] = turn.real
    blocks[:, index, 0, branch.pairs, 1] = -turn.imag
    blocks[:, index, 1, branch.pairs, 0] = turn.imag
    blocks[:, index, 1, branch.pairs, 1] = turn.real
    return blocks.flatten(3, 4).flatten(1, 2)
