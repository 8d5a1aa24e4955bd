"""From the key and value weights of a layer to the projections of its latent twin.

One function per init, all with one signature, collected in `INITS`. The target is the same for all:
with u the centred input, the normed key of head h is (D_g W_k x + D_g b_k)_h / rho and the value
(W_v x + b_v)_h, where D_g is the gain of the key norm and 1/rho is cached exactly (METHOD 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.maths.moments import Moments, as_pairs
from vmla_convert.maths.positions import RopeBranch, highest_frequency_branch, principal_branch


class KVWeights(NamedTuple):
    """What one dense layer computes keys and values with; float64.

    Attributes:
        key: D_g W_k, (H·D, d).
        key_bias: D_g b_k, (H·D,).
        value: W_v, (H·D, d).
        value_bias: b_v, (H·D,).
        output: W_o, (d, H·D).
        num_heads: H.
    """

    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor
    output: Tensor
    num_heads: int

    @property
    def head_dim(self) -> int:
        """D."""
        return len(self.key) // self.num_heads


class Budget(NamedTuple):
    """What a token may cost: R numbers of content, and two for each rope pair."""

    kv_lora_rank: int
    rope_pairs: int


class Evidence(NamedTuple):
    """What calibration knows of one layer.

    Attributes:
        moments: Of its activations.
        phases: Expected phase of each RoPE pair in the deployed window, (D/2,) complex.
    """

    moments: Moments
    phases: Tensor


class Factors(NamedTuple):
    """Parameters of the latent layer, under its own names; float64.

    Attributes:
        kv_a_proj, kv_a_bias: (R, d), (R,).
        kv_b_proj_k, kv_b_bias_k: (H·D, R), (H·D,).
        kv_b_proj_v, kv_b_bias_v: (H·D, R), (H·D,).
        k_rope_proj, k_rope_bias: (2m, d), (2m,).
        q_rope_map: (H, 2m, D).
        rope_pairs: m indices of RoPE pairs.
    """

    kv_a_proj: Tensor
    kv_a_bias: Tensor
    kv_b_proj_k: Tensor
    kv_b_bias_k: Tensor
    kv_b_proj_v: Tensor
    kv_b_bias_v: Tensor
    k_rope_proj: Tensor
    k_rope_bias: Tensor
    q_rope_map: Tensor
    rope_pairs: tuple[int, ...]


Init = Callable[[KVWeights, Budget, Evidence | None, torch.Generator], Factors]


def random(
    weights: KVWeights,
    budget: Budget,
    evidence: Evidence | None,  # noqa: ARG001
    generator: torch.Generator,
) -> Factors:
    """Nothing taken over: the baseline that shows what an init is worth."""
    rank, pairs, width = budget.kv_lora_rank, budget.rope_pairs, weights.key.shape[1]
    heads, dim = weights.num_heads, weights.head_dim

    def normal(*shape: int, fan_in: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / fan_in**0.5

    branch = highest_frequency_branch(dim, heads, pairs)
    return Factors(
        kv_a_proj=normal(rank, width, fan_in=width),
        kv_a_bias=torch.zeros(rank, dtype=torch.float64),
        kv_b_proj_k=normal(heads * dim, rank, fan_in=rank),
        kv_b_bias_k=torch.zeros(heads * dim, dtype=torch.float64),
        kv_b_proj_v=normal(heads * dim, rank, fan_in=rank),
        kv_b_bias_v=torch.zeros(heads * dim, dtype=torch.float64),
        k_rope_proj=normal(2 * pairs, width, fan_in=width),
        k_rope_bias=torch.zeros(2 * pairs, dtype=torch.float64),
        q_rope_map=normal(heads, 2 * pairs, dim, fan_in=dim),
        rope_pairs=tuple(branch.pairs.tolist()),
    )


def spectral(
    weights: KVWeights,
    budget: Budget,
    evidence: Evidence | None,  # noqa: ARG001
    generator: torch.Generator,  # noqa: ARG001
) -> Factors:
    """The paper's: SVD of the stacked weights, no data; fastest pairs roped, their content dropped.

    VideoMLA, appendix D.6, gives no formula; rows, gains and biases are handled as METHOD 3 and 4
    demand, which the paper leaves open.
    """
    branch = highest_frequency_branch(weights.head_dim, weights.num_heads, budget.rope_pairs)
    key, key_bias = _complex_key(weights)
    rope, rope_bias = _gather(branch, key, key_bias)
    key[:, branch.pairs], key_bias[:, branch.pairs] = 0, 0
    stacked = torch.cat([_real_key(key), weights.value])
    left, singular, right = torch.linalg.svd(stacked, full_matrices=False)
    up = left[:, : budget.kv_lora_rank] * singular[: budget.kv_lora_rank]
    down = right[: budget.kv_lora_rank]
    no_offset = torch.zeros(len(down), dtype=down.dtype)
    biases = (_real_key(key_bias[..., None]).squeeze(-1), weights.value_bias)
    return _assemble(weights, branch, rope, rope_bias, down, no_offset, up, biases)


def calibrated(
    weights: KVWeights,
    budget: Budget,
    evidence: Evidence | None,
    generator: torch.Generator,  # noqa: ARG001
) -> Factors:
    """Two-sided factorisation on centred activations, with the best shared rope keys.

    Complex PCA picks the rope keys (METHOD 5); what they leave is folded to its expected phase
    (METHOD 6); keys weighted by the queries that read them and values by W_o are then approximated
    together on the inputs that calibration saw (METHOD 7), means and biases exactly (METHOD 4).

    Raises:
        ConfigError: There is no calibration.
    """
    if evidence is None:
        raise ConfigError("the init 'calibrated' needs calibration clips", "or use --init spectral")
    moments, phases = evidence
    branch = principal_branch(moments, phases, budget.rope_pairs)
    key, key_bias = _complex_key(weights)
    rope, rope_bias = _gather(branch, key, key_bias)
    # A pair may be carried by several rope keys, so their shares are taken off one by one.
    for pair, mix, row, offset in zip(branch.pairs, branch.mix, rope, rope_bias, strict=True):
        key[:, pair] -= mix[:, None] * row
        key_bias[:, pair] -= mix * offset
    target_key = _real_key(key * phases[:, None])
    target_bias = _real_key((key_bias * phases)[..., None]).squeeze(-1)
    stacked = torch.cat([target_key, weights.value])
    down, up = two_sided(
        stacked, _importance(weights, moments), moments.covariance, budget.kv_lora_rank
    )
    mean = moments.mean
    biases = (target_bias + target_key @ mean, weights.value_bias + weights.value @ mean)
    return _assemble(weights, branch, rope, rope_bias, down, -down @ mean, up, biases)


INITS: dict[str, Init] = {"random": random, "spectral": spectral, "calibrated": calibrated}


def two_sided(
    target: Tensor, importance: Tensor, covariance: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Best rank-R approximation up · down of a target W in E‖S (W − Ŵ) u‖².

    Args:
        target: W, (n, d).
        importance: S, (n, n).
        covariance: C = E[u uᵀ], (d, d).
        rank: R.

    Returns:
        down (R, d) and up (n, R). With U the leading eigenvectors of S W C Wᵀ Sᵀ, down = Uᵀ S W,
        and up = W C downᵀ Λ⁻¹ solves the least-squares problem that is left, so neither S nor C is
        inverted. One decomposition serves every R: keep the first rows and columns.
    """
    weighted = importance @ target
    values, vectors = torch.linalg.eigh(weighted @ covariance @ weighted.mT)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    down = vectors.mT @ weighted
    # Directions the data never takes have no energy; they get no up-projection.
    seen = values > values[0] * 1e-14
    inverse = torch.where(seen, 1 / values.where(seen, torch.ones_like(values)), 0)
    return down, (target @ covariance @ down.mT) * inverse


