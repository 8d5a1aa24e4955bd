"""A sweep measures every point once, shares its calibration, and resumes where it stopped."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from checkpoints import BUDGETED, CONVERT, EVALUATE, RECOVER, PowerCut, PowerCutError, untimed
from safetensors import SafetensorError
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from vmla_convert import progress
from vmla_convert.config import Product, RecoverConfig, RuntimeConfig, Sizes, SweepConfig
from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.fitting.calibrate import Statistics
from vmla_convert.fitting.convert import convert
from vmla_convert.fitting.mla import convert_model
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.maths import factor
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.measuring.rows import run_name
from vmla_convert.progress import Advance, Progress, Silent
from vmla_convert.recovery.stages import recover_model
from vmla_convert.results import Metric, Row, bytes_at_error, put_rows, read_rows
from vmla_convert.storage.tensor_store import FolderStore, MemoryStore, TensorStore
from vmla_convert.sweep import point as measured_point
from vmla_convert.sweep import shared
from vmla_convert.sweep import sweep as pipeline
from vmla_convert.sweep.grid import SweepPoint, grid, sweep_points
from vmla_convert.sweep.shared import Shared
from vmla_convert.sweep.sweep import sweep
from vmla_convert.sweep.team import Team

pytest_plugins = ["checkpoints"]
pytestmark = pytest.mark.usefixtures("few_layerwise_clips")

NARROW = Sizes(kv_lora_rank=8, qk_rope_head_dim=4)
GRID = SweepConfig(products=("mla",), inits=("random", "calibrated"), mla_sizes=(NARROW,))
UNTRAINED = replace(GRID, inits=("random", "spectral", "calibrated"), recover=False)
ONE = replace(UNTRAINED, inits=("calibrated",))
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.safetensors")


def run(
    dense: CausalWanModel, file: Path, config: SweepConfig = GRID, progress: Progress | None = None
) -> list[Row]:
    sweep(dense, config, CONVERT, RECOVER, EVALUATE, file, progress)
    return read_rows(file)


def points_of(config: SweepConfig) -> list[SweepPoint]:
    return sweep_points(config, CONVERT, RECOVER)


def inits(rows: list[Row], metric: str) -> list[str | None]:
    """Inits of the points with rows of a metric, in order."""
    return [row.init for row in rows if row.metric == metric]


def refuse(*_: object) -> NoReturn:
    pytest.fail("work that should not have been done")


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows of an uninterrupted sweep."""
    return run(load(teacher), tmp_path_factory.mktemp("sweep") / "rows.jsonl")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Exception], None]:
    """Make points of one init fail."""
    measure = pipeline.measure_point

    def fail_at(init: str, error: Exception) -> None:
        def measured(student: CausalWanModel, point: SweepPoint, *rest: Any) -> list[Row]:
            if point.conversion.init == init:
                raise error
            return measure(student, point, *rest)

        monkeypatch.setattr(pipeline, "measure_point", measured)

    return fail_at


# Rows


def test_every_point_has_its_curve_its_cache_and_its_times(whole: list[Row]) -> None:
    once = {"cache_bytes_per_token", "cache_cut"}
    once |= {"convert_seconds", "recover_seconds", "learning_rate"}
    for init, point in zip(GRID.inits, points_of(GRID), strict=True):
        rows = [row for row in whole if row.init == init]
        assert {row.run for row in rows} == {f"mla-{init}-8+4-joint"}
        assert {(row.point, row.seed, row.recovery_steps) for row in rows} == {(point.key, 0, 4)}
        learned = [row for row in rows if row.metric == "effective_rank_99"]
        assert [(row.step, row.layer) for row in learned] == [(0, 0), (0, 1), (6, 0), (6, 1)]
        sizes = [(r.metric, r.layer, r.value) for r in rows if r.metric.endswith(("rank", "dim"))]
        assert sizes == [
            (metric, layer, size)
            for layer in (0, 1)
            for metric, size in (("kv_lora_rank", 8), ("qk_rope_head_dim", 4))
        ]
        turned = [row for row in rows if row.metric == "rope_pair"]
        assert [sum(r.value for r in turned if r.layer == layer) for layer in (0, 1)] == [2, 2]
        for metric in ("velocity_error", "flow_loss"):
            assert [row.step for row in rows if row.metric == metric] == [0, 2, 4, 6]
        count = Counter(row.metric for row in rows)
        assert {metric for metric in count if count[metric] == 1} == once
    assert inits(whole, "recover_seconds") == list(GRID.inits)


