"""The linear code of a layer: lossless, whitened, nested, optimal; the metric, pair by pair."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY_GEOMETRY, noise, random_stats, tiny_config, tiny_model
from torch import Tensor

from vmla_convert.fitting.weights import layer_weights
from vmla_convert.maths.codec import (
    SAMPLED_CHANNELS,
    CodecFit,
    Metric,
    assume_codec,
    fit_channels,
    fit_codec,
    measured_metric,
)
from vmla_convert.maths.decomposition import psd_sqrt
from vmla_convert.maths.moments import Moments, measure_moments
from vmla_convert.maths.projections import KVWeights
from vmla_convert.maths.quantise import distortions, fit_tables, gaussian_tables

HEADS, HEAD_DIM = 2, 6
WIDTH = 2 * HEADS * HEAD_DIM
STATS = random_stats(HEADS, HEAD_DIM)


def data(tokens: int = 500, directions: int = WIDTH, seed: int = 0) -> Tensor:
    """[k; v] (tokens, 2d) of a steep spectrum and a large mean, in so many directions."""
    mix = noise(directions, WIDTH, seed=seed + 1) * torch.logspace(0, -2, directions)[:, None]
    return (noise(tokens, directions, seed=seed) @ mix + 3 * noise(WIDTH, seed=seed + 2)).double()


def fitted(entries: Tensor, rank: int) -> CodecFit:
    return fit_codec(STATS, measure_moments(entries), entries, rank)


def rebuilt(codec: CodecFit, entries: Tensor) -> Tensor:
    return (entries - codec.mean) @ codec.encode.mT @ codec.decode.mT + codec.mean


def cost(entries: Tensor, back: Tensor) -> float:
    """Mean cost of errors in the metric."""
    error = back - entries
    metric = dense(measured_metric(STATS, measure_moments(entries)))
    return torch.einsum("ni,ij,nj->", error, metric, error).item() / len(entries)


def dense(metric: Metric) -> Tensor:
    """The quadratic form as a matrix (2d, 2d)."""
    return metric.apply(torch.eye(2 * len(metric.values)).double())


def best_decoder(covariance: Tensor, encode: Tensor) -> Tensor:
    """The decoder that loses least after an encoder, whatever the metric."""
    return torch.linalg.solve(encode @ covariance @ encode.mT, encode @ covariance).mT


# The code


def test_as_many_channels_as_numbers_lose_nothing() -> None:
    entries = data()
    codec = fitted(entries, WIDTH)
    torch.testing.assert_close(rebuilt(codec, entries), entries, rtol=0, atol=1e-8)
    # Tokens outside the calibration data lose nothing either.
    others = data(seed=50)
    torch.testing.assert_close(rebuilt(codec, others), others, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 7, WIDTH])
def test_channels_have_mean_zero_variance_one_and_nothing_in_common(rank: int) -> None:
    entries = data()
    codec = fitted(entries, rank)
    channels = measure_moments((entries - codec.mean) @ codec.encode.mT)
    torch.testing.assert_close(channels.mean, torch.zeros(rank).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(channels.covariance, torch.eye(rank).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 12, WIDTH - 1])
def test_truncation_costs_the_energies_that_it_drops(rank: int) -> None:
    entries = data()
    whole, codec = fitted(entries, WIDTH), fitted(entries, rank)
    lost = cost(entries, rebuilt(codec, entries))
    assert lost == pytest.approx(whole.energies[rank:].sum().item(), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 15])
def test_a_smaller_codec_is_the_first_channels_of_a_larger_one(rank: int) -> None:
    entries = data()
    large, small = fitted(entries, 20), fitted(entries, rank)
    first = large.encode[:rank], large.decode[:, :rank], large.mean, large.energies[:rank]
    torch.testing.assert_close(small[:4], first, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 10])
def test_no_other_linear_code_of_as_many_channels_costs_less(rank: int) -> None:
    """Random ones with their best decoders, and small changes of the codec itself."""
    entries = data()
    moments, codec = measure_moments(entries), fitted(entries, rank)
    least = cost(entries, rebuilt(codec, entries))
    for seed in range(4):
        drawn = noise(rank, WIDTH, seed=seed).double()
        near = codec.encode * (1 + 0.01 * noise(rank, WIDTH, seed=seed))
        for encode in (drawn, near):
            other = codec._replace(encode=encode, decode=best_decoder(moments.covariance, encode))
            assert cost(entries, rebuilt(other, entries)) > least
        decode = codec.decode * (1 + 0.01 * noise(WIDTH, rank, seed=seed))
        assert cost(entries, rebuilt(codec._replace(decode=decode), entries)) > least
    # The best decoder is the codec's own.
    torch.testing.assert_close(
        best_decoder(moments.covariance, codec.encode), codec.decode, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("rank", [5, 9, WIDTH, WIDTH + 3])
def test_what_the_data_never_does_takes_no_channel(rank: int) -> None:
    """Rows of zeros beyond its nine directions; within them nothing is lost."""
    entries = data(directions=9)
    codec = fitted(entries, rank)
    assert codec.encode.shape == (rank, WIDTH)
    assert codec.decode.shape == (WIDTH, rank)
    assert codec.energies.shape == (rank,)
    for part in (codec.encode, codec.decode.mT, codec.energies[:, None]):
        assert part.isfinite().all()
        assert part[:9].any(1).all()
        assert not part[9:].any()
    if rank >= 9:
        torch.testing.assert_close(rebuilt(codec, entries), entries, rtol=0, atol=1e-6)
    assert codec.tables.isfinite().all() and codec.distortions.isfinite().all()


def test_what_costs_nothing_takes_no_channel() -> None:
    root = noise(WIDTH, WIDTH).double()
    keys = torch.zeros(WIDTH // 2).double()
    keys[:5] = 1
    half = WIDTH // 2
    metric = Metric(torch.diag(keys)[None], torch.zeros(half, half).double())
    channels = fit_channels(root, metric, WIDTH)
    assert (channels.energies > 0).tolist() == [True] * 5 + [False] * (WIDTH - 5)
    kept = channels.decode @ channels.encode
    torch.testing.assert_close(kept[:5] @ root, root[:5], rtol=0, atol=1e-9)


def test_tables_are_those_of_the_most_energetic_channels() -> None:
    entries = data(directions=9)
    moments = measure_moments(entries)
    codec = fit_codec(STATS, moments, entries[:200], WIDTH)
    units = ((entries[:200] - codec.mean) @ codec.encode.mT)[:, :9]
    units = units / units.square().mean(0).sqrt()
    assert SAMPLED_CHANNELS > 9
    torch.testing.assert_close(codec.tables, fit_tables(units))
    torch.testing.assert_close(codec.distortions, distortions(codec.tables, units))


# What errors cost


def test_the_metric_is_what_its_formula_says_pair_by_pair() -> None:
    moments = measure_moments(data())
    metric, spread = dense(measured_metric(STATS, moments)), moments.covariance.diagonal()
    expected = torch.zeros(WIDTH, WIDTH).double()
    half = HEADS * HEAD_DIM
    length = [
        sum(spread[half + h * HEAD_DIM + i].item() for i in range(HEAD_DIM)) ** 0.5
        for h in range(HEADS)
    ]
    for a in range(half):
        for b in range(half):
            heads = a // HEAD_DIM, b // HEAD_DIM
            if heads[0] == heads[1]:
                square = STATS.rotated_query_square[heads[0], a % HEAD_DIM, b % HEAD_DIM]
                expected[a, b] = square / STATS.queries
            of_values = STATS.value_square[a, b] / (length[heads[0]] * length[heads[1]])
            expected[half + a, half + b] = of_values / STATS.queries
    torch.testing.assert_close(metric, expected)


def test_a_value_that_never_changes_does_not_break_the_metric() -> None:
    entries = data()
    entries[:, HEADS * HEAD_DIM : (HEADS + 1) * HEAD_DIM] = 2.0
    square = STATS.value_square.clone()
    square[:HEAD_DIM] = square[:, :HEAD_DIM] = 0
    sums, moments = STATS._replace(value_square=square), measure_moments(entries)
    assert dense(measured_metric(sums, moments)).isfinite().all()
    codec = fit_codec(sums, moments, entries, WIDTH)
    assert (codec.energies > 0).sum() == WIDTH - HEAD_DIM
    torch.testing.assert_close(rebuilt(codec, entries), entries, rtol=0, atol=1e-5)


# Without data


@pytest.fixture
def weights() -> KVWeights:
    """The weights of the second layer of a tiny model."""
    state = tiny_model(tiny_config()).state_dict()
    return layer_weights(state.__getitem__, 1, TINY_GEOMETRY.num_heads)


def assumed_entries(weights: KVWeights, x: Tensor) -> Tensor:
    """Keys and values (n, 2d) of inputs (n, d); keys all of the norm that white inputs have."""
    raw = torch.cat([weights.raw_key, weights.raw_key_bias[:, None]], 1)
    norm = raw.square().sum(1).mean() ** -0.5
    key = (x @ weights.raw_key.mT + weights.raw_key_bias) * norm * weights.key_gain
    return torch.cat([key, x @ weights.value.mT + weights.value_bias], 1)


def test_without_data_enough_channels_rebuild_what_the_weights_make(weights: KVWeights) -> None:
    """No more channels carry energy than inputs have numbers."""
    dim = TINY_GEOMETRY.dim
    entries = assumed_entries(weights, noise(100, dim).double())
    for rank in (dim, 2 * dim):
        codec = assume_codec(weights, rank)
        torch.testing.assert_close(rebuilt(codec, entries), entries, rtol=0, atol=1e-8)
        assert (codec.energies > 0).sum() == dim
    assert torch.equal(codec.tables, gaussian_tables())


def test_without_data_channels_are_white_where_inputs_are(weights: KVWeights) -> None:
    dim = TINY_GEOMETRY.dim
    codec = assume_codec(weights, 20)
    # Exactly white inputs: plus and minus each axis.
    x = torch.cat([torch.eye(dim), -torch.eye(dim)]).double() * dim**0.5
    channels = (assumed_entries(weights, x) - codec.mean) @ codec.encode.mT
    covariance = channels.mT @ channels / len(x)
    torch.testing.assert_close(covariance, torch.eye(20).double(), rtol=0, atol=1e-8)
    assert (codec.energies.diff() < 0).all()


def moments_of(covariance: Tensor) -> Moments:
    """Moments of mean 0 with some covariance."""
    one = torch.ones((), dtype=torch.float64)
    return Moments(one, torch.zeros(len(covariance)).double(), covariance)


def test_any_root_of_the_covariance_gives_the_same_code() -> None:
    covariance = measure_moments(data()).covariance
    metric = measured_metric(STATS, moments_of(covariance))
    roots = psd_sqrt(covariance), torch.linalg.cholesky(covariance)
    one, other = (fit_channels(root, metric, 8) for root in roots)
    torch.testing.assert_close(one.energies, other.energies, rtol=1e-8, atol=0)
    torch.testing.assert_close(
        one.decode @ one.encode, other.decode @ other.encode, rtol=0, atol=1e-6
    )
