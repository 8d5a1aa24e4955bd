"""From the weights of a dense layer to the weights of its MLA twin, and the error to expect.

Each init is a function in `INITS`. `calibrated` minimises the error that it predicts at the model's
output. `predict_errors` gives that error for every size, so that one budget can be divided among
layers before any layer is factored.

Shapes: d input width, H heads, D head dim, R latent rank, m rope keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.maths.decomposition import Decomposition, two_sided
from vmla_convert.maths.evidence import Evidence
from vmla_convert.maths.moments import as_channels
from vmla_convert.maths.projections import (
    Factors,
    KVWeights,
    LatentKind,
    LayerShape,
    key_square,
    real_key,
)
from vmla_convert.maths.rope_keys import (
    RopeKeys,
    RopeMix,
    fastest_rope_mix,
    gather_rope,
    position_cost,
    principal_rope_mix,
    rope_tail,
    subtract_rope,
)
from vmla_convert.maths.spectra import truncate

# Numbers of rope keys that a budget may be split with; more buy little.
PAIR_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)

Init = Callable[[KVWeights, LayerShape, Evidence | None, torch.Generator], Factors]


def random(
    weights: KVWeights,
    shape: LayerShape,
    evidence: Evidence | None,  # noqa: ARG001
    generator: torch.Generator,
) -> Factors:
    """Random weights with the source's norms: the baseline that shows what an init is worth."""
    width, heads, head_dim = weights.key.shape[1], weights.num_heads, weights.head_dim

    def normal(*size: int, fan_in: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) / max(fan_in, 1) ** 0.5

    ranks, keys = shape.ranks(), heads * head_dim
    down = normal(shape.kv_lora_rank, width, fan_in=width)
    zero = torch.zeros(keys, dtype=torch.float64)
    mix = fastest_rope_mix(head_dim, heads, shape.rope_pairs)
    return Factors(
        kv_a_proj=down,
        kv_a_bias=down.new_zeros(len(down)),
        kv_b_proj_k=normal(keys, ranks[0], fan_in=ranks[0]),
        kv_b_bias_k=zero,
        kv_b_proj_v=normal(keys, ranks[-1], fan_in=ranks[-1]),
        kv_b_bias_v=zero,
        rope=RopeKeys(
            rows=torch.complex(*(normal(shape.rope_pairs, width, fan_in=width) for _ in range(2))),
            offsets=torch.zeros(shape.rope_pairs, dtype=torch.complex128),
            pairs=mix.pairs,
            query_map=normal(heads, 2 * shape.rope_pairs, head_dim, fan_in=head_dim),
        ),
    )


def spectral(
    weights: KVWeights,
    shape: LayerShape,
    evidence: Evidence | None,  # noqa: ARG001
    generator: torch.Generator,  # noqa: ARG001
) -> Factors:
    """The paper's init: SVD of the stacked weights without data, fastest pairs as rope keys.

    VideoMLA, appendix D.6, gives no formula. The content of these pairs is dropped; gains and
    biases, which the paper leaves open, are exact.
    """
    key, key_bias = weights.key_pairs()
    mix = fastest_rope_mix(weights.head_dim, weights.num_heads, shape.rope_pairs)
    rope = gather_rope(mix, key, key_bias)
    key[:, mix.pairs], key_bias[:, mix.pairs] = 0, 0
    content, value = real_key(key), weights.value
    targets = (torch.cat([content, value]),) if shape.latent == "joint" else (content, value)
    maps = [truncate(target, rank) for target, rank in zip(targets, shape.ranks(), strict=True)]
    biases = as_channels(key_bias).flatten(), weights.value_bias
    return _factors([(down, up) for up, down in maps], torch.zeros(key.shape[-1]), biases, rope)


def calibrated(
    weights: KVWeights,
    shape: LayerShape,
    evidence: Evidence | None,
    generator: torch.Generator,  # noqa: ARG001
) -> Factors:
    """Two-sided factorisation on centred inputs, with the best rope keys.

    Complex PCA picks the rope keys (Method: rotary pairs). The rest of each key is multiplied by
    its expected phase (Method: expected phase). Keys and values are then approximated together,
    weighted by the cost of their errors, on the inputs that calibration saw (Method: calibrated
    factors); means and biases are exact (Method: biases and means).

    Raises:
        ConfigError: There is no evidence.
    """
    known = _required(evidence)
    mix = _best_rope_mix(weights, known, shape.rope_pairs)
    rope, target, bias = _content_key(weights, known, mix)
    parts = _decompose(target, weights, shape.latent, known)
    maps = [part.leading(rank) for part, rank in zip(parts, shape.ranks(), strict=True)]
    # The latent of the mean input is 0 and rebuilds the mean key and value.
    biases = bias + target @ known.mean, weights.value_bias + weights.value @ known.mean
    return _factors(maps, known.mean, biases, rope, known.phases)


INITS: dict[str, Init] = {"calibrated": calibrated, "spectral": spectral, "random": random}
DATA_INITS = ("calibrated",)
"""Inits that need evidence."""


