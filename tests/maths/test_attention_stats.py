"""The predicted cost of errors in keys and values equals slow loops and the measured cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.attention_stats import make_sample, outputs, sums_by_loops
from torch import Tensor

from vmla_convert.maths import attention_stats
from vmla_convert.maths.attention_stats import (
    AttentionSample,
    AttentionStats,
    measure_stats,
    merge_stats,
    real_square,
)
from vmla_convert.maths.moments import as_channels, as_pairs

repeatable = settings(derandomize=True, deadline=None, max_examples=8)


def two_groups(sample: AttentionSample) -> list[Tensor]:
    """The seen keys in two parts that differ from query to query."""
    first = (torch.arange(sample.mask.numel()).view_as(sample.mask) * 7) % 3 == 0
    return [sample.mask & first, sample.mask & ~first]


def only_key(sample: AttentionSample, key: int) -> Tensor:
    return sample.mask & (torch.arange(sample.mask.shape[1]) == key)


def assert_equal(found: AttentionStats, expected: AttentionStats) -> None:
    for name, a, b in zip(AttentionStats._fields, found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@repeatable
@given(st.integers(1, 4), st.sampled_from((6, 8, 10)), st.integers(1, 2), st.integers(0, 99))
def test_sums_are_those_of_plain_loops(heads: int, head_dim: int, clips: int, seed: int) -> None:
    sample = make_sample(heads, head_dim, clips, seed)
    groups = two_groups(sample)
    for group, found in zip(groups, measure_stats(sample, groups), strict=True):
        assert_equal(found, sums_by_loops(sample, group))


def test_keys_in_blocks_give_the_sums_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make_sample(keys=7)
    whole = measure_stats(sample, [sample.mask])[0]
    monkeypatch.setattr(attention_stats, "KEYS_AT_ONCE", 2)
    assert_equal(measure_stats(sample, [sample.mask])[0], whole)


def test_a_group_without_keys_costs_nothing() -> None:
    sample = make_sample()
    (sums,) = measure_stats(sample, [torch.zeros_like(sample.mask)])
    assert sums.queries == 6
    assert all(not part.any() for part in sums[1:])


def test_clips_one_by_one_and_queries_in_parts_add_up_to_all() -> None:
    sample = make_sample()
    groups = two_groups(sample)
    parts: list[list[AttentionStats]] = []
    for clip in range(2):
        for some in (slice(0, 1), slice(1, 3)):
            part = AttentionSample(
                sample.query[clip : clip + 1, some],
                sample.query_rotation[some],
                sample.key[clip : clip + 1],
                sample.key_rotation,
                sample.key_norm[clip : clip + 1],
                sample.value[clip : clip + 1],
                sample.value_mean,
                sample.gradient[clip : clip + 1, some],
                sample.mask[some],
            )
            parts.append(measure_stats(part, [group[some] for group in groups]))
    together = measure_stats(sample, groups)
    for group, whole in zip(zip(*parts, strict=True), together, strict=True):
        assert_equal(merge_stats(group), whole)


@repeatable
@given(st.integers(1, 5), st.integers(0, 99))
def test_real_square_is_the_outer_product_of_channels(pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(2, 4, pairs, generator=generator, dtype=torch.complex128)
    hermitian = torch.einsum("hnf,hng->hfg", t, t.conj())
    symmetric = torch.einsum("hnf,hng->hfg", t, t)
    channels = as_channels(t)
    expected = torch.einsum("hnd,hne->hde", channels, channels)
    torch.testing.assert_close(real_square(hermitian, symmetric), expected)


def output_change(sample: AttentionSample, moved: AttentionSample) -> Tensor:
    """How far each query's output moves along its pull, (B, n)."""
    return ((outputs(moved) - outputs(sample)) * sample.gradient).sum((2, 3))


@pytest.mark.parametrize("key", range(2))
def test_an_error_of_one_key_costs_what_the_turned_metric_says(key: int) -> None:
    """The raw key of all heads but one is kept; finite differences of attention itself."""
    sample, size = make_sample(clips=1), 1e-5
    (sums,) = measure_stats(sample, [only_key(sample, key)])
    error = make_sample(clips=1, seed=1).key[0, key]
    for head in range(2):
        moved = sample.key.clone()
        moved[0, key, head] += size * error[head] * sample.key_norm[0, key]
        change = output_change(sample, sample._replace(key=moved)).square().sum() / size**2
        predicted = error[head] @ sums.rotated_query_square[head] @ error[head]
        torch.testing.assert_close(change, predicted, rtol=1e-3, atol=1e-9)


def test_an_error_of_a_key_without_position_costs_what_the_plain_metric_says() -> None:
    """Such a key is turned with the query, so that they meet as they are."""
    sample, size, key = make_sample(clips=1, count=1), 1e-5, 0
    (sums,) = measure_stats(sample, [only_key(sample, key)])
    error = make_sample(clips=1, seed=1).key[0, key]
    as_query = as_channels(
        as_pairs(error) * sample.query_rotation[0] * sample.key_rotation[key].conj()
    )
    for head in range(2):
        moved = sample.key.clone()
        moved[0, key, head] += size * as_query[head] * sample.key_norm[0, key]
        change = output_change(sample, sample._replace(key=moved)).square().sum() / size**2
        predicted = error[head] @ sums.query_square[head] @ error[head]
        torch.testing.assert_close(change, predicted, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("key", range(2))
def test_an_error_of_one_value_costs_what_the_value_metric_says(key: int) -> None:
    """All heads together; the metric counts each in lengths of its own centred value."""
    sample = make_sample(clips=1)
    (sums,) = measure_stats(sample, [only_key(sample, key)])
    error = make_sample(clips=1, seed=1).value[0, key]
    moved = sample.value.clone()
    moved[0, key] += error
    change = output_change(sample, sample._replace(value=moved)).square().sum()
    length = (sample.value[0, key] - sample.value_mean).norm(dim=1, keepdim=True)
    scaled = (error / length).flatten()
    torch.testing.assert_close(change, scaled @ sums.value_square @ scaled)


def test_measured_phases_are_the_best_constants_for_the_rotation() -> None:
    """No other constant departs less from the rotations, weighted by cost."""
    sample = make_sample()
    (sums,) = measure_stats(sample, [sample.mask])
    phases = sums.phases / sums.query_pairs
    assert phases.abs().max() <= 1

    def departure(stand_in: Tensor) -> Tensor:
        """Sum of w |u|² |turn − stand-in|², but for what is the same for all."""
        cross = 2 * (stand_in.conj() * sums.phases).real
        return sums.query_pairs * (1 + stand_in.abs().square()) - cross

    best = departure(phases)
    torch.testing.assert_close(best, sums.query_pairs * (1 - phases.abs().square()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.randn(phases.shape, generator=generator, dtype=torch.complex128)
        assert (departure(phases + 0.1 * other) > best).all()
    assert (departure(torch.ones_like(phases)) >= best).all()
