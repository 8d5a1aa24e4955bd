"""What errors in keys and values cost: against loops, and against what errors really do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.reads import outputs, sums_by_loops
from torch import Tensor

from vmla_convert.maths import reads as reads_module
from vmla_convert.maths.moments import as_channels, as_pairs
from vmla_convert.maths.reads import Reads, ReadSums, measure_reads, merge_reads, real_square

repeatable = settings(derandomize=True, deadline=None, max_examples=8)


def make_reads(
    heads: int = 2, head_dim: int = 6, clips: int = 2, seed: int = 0, count: int = 3, keys: int = 5
) -> Reads:
    """Random queries, keys and all that belongs to them; each query sees some keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def turn(tokens: int) -> Tensor:
        angles = 3 * normal(tokens, head_dim // 2)
        return torch.polar(torch.ones_like(angles), angles)

    seen = torch.rand(count, keys, generator=generator) < 0.7
    seen[:, 0] = True
    return Reads(
        query=normal(clips, count, heads, head_dim),
        query_turn=turn(count),
        key=normal(clips, keys, heads, head_dim),
        key_turn=turn(keys),
        key_norm=normal(clips, keys).abs() + 0.1,
        value=normal(clips, keys, heads, head_dim),
        value_mean=normal(heads, head_dim),
        pull=normal(clips, count, heads, head_dim),
        seen=seen,
    )


def two_groups(reads: Reads) -> list[Tensor]:
    """The seen keys in two parts that differ from query to query."""
    first = (torch.arange(reads.seen.numel()).view_as(reads.seen) * 7) % 3 == 0
    return [reads.seen & first, reads.seen & ~first]


def only_key(reads: Reads, key: int) -> Tensor:
    return reads.seen & (torch.arange(reads.seen.shape[1]) == key)


def assert_equal(found: ReadSums, expected: ReadSums) -> None:
    for name, a, b in zip(ReadSums._fields, found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@repeatable
@given(st.integers(1, 4), st.sampled_from((6, 8, 10)), st.integers(1, 2), st.integers(0, 99))
def test_sums_are_those_of_plain_loops(heads: int, head_dim: int, clips: int, seed: int) -> None:
    reads = make_reads(heads, head_dim, clips, seed)
    groups = two_groups(reads)
    for group, found in zip(groups, measure_reads(reads, groups), strict=True):
        assert_equal(found, sums_by_loops(reads, group))


def test_keys_in_blocks_give_the_sums_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = make_reads(keys=7)
    whole = measure_reads(reads, [reads.seen])[0]
    monkeypatch.setattr(reads_module, "KEYS_AT_ONCE", 2)
    assert_equal(measure_reads(reads, [reads.seen])[0], whole)


def test_a_group_without_keys_costs_nothing() -> None:
    reads = make_reads()
    (sums,) = measure_reads(reads, [torch.zeros_like(reads.seen)])
    assert sums.queries == 6
    assert all(not part.any() for part in sums[1:])


def test_clips_one_by_one_and_queries_in_parts_add_up_to_all() -> None:
    reads = make_reads()
    groups = two_groups(reads)
    parts: list[list[ReadSums]] = []
    for clip in range(2):
        for some in (slice(0, 1), slice(1, 3)):
            part = Reads(
                reads.query[clip : clip + 1, some],
                reads.query_turn[some],
                reads.key[clip : clip + 1],
                reads.key_turn,
                reads.key_norm[clip : clip + 1],
                reads.value[clip : clip + 1],
                reads.value_mean,
                reads.pull[clip : clip + 1, some],
                reads.seen[some],
            )
            parts.append(measure_reads(part, [group[some] for group in groups]))
    together = measure_reads(reads, groups)
    for group, whole in zip(zip(*parts, strict=True), together, strict=True):
        assert_equal(merge_reads(group), whole)


def test_key_sums_of_two_groups_add_up_to_those_of_all_keys() -> None:
    """But for the queries, which each group counts, and values, which are gathered together."""
    reads = make_reads()
    both = merge_reads(measure_reads(reads, two_groups(reads)))
    (whole,) = measure_reads(reads, [reads.seen])
    assert_equal(
        both._replace(queries=whole.queries, value_square=whole.value_square),
        whole,
    )


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


def output_change(reads: Reads, moved: Reads) -> Tensor:
    """How far each query's output moves along its pull, (B, n)."""
    return ((outputs(moved) - outputs(reads)) * reads.pull).sum((2, 3))


@pytest.mark.parametrize("key", range(5))
def test_an_error_of_one_key_costs_what_the_turned_metric_says(key: int) -> None:
    """The raw key of all heads but one is kept; finite differences of attention itself."""
    reads, size = make_reads(clips=1), 1e-5
    (sums,) = measure_reads(reads, [only_key(reads, key)])
    error = make_reads(clips=1, seed=1).key[0, key]
    for head in range(2):
        moved = reads.key.clone()
        moved[0, key, head] += size * error[head] * reads.key_norm[0, key]
        change = output_change(reads, reads._replace(key=moved)).square().sum() / size**2
        predicted = error[head] @ sums.turned_query_square[head] @ error[head]
        torch.testing.assert_close(change, predicted, rtol=1e-3, atol=1e-9)


def test_an_error_of_a_key_without_position_costs_what_the_plain_metric_says() -> None:
    """Such a key is turned with the query, so that they meet as they are."""
    reads, size, key = make_reads(clips=1, count=1), 1e-5, 0
    (sums,) = measure_reads(reads, [only_key(reads, key)])
    error = make_reads(clips=1, seed=1).key[0, key]
    as_query = as_channels(as_pairs(error) * reads.query_turn[0] * reads.key_turn[key].conj())
    for head in range(2):
        moved = reads.key.clone()
        moved[0, key, head] += size * as_query[head] * reads.key_norm[0, key]
        change = output_change(reads, reads._replace(key=moved)).square().sum() / size**2
        predicted = error[head] @ sums.query_square[head] @ error[head]
        torch.testing.assert_close(change, predicted, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("key", range(5))
def test_an_error_of_one_value_costs_what_the_value_metric_says(key: int) -> None:
    """Of all heads together; the metric counts each in lengths of its own centred value."""
    reads = make_reads(clips=1)
    (sums,) = measure_reads(reads, [only_key(reads, key)])
    error = make_reads(clips=1, seed=1).value[0, key]
    moved = reads.value.clone()
    moved[0, key] += error
    change = output_change(reads, reads._replace(value=moved)).square().sum()
    length = (reads.value[0, key] - reads.value_mean).norm(dim=1, keepdim=True)
    scaled = (error / length).flatten()
    torch.testing.assert_close(change, scaled @ sums.value_square @ scaled)


def test_measured_phases_are_the_best_constants_for_the_rotation() -> None:
    """METHOD 6, with weights: no other constant departs less from what the queries meet."""
    reads = make_reads()
    (sums,) = measure_reads(reads, [reads.seen])
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
