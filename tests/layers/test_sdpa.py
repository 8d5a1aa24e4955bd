"""Attention to parts of the keys, merged, against one softmax over all of them."""

from __future__ import annotations

import pytest
import torch
from conftest import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.layers import sdpa
from vmla_convert.layers.sdpa import PartialAttention, attend, attend_partly, merge, plainly

repeatable = settings(derandomize=True, deadline=None, max_examples=15)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def one_softmax(q: Tensor, k: Tensor, v: Tensor, scale: float) -> PartialAttention:
    """Output and log-sum in float64, head by head."""
    q, k, v = (x.double() for x in (q, k, v))
    logits = torch.einsum("bthw,bshw->bths", q, k) * scale
    output = torch.einsum("bths,bshd->bthd", logits.softmax(-1), v)
    return PartialAttention(output, torch.logsumexp(logits, -1))


def arguments(
    keys: int, queries: int = 5, width: int = 8, value_width: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (2, T, 3, W), keys (2, S, 3, W) and values (2, S, 3, D)."""
    return (
        noise(2, queries, 3, width, seed=seed),
        noise(2, keys, 3, width, seed=seed + 1),
        noise(2, keys, 3, value_width, seed=seed + 2),
    )


def check_near(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    atol = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(one.double(), other.double(), atol=atol, rtol=0)


def in_two_parts(q: Tensor, k: Tensor, v: Tensor, scale: float, split: int) -> Tensor:
    parts = (slice(split), slice(split, None))
    return merge(*(attend_partly(q, k[:, part], v[:, part], scale) for part in parts))


@DTYPES
@repeatable
@given(
    keys=st.integers(2, 40),
    where=st.floats(0, 1),
    queries=st.integers(1, 9),
    width=st.integers(1, 20),
    value_width=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_two_parts_merged_are_one_softmax_wherever_the_keys_are_split(
    dtype: torch.dtype,
    keys: int,
    where: float,
    queries: int,
    width: int,
    value_width: int,
    seed: int,
) -> None:
    """With values narrower and wider than keys."""
    q, k, v = (x.to(dtype) for x in arguments(keys, queries, width, value_width, seed))
    split = min(keys - 1, 1 + int(where * (keys - 1)))
    merged = in_two_parts(q, k, v, width**-0.5, split)
    assert merged.shape == (2, queries, 3, value_width)
    assert merged.dtype == dtype
    expected = one_softmax(q, k, v, width**-0.5).output
    check_near(merged, expected, dtype)


@DTYPES
@pytest.mark.parametrize("loud", [slice(0, 7), slice(3, 4)], ids=str)
@pytest.mark.parametrize("factor", [30.0, 1e4, 1e-4])
def test_a_part_that_is_much_louder_or_quieter_than_the_other_is_weighed_right(
    dtype: torch.dtype, loud: slice, factor: float
) -> None:
    """Logits of thousands, whose exponentials no float holds, and nearly equal ones."""
    q, k, v = arguments(20)
    k[:, loud] *= factor
    q, k, v = (x.to(dtype) for x in (q, k, v))
    merged = in_two_parts(q, k, v, 8**-0.5, 7)
    assert merged.isfinite().all()
    check_near(merged, one_softmax(q, k, v, 8**-0.5).output, dtype)


@DTYPES
@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize("value_width", [3, 11])
def test_a_part_knows_its_softmax_and_the_sum_of_its_exponentials(
    dtype: torch.dtype, scale: float, value_width: int
) -> None:
    q, k, v = (x.to(dtype) for x in arguments(13, value_width=value_width))
    part, expected = attend_partly(q, k, v, scale), one_softmax(q, k, v, scale)
    assert part.log_sum.dtype == torch.float32
    assert part.output.shape == (2, 5, 3, value_width)
    check_near(part.output, expected.output, dtype)
    check_near(part.log_sum, expected.log_sum, dtype)


@DTYPES
@pytest.mark.parametrize("at_once", [1, 4, 1024])
def test_the_kernel_is_the_plain_matrix_products(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: int
) -> None:
    """However many queries are multiplied at a time."""
    monkeypatch.setattr(sdpa, "QUERIES_AT_ONCE", at_once)
    q, k, v = (x.to(dtype) for x in arguments(11, queries=9))
    part = attend_partly(q, k, v, 0.4)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output, log_sum = plainly(q, k, v, 0.4)
    assert (output.dtype, log_sum.dtype) == (dtype, torch.float32)
    check_near(output.transpose(1, 2), part.output, dtype)
    check_near(log_sum.transpose(1, 2), part.log_sum, dtype)


def test_under_autocast_parts_have_its_dtype_as_attention_has() -> None:
    """Norms leave float32, linear layers bfloat16; the operators below take one dtype."""
    q, k = (noise(1, 5, 2, 8, seed=seed) for seed in (0, 1))
    v = noise(1, 5, 2, 8, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        part = attend_partly(q, k, v, 0.3)
        whole = attend(q, k, v, scale=0.3)
    assert part.output.dtype == whole.dtype == torch.bfloat16
    torch.testing.assert_close(part.output, whole)
