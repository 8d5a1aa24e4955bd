"""The grid has every combination once, by size, and a key for each; bad axes are refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from checkpoints import BUDGETED, CONVERT, RECOVER
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from vmla_convert.config import Sizes, SweepConfig
from vmla_convert.errors import ConfigError
from vmla_convert.sweep.grid import SweepPoint, grid, sweep_points
from vmla_convert.sweep.team import Team

NARROW, WIDE = (Sizes(kv_lora_rank=rank, qk_rope_head_dim=4) for rank in (8, 10))
RANKS = SweepConfig(
    products=("mla",), inits=("random", "spectral"), mla_sizes=(NARROW, WIDE), seeds=(0, 1)
)


def points_of(config: SweepConfig) -> list[SweepPoint]:
    return sweep_points(config, CONVERT, RECOVER)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seeds": (0, 0)},
        {"sizes": (Sizes(cut=0.9), Sizes(cut=0.9))},
        {"mla_sizes": (WIDE,)},
        {"products": ("mla",), "sizes": (Sizes(cut=0.9),), "unquantised": True},
        {"sizes": (Sizes(cut=0.9),), "recovery_steps": (2,), "recover": False},
    ],
)
def test_an_axis_that_acts_on_nothing_or_repeats_itself_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SweepConfig(**wrong)


def test_a_key_names_all_settings_but_the_seed() -> None:
    keys: dict[str, set[int]] = {}
    for point in points_of(RANKS):
        keys.setdefault(point.key, set()).add(point.seed)
    assert list(keys.values()) == 4 * [{0, 1}]
    codecs = {points_of(SweepConfig(sizes=(Sizes(cut=cut),)))[0].key for cut in (0.9, 0.8)}
    assert len(codecs) == 2


def test_codecs_are_of_seeds_and_lengths_and_mla_of_sizes() -> None:
    config = SweepConfig(
        products=("codec", "mla"),
        sizes=(Sizes(cut=0.8), Sizes(cut=0.9), Sizes(8.0)),
        mla_sizes=(Sizes(cut=0.8), Sizes(cut=0.9)),
        seeds=(0, 1),
        recovery_steps=(2, 4),
    )
    points = points_of(config)
    count = Counter((each.conversion.product, each.conversion.init) for each in points)
    assert count == {("codec", "calibrated"): 4, ("mla", "spectral"): 8, ("mla", "calibrated"): 8}
    assert {each.recovery.training.steps for each in points if each.recovery} == {2, 4}
    for each in points:
        assert each.recovery is not None
        is_codec = each.conversion.product == "codec"
        assert each.recovery.nested == ((0.8, 0.9) if is_codec else ())
        assert len(each.runtimes) == (3 if is_codec else 0)
    (single,) = points_of(SweepConfig(sizes=(Sizes(cut=0.9),)))
    assert single.recovery is not None
    assert (single.conversion.size, single.recovery.nested) == (Sizes(cut=0.9), ())
    (sized,) = points_of(SweepConfig(sizes=(Sizes(8.0), Sizes(16.0), Sizes(24.0))))
    assert sized.conversion.size == Sizes(16.0)


def test_mla_points_have_every_latent_and_size_smallest_caches_first() -> None:
    config = SweepConfig(
        products=("mla",),
        inits=("random",),
        latents=("joint", "split"),
        sizes=(Sizes(cut=0.8), Sizes(cut=0.9)),
        seeds=(0, 1),
    )
    common = replace(BUDGETED, size=Sizes(cut=0.5), seed=9)
    of_cuts = grid(config, common)
    of_ranks = grid(replace(config, mla_sizes=(WIDE, NARROW)), common)  # in place of sizes
    assert len(set(of_cuts)) == len(set(of_ranks)) == 2 * 2 * 2
    assert {point.latent for point in of_cuts} == {"joint", "split"}
    assert [p.size for p in of_cuts] == 4 * [Sizes(cut=0.9)] + 4 * [Sizes(cut=0.8)]
    assert [p.size for p in of_ranks] == 4 * [NARROW] + 4 * [WIDE]


def test_free_processes_take_the_next_point_until_there_are_none() -> None:
    store = HashStore()
    teams = [Team(rank, 2, store) for rank in (0, 1)]
    shares = [team.share(range(5)) for team in teams]
    assert [next(shares[i]) for i in (0, 1, 1, 0)] == [0, 1, 2, 3]
    assert [list(share) for share in shares] == [[4], []]
    assert [team.finished() for team in teams] == [5, 5]
    teams[0].await_all(lambda: pytest.fail("both have left"))