def psd_sqrt(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix (..., n, n)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT


def _importance(weights: KVWeights, moments: Moments) -> Tensor:
    """S of METHOD 7, (2·H·D, 2·H·D): queries on the key rows, W_o on the value rows.

    Keys are balanced against values by the energy of a value at the output, a first-order estimate
    of what a logit error costs.
    """
    query_square = moments.query_square / moments.queries
    scale = moments.key_norm / moments.tokens / weights.head_dim**0.5
    on_keys = torch.block_diag(*(psd_sqrt(query_square) * scale))
    output_square = weights.output.mT @ weights.output
    spread = weights.value @ moments.covariance @ weights.value.mT
    value_energy = (output_square * spread).sum() / weights.num_heads
    return torch.block_diag(on_keys * value_energy.sqrt(), psd_sqrt(output_square))


def _complex_key(weights: KVWeights) -> tuple[Tensor, Tensor]:
    """Key weight (H, D/2, d) and bias (H, D/2) by RoPE pair."""
    key = weights.key.unflatten(0, (weights.num_heads, -1))
    bias = weights.key_bias.unflatten(0, (weights.num_heads, -1))
    return as_pairs(key.mT).mT.clone(), as_pairs(bias).clone()


def _real_key(pairs: Tensor) -> Tensor:
    """Complex rows (H, D/2, d) back to interleaved rows (H·D, d)."""
    return torch.view_as_real(pairs).movedim(-1, 2).flatten(0, 2)


def _gather(branch: RopeBranch, key: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (m, d) and biases (m,) of the shared rope keys, complex."""
    rows = torch.einsum("mh,hmd->md", branch.gather, key[:, branch.pairs])
    return rows, torch.einsum("mh,hm->m", branch.gather, key_bias[:, branch.pairs])


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


def _assemble(
    weights: KVWeights,
    branch: RopeBranch,
    rope: Tensor,
    rope_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    biases: tuple[Tensor, Tensor],
) -> Factors:
    """Put a rope branch and a content factorisation together."""
    keys = len(weights.key)
    return Factors(
        kv_a_proj=down,
        kv_a_bias=down_bias,
        kv_b_proj_k=up[:keys],
        kv_b_bias_k=biases[0],
        kv_b_proj_v=up[keys:],
        kv_b_bias_v=biases[1],
        k_rope_proj=torch.view_as_real(rope).movedim(-1, 1).flatten(0, 1),
        k_rope_bias=torch.view_as_real(rope_bias).flatten(),
        q_rope_map=_query_map(branch, weights.head_dim),
        rope_pairs=tuple(branch.pairs.tolist()),
    )