class ErrorCurve(NamedTuple):
    """Predicted error of a layer that caches s numbers beside the norm, and how to spend them.

    Attributes:
        errors: Error for s = 0, 1, … up to the most, or until nothing is lost; `inf` where no layer
            has that size.
        rope_pairs: Number of rope keys of the best layer of each size.
        key_ranks: Key part of a split latent at each size; empty for joint latents.
    """

    errors: Tensor
    rope_pairs: list[int]
    key_ranks: list[int]


def predict_errors(
    weights: KVWeights,
    latent: LatentKind,
    evidence: Evidence | None,
    most: int,
    pair_counts: tuple[int, ...] = PAIR_COUNTS,
) -> ErrorCurve:
    """Error of `calibrated` at every size up to `most` numbers, with the best number of rope keys.

    The error is what truncation drops, and the departure from the expected phase of the pairs
    without a rope key.

    Raises:
        ConfigError: There is no evidence.
    """
    known = _required(evidence)
    square = key_square(weights, known.mean, known.covariance)
    lost = rope_tail(square, position_cost(known.query_pairs, known.phases))
    errors = torch.full((most + 1,), torch.inf, dtype=torch.float64)
    rope_pairs, key_ranks = [0] * (most + 1), [0] * (most + 1)
    for pairs in pair_counts:
        if 2 * pairs >= most or pairs >= len(lost):
            break
        _, target, _ = _content_key(weights, known, _best_rope_mix(weights, known, pairs))
        parts = _decompose(target, weights, latent, known)
        tail, of_keys = _rank_errors(parts, most - 2 * pairs)
        for rank in range(1, len(tail)):
            error, size = tail[rank] + lost[pairs], rank + 2 * pairs
            if error < errors[size]:
                errors[size], rope_pairs[size], key_ranks[size] = error, pairs, of_keys[rank]
    return ErrorCurve(errors, rope_pairs, key_ranks if latent == "split" else [])


def _factors(
    maps: Sequence[tuple[Tensor, Tensor]],
    mean: Tensor,
    biases: tuple[Tensor, Tensor],
    rope: RopeKeys,
    phases: Tensor | None = None,
) -> Factors:
    """A layer from the down and up maps of its joint latent, or of its key and value part."""
    down = torch.cat([down for down, _ in maps])
    ups = [up for _, up in maps]
    up_key, up_value = ups if len(ups) > 1 else ups[0].split(len(biases[0]))
    offset = -down @ mean.to(down.dtype)
    return Factors(down, offset, up_key, biases[0], up_value, biases[1], rope, phases)


def _content_key(
    weights: KVWeights, evidence: Evidence, mix: RopeMix
) -> tuple[RopeKeys, Tensor, Tensor]:
    """Rope keys, and the rest of the key times its phases: weights (H·D, d) and bias (H·D,)."""
    key, bias = weights.key_pairs()
    rope = gather_rope(mix, key, bias)
    key, bias = subtract_rope(mix, rope, key, bias)
    phases = evidence.phases
    return rope, real_key(key * phases[..., None]), as_channels(bias * phases).flatten()


def _best_rope_mix(weights: KVWeights, evidence: Evidence, count: int) -> RopeMix:
    cost = position_cost(evidence.query_pairs, evidence.phases)
    square = key_square(weights, evidence.mean, evidence.covariance)
    return principal_rope_mix(square, cost, count)


def _decompose(
    target: Tensor, weights: KVWeights, latent: LatentKind, evidence: Evidence
) -> list[Decomposition]:
    """Decomposition of keys and values together, or of each."""
    by_head = target.unflatten(0, (weights.num_heads, -1))
    key_cost = target.mT @ (evidence.key_metric @ by_head).flatten(0, 1)
    value_cost = weights.value.mT @ (evidence.value_metric @ weights.value)
    if latent == "split":
        return [
            two_sided(target, key_cost, evidence.covariance),
            two_sided(weights.value, value_cost, evidence.covariance),
        ]
    stacked = torch.cat([target, weights.value])
    return [two_sided(stacked, key_cost + value_cost, evidence.covariance)]


def _rank_errors(parts: list[Decomposition], most: int) -> tuple[Tensor, list[int]]:
    """Error of ranks 0, 1, … up to `most`, and the key part of each rank (0 for a joint latent).

    A latent has at least one number, and so has each part of a split one; smaller ranks are `inf`.
    """
    if len(parts) == 1:
        tail = parts[0].tail()[: most + 1]
        tail[0] = torch.inf
        return tail, [0] * len(tail)
    # Keys get as many directions as they have among the largest of both.
    keys, values = parts
    order = torch.cat([keys.energies, values.energies]).argsort(descending=True, stable=True)
    counts = [0, *(order < len(keys.energies)).long().cumsum(0).tolist()][: most + 1]
    key_ranks = [min(max(1, count), rank - 1) for rank, count in enumerate(counts)]
    key_tail, value_tail = keys.tail(), values.tail()
    tail = torch.full((len(key_ranks),), torch.inf, dtype=torch.float64)
    for rank in range(2, len(key_ranks)):
        tail[rank] = key_tail[key_ranks[rank]] + value_tail[rank - key_ranks[rank]]
    return tail, key_ranks


def _required(evidence: Evidence | None) -> Evidence:
    if evidence is None:
        raise ConfigError(
            "the init 'calibrated' needs calibration clips", "or use --set convert.init=spectral"
        )
    return evidence
