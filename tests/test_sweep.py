"""A sweep measures every point once, shares its calibration, and goes on where it stopped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NoReturn

import pytest
from checkpoints import CONVERT, EVALUATE, RECOVER, PowerCut, PowerCutError, untimed

from vmla_convert.config import SweepConfig
from vmla_convert.errors import ConfigError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.pipelines import sweep as pipeline
from vmla_convert.pipelines.evaluate import HeldOut
from vmla_convert.pipelines.sweep import grid, sweep
from vmla_convert.progress import Progress
from vmla_convert.results import Row, append_rows, read_rows

pytest_plugins = ["checkpoints"]

GRID = SweepConfig(("random", "calibrated"), (8,), (4,), (0, 1))
POINTS = [("random", 0), ("random", 1), ("calibrated", 0), ("calibrated", 1)]


@pytest.fixture
def held_out(dense: CausalWanModel) -> HeldOut:
    return HeldOut(dense, EVALUATE)


def run(
    held_out: HeldOut,
    dense: CausalWanModel,
    file: Path,
    config: SweepConfig = GRID,
    progress: Progress | None = None,
) -> list[Row]:
    sweep(dense, config, CONVERT, RECOVER, held_out, file, progress)
    return read_rows(file)


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row], int]:
    """An uninterrupted sweep: its file, its rows, and how often it calibrated."""
    from vmla_convert.pipelines.load import load

    dense, calibrate, calls = load(teacher), pipeline.calibrate, []

    def counted(*args: object) -> object:
        calls.append(args)
        return calibrate(*args)  # pyright: ignore[reportArgumentType]

    file = tmp_path_factory.mktemp("sweep") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "calibrate", counted)
        rows = run(HeldOut(dense, EVALUATE), dense, file)
    return file, rows, len(calls)


def refuse(*_: object) -> NoReturn:
    pytest.fail("work that should not have been done")


def test_the_points_share_one_calibration(whole: tuple[Path, list[Row], int]) -> None:
    assert whole[2] == 1


def test_every_point_has_its_curve_its_cache_and_its_times(
    whole: tuple[Path, list[Row], int],
) -> None:
    once = {"cache_scalars_per_token", "cache_bytes_per_token", "cache_cut"}
    once |= {"convert_seconds", "recover_seconds"}
    for init, seed in POINTS:
        rows = [row for row in whole[1] if (row.init, row.seed) == (init, seed)]
        assert {(row.kv_lora_rank, row.qk_rope_head_dim) for row in rows} == {(8, 4)}
        for metric in ("velocity_error", "flow_loss"):
            assert [row.step for row in rows if row.metric == metric] == [0, 2, 4, 6]
        count = Counter(row.metric for row in rows)
        assert {metric for metric in count if count[metric] == 1} == once
    order = [(row.init, row.seed) for row in whole[1] if row.metric == "recover_seconds"]
    assert order == POINTS


def test_the_dense_model_and_its_spectra_are_told_once(whole: tuple[Path, list[Row], int]) -> None:
    dense = [row.metric for row in whole[1] if row.run == "dense"]
    assert dense.count("flow_loss") == dense.count("flow_loss_other_past") == 1
    spectra = [row for row in whole[1] if row.run.startswith("weights")]
    assert len(spectra) == 8
    assert {row.kv_lora_rank for row in spectra} == {None, 8}


def test_the_seed_of_a_point_counts(whole: tuple[Path, list[Row], int]) -> None:
    start = {(r.init, r.seed): r.value for r in whole[1] if r.metric == "flow_loss" and r.step == 0}
    assert start["random", 0] != start["random", 1]
    assert start["calibrated", 0] == start["calibrated", 1]


@pytest.mark.parametrize(("label", "before"), [("calibrating", 0), ("sweep", 2), ("distilling", 3)])
def test_an_interrupted_sweep_goes_on_where_it_was(
    label: str,
    before: int,
    whole: tuple[Path, list[Row], int],
    held_out: HeldOut,
    dense: CausalWanModel,
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(PowerCutError):
        run(held_out, dense, file, progress=PowerCut(label, before))
    assert untimed(run(held_out, dense, file)) == untimed(whole[1])


def test_finished_points_are_not_measured_again(
    whole: tuple[Path, list[Row], int],
    held_out: HeldOut,
    dense: CausalWanModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    append_rows(file, whole[1])
    monkeypatch.setattr(pipeline, "measure_point", refuse)
    assert run(held_out, dense, file) == whole[1]


def test_only_what_is_new_in_a_larger_grid_is_measured(
    whole: tuple[Path, list[Row], int],
    held_out: HeldOut,
    dense: CausalWanModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    append_rows(file, whole[1])
    measured: list[object] = []

    def noted(_: object, point: object, *rest: object) -> list[Row]:  # noqa: ARG001
        measured.append(point)
        return []

    monkeypatch.setattr(pipeline, "measure_point", noted)
    larger = SweepConfig(("random", "spectral"), (8, 10), (4,), (0, 1))
    run(held_out, dense, file, larger)
    old = [point for point in grid(larger, CONVERT) if point in grid(GRID, CONVERT)]
    assert measured == [point for point in grid(larger, CONVERT) if point not in old]
    assert len(old) == 2


BAD_GRIDS = {
    "misspelt init": (SweepConfig(("random", "spectrl"), (8,), (4,)), "spectral"),
    "rank over width": (SweepConfig(("random",), (8, 49), (4,)), "48"),
    "odd rope": (SweepConfig(("random",), (8,), (4, 5)), "even"),
}


@pytest.mark.parametrize("name", BAD_GRIDS)
def test_a_grid_with_a_bad_point_is_refused_before_any_work(
    name: str,
    held_out: HeldOut,
    dense: CausalWanModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config, word = BAD_GRIDS[name]
    for work in ("calibrate", "dense_rows", "measure_point"):
        monkeypatch.setattr(pipeline, work, refuse)
    with pytest.raises(ConfigError) as caught:
        run(held_out, dense, tmp_path / "rows.jsonl", config)
    assert caught.value.hint
    assert word in caught.value.message + caught.value.hint
    assert not list(tmp_path.iterdir())
