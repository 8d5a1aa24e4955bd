"""The cache codec of one layer: linear maps from keys and values to few channels, and back.

With x = [k; v] the normed key, before RoPE, and the value of all heads, C its covariance on
calibration data and M what an error costs at the model's output, the best linear code of R channels
is

    encode = Λ^-1 Vᵀ Gᵀ M        decode = G V        with C = G Gᵀ and Gᵀ M G = V Λ Vᵀ

(Method: the codec). Channels are uncorrelated with variance 1, and an error in channel i costs its
own square times its energy Λ_i. The channels are ordered by energy, so the first R channels of a
larger codec are the smaller codec.

Letters: H heads, D head dim (H·D = d), R channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.maths.attention_stats import AttentionStats
from vmla_convert.maths.factor import psd_sqrt
from vmla_convert.maths.moments import Moments
from vmla_convert.maths.projections import KVWeights, white_queries
from vmla_convert.maths.quantise import (
    distortions,
    fit_tables,
    gaussian_samples,
    gaussian_tables,
)

# The most energetic channels are the ones whose bits matter; their samples make the tables.
SAMPLED_CHANNELS = 48


class Metric(NamedTuple):
    """What an error of [k; v] costs at the model's output: a quadratic form M, by its blocks.

    Attributes:
        keys: Cost of an error of the key of each head, (H, D, D).
        values: Cost of an error of the values of all heads, (d, d).
    """

    keys: Tensor
    values: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        """M times vectors (2d, n)."""
        heads, width = self.keys.shape[0], len(self.values)
        keys, values = vectors.split(width)
        by_head = self.keys @ keys.unflatten(0, (heads, -1))
        return torch.cat([by_head.flatten(0, 1), self.values @ values])


class CodecFit(NamedTuple):
    """The codec of one layer, the most energetic channel first.

    Attributes:
        encode: (R, 2d).
        decode: (2d, R).
        mean: Mean of [k; v], (2d,), which costs no channel.
        energies: Cost of each channel when it is not stored, (R,).
        tables: Lloyd–Max tables of its channels, (TABLE_SIZE,).
        distortions: Error of each width, relative to a channel's energy, (len(WIDTHS),).
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor
    energies: Tensor
    tables: Tensor
    distortions: Tensor


class Channels(NamedTuple):
    """The linear part of a codec; fields as of `CodecFit`."""

    encode: Tensor
    decode: Tensor
    energies: Tensor


def fit_codec(sums: AttentionStats, entries: Moments, samples: Tensor, rank: int) -> CodecFit:
    """The codec of a layer from what calibration measured.

    Args:
        sums: What reads of cached tokens are sensitive to, measured with normed keys.
        entries: Moments of [k; v] of cached tokens.
        samples: Some [k; v], (n, 2d), for the tables.
        rank: R.
    """
    mean = entries.mean
    channels = fit_channels(psd_sqrt(entries.covariance), read_metric(sums, entries), rank)
    units = (samples.double() - mean) @ channels.encode[:SAMPLED_CHANNELS].mT
    # Channels beyond the rank of the data are exactly 0.
    units = units[:, channels.energies[:SAMPLED_CHANNELS] > 0]
    units = units / units.square().mean(0).sqrt().clamp_min(1e-12)
    tables = fit_tables(units)
    return CodecFit(*channels[:2], mean, channels[2], tables, distortions(tables, units))


def assume_codec(weights: KVWeights, rank: int) -> CodecFit:
    """The codec of a layer without data: white inputs, Gaussian channels (Method: without data).

    Args:
        weights: The dense layer.
        rank: R.
    """
    # White inputs make raw keys of this mean square in every channel.
    raw = torch.cat([weights.raw_key, weights.raw_key_bias[:, None]], 1)
    norm = (raw.square().sum() / len(raw)).rsqrt()
    root = torch.cat([weights.key * norm, weights.value])
    mean = torch.cat([weights.key_bias * norm, weights.value_bias])
    channels = fit_channels(root, _assumed_metric(weights), rank)
    tables = gaussian_tables()
    told = distortions(tables, gaussian_samples())
    return CodecFit(*channels[:2], mean, channels[2], tables, told)


def fit_channels(root: Tensor, metric: Metric, rank: int) -> Channels:
    """The best linear code of every rank up to R.

    Args:
        root: G with C = G Gᵀ, (2d, n).
        metric: M, symmetric and positive semi-definite.
        rank: R; channels beyond the rank of Gᵀ M G are zeros.
    """
    costly = metric.apply(root)
    product = root.mT @ costly
    # Products are symmetric but for rounding.
    values, vectors = torch.linalg.eigh((product + product.mT) / 2)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    # Below this a direction is rounding, and its encoder would be noise.
    seen = values > values[0] * len(product) * torch.finfo(values.dtype).eps
    energies = torch.where(seen, values, 0)
    inverse = torch.where(seen, 1 / values.where(seen, torch.ones_like(values)), 0)
    encode = inverse[:, None] * (costly @ vectors).mT
    decode = (root @ vectors) * seen
    missing = rank - len(energies)
    if missing > 0:
        encode = torch.nn.functional.pad(encode, (0, 0, 0, missing))
        decode = torch.nn.functional.pad(decode, (0, missing))
        energies = torch.nn.functional.pad(energies, (0, missing))
    return Channels(encode, decode, energies)


def read_metric(sums: AttentionStats, entries: Moments) -> Metric:
    """What an error of [k; v] costs at the model's output (Method: what errors cost).

    Keys matter by head, turned into their own frame; values across heads, since the output
    projection mixes these.

    Args:
        sums: Measured with normed keys: what a raw key's norm would add is not in them.
        entries: Moments of [k; v].
    """
    heads, head_dim = sums.query_pairs.shape[0], sums.rotated_query_square.shape[-1]
    spread = entries.covariance.diagonal()[heads * head_dim :]
    # Values were weighted by the length that each head gathered; a token's own length counts once.
    length = spread.unflatten(0, (heads, -1)).sum(1).clamp_min(1e-30)
    scale = length.rsqrt().repeat_interleave(head_dim)
    of_values = scale[:, None] * sums.value_square * scale
    return Metric(sums.rotated_query_square / sums.queries, of_values / sums.queries)


def _assumed_metric(weights: KVWeights) -> Metric:
    """The cost for queries as W_q makes them and values as W_o passes them on."""
    heads, head_dim = weights.num_heads, weights.head_dim
    # Keys count by the energy of a value at the output, which a change of attention moves.
    energy = (weights.output @ weights.value).square().sum() / heads
    pairs = white_queries(weights).diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, 2)).mean(-1)
    # A rotation by any angle is as likely as another: only the lengths of pairs count.
    of_keys = pairs.repeat_interleave(2, -1) * energy / head_dim
    return Metric(torch.diag_embed(of_keys), weights.output.mT @ weights.output)
