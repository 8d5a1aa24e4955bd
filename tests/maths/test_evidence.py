"""Evidence of a layer: what calibration measured, per query, and what weights alone suggest."""

from __future__ import annotations

import torch
from reference.attention_stats import make_sample
from reference.latent import generator, toy

from vmla_convert.maths.attention_stats import (
    AttentionStats,
    measure_stats,
    merge_stats,
)
from vmla_convert.maths.evidence import WINDOW_SHARE, assume_evidence, join_evidence
from vmla_convert.maths.moments import Moments, measure_moments, merge_moments

STILL = torch.ones(3, dtype=torch.complex128)
"""Phases of the pairs of a head of 6 that never rotate."""


def test_assumed_evidence_knows_queries_by_their_weights() -> None:
    data = toy(2, 10)
    weights, phases = data.weights, data.evidence.phases[0]
    evidence = assume_evidence(weights, phases)
    for head in range(2):
        rows = torch.cat([weights.query, weights.query_bias[:, None]], 1)[10 * head :][:10]
        ratio = evidence.key_metric[head] / (rows @ rows.mT)
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
        assert torch.equal(evidence.phases[head], phases)
    energy = evidence.key_metric.diagonal(dim1=1, dim2=2).unflatten(1, (-1, 2)).sum(-1)
    torch.testing.assert_close(evidence.query_pairs, energy)
    torch.testing.assert_close(evidence.value_metric, weights.output.mT @ weights.output)


def measured(seed: int, gradient: float = 1) -> tuple[AttentionStats, Moments]:
    """Statistics and moments of random tokens of a layer of 2 heads of 6."""
    sample = make_sample(clips=1, seed=seed, count=4, keys=8)
    sample = sample._replace(gradient=gradient * sample.gradient)
    inputs = torch.randn(30, 12, generator=generator(seed), dtype=torch.float64) + seed
    return measure_stats(sample, [sample.mask])[0], measure_moments(inputs)


def test_evidence_is_the_mean_of_the_statistics_per_query() -> None:
    weights, (sums, moments) = toy(2, 6).weights, measured(1)
    evidence = join_evidence([(sums, moments)], weights, STILL)
    torch.testing.assert_close(evidence.mean, moments.mean)
    torch.testing.assert_close(evidence.covariance, moments.covariance)
    torch.testing.assert_close(evidence.key_metric, sums.query_square / 4)
    torch.testing.assert_close(evidence.query_pairs, sums.query_pairs / 4)


def test_phases_lie_between_measured_ones_and_those_of_the_window() -> None:
    weights, (sums, moments) = toy(2, 6).weights, measured(1)
    read, window = sums.phases / sums.query_pairs, torch.tensor([1, 0.5j, -0.2])
    phases = join_evidence([(sums, moments)], weights, window.to(read.dtype)).phases
    torch.testing.assert_close(phases - read, WINDOW_SHARE * (window - read))
    silent = join_evidence([measured(1, gradient=0)], weights, STILL).phases
    assert silent.isfinite().all()


def test_an_error_as_large_as_a_value_costs_what_the_statistics_say() -> None:
    """The metric of two heads, times the typical lengths of their values."""
    weights, (sums, moments) = toy(2, 6).weights, measured(1)
    evidence = join_evidence([(sums, moments)], weights, STILL)
    energy = (weights.value @ moments.covariance @ weights.value.mT).diagonal()
    lengths = energy.unflatten(0, (2, 6)).sum(1).sqrt().repeat_interleave(6)
    costs = evidence.value_metric * torch.outer(lengths, lengths)
    torch.testing.assert_close(costs, sums.value_square / 4)


def test_a_group_counts_for_inputs_by_what_its_errors_cost() -> None:
    weights = toy(2, 6).weights
    parts = [measured(1), measured(2), measured(3, gradient=0)]
    joined = join_evidence(parts, weights, STILL)
    weighted = [moments.weighted(sums.value_square.trace()) for sums, moments in parts[:2]]
    torch.testing.assert_close(joined.mean, merge_moments(weighted).mean)
    torch.testing.assert_close(joined.covariance, merge_moments(weighted).covariance)
    reads = merge_stats([sums for sums, _ in parts])
    # Every group counts the same queries.
    queries = parts[0][0].queries
    torch.testing.assert_close(joined.key_metric, reads.query_square / queries)
