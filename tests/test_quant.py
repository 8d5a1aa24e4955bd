"""Latents in few bits: exact bytes and bounds, a plain twin, errors that pay for the trouble."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.maths.quant import (
    LatentCode,
    Packed,
    allocate,
    code_bytes,
    fit_code,
    pack,
    unpack,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=25)
BITS = st.sampled_from([1, 2, 3, 4, 5, 7, 8])


def steep(rank: int, decades: float = 2) -> Tensor:
    return 10 ** -torch.linspace(0, decades, rank)


def latents(tokens: int, deviations: Tensor, seed: int = 0, turn: int = 7) -> Tensor:
    """Gaussian latents of some spectrum in a random basis, of a mean that is not 0."""
    rank = len(deviations)
    draw = torch.Generator().manual_seed(turn)
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=draw)).Q
    mean = torch.randn(rank, generator=draw)
    draw.manual_seed(seed)
    return torch.randn(tokens, rank, generator=draw) * deviations @ basis + mean


def again(code: LatentCode, x: Tensor) -> Tensor:
    return unpack(code, pack(code, x), torch.float32)


def error(wrong: Tensor, right: Tensor, metric: Tensor) -> float:
    """In the metric, of what the latents vary by."""
    wrong, varied = (wrong - right).double(), (right - right.mean(0)).double()
    metric = metric.double()
    return math.sqrt(((wrong @ metric * wrong).sum() / (varied @ metric * varied).sum()).item())


def plain_absmax(x: Tensor, bits: int) -> Tensor:
    """What is usual: a scale per token, the same bits for every number."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True) / top
    return (x / scale).round() * scale


def coded_steps(code: LatentCode, x: Tensor) -> Tensor:
    return (x - code.mean) @ code.analysis.mT


def fields_by_integers(code: LatentCode, token: Tensor) -> list[int]:
    """The channels that the bytes of one token hold, read as one long number."""
    stream, fields = int.from_bytes(bytes(token.tolist()), "little"), []
    for width in code.widths.tolist():
        fields.append(stream & (1 << width) - 1)
        stream >>= width
    assert stream == 0
    return fields


def bytes_by_integers(code: LatentCode, steps: Tensor, scale: Tensor) -> list[int]:
    """The bytes of one token at a scale that is given."""
    stream, start = 0, 0
    for step, width in zip(steps.numpy(), code.widths.tolist(), strict=True):
        field = math.floor(step / np.float32(scale.item()) + np.float32(2**width / 2))
        stream |= min(max(field, 0), 2**width - 1) << start
        start += width
    return list(stream.to_bytes(code_bytes(len(code.mean), code.bits), "little"))


@repeatable
@given(rank=st.integers(1, 70), bits=BITS, tokens=st.integers(1, 30), decades=st.floats(0, 4))
def test_a_token_takes_the_bytes_that_the_formula_tells(
    rank: int, bits: int, tokens: int, decades: float
) -> None:
    x = latents(tokens, steep(rank, decades))
    code = fit_code(x, torch.eye(rank), bits)
    packed = pack(code, x.view(1, tokens, rank))
    assert packed.codes.shape == (1, tokens, math.ceil(rank * bits / 8))
    assert packed.codes.shape[-1] == code_bytes(rank, bits)
    assert (packed.codes.dtype, packed.scale.dtype) == (torch.uint8, torch.float16)
    assert packed.scale.shape == (1, tokens, 1)
    assert code.widths.sum() <= bits * rank and 0 <= code.widths.min() <= code.widths.max() <= 8
    assert unpack(code, packed, torch.float32).isfinite().all()