def test_the_dense_model_and_its_spectra_have_rows_once(whole: list[Row]) -> None:
    dense = [row.metric for row in whole if row.run == "dense"]
    assert dense.count(Metric.FLOW_LOSS) == dense.count(Metric.FLOW_LOSS_OTHER_PAST) == 1
    spectra = [row for row in whole if row.run.startswith("weights")]
    assert len([row for row in spectra if row.metric == "effective_rank_99"]) == 4
    drawn = [r for r in spectra if r.layer == 1 and r.run == "weights" and r.kv_lora_rank]
    assert {1, 6, 48} <= {row.kv_lora_rank for row in drawn}
    assert all(a.value <= b.value for a, b in pairwise(drawn))
    assert drawn[-1].value == pytest.approx(1)
    assert {(row.batch, row.clip_seconds) for row in whole if row.metric == "cache_bytes"} == {
        (batch, seconds) for batch in (1, 4, 16) for seconds in (None, 5, 30, 60)
    }
    streams = {(r.run, r.card_gb): r.value for r in whole if r.metric == "streams"}
    smaller = [run for run, card in streams if run.startswith("mla") and card == 24]
    assert smaller and all(0 < streams["dense", 24] < streams[run, 24] for run in smaller)


def test_the_seed_of_a_point_counts(dense: CausalWanModel, tmp_path: Path) -> None:
    rows = run(dense, tmp_path / "rows.jsonl", replace(GRID, seeds=(0, 1), recover=False))
    start = {(row.init, row.seed): row.value for row in rows if row.metric == "velocity_error"}
    assert start["random", 0] != start["random", 1]
    assert start["calibrated", 0] == start["calibrated", 1]


def test_a_point_is_timed_and_rolled_out(dense: CausalWanModel, tmp_path: Path) -> None:
    config = replace(ONE, timed=True, rollout_frames=12, rollout_prompts=("0", "7"))
    rows = run(dense, tmp_path / "rows.jsonl", config)
    (ratio,) = [row.value for row in rows if row.metric == "seconds_ratio"]
    assert ratio > 0
    for name in ("dense", "mla-calibrated-8+4-joint"):
        drift = [r for r in rows if r.run == name and r.metric == "drift"]
        assert [row.segment for row in drift] == [0, 1, 2, 3]
        assert drift[0].value == 0 < min(row.value for row in drift[1:])
        assert {row.frames for row in drift} == {12}
        accuracy = [r for r in rows if r.run == name and r.metric == "digit_accuracy"]
        assert len(accuracy) == 5
    (strip,) = (tmp_path / "strips").iterdir()
    assert strip.name == f"{points_of(config)[0].key}-0.png"
    assert strip.stat().st_size > 1000


# Resuming


