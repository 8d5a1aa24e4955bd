"""Tables against known optima; codes and bytes against what they stand for."""

from __future__ import annotations

import pytest
import torch
from conftest import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.maths.quantise import (
    MOST_BITS,
    TABLE_SIZE,
    WHOLE_BITS,
    WIDTHS,
    code_bytes,
    dequantise,
    distortions,
    fit_tables,
    gaussian_samples,
    gaussian_tables,
    pack,
    quantise,
    table,
    unpack,
)

BITS = range(1, MOST_BITS + 1)
repeatable = settings(derandomize=True, deadline=None, max_examples=25)


@st.composite
def mixed_widths(draw: st.DrawFn) -> list[int]:
    """Whole channels first, then any widths in any order."""
    whole = draw(st.integers(0, 3))
    return whole * [WHOLE_BITS] + draw(st.lists(st.integers(0, MOST_BITS), min_size=1, max_size=40))


def random_codes(widths: list[int], seed: int, *batch: int) -> Tensor:
    """Codes (*batch, R), the smallest and largest of each width among them."""
    generator = torch.Generator().manual_seed(seed)
    most = torch.tensor([2**width - 1 for width in widths])
    share = torch.rand(*batch, len(widths), generator=generator, dtype=torch.float64) * 1.2 - 0.1
    return (share * (most + 1)).floor().clamp(min=torch.zeros(()), max=most).int()


# Tables


@pytest.mark.parametrize(
    ("bits", "values", "distortion"),
    [
        # Max (1960), table I.
        (1, [0.7979], 0.3634),
        (2, [0.4528, 1.510], 0.1175),
        (3, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
    ],
)
def test_the_tables_of_a_gaussian_are_those_of_max(
    bits: int, values: list[float], distortion: float
) -> None:
    found = table(gaussian_tables(), bits)
    positive = torch.tensor(values)
    expected = torch.cat([-positive.flip(0), positive])
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    told = distortions(gaussian_tables(), gaussian_samples())[WIDTHS.index(bits)]
    assert told.item() == pytest.approx(distortion, rel=5e-3)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_many_values_reach_the_known_limit_of_fine_quantisation(bits: int) -> None:
    """Panter and Dite (1951): π√3/2 · 4^-bits for a Gaussian, from below."""
    limit = 3**0.5 * torch.pi / 2 * 4.0**-bits
    told = distortions(gaussian_tables(), gaussian_samples())[bits].item()
    assert 0.8 * limit < told < 1.02 * limit


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "two lumps", "few"])
def test_tables_ascend_and_errors_fall_with_bits(kind: str) -> None:
    samples = {
        "normal": noise(4000),
        "laplace": noise(4000).abs().sqrt() * noise(4000, seed=1),
        "uniform": torch.linspace(-1.7, 1.7, 4000),
        "two lumps": torch.cat([noise(2000) / 9 - 1, noise(2000, seed=1) / 9 + 1]),
        "few": noise(300),
    }[kind]
    tables = fit_tables(samples)
    assert tables.shape == (TABLE_SIZE,)
    for bits in BITS:
        values = table(tables, bits)
        assert values.shape == (2**bits,)
        assert (values.diff() >= 0).all()
        assert samples.min() <= values[0] and values[-1] <= samples.max()
    told = distortions(tables, samples)
    assert told.shape == (len(WIDTHS),)
    assert told[0] == 1
    assert (told.diff() < 0).all() or kind == "few"
    assert (told[:9].diff() < 0).all()
    assert told[-1] < 1e-6


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_no_small_change_of_a_table_lowers_its_error(bits: int) -> None:
    samples = noise(4000).abs().sqrt() * noise(4000, seed=1)
    values = table(fit_tables(samples), bits)

    def error(values: Tensor) -> float:
        return (samples[:, None] - values).square().min(1).values.mean().item()

    least = error(values)
    for seed in range(20):
        changed = values + 0.05 * noise(len(values), seed=seed)
        assert error(changed) > least * (1 - 2e-3)
        assert error(values + 0.2 * noise(len(values), seed=seed)) > least


def test_distortions_are_the_errors_of_stored_channels() -> None:
    samples = noise(3000) * 1.5
    tables = fit_tables(noise(5000, seed=2))
    for told, width in zip(distortions(tables, samples), WIDTHS, strict=True):
        channels = samples[:, None].double()
        back = dequantise(quantise(channels, tables, [width]), tables, [width], torch.float64)
        assert told.item() == pytest.approx(
            ((back - channels).square().mean() / channels.square().mean()).item(), rel=1e-5
        )


# Codes


@given(mixed_widths(), st.integers(0, 99))
@repeatable
def test_a_code_is_that_of_the_nearest_value(widths: list[int], seed: int) -> None:
    channels = 1.5 * noise(2, 3, len(widths), seed=seed)
    codes = quantise(channels, gaussian_tables(), widths)
    values = dequantise(codes, gaussian_tables(), widths, torch.float32)
    assert codes.dtype == torch.int32
    for i, width in enumerate(widths):
        assert codes[..., i].min() >= 0 and codes[..., i].max() < 2**width
        if width == 0:
            assert not values[..., i].any()
        elif width == WHOLE_BITS:
            assert torch.equal(values[..., i], channels[..., i].half().float())
        else:
            gaps = (channels[..., i, None] - table(gaussian_tables(), width)).abs()
            torch.testing.assert_close((values - channels)[..., i].abs(), gaps.min(-1).values)


@given(mixed_widths(), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
@repeatable
def test_values_have_the_codes_that_they_came_from(
    widths: list[int], seed: int, dtype: torch.dtype
) -> None:
    codes = quantise(noise(5, len(widths), seed=seed), gaussian_tables(), widths)
    values = dequantise(codes, gaussian_tables(), widths, dtype)
    assert values.dtype == dtype
    assert torch.equal(quantise(values, gaussian_tables(), widths), codes)


def test_channels_of_16_bits_keep_every_float16() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    codes = quantise(every[:, None], gaussian_tables(), [WHOLE_BITS])
    packed = pack(codes, [WHOLE_BITS])
    assert packed.shape == (len(every), 2)
    back = dequantise(unpack(packed, [WHOLE_BITS]), gaussian_tables(), [WHOLE_BITS], torch.float16)
    assert torch.equal(back[:, 0].view(torch.int16), every.view(torch.int16))


# Bytes


@given(mixed_widths(), st.integers(0, 99))
@repeatable
def test_packed_codes_come_back_from_as_few_bytes_as_hold_them(
    widths: list[int], seed: int
) -> None:
    codes = random_codes(widths, seed, 2, 3)
    packed = pack(codes, widths)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, -(-sum(widths) // 8))
    assert code_bytes(widths) == packed.shape[-1]
    assert torch.equal(unpack(packed, widths), codes)


@pytest.mark.parametrize("bits", [*BITS, WHOLE_BITS])
def test_the_smallest_and_the_largest_codes_touch_no_neighbour(bits: int) -> None:
    widths = [bits] * 16
    for first in (0, 1):
        codes = torch.tensor([(i + first) % 2 * (2**bits - 1) for i in range(16)]).int()
        assert torch.equal(unpack(pack(codes, widths), widths), codes)


def test_codes_lie_one_after_the_other_lowest_bit_first() -> None:
    codes = torch.tensor([0xABCD, 0b101, 0b01, 0b1111, 0b1, 0b1])
    assert pack(codes.int(), [16, 3, 2, 4, 1, 1]).tolist() == [0xCD, 0xAB, 0b11101101, 0b111]