@repeatable
@given(rank=st.integers(1, 40), bits=BITS, decades=st.floats(0, 4), seed=st.integers(0, 99))
def test_bytes_agree_with_a_plain_twin(rank: int, bits: int, decades: float, seed: int) -> None:
    x = latents(60, steep(rank, decades), seed)
    code = fit_code(x, torch.eye(rank), bits)
    packed, steps = pack(code, x), coded_steps(code, x)
    rows = zip(packed.codes, steps, packed.scale, strict=True)
    assert all(codes.tolist() == bytes_by_integers(code, *row) for codes, *row in rows)

    fields = torch.tensor([fields_by_integers(code, token) for token in packed.codes])
    levels = fields + 0.5 - 2.0**code.widths / 2
    plain = code.mean + packed.scale.double() * (levels.double() @ code.synthesis.double())
    read = unpack(code, packed, torch.float64)
    torch.testing.assert_close(read, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_token_errs_more_than_half_a_step_in_every_channel(bits: int) -> None:
    """At the least scale without clipping, whatever the token: the bound that outliers have too."""
    x = latents(2000, steep(48))
    code = fit_code(x, torch.eye(48), bits)
    rare = code.mean + 100 * (latents(300, steep(48), 1) - code.mean)
    one = code.mean.repeat(48, 1) + 300 * torch.eye(48)
    quiet = code.mean + 1e-3 * (x[:300] - code.mean)
    kept = code.widths > 0
    for tokens in (x, rare, one, quiet, code.mean[None]):
        steps = coded_steps(code, tokens)
        scale = (steps.abs() / (2.0**code.widths / 2)).amax(-1, keepdim=True)
        scale = scale.clamp_min(torch.finfo(torch.float16).smallest_normal)
        # Rounded up to float16, with the mean's and the GEMM's own rounding.
        wrong = (coded_steps(code, again(code, tokens)) - steps)[:, kept]
        wrong = wrong.square() @ code.costs[kept]
        bound = (scale / 2).square()[:, 0] * code.costs[kept].sum()
        # The middle term is what float32 resolves of the latents themselves.
        grain = (code.analysis.norm(dim=1) * 1e-6 * tokens.norm(dim=1, keepdim=True)).square()
        assert (wrong <= 1.004 * bound + (grain @ code.costs)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_channels_that_do_not_clip_err_by_half_a_step(bits: int) -> None:
    x = latents(2000, steep(48))
    code = fit_code(x, torch.eye(48), bits)
    packed, steps = pack(code, x), coded_steps(code, x)
    scale = packed.scale.float()
    inside = steps.abs() <= scale * 2.0**code.widths / 2
    wrong = (coded_steps(code, unpack(code, packed, torch.float32)) - steps).abs()
    assert (wrong <= 0.501 * scale)[inside & (code.widths > 0)].all()
    assert inside[:, code.widths > 0].float().mean() > 0.97


@pytest.mark.parametrize("bits", [4, 8])
def test_later_latents_of_other_size_are_kept_as_well(bits: int) -> None:
    """The scale follows them, both ways: statistics drift."""
    code = fit_code(latents(3000, steep(32)), torch.eye(32), bits)
    later = latents(1000, steep(32), 1)
    usual = error(again(code, later), later, torch.eye(32))
    for size in (1e-2, 1 / 3, 5.0, 1e3):
        drifted = code.mean + size * (later - code.mean)
        assert error(again(code, drifted), drifted, torch.eye(32)) < 1.02 * usual


def test_scales_beyond_float16_clip_and_stay_finite() -> None:
    x = latents(300, steep(16))
    code = fit_code(x, torch.eye(16), 4)
    far = pack(code, code.mean + 1e12 * (x - code.mean))
    assert (far.scale == torch.finfo(torch.float16).max).any()
    assert unpack(code, far, torch.float32).isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_survive_their_bytes_and_a_second_packing(bits: int) -> None:
    x = latents(500, steep(40))
    code = fit_code(x, torch.eye(40), bits)
    first, packed = again(code, x), pack(code, x)
    # The scale is found anew, so that it is rounded twice: two errors add, none grows.
    twice, once = (error(again(code, y), x, torch.eye(40)) for y in (first, x))
    assert once < twice < 1.5 * once
    reloaded = Packed(
        torch.frombuffer(bytearray(packed.codes.numpy().tobytes()), dtype=torch.uint8).view(
            500, -1
        ),
        torch.frombuffer(bytearray(packed.scale.numpy().tobytes()), dtype=torch.float16)[:, None],
    )
    assert torch.equal(unpack(code, reloaded, torch.float32), first)


@pytest.mark.parametrize("decades", [0, 2, 4])
def test_more_bits_are_never_worse(decades: float) -> None:
    metric = torch.diag(steep(30, 1)) ** 2
    x = latents(1500, steep(30, decades))
    errors = [error(again(fit_code(x, metric, bits), x), x, metric) for bits in range(1, 9)]
    assert all(more < 0.9 * fewer for fewer, more in pairwise(errors))


def test_a_scale_is_chosen_by_what_errors_cost() -> None:
    """Channels of 8 bits that wanted more err most; steps alike in number are not alike in cost."""
    seen, new = latents(3000, steep(24, 4)), latents(1000, steep(24, 4), 1)
    code = fit_code(seen, torch.eye(24), 6)
    alike = code._replace(costs=code.costs.sign())
    wrong, careless = (error(again(c, new), new, torch.eye(24)) for c in (code, alike))
    assert wrong < 0.9 * careless


def test_on_a_steep_spectrum_it_beats_plain_absmax() -> None:
    seen, new = latents(4000, steep(96)), latents(1000, steep(96), 1)
    for bits, factor in ((4, 3.7), (8, 1.5)):
        code, metric = fit_code(seen, torch.eye(96), bits), torch.eye(96)
        plain = plain_absmax(new - code.mean, bits) + code.mean
        assert factor * error(again(code, new), new, metric) < error(plain, new, metric)


@pytest.mark.parametrize(("bits", "most"), [(4, 1.0), (8, 1.03)])
def test_on_a_flat_spectrum_it_is_no_worse_than_plain_absmax(bits: int, most: float) -> None:
    seen, new = latents(4000, torch.ones(96)), latents(1000, torch.ones(96), 1)
    code = fit_code(seen, torch.eye(96), bits)
    plain = plain_absmax(new - code.mean, bits) + code.mean
    assert error(again(code, new), new, torch.eye(96)) < most * error(plain, new, torch.eye(96))


@pytest.mark.parametrize("bits", [4, 8])
def test_long_tails_cost_little(bits: int) -> None:
    """Mixing makes them Gaussian; independent Laplace channels are what it is needed for."""
    size = torch.rand(3000, 64, generator=torch.Generator().manual_seed(0)).clamp_min(1e-7).log()
    sign = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1)).sign()
    tailed, usual = sign * size / math.sqrt(2) * steep(64), latents(3000, steep(64))
    wrong = [
        error(again(fit_code(x, torch.eye(64), bits), x), x, torch.eye(64)) for x in (tailed, usual)
    ]
    assert wrong[0] < 1.1 * wrong[1]


