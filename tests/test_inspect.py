"""What inspect says is what a conversion would make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import BUDGETED, CONVERT, MODEL, Vmla, refused

from vmla_convert.config import ConvertConfig
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.pipelines.inspect import inspect_checkpoint
from vmla_convert.pipelines.load import load

pytest_plugins = ["checkpoints"]


def test_a_dense_checkpoint_is_described_as_it_is(teacher: Path) -> None:
    told, model = inspect_checkpoint(teacher), load(teacher)
    assert told.path == str(teacher)
    assert told.model == MODEL
    assert told.parameters == sum(p.numel() for p in model.parameters())
    cache = model.new_cache(1)
    assert told.window_cache_bytes == cache.nbytes // 2  # four bytes a number there, two here


@pytest.mark.parametrize("name", ["converted", "budgeted"])
def test_the_foretold_cache_is_the_converted_models(
    name: str, teacher: Path, request: pytest.FixtureRequest
) -> None:
    told = inspect_checkpoint(teacher, CONVERT if name == "converted" else BUDGETED)
    assert told.converted.cache_scalars_per_token() == 13
    cache = load(request.getfixturevalue(name)).new_cache(1)
    assert told.converted_window_cache_bytes == cache.nbytes // 2
    assert told.converted.mla
    assert told.spectrum[0].energy_at_rank == energy(teacher, told.converted.mla.kv_lora_rank[0])


def energy(teacher: Path, rank: int) -> float:
    """What a rank holds of the first layer's weights."""
    return inspect_checkpoint(teacher, ConvertConfig(kv_lora_rank=rank)).spectrum[0].energy_at_rank


def test_every_layer_has_a_spectrum_that_more_rank_fills(teacher: Path) -> None:
    small, large = (
        inspect_checkpoint(teacher, ConvertConfig(kv_lora_rank=rank)).spectrum for rank in (8, 40)
    )
    assert [layer.layer for layer in small] == [0, 1]
    for few, many in zip(small, large, strict=True):
        assert 0 < few.energy_at_rank < many.energy_at_rank < 1
        assert 8 < few.effective_rank_99 == many.effective_rank_99 <= MODEL.geometry.dim


def test_a_converted_folder_is_compared_with_nothing(converted: Path) -> None:
    told = inspect_checkpoint(converted)
    assert told.converted == told.model == load(converted).config
    assert told.spectrum == []


@pytest.mark.parametrize(
    ("option", "size", "rank"), [("--cut", 0.8, 18), ("--cache-scalars", 20, 19)]
)
def test_a_budget_is_shown_as_equal_shares(
    option: str, size: float, rank: int, teacher: Path, vmla: Vmla
) -> None:
    ran = vmla("inspect", teacher, "--json", option, str(size))
    assert ran.code == 0
    mla = json.loads(ran.out)["converted"]["mla"]
    assert (mla["kv_lora_rank"], mla["rope_pairs"]) == ([rank, rank], [[], []])


def test_sizes_that_do_not_fit_are_refused(teacher: Path) -> None:
    with pytest.raises(ConfigError, match="kv_lora_rank 49"):
        inspect_checkpoint(teacher, ConvertConfig(kv_lora_rank=49))


def test_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect_checkpoint(tmp_path / "nothing")


def test_the_command_speaks_json(teacher: Path, vmla: Vmla) -> None:
    ran = vmla("inspect", teacher, "--json", "--kv-lora-rank", "8")
    assert ran.code == 0
    told = json.loads(ran.out)
    assert told["model"]["geometry"]["dim"] == 48
    assert told["converted"]["mla"]["kv_lora_rank"] == [8, 8]
    assert told["parameters"] == inspect_checkpoint(teacher).parameters
    assert len(told["spectrum"]) == 2


def test_the_command_shows_the_cut_and_the_spectrum(teacher: Path, vmla: Vmla) -> None:
    ran = vmla("inspect", teacher, "--kv-lora-rank", "12")
    assert ran.code == 0
    assert "86.5%" in ran.out
    assert "energy at R = 12" in ran.out
    assert "self_forcing" in ran.out


def test_the_command_shows_a_converted_folder(converted: Path, vmla: Vmla) -> None:
    ran = vmla("inspect", converted)
    assert ran.code == 0
    assert "86.5%" in ran.out
    assert "energy" not in ran.out


def test_the_command_refuses_nothing_and_bad_sizes(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    assert refused(vmla("inspect", tmp_path / "nothing"))
    assert refused(vmla("inspect", teacher, "--kv-lora-rank", "49"))
    assert refused(vmla("inspect", teacher, "--cut", "0.9", "--kv-lora-rank", "8"))
