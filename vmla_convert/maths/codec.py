"""The cache codec of one layer: linear maps from keys and values to few channels, and back.

With x = [k; v] the normed key before RoPE and the value of all heads, C the covariance of x on
calibration data and M the cost of an error at the model's output, the best linear code of R
channels is

    encode = Λ^-1 Vᵀ Gᵀ M        decode = G V        with C = G Gᵀ and Gᵀ M G = V Λ Vᵀ

(Method: the cache codec). Channels are uncorrelated with variance 1, and an error in channel i
costs its square times the channel's energy Λ_i. Channels are ordered by energy, so the first R
channels of a larger codec are the smaller codec.

Shapes: H heads, D head dim (H·D = d), R channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vmla_convert.maths.attention_stats import AttentionStats
from vmla_convert.maths.decomposition import descending_eigh, psd_sqrt, reciprocal
from vmla_convert.maths.evidence import value_metric
from vmla_convert.maths.moments import Moments
from vmla_convert.maths.projections import (
    KVWeights,
    white_logit_cost,
    white_queries,
    white_raw_key_square,
)
from vmla_convert.maths.quantise import (
    distortions,
    fit_tables,
    gaussian_samples,
    gaussian_tables,
)

# The tables are fitted to samples of the most energetic channels, which get the most bits.
SAMPLED_CHANNELS = 48


class Metric(NamedTuple):
    """Cost of an error of [k; v] at the model's output: a quadratic form M, by its blocks.

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
        encode: From [k; v] to channels, (R, 2d).
        decode: From channels to [k; v], (2d, R).
        mean: Mean of [k; v], (2d,), which costs no channel.
        energies: Cost of each channel when it is not stored, (R,).
        tables: Lloyd–Max tables of the channels, (TABLE_SIZE,).
        distortions: Error of each width, relative to a channel's energy, (len(WIDTHS),).
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor
    energies: Tensor
    tables: Tensor
    distortions: Tensor


class Channels(NamedTuple):
    """The linear maps of a codec and the energies of its channels, as in `CodecFit`."""

    encode: Tensor
    decode: Tensor
    energies: Tensor


def fit_codec(stats: AttentionStats, entries: Moments, samples: Tensor, rank: int) -> CodecFit:
    """The codec of a layer from calibration.

    Args:
        stats: Statistics of attention to cached tokens, measured with normed keys.
        entries: Moments of [k; v] of cached tokens.
        samples: Some [k; v], (n, 2d), for the tables.
        rank: Number of channels, R.
    """
    maps = fit_channels(psd_sqrt(entries.covariance), measured_metric(stats, entries), rank)
    units = (samples.double() - entries.mean) @ maps.encode[:SAMPLED_CHANNELS].mT
    # Channels beyond the rank of the data are exactly 0.
    units = units[:, (maps.energies[:SAMPLED_CHANNELS] > 0) & units.any(0)]
    units = units / units.square().mean(0).sqrt().clamp_min(1e-12)
    if not units.numel():  # all tokens are equal: the mean says everything
        units = gaussian_samples()
    tables = fit_tables(units)
    errors = distortions(tables, units)
    return CodecFit(maps.encode, maps.decode, entries.mean, maps.energies, tables, errors)


def assume_codec(weights: KVWeights, rank: int) -> CodecFit:
    """The codec of a layer without data: white inputs, Gaussian channels (Method: without data)."""
    norm = white_raw_key_square(weights).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    root = torch.cat([weights.key * norm, weights.value])
    mean = torch.cat([weights.key_bias * norm, weights.value_bias])
    maps = fit_channels(root, assumed_metric(weights), rank)
    tables = gaussian_tables()
    errors = distortions(tables, gaussian_samples())
    return CodecFit(maps.encode, maps.decode, mean, maps.energies, tables, errors)


def fit_channels(root: Tensor, metric: Metric, rank: int) -> Channels:
    """The best linear code of every rank up to R.

    Args:
        root: G with C = G Gᵀ, (2d, n).
        metric: M, symmetric and positive semi-definite.
        rank: Number of channels, R; channels beyond the rank of Gᵀ M G are zeros.
    """
    costly = metric.apply(root)
    energies, vectors = descending_eigh(root.mT @ costly)
    energies, vectors = energies[:rank], vectors[:, :rank]
    encode = reciprocal(energies)[:, None] * (costly @ vectors).mT
    decode = (root @ vectors) * (energies > 0)
    missing = rank - len(energies)
    return Channels(
        pad(encode, (0, 0, 0, missing)), pad(decode, (0, missing)), pad(energies, (0, missing))
    )


def measured_metric(stats: AttentionStats, entries: Moments) -> Metric:
    """Cost of an error of [k; v] as measured (Method: what errors cost).

    Keys count by head, in each key's own frame; values count across heads, because the output
    projection mixes the heads.
    """
    heads, head_dim = stats.query_pairs.shape[0], stats.rotated_query_square.shape[-1]
    lengths = entries.covariance.diagonal()[heads * head_dim :].unflatten(0, (heads, -1)).sum(1)
    values = value_metric(stats, lengths, head_dim)
    return Metric(stats.rotated_query_square / stats.queries, values / stats.queries)


def assumed_metric(weights: KVWeights) -> Metric:
    """Cost of an error of [k; v] for queries as W_q makes them and values as W_o passes them on."""
    pairs = white_queries(weights).diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, 2)).mean(-1)
    # All rotations are equally likely, so only the lengths of pairs count.
    keys = pairs.repeat_interleave(2, -1) * white_logit_cost(weights)
    return Metric(torch.diag_embed(keys), weights.output.mT @ weights.output)