@pytest.mark.parametrize(("bits", "least"), [(4, 0.2), (8, 0.75)])
def test_errors_go_where_the_metric_lets_them(bits: int, least: float) -> None:
    x = latents(3000, torch.ones(24))
    metric = torch.diag(torch.tensor([1.0] * 12 + [1e-4] * 12))
    honoured, ignored = (again(fit_code(x, m, bits), x) - x for m in (metric, torch.eye(24)))
    assert honoured[:, :12].norm() < least * ignored[:, :12].norm()
    assert honoured[:, 12:].norm() > 2 * ignored[:, 12:].norm()
    # Only the ratios of its entries matter.
    scaled = again(fit_code(x, 1e-12 * metric, bits), x) - x
    torch.testing.assert_close(scaled.norm(), honoured.norm(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_an_invertible_change_of_basis_changes_nothing(bits: int) -> None:
    draw = torch.Generator().manual_seed(3)
    turn = torch.eye(20) + 0.3 * torch.randn(20, 20, generator=draw)
    x = latents(2000, steep(20))
    back = torch.linalg.inv(turn)
    moved, metric = x @ turn, back @ back.mT
    here = error(again(fit_code(x, torch.eye(20), bits), x), x, torch.eye(20))
    there = error(again(fit_code(moved, metric, bits), moved), moved, metric)
    assert there == pytest.approx(here, rel=1e-2)


def test_one_bit_tells_more_than_none() -> None:
    x = latents(4000, torch.ones(16))
    assert error(again(fit_code(x, torch.eye(16), 1), x), x, torch.eye(16)) < 0.65


@repeatable
@given(rank=st.integers(1, 60), bits=BITS, decades=st.floats(0, 6), alive=st.floats(0.1, 1))
def test_no_swap_of_a_bit_lowers_the_error(
    rank: int, bits: int, decades: float, alive: float
) -> None:
    energies = steep(rank, decades).double().square()
    energies[math.ceil(alive * rank) :] = 0
    widths = allocate(energies, bits)
    assert (widths[energies == 0] == 0).all()
    # All is spent, but for what nothing can use.
    assert widths.sum() == min(bits * rank, 8 * int((energies > 0).sum()))
    wrong = energies * 4.0**-widths
    gain = torch.where(widths < 8, 0.75 * wrong, 0)
    loss = torch.where(widths > 0, 3 * wrong, math.inf)
    assert gain.max() <= loss.min() * (1 + 1e-9)
    inner = (widths > 0) & (widths < 8)
    if inner.any():  # ½ log2(σ²) of an unbounded channel, up to one level and half a bit
        level = widths[inner] - energies[inner].log2() / 2
        assert level.max() - level.min() <= 1 + 1e-9


@pytest.mark.parametrize("bits", [4, 8])
def test_constant_latents_are_exact(bits: int) -> None:
    constant = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).repeat(50, 1)
    assert torch.equal(again(fit_code(constant, torch.eye(12), bits), constant), constant)
    one = constant[:1]
    assert torch.equal(again(fit_code(one, torch.eye(12), bits), one), one)
    mixed = latents(50, steep(12))
    mixed[:, 5] = 3
    code = fit_code(mixed, torch.eye(12), bits)
    assert code.widths[-1] == 0
    assert (again(code, mixed)[:, 5] - 3).abs().max() < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 9, 400])
