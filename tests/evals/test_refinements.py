"""Bytes of an allocation for each position: fewer where positions differ, else the same."""

from __future__ import annotations

import torch
from torch import Tensor

from evals.refinements import bytes_for, rest
from vmla_convert.maths.quantise import distortions, gaussian_samples, gaussian_tables
from vmla_convert.maths.rates import allocate, purchases

TABLE = distortions(gaussian_tables(), gaussian_samples())
ENERGIES = 2.0 ** -torch.arange(24.0)
NBYTES = 8


def saved(positions: list[Tensor]) -> float:
    """Share of the bytes that own allocations save beside the one for the mean energies."""
    mean = torch.stack(positions).mean(0)
    rates = allocate([purchases(mean, TABLE)], NBYTES)
    common = sum(rest([energy], [TABLE], rates) for energy in positions)
    own = [energy.sort(descending=True).values for energy in positions]
    whole = NBYTES * len(positions)
    return 1 - bytes_for(common, own, [TABLE] * len(positions), 8 * whole) / whole


def test_equal_positions_save_nothing() -> None:
    assert saved([ENERGIES] * 3) == 0


def test_positions_that_use_other_channels_save() -> None:
    assert saved([ENERGIES, ENERGIES.flip(0)]) > 0.2
