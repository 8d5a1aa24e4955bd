"""Low-rank approximations: optimal in the metric, uncorrelated latents, nothing without data."""

from __future__ import annotations

import pytest
import torch
from reference.latent import generator
from torch import Tensor

from vmla_convert.maths.decomposition import Decomposition, psd_sqrt, two_sided


def two_sided_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Target W, metric M and covariance C."""
    draw = generator(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    side, spread = normal(20, 20), normal(12, 12) * torch.logspace(0, -2, 12, dtype=torch.float64)
    return normal(20, 12), side @ side.mT, spread @ spread.mT


def weighted_error(target: Tensor, metric: Tensor, covariance: Tensor, rebuilt: Tensor) -> float:
    gap = target - rebuilt
    return torch.einsum("nm,nd,de,me->", metric, gap, covariance, gap).item()


def solved(target: Tensor, metric: Tensor, covariance: Tensor) -> Decomposition:
    return two_sided(target, target.mT @ metric @ target, covariance)


def truncated(whole: Decomposition, rank: int) -> Tensor:
    return whole.up[:, :rank] @ whole.down[:rank]


def test_two_sided_error_falls_with_rank_and_is_the_discarded_tail() -> None:
    problem = two_sided_problem()
    target, metric, covariance = problem
    energies = torch.linalg.svdvals(psd_sqrt(metric) @ target @ psd_sqrt(covariance)).square()
    whole = solved(*problem)
    torch.testing.assert_close(whole.energies, energies)
    before = torch.inf
    for rank in range(13):
        error = weighted_error(*problem, truncated(whole, rank))
        assert error == pytest.approx(energies[rank:].sum().item(), rel=1e-9, abs=1e-9)
        assert error < before
        before = error


def test_two_sided_optimum_beats_perturbations_of_itself() -> None:
    problem, draw = two_sided_problem(), generator(3)
    down, up, _ = solved(*problem)
    down, up = down[:4], up[:, :4]
    best = weighted_error(*problem, up @ down)
    for trial in range(100):
        noise = 10.0 ** -(1 + trial % 4)
        moved = [
            part * (1 + noise * torch.randn(part.shape, generator=draw, dtype=part.dtype))
            for part in (up, down)
        ]
        assert weighted_error(*problem, moved[0] @ moved[1]) > best


def test_latents_of_two_sided_are_uncorrelated_with_its_energies_as_variances() -> None:
    target, metric, covariance = two_sided_problem()
    down, _, energies = solved(target, metric, covariance)
    torch.testing.assert_close(down @ covariance @ down.mT, torch.diag(energies))


def test_directions_without_data_get_no_projection() -> None:
    target, metric, covariance = two_sided_problem()
    flat = torch.diag(torch.tensor([1.0] * 5 + [0.0] * 7, dtype=torch.float64))
    covariance = flat @ covariance @ flat
    whole = solved(target, metric, covariance)
    assert whole.energies[5:].abs().max() < 1e-9 * whole.energies[0]
    assert not whole.up[:, 5:].any()
    assert not whole.down[5:].any()
    torch.testing.assert_close(truncated(whole, 12)[:, :5], target[:, :5])


def test_nothing_to_weigh_gives_nothing_but_finite_numbers() -> None:
    target, metric, covariance = two_sided_problem()
    for problem in (
        (0 * target, metric, covariance),
        (target, 0 * metric, covariance),
        (target, metric, 0 * covariance),
    ):
        assert not any(part.any() for part in solved(*problem))


def test_root_of_a_metric_is_symmetric_and_squares_to_it() -> None:
    _, metric, _ = two_sided_problem()
    batch = torch.stack([metric, 2 * metric])
    root = psd_sqrt(batch)
    torch.testing.assert_close(root, root.mT)
    torch.testing.assert_close(root @ root, batch)


def test_rounding_does_not_pass_for_a_direction_of_singular_inputs() -> None:
    """The hardest inputs are largest along a direction that the layer hardly uses."""
    for seed in range(8):
        source = torch.Generator().manual_seed(seed)
        target, basis, side = (
            torch.randn(rows, columns, generator=source, dtype=torch.float64)
            for rows, columns in ((60, 40), (40, 40), (60, 60))
        )
        basis = torch.linalg.qr(basis).Q
        scales = torch.logspace(0, -3, 40, dtype=torch.float64)
        scales[0], scales[-1] = 100, 0
        target = target - 0.99 * (target @ basis[:, :1]) @ basis[:, :1].mT
        covariance = (basis * scales.square()) @ basis.mT
        down, up, _ = solved(target, side @ side.mT, (covariance + covariance.mT) / 2)
        assert not down[-1].any() and not up[:, -1].any()