def test_few_tokens_and_singular_metrics_are_harmless(tokens: int, bits: int) -> None:
    x = latents(tokens, steep(20))
    low = torch.randn(20, 5, generator=torch.Generator().manual_seed(4))
    for metric in (torch.eye(20), low @ low.mT, torch.zeros(20, 20)):
        code = fit_code(x, metric, bits)
        assert all(part.isfinite().all() for part in code[:-1] if isinstance(part, Tensor))
        assert (code.widths > 0).sum() <= max(tokens - 1, 0)
        new = again(code, latents(7, steep(20), 1))
        assert new.isfinite().all()
        if metric.any() and tokens > 1:
            assert error(again(code, x), x, metric) < (0.1 if bits == 4 else 0.01)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_single_channel(bits: int) -> None:
    x = latents(400, torch.ones(1))
    code = fit_code(x, torch.ones(1, 1), bits)
    assert code.widths.tolist() == [bits]
    # The scale alone takes it to the edge of the outermost step.
    assert ((again(code, x) - x).abs() <= 1.002 * (x - code.mean).abs() / 2**bits + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_go_in_and_out(bits: int, dtype: torch.dtype) -> None:
    x = latents(300, steep(24)).to(dtype)
    code = fit_code(x, torch.eye(24), bits)
    packed = pack(code, x)
    read = unpack(code, packed, dtype)
    assert read.dtype == dtype
    assert torch.equal(read, unpack(code, packed, torch.float32).to(dtype))
    assert torch.equal(packed.codes, pack(code, x.float()).codes)
    assert all(part.dtype == torch.float32 for part in code[:3])


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_do_not_know_of_each_other(bits: int) -> None:
    x = latents(60, steep(24))
    code = fit_code(x, torch.eye(24), bits)
    whole, parts = pack(code, x.view(3, 20, 24)), [pack(code, part) for part in x.split(20)]
    assert torch.equal(whole.codes, torch.stack([part.codes for part in parts]))
    with torch.no_grad():
        read = unpack(code, whole, torch.float32)
    assert read.shape == (3, 20, 24)
    torch.testing.assert_close(read.flatten(0, 1), again(code, x))
    assert pack(code, x[:0]).codes.shape == (0, code_bytes(24, bits))
    assert unpack(code, pack(code, x[:0]), torch.float32).shape == (0, 24)


def test_the_same_latents_give_the_same_code_in_any_order() -> None:
    x, metric = latents(500, steep(24)), torch.diag(steep(24, 1))
    first, same = fit_code(x, metric, 4), fit_code(x.clone(), metric.clone(), 4)
    assert all(torch.equal(a, b) for a, b in zip(first[:5], same[:5], strict=True))
    turned = fit_code(x.flip(0), metric, 4)
    assert torch.equal(turned.widths, first.widths)
    torch.testing.assert_close(turned.synthesis, first.synthesis, rtol=1e-4, atol=1e-5)


def test_the_signs_of_eigenvectors_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, metric, eigh = latents(500, steep(24)), torch.diag(steep(24, 1)), torch.linalg.eigh
    first = fit_code(x, metric, 8)

    def other(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values, vectors * (-1.0) ** torch.arange(24)

    monkeypatch.setattr(torch.linalg, "eigh", other)
    second = fit_code(x, metric, 8)
    torch.testing.assert_close(second.synthesis, first.synthesis, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_impossible_bits_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"at {bits} bits"):
        fit_code(latents(9, steep(4)), torch.eye(4), bits)