@pytest.mark.parametrize(
    ("label", "before"),
    [
        ("sweep", 1),
        pytest.param("weighing errors", 1, marks=pytest.mark.slow),
        pytest.param("distilling", 3, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_sweep_resumes(
    label: str, before: int, whole: list[Row], dense: CausalWanModel, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(PowerCutError):
        run(dense, file, progress=PowerCut(label, before))
    resumed = run(dense, file)
    assert untimed(resumed) == untimed(whole)
    assert Counter(row.figure for row in resumed) == Counter(row.figure for row in whole)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_finished_points_are_not_measured_again(
    whole: list[Row], dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    put_rows(file, whole)
    monkeypatch.setattr(pipeline, "measure_point", refuse)
    monkeypatch.setattr(shared, "calibrate", refuse)
    assert run(dense, file) == whole


def test_only_what_is_new_in_a_larger_grid_is_measured(
    whole: list[Row], dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, measured = tmp_path / "rows.jsonl", list[object]()
    put_rows(file, whole)

    def noted(_: object, point: object, *__: object) -> list[Row]:
        measured.append(point)
        return []

    monkeypatch.setattr(pipeline, "measure_point", noted)
    wide = Sizes(kv_lora_rank=10, qk_rope_head_dim=4)
    larger = replace(GRID, inits=("random", "spectral"), mla_sizes=(NARROW, wide))
    run(dense, file, larger)
    old = [point for point in points_of(larger) if point in points_of(GRID)]
    assert measured == [point for point in points_of(larger) if point not in old]
    assert len(old) == 1


def test_a_point_that_lacks_a_measurement_is_measured_anew(
    dense: CausalWanModel, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    run(dense, file, ONE)
    rows = run(dense, file, replace(ONE, timed=True))
    for metric in ("velocity_error", "seconds_ratio", "cache_cut"):
        assert len(inits([row for row in rows if row.run != "dense"], metric)) == 1


# Failures


def test_a_point_that_fails_is_a_row_that_says_why_and_is_tried_again(
    whole: list[Row],
    dense: CausalWanModel,
    failing: Callable[[str, Exception], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    failing("calibrated", RuntimeError("out of memory\nmore words"))
    rows = run(dense, file)
    (failed,) = [row for row in rows if row.metric == "failed"]
    assert (failed.init, failed.note) == ("calibrated", "RuntimeError: out of memory")
    assert inits(rows, "recover_seconds") == ["random"]
    monkeypatch.undo()
    again = run(dense, file)
    assert not inits(again, "failed")
    assert Counter(untimed(again)) == Counter(untimed(whole))


def test_a_conversion_that_fails_or_misses_a_file_leaves_the_others_alone(
    dense: CausalWanModel,
    failing: Callable[[str, Exception], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def diverging(*_: object) -> NoReturn:
        raise RuntimeError("did not converge")

    monkeypatch.setitem(factor.INITS, "spectral", diverging)
    failing("random", FileNotFoundError(errno.ENOENT, "No such file", "a.safetensors"))
    rows = run(dense, tmp_path / "rows.jsonl", UNTRAINED)
    notes = {row.init: row.note or "" for row in rows if row.metric == "failed"}
    assert "converge" in notes["spectral"]
    assert "a.safetensors" in notes["random"]
    assert inits(rows, "velocity_error") == ["calibrated"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_ends_the_sweep_and_keeps_what_was_measured(
    wrapped: bool,
    dense: CausalWanModel,
    failing: Callable[[str, Exception], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file, error = tmp_path / "rows.jsonl", NO_SPACE
    if wrapped:
        error = OutputError("a.safetensors cannot be written")
        error.__cause__ = SafetensorError("I/O error: No space left on device (os error 28)")
    failing("spectral", error)
    with pytest.raises(OutputError, match=r"disk is full.*a\.safetensors") as caught:
        run(dense, file, UNTRAINED)
    assert str(file) in caught.value.hint
    rows = read_rows(file)
    assert not inits(rows, "failed")
    assert inits(rows, "velocity_error") == ["random"]
    monkeypatch.undo()
    resumed = run(dense, file, UNTRAINED)
    assert resumed[: len(rows)] == rows
    assert inits(resumed, "velocity_error") == list(UNTRAINED.inits)


def test_a_disk_that_fills_up_during_calibration_ends_the_sweep_there(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write, tried = FolderStore.put, list[str]()

    def full(store: FolderStore, name: str, tensors: dict[str, torch.Tensor]) -> None:
        if name.startswith("statistics"):
            tried.append(name)
            raise NO_SPACE
        write(store, name, tensors)

    monkeypatch.setattr(FolderStore, "put", full)
    with pytest.raises(OutputError, match="disk is full"):
        run(dense, tmp_path / "rows.jsonl", UNTRAINED)
    assert len(tried) == 1


def test_rows_that_cannot_be_written_end_the_sweep(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", "rows.jsonl")

    monkeypatch.setattr(pipeline, "put_rows", refused)
    with pytest.raises(OutputError, match="Permission denied") as caught:
        run(dense, tmp_path / "rows.jsonl", UNTRAINED)
    assert caught.value.hint


# Processes


@pytest.mark.slow
def test_the_first_process_draws_what_all_have_done(dense: CausalWanModel, tmp_path: Path) -> None:
    class Bars(Silent):
        """Notes how far the bar of the sweep is at every step of a recovery."""

        def __init__(self) -> None:
            self.total, self.at, self.seen = 0, 0, list[int]()

        @contextmanager
        def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
            def advance(count: int) -> None:
                if label == "sweep":
                    self.at += count
                if label == "distilling":
                    self.seen.append(self.at)
                    if self.at == 1:  # meanwhile the other process finishes its second point
                        store.add("finished", 1)

            if label == "sweep":
                self.total = total or 0
            yield advance

    store, bars, config = HashStore(), Bars(), replace(GRID, seeds=(0, 1))
    theirs = Team(1, 2, store).share(range(4))
    assert [next(theirs), next(theirs)] == [0, 1]
    store.add("left", 1)
    file, team = tmp_path / "rows.jsonl", Team(0, 2, store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "LOOK_SECONDS", 0.0)
        sweep(dense, config, CONVERT, RECOVER, EVALUATE, file, bars, team)
    assert (bars.total, bars.at) == (4, 4)
    # The bar moves within this process's own first point.
    assert bars.seen == [1, *3 * [2], *4 * [3]]


# Sizes


SIZES = SweepConfig(
    products=("codec", "mla"),
    sizes=(Sizes(cut=0.9), Sizes(cut=0.8), Sizes(6.0)),
    mla_sizes=(Sizes(cut=0.9),),
    unquantised=True,
    dense_dtypes=("int4", "int2"),
    inits=("calibrated",),
)


@pytest.fixture(scope="module")
def sizes(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows of a sweep of both products; one codec and one MLA model are recovered."""
    file, recovered = tmp_path_factory.mktemp("sizes") / "rows.jsonl", list[RecoverConfig]()

    def noted(*args: Any, **how: Any) -> Any:
        recovered.append(args[2])
        return recover_model(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured_point, "recover_model", noted)
        rows = run(load(teacher), file, SIZES)
    assert [config.nested for config in recovered] == [(0.9, 0.8), ()]
    return rows


def of_codec(rows: list[Row], metric: str, step: int | None = None) -> list[Row]:
    return [r for r in rows if (r.product, r.metric, r.step) == ("codec", metric, step)]


def test_a_codec_is_measured_at_every_size_before_and_after_its_one_recovery(
    sizes: list[Row],
) -> None:
    runtimes = [(size, dtype) for dtype in ("auto", "model") for size in (6.0, 19.2, 38.4)]
    for metric in ("velocity_error", "flow_loss"):
        for step in (0, 6):
            found = of_codec(sizes, metric, step)
            measured = [(round(row.bytes_per_token or 0, 6), row.cache_dtype) for row in found]
            assert sorted(measured, key=str) == sorted(runtimes, key=str)
    # The size in the middle of the list has its curve too.
    between = of_codec(sizes, "velocity_error", 2) + of_codec(sizes, "velocity_error", 4)
    assert [round(row.bytes_per_token or 0, 6) for row in between] == [38.4, 38.4]
    assert len(of_codec(sizes, "cache_bytes_per_token")) == len(runtimes)
    assert len(of_codec(sizes, "cache_bytes")) == 12 * len(runtimes)
    assert not of_codec(sizes, "effective_rank_99") + of_codec(sizes, "kv_lora_rank")
    assert {row.run for row in sizes if row.product == "mla"} == {"mla-calibrated-9.5-joint"}


def test_more_bytes_err_less_and_bits_err_less_than_whole_numbers(sizes: list[Row]) -> None:
    start = of_codec(sizes, "velocity_error", 0)
    start.sort(key=lambda row: row.bytes_per_token or 0)
    curves = {
        dtype: [row.value for row in start if row.cache_dtype == dtype]
        for dtype in ("auto", "model")
    }
    for curve in curves.values():
        assert curve == sorted(curve, reverse=True)
    assert all(a < b for a, b in zip(curves["auto"], curves["model"], strict=True))


def test_a_quantised_dense_cache_is_measured_and_compared_at_equal_error(
    sizes: list[Row], dense: CausalWanModel
) -> None:
    streamed, wanted = HeldOut(dense, EVALUATE, streamed=True), dict[str, float | None]()
    start = of_codec(sizes, "velocity_error", 0)
    curve = [(r.bytes_per_token or 0, r.value) for r in start if r.cache_dtype == "auto"]
    for dtype in SIZES.dense_dtypes:
        rows = {row.metric: row for row in sizes if row.run == f"dense {dtype}" and not row.batch}
        assert {"velocity_error", "flow_loss", "cache_bytes_per_token"} <= rows.keys()
        assert {row.cache_dtype for row in rows.values()} == {dtype}
        error = streamed.measure(dense, RuntimeConfig(cache_dtype=dtype)).velocity_error
        assert rows[Metric.VELOCITY_ERROR].value == pytest.approx(error, rel=1e-4)
        wanted[dtype] = bytes_at_error(curve, rows[Metric.VELOCITY_ERROR].value)
    compared = {row.cache_dtype: row.value for row in sizes if row.metric == "bytes_at_error"}
    assert compared == {dtype: nbytes for dtype, nbytes in wanted.items() if nbytes is not None}
    assert compared


def test_a_dtype_that_is_added_is_measured_without_the_points(
    sizes: list[Row], dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    put_rows(file, sizes)
    monkeypatch.setattr(pipeline, "measure_point", refuse)
    monkeypatch.setattr(shared, "calibrate", refuse)
    rows = run(dense, file, replace(SIZES, dense_dtypes=("int8", "int4", "int2")))
    assert {row.run for row in rows} - {row.run for row in sizes} == {"dense int8"}
    added = [row.metric for row in rows if row.run == "dense int8"]
    assert added.count(Metric.VELOCITY_ERROR) == 1


# Conversions


def test_a_codec_of_a_sweep_is_the_one_that_a_conversion_writes(
    dense: CausalWanModel, teacher: Path, tmp_path: Path
) -> None:
    conversion = grid(SweepConfig(sizes=(Sizes(cut=0.9),)), CONVERT)[0]
    convert(teacher, tmp_path / "kv", conversion)
    stores: dict[Product, TensorStore] = {"codec": MemoryStore()}
    student, written = Shared(dense, CONVERT, stores).student(conversion), load(tmp_path / "kv")
    assert student.config == written.config
    for name, tensor in written.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name


def test_untrained_points_are_the_conversions_of_their_settings(
    dense: CausalWanModel, measured: Statistics, tmp_path: Path
) -> None:
    config = replace(ONE, latents=("joint", "split"), mla_sizes=(), sizes=(Sizes(cut=0.8),))
    rows, held_out = run(dense, tmp_path / "rows.jsonl", config), HeldOut(dense, EVALUATE)
    errors = {row.run: row for row in rows if row.metric == "velocity_error"}
    assert len(errors) == 2
    for latent in config.latents:
        point = replace(BUDGETED, latent=latent, size=Sizes(cut=0.8))
        student = convert_model(dense, point, measured)
        row, error = errors[run_name(student.config)], held_out.measure(student).velocity_error
        assert (row.step, row.latent) == (0, latent)
        assert row.value == pytest.approx(error, rel=1e-4)
    assert not inits(rows, "recover_seconds")
    assert all(0.9 > row.value >= 0.8 for row in rows if row.metric == "cache_cut")


def test_without_calibration_white_inputs_are_assumed(
    dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SweepConfig(("codec", "mla"), (Sizes(cut=0.8),), inits=("calibrated",), recover=False)
    students: list[CausalWanModel] = []

    def noted(student: CausalWanModel, *_: object) -> list[Row]:
        students.append(student)
        return []

    monkeypatch.setattr(pipeline, "measure_point", noted)
    for calibrate in (True, False):
        common, folder = replace(BUDGETED, calibrate=calibrate), tmp_path / f"{calibrate}"
        sweep(dense, config, common, RECOVER, EVALUATE, folder / "rows.jsonl")
    held_out = HeldOut(dense, EVALUATE)
    errors = [held_out.measure(student).velocity_error for student in students]
    for calibrated, assumed in zip(errors[:2], errors[2:], strict=True):
        assert 0 < calibrated < assumed


BAD_GRIDS = {
    "misspelt init": (replace(GRID, inits=("random", "spectrl")), "spectral"),
    "rank over width": (replace(GRID, mla_sizes=(Sizes(kv_lora_rank=49),)), "48"),
    "odd rope": (replace(GRID, mla_sizes=(Sizes(kv_lora_rank=8, qk_rope_head_dim=5),)), "5"),
    "a size of MLA layers": (SweepConfig(sizes=(NARROW,)), "kv_lora_rank"),
    "more than a codec holds": (SweepConfig(sizes=(Sizes(16.0), Sizes(97.0))), "96"),
    "less than a channel": (SweepConfig(sizes=(Sizes(0.5),)), "0.5"),
    "no size": (SweepConfig(), "empty"),
}


@pytest.mark.parametrize("name", BAD_GRIDS)
def test_a_grid_with_a_bad_point_is_refused_before_any_work(
    name: str, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, word = BAD_GRIDS[name]
    monkeypatch.setattr(shared, "calibrate", refuse)
    for work in ("dense_rows", "measure_point"):
        monkeypatch.setattr(pipeline, work, refuse)
    with pytest.raises(ConfigError) as caught:
        run(dense, tmp_path / "rows.jsonl", config)
    assert caught.value.hint
    assert word in caught.value.message + caught.value.hint
    assert not list(tmp_path.iterdir())
