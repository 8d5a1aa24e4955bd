"""Attention against a plain softmax, at widths and addresses that fused kernels refuse."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import noise, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.config import RuntimeConfig
from vmla_convert.errors import ConfigError
from vmla_convert.kernels import alignment
from vmla_convert.kernels.alignment import aligned
from vmla_convert.kernels.attention import PACKAGES, Kernel, choose, from_package
from vmla_convert.layers.runtime import check_runtime
from vmla_convert.layers.sdpa import attend

repeatable = settings(derandomize=True, deadline=None, max_examples=15)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
HOPPER, AMPERE = (9, 0), (8, 0)


def one_softmax(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention in float64, head by head."""
    q, k, v = (x.double() for x in (q, k, v))
    logits = torch.einsum("bthw,bshw->bths", q, k) * scale
    return torch.einsum("bths,bshd->bthd", logits.softmax(-1), v)


def arguments(
    keys: int, queries: int = 5, width: int = 8, value_width: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (2, T, 3, W), keys (2, S, 3, W) and values (2, S, 3, D)."""
    return (
        noise(2, queries, 3, width, seed=seed),
        noise(2, keys, 3, width, seed=seed + 1),
        noise(2, keys, 3, value_width, seed=seed + 2),
    )


@DTYPES
@repeatable
@given(
    keys=st.integers(1, 40),
    queries=st.integers(1, 9),
    width=st.integers(1, 20),
    value_width=st.integers(1, 20),
    multiple=st.sampled_from([1, 8]),
    seed=st.integers(0, 99),
)
def test_attention_is_one_softmax_at_all_widths(
    dtype: torch.dtype,
    keys: int,
    queries: int,
    width: int,
    value_width: int,
    multiple: int,
    seed: int,
) -> None:
    """With values narrower and wider than keys, padded as for a GPU or not."""
    q, k, v = (x.to(dtype) for x in arguments(keys, queries, width, value_width, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(alignment.MULTIPLE, "cpu", multiple)
        output = attend(q, k, v)
    assert (output.shape, output.dtype) == ((2, queries, 3, value_width), dtype)
    atol = 2e-5 if dtype == torch.float32 else 0.03
    expected = one_softmax(q, k, v, width**-0.5)
    torch.testing.assert_close(output.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("first", [0, 1, 8, 63])
@pytest.mark.parametrize("width", [64, 96, 289])
def test_kernels_get_aligned_widths_and_addresses(
    monkeypatch: pytest.MonkeyPatch, first: int, width: int
) -> None:
    """Parts of a latent start anywhere, and absorbed widths are odd."""
    monkeypatch.setitem(alignment.MULTIPLE, "cpu", 8)
    x = noise(2, 5, 400)[..., first : first + width]
    given = aligned(x)
    assert given.shape[-1] % 8 == given.storage_offset() % 8 == 0
    assert all(step % 8 == 0 for step in given.stride()[:-1])
    assert torch.equal(given[..., :width], x) and not given[..., width:].any()


def test_aligned_tensors_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(alignment.MULTIPLE, "cpu", 8)
    x = noise(2, 5, 3, 64)
    assert aligned(x) is x
    assert aligned(x[:, 1:], 64).data_ptr() == x[:, 1:].data_ptr()


CHOICES: list[tuple[Kernel, set[str], tuple[int, int] | None, int, int, str]] = [
    ("auto", set(), None, 2, 128, "sdpa"),
    ("auto", set(), AMPERE, 2, 128, "sdpa"),
    ("auto", set(), HOPPER, 2, 128, "cudnn"),
    ("auto", set(), HOPPER, 4, 128, "sdpa"),
    ("auto", {"flash3", "sage", "flash"}, HOPPER, 2, 128, "flash3"),
    ("auto", {"flash3"}, AMPERE, 2, 128, "sdpa"),
    ("auto", {"flash3", "flash4"}, HOPPER, 2, 128, "flash4"),
    ("auto", {"flash3", "flash4"}, HOPPER, 2, 256, "flash3"),
    ("flash3", {"flash3"}, AMPERE, 2, 128, "sdpa"),
    ("sage", {"sage"}, AMPERE, 2, 128, "sage"),
    ("sage", {"sage"}, AMPERE, 2, 256, "sdpa"),
    ("cudnn", set(), AMPERE, 2, 128, "cudnn"),
    ("sdpa", {"flash3"}, HOPPER, 2, 128, "sdpa"),
]


@pytest.mark.parametrize(("kernel", "installed", "capability", "item", "width", "chosen"), CHOICES)
def test_the_kernel_follows_packages_and_gpu(
    monkeypatch: pytest.MonkeyPatch,
    kernel: Kernel,
    installed: set[str],
    capability: tuple[int, int] | None,
    item: int,
    width: int,
    chosen: str,
) -> None:
    monkeypatch.setattr("vmla_convert.kernels.attention.is_installed", installed.__contains__)
    assert choose(kernel, capability, item, width) == chosen


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("with_sums", [False, True])
def test_a_package_is_called_with_heads_third_and_the_scale(
    monkeypatch: pytest.MonkeyPatch, name: str, with_sums: bool
) -> None:
    package = PACKAGES[name]

    def stand_in(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        output = one_softmax(q, k, v, options.pop(package.scale)).to(q)
        assert options == package.options
        return (output, None) if with_sums else output

    module = ModuleType(package.module)
    setattr(module, package.function, stand_in)
    for parent in package.module.split(".")[:-1]:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, package.module, module)
    q, k, v = arguments(7)
    torch.testing.assert_close(from_package(package, q, k, v, 0.3), attend(q, k, v, scale=0.3))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_backend_that_is_not_installed_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        check_runtime(tiny_config(), RuntimeConfig(attention_backend=name))
