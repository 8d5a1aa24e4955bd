"""A sweep measures every point once, shares its calibration, and goes on where it stopped."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest
import torch
from checkpoints import (
    BUDGETED,
    CONVERT,
    EVALUATE,
    RECOVER,
    PowerCut,
    PowerCutError,
    untimed,
)
from safetensors import SafetensorError
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from vmla_convert import progress
from vmla_convert.checkpoint.tensor_store import FolderStore, MemoryStore, TensorStore
from vmla_convert.config import Product, RecoverConfig, RuntimeConfig, Sizes, SweepConfig
from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.fitting.calibrate import Statistics
from vmla_convert.fitting.calibrate import _Walk as Walk  # pyright: ignore[reportPrivateUsage]
from vmla_convert.fitting.convert import convert
from vmla_convert.fitting.mla import convert_model
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.maths import factor
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.measuring.rows import run_name
from vmla_convert.progress import Progress, Silent
from vmla_convert.recovery.stages import recover_model
from vmla_convert.results import Row, append_rows, bytes_at_error, read_rows
from vmla_convert.sweep import point as measured_point
from vmla_convert.sweep import shared
from vmla_convert.sweep import sweep as pipeline
from vmla_convert.sweep.grid import SweepPoint, grid, sweep_points
from vmla_convert.sweep.shared import Shared
from vmla_convert.sweep.sweep import sweep
from vmla_convert.sweep.team import Team

T = TypeVar("T")

pytest_plugins = ["checkpoints"]
pytestmark = pytest.mark.usefixtures("few_layerwise_clips")

GRID = SweepConfig(
    products=("mla",),
    inits=("random", "calibrated"),
    mla_sizes=(Sizes(kv_lora_rank=8, qk_rope_head_dim=4),),
    seeds=(0, 1),
)
WIDER = Sizes(kv_lora_rank=10, qk_rope_head_dim=4)
POINTS = [("random", 0), ("random", 1), ("calibrated", 0), ("calibrated", 1)]


@pytest.fixture
def held_out(dense: CausalWanModel) -> HeldOut:
    return HeldOut(dense, EVALUATE)


def run(
    dense: CausalWanModel,
    file: Path,
    config: SweepConfig = GRID,
    progress: Progress | None = None,
) -> list[Row]:
    sweep(dense, config, CONVERT, RECOVER, EVALUATE, file, progress)
    return read_rows(file)


def points_of(config: SweepConfig) -> list[SweepPoint]:
    return sweep_points(config, CONVERT, RECOVER)


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row], int]:
    """An uninterrupted sweep: its file, its rows, and how often it calibrated."""
    dense, begin, calls = load(teacher), Walk.__init__, list[object]()

    def counted(walk: Walk, *args: Any) -> None:
        calls.append(walk)
        begin(walk, *args)

    file = tmp_path_factory.mktemp("sweep") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "__init__", counted)
        rows = run(dense, file)
    return file, rows, len(calls)


def refuse(*_: object) -> NoReturn:
    pytest.fail("work that should not have been done")


def test_the_points_share_one_calibration(whole: tuple[Path, list[Row], int]) -> None:
    assert whole[2] == 1


def test_every_point_has_its_curve_its_cache_and_its_times(
    whole: tuple[Path, list[Row], int],
) -> None:
    once = {"cache_bytes_per_token", "cache_cut"}
    once |= {"convert_seconds", "recover_seconds", "learning_rate"}
    for init, seed in POINTS:
        rows = [row for row in whole[1] if (row.init, row.seed) == (init, seed)]
        assert {row.run for row in rows} == {f"mla-{init}-8+4-joint"}
        (key,) = {row.point for row in rows}
        assert key in {point.key for point in points_of(GRID) if point.conversion.init == init}
        assert {row.recovery_steps for row in rows} == {4}
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
    order = [(row.init, row.seed) for row in whole[1] if row.metric == "recover_seconds"]
    assert order == POINTS


def test_the_dense_model_and_its_spectra_are_told_once(whole: tuple[Path, list[Row], int]) -> None:
    dense = [row.metric for row in whole[1] if row.run == "dense"]
    assert dense.count("flow_loss") == dense.count("flow_loss_other_past") == 1
    spectra = [row for row in whole[1] if row.run.startswith("weights")]
    assert len([row for row in spectra if row.metric == "effective_rank_99"]) == 4
    drawn = [r for r in spectra if r.layer == 1 and r.run == "weights" and r.kv_lora_rank]
    assert {1, 6, 48} <= {row.kv_lora_rank for row in drawn}
    assert all(a.value <= b.value for a, b in pairwise(drawn))
    assert drawn[-1].value == pytest.approx(1)
    assert {(row.batch, row.clip_seconds) for row in whole[1] if row.metric == "cache_bytes"} == {
        (batch, seconds) for batch in (1, 4, 16) for seconds in (None, 5, 30, 60)
    }


def test_the_seed_of_a_point_counts(whole: tuple[Path, list[Row], int]) -> None:
    start = {(r.init, r.seed): r.value for r in whole[1] if r.metric == "flow_loss" and r.step == 0}
    assert start["random", 0] != start["random", 1]
    assert start["calibrated", 0] == start["calibrated", 1]


@pytest.mark.parametrize(
    ("label", "before"),
    [("calibrating", 1), ("weighing errors", 1), ("sweep", 2), ("distilling", 3)],
)
def test_an_interrupted_sweep_goes_on_where_it_was(
    label: str,
    before: int,
    whole: tuple[Path, list[Row], int],
    dense: CausalWanModel,
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(PowerCutError):
        run(dense, file, progress=PowerCut(label, before))
    assert untimed(run(dense, file)) == untimed(whole[1])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_finished_points_are_not_measured_again(
    whole: tuple[Path, list[Row], int],
    dense: CausalWanModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    append_rows(file, whole[1])
    monkeypatch.setattr(pipeline, "measure_point", refuse)
    monkeypatch.setattr(shared, "calibrate", refuse)
    assert run(dense, file) == whole[1]


def test_only_what_is_new_in_a_larger_grid_is_measured(
    whole: tuple[Path, list[Row], int],
    dense: CausalWanModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    append_rows(file, whole[1])
    measured: list[object] = []

    def noted(_: object, point: object, *__: object) -> list[Row]:
        measured.append(point)
        return []

    monkeypatch.setattr(pipeline, "measure_point", noted)
    larger = replace(GRID, inits=("random", "spectral"), mla_sizes=(*GRID.mla_sizes, WIDER))
    run(dense, file, larger)
    old = [point for point in points_of(larger) if point in points_of(GRID)]
    assert measured == [point for point in points_of(larger) if point not in old]
    assert len(old) == 2


def test_a_point_that_fails_is_a_row_that_says_why_and_is_tried_again(
    whole: tuple[Path, list[Row], int],
    dense: CausalWanModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file, measure = tmp_path / "rows.jsonl", pipeline.measure_point

    def failing(student: CausalWanModel, point: SweepPoint, *rest: object) -> list[Row]:
        if point.conversion.init == "calibrated" and point.seed == 0:
            raise RuntimeError("out of memory\nmore words")
        return measure(student, point, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(pipeline, "measure_point", failing)
    rows = run(dense, file)
    (failed,) = [row for row in rows if row.metric == "failed"]
    assert (failed.init, failed.seed, failed.note) == (
        "calibrated",
        0,
        "RuntimeError: out of memory",
    )
    assert len({(row.point, row.seed) for row in rows if row.metric == "recover_seconds"}) == 3
    monkeypatch.undo()
    again = run(dense, file)
    assert not [row for row in again if row.metric == "failed"]
    assert Counter(untimed(again)) == Counter(untimed(whole[1]))


def failing_at(
    measure: Callable[..., list[Row]], init: str, error: Exception
) -> Callable[..., list[Row]]:
    """`measure_point`, but for points of one init."""

    def measured(student: CausalWanModel, point: SweepPoint, *rest: object) -> list[Row]:
        if point.conversion.init == init:
            raise error
        return measure(student, point, *rest)

    return measured


UNTRAINED = replace(GRID, inits=("random", "spectral", "calibrated"), seeds=(0,), recover=False)
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.safetensors")


def test_a_file_that_one_point_misses_is_that_points_failure(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost = FileNotFoundError(errno.ENOENT, "No such file", "a.safetensors")
    failing = failing_at(pipeline.measure_point, "spectral", lost)
    monkeypatch.setattr(pipeline, "measure_point", failing)
    rows = run(dense, tmp_path / "rows.jsonl", UNTRAINED)
    (told,) = [(row.init, row.note) for row in rows if row.metric == "failed"]
    assert told[0] == "spectral"
    assert "a.safetensors" in (told[1] or "")
    assert [r.init for r in rows if r.metric == "velocity_error"] == ["random", "calibrated"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_ends_the_sweep_and_what_was_measured_is_kept(
    wrapped: bool, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, error = tmp_path / "rows.jsonl", NO_SPACE
    if wrapped:
        error = OutputError("a.safetensors cannot be written")
        error.__cause__ = SafetensorError("I/O error: No space left on device (os error 28)")
    failing = failing_at(pipeline.measure_point, "spectral", error)
    monkeypatch.setattr(pipeline, "measure_point", failing)
    with pytest.raises(OutputError, match=r"disk is full.*a\.safetensors") as caught:
        run(dense, file, UNTRAINED)
    assert str(file) in caught.value.hint
    kept = read_rows(file)
    assert not [row for row in kept if row.metric == "failed"]
    assert [row.init for row in kept if row.metric == "velocity_error"] == ["random"]
    monkeypatch.undo()
    rows = run(dense, file, UNTRAINED)
    assert rows[: len(kept)] == kept
    assert [r.init for r in rows if r.metric == "velocity_error"] == list(UNTRAINED.inits)


def test_a_disk_that_fills_up_while_the_model_is_calibrated_ends_the_sweep_there(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[str] = []

    def full(_: object, name: str, __: object) -> NoReturn:
        tried.append(name)
        raise NO_SPACE

    write = FolderStore._write  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(FolderStore, "_write", lambda *a: (full if "reads-" in a[1] else write)(*a))
    with pytest.raises(OutputError, match="disk is full"):
        run(dense, tmp_path / "rows.jsonl", UNTRAINED)
    assert len(tried) == 1


def test_rows_that_cannot_be_written_end_the_sweep_with_a_sentence(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", "rows.jsonl")

    monkeypatch.setattr(pipeline, "append_rows", refused)
    with pytest.raises(OutputError, match="Permission denied") as caught:
        run(dense, tmp_path / "rows.jsonl", UNTRAINED)
    assert caught.value.hint


def test_a_conversion_that_fails_leaves_the_others_alone(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def diverging(*_: object) -> NoReturn:
        raise RuntimeError("did not converge")

    monkeypatch.setitem(factor.INITS, "spectral", diverging)
    config = replace(GRID, inits=("random", "spectral"), seeds=(0,), recover=False)
    rows = run(dense, tmp_path / "rows.jsonl", config)
    told = {row.init: row.note for row in rows if row.metric == "failed"}
    assert told == {"spectral": "RuntimeError: did not converge"}
    assert [row.init for row in rows if row.metric == "velocity_error"] == ["random"]
    monkeypatch.undo()
    again = run(dense, tmp_path / "rows.jsonl", config)
    assert [r.init for r in again if r.metric == "velocity_error"] == ["random", "spectral"]
    assert not [row for row in again if row.metric == "failed"]


def test_a_point_that_lacks_what_is_asked_for_is_measured_anew(
    dense: CausalWanModel, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    plain = replace(GRID, inits=("calibrated",), seeds=(0,), recover=False)
    run(dense, file, plain)
    rows = run(dense, file, replace(plain, timed=True))
    assert len([row for row in rows if row.metric == "velocity_error"]) == 1
    assert len([row for row in rows if row.metric == "seconds_ratio"]) == 1
    assert len([row for row in rows if row.metric == "cache_cut"]) == 1


def test_a_line_that_a_kill_cut_short_is_dropped(dense: CausalWanModel, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    config = replace(GRID, inits=("calibrated",), seeds=(0,), recover=False)
    whole = run(dense, file, config)
    file.write_bytes(file.read_bytes() + b'{"metric": "velocity_err')
    assert run(dense, file, config) == whole


def test_free_processes_take_the_next_point_until_there_are_none() -> None:
    store = HashStore()
    shares = [Team(rank, 2, store).share(range(5)) for rank in (0, 1)]
    taken = [next(shares[0]), next(shares[1]), next(shares[1]), next(shares[0])]
    assert taken == [0, 1, 2, 3]
    assert [list(share) for share in shares] == [[4], []]


def test_the_first_process_draws_what_all_have_done(dense: CausalWanModel, tmp_path: Path) -> None:
    class Bars(Silent):
        """Notes how far the bar of the sweep is at every step of a recovery."""

        def __init__(self) -> None:
            self.total, self.at, self.seen = 0, -1, list[int]()

        def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
            for item in super().track(items, label, total):
                if label == "sweep":
                    assert isinstance(items, Sized)
                    self.total, self.at = len(items), self.at + 1
                if label == "distilling":
                    self.seen.append(self.at)
                    if self.at == 1:  # meanwhile the other comes to the end of its second
                        store.add("finished", 1)
                yield item
            self.at += label == "sweep"

    store, bars = HashStore(), Bars()
    other = Team(1, 2, store)
    theirs = other.share(range(len(POINTS)))
    assert [next(theirs), next(theirs)] == [0, 1]
    store.add("left", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "GLANCE", 0.0)
        sweep(
            dense,
            GRID,
            CONVERT,
            RECOVER,
            EVALUATE,
            tmp_path / "rows.jsonl",
            bars,
            Team(0, 2, store),
        )
    assert (bars.total, bars.at) == (4, 4)
    # Within its own first point it shows what the other does meanwhile.
    assert bars.seen == [1, *3 * [2], *4 * [3]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"seeds": (0, 0)},
        {"sizes": (Sizes(cut=0.9), Sizes(cut=0.9))},
        {"mla_sizes": (WIDER,)},
        {"products": ("mla",), "sizes": (Sizes(cut=0.9),), "unquantised": True},
        {"sizes": (Sizes(cut=0.9),), "recovery_steps": (2,), "recover": False},
    ],
)
def test_an_axis_that_acts_on_nothing_or_repeats_itself_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SweepConfig(**wrong)


def test_a_key_names_all_settings_but_the_seed() -> None:
    keys: dict[str, set[int]] = {}
    for point in points_of(replace(GRID, mla_sizes=(*GRID.mla_sizes, WIDER))):
        keys.setdefault(point.key, set()).add(point.seed)
    assert list(keys.values()) == 4 * [{0, 1}]
    codecs = [points_of(each)[0].key for each in (SIZES, replace(SIZES, sizes=(Sizes(cut=0.7),)))]
    assert len(set(codecs)) == 2


SIZES = SweepConfig(
    products=("codec", "mla"),
    sizes=(Sizes(cut=0.9), Sizes(cut=0.8), Sizes(6.0)),
    mla_sizes=(Sizes(cut=0.9), Sizes(cut=0.8)),
    unquantised=True,
    dense_dtypes=("int4", "int2"),
    inits=("calibrated",),
)


@pytest.fixture(scope="module")
def sizes(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], int]:
    """A sweep of both products: its rows, and how many codecs were recovered."""
    file, recovered = tmp_path_factory.mktemp("sizes") / "rows.jsonl", list[RecoverConfig]()

    def noted(*args: Any, **how: Any) -> Any:
        recovered.append(args[2])
        return recover_model(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured_point, "recover_model", noted)
        rows = run(load(teacher), file, SIZES)
    assert [config.nested for config in recovered] == [(0.9, 0.8), (), ()]
    return rows, len(recovered)


def of_codec(rows: list[Row], metric: str) -> list[Row]:
    return [row for row in rows if row.product == "codec" and row.metric == metric]


def test_a_codec_is_measured_at_every_size_before_and_after_its_one_recovery(
    sizes: tuple[list[Row], int],
) -> None:
    rows, recovered = sizes
    assert recovered == 3  # beside the codec, MLA at two cuts
    ways = {(6.0, "auto"), (6.0, "model"), (19.2, "auto"), (19.2, "model")}
    ways |= {(38.4, "auto"), (38.4, "model")}
    for metric in ("velocity_error", "flow_loss"):
        for step in (0, 6):
            told = [
                (round(row.bytes_per_token or 0, 6), row.cache_dtype)
                for row in of_codec(rows, metric)
                if row.step == step
            ]
            assert set(told) == ways
            assert len(told) == len(ways)
    # The size in the middle of the cuts has its curve too.
    between = [row for row in of_codec(rows, "velocity_error") if row.step in (2, 4)]
    assert {round(row.bytes_per_token or 0, 6) for row in between} == {38.4}
    assert len(of_codec(rows, "cache_bytes_per_token")) == len(ways)
    assert len(of_codec(rows, "cache_bytes")) == 12 * len(ways)
    assert not of_codec(rows, "effective_rank_99") + of_codec(rows, "kv_lora_rank")
    assert {row.run for row in rows if row.product == "mla"} == {
        f"mla-calibrated-{numbers}-joint" for numbers in ("9.5", "19")
    }


def test_more_bytes_err_less_and_bits_err_less_than_whole_numbers(
    sizes: tuple[list[Row], int],
) -> None:
    start = [row for row in of_codec(sizes[0], "velocity_error") if row.step == 0]
    curves = {
        dtype: [
            row.value
            for row in sorted(start, key=lambda row: row.bytes_per_token or 0)
            if row.cache_dtype == dtype
        ]
        for dtype in ("auto", "model")
    }
    for curve in curves.values():
        assert curve == sorted(curve, reverse=True)
    assert all(a < b for a, b in zip(curves["auto"], curves["model"], strict=True))


def test_the_dense_model_is_measured_with_its_own_cache_quantised(
    sizes: tuple[list[Row], int], dense: CausalWanModel
) -> None:
    rows, streamed = sizes[0], HeldOut(dense, EVALUATE, streamed=True)
    for dtype in SIZES.dense_dtypes:
        told = {row.metric: row for row in rows if row.run == f"dense {dtype}" and not row.batch}
        assert {"velocity_error", "flow_loss", "cache_bytes_per_token"} <= told.keys()
        runtime = RuntimeConfig(cache_dtype=dtype)
        error = streamed.measure(dense, runtime).velocity_error
        assert told["velocity_error"].value == pytest.approx(error, rel=1e-4)
        assert {row.cache_dtype for row in told.values()} == {dtype}


def test_sizes_are_compared_at_equal_error(sizes: tuple[list[Row], int]) -> None:
    rows = sizes[0]
    start = [row for row in of_codec(rows, "velocity_error") if row.step == 0]
    curve = [(r.bytes_per_token or 0, r.value) for r in start if r.cache_dtype == "auto"]
    dense = [r for r in rows if r.run.startswith("dense int") and r.metric == "velocity_error"]
    errors = {row.cache_dtype: row.value for row in dense}
    wanted = {dtype: bytes_at_error(curve, error) for dtype, error in errors.items()}
    told = {row.cache_dtype: row.value for row in rows if row.metric == "bytes_at_error"}
    assert wanted.keys() == {"int4", "int2"}
    assert told == {dtype: nbytes for dtype, nbytes in wanted.items() if nbytes is not None}
    assert told


def test_a_dtype_that_is_added_is_measured_without_the_points(
    sizes: tuple[list[Row], int],
    dense: CausalWanModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    append_rows(file, sizes[0])
    monkeypatch.setattr(pipeline, "measure_point", refuse)
    monkeypatch.setattr(shared, "calibrate", refuse)
    assert run(dense, file, SIZES) == sizes[0]
    rows = run(dense, file, replace(SIZES, dense_dtypes=("int8", "int4", "int2")))
    assert {row.run for row in rows} - {row.run for row in sizes[0]} == {"dense int8"}
    assert Counter(row.metric for row in rows if row.run == "dense int8")["velocity_error"] == 1


def test_a_codec_of_a_sweep_is_the_one_that_a_conversion_writes(
    dense: CausalWanModel, teacher: Path, tmp_path: Path
) -> None:
    conversion = grid(SweepConfig(sizes=(Sizes(cut=0.9),)), CONVERT)[0]
    convert(teacher, tmp_path / "kv", conversion)
    shelves: dict[Product, TensorStore] = {"codec": MemoryStore()}
    student, written = Shared(dense, CONVERT, shelves).student(conversion), load(tmp_path / "kv")
    assert student.config == written.config
    for name, tensor in written.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name


def test_codecs_are_of_seeds_and_lengths_and_mla_of_sizes() -> None:
    products: tuple[Product, ...] = ("codec", "mla")
    config = SweepConfig(
        products,
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


MEASURED = replace(
    GRID,
    inits=("calibrated",),
    seeds=(0,),
    recover=False,
    timed=True,
    rollout_frames=12,
    rollout_prompts=("0", "7"),
)


def test_a_point_is_timed_and_rolled_out(dense: CausalWanModel, tmp_path: Path) -> None:
    rows = run(dense, tmp_path / "rows.jsonl", MEASURED)
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
    assert strip.name == f"{points_of(MEASURED)[0].key}-0.png"
    assert strip.stat().st_size > 1000


ABLATION = SweepConfig(
    products=("mla",),
    inits=("calibrated", "spectral", "random"),
    latents=("joint", "split"),
    sizes=(Sizes(cut=0.9), Sizes(cut=0.8)),
    recover=False,
)


@pytest.fixture(scope="module")
def ablation(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Either latent at two cuts, before any training."""
    return run(load(teacher), tmp_path_factory.mktemp("ablation") / "rows.jsonl", ABLATION)


def test_either_latent_at_two_cuts_is_measured_with_every_init(ablation: list[Row]) -> None:
    points = [(r.init, r.latent) for r in ablation if r.metric == "velocity_error"]
    cuts = [row.value for row in ablation if row.metric == "cache_cut"]
    assert points == 2 * [(init, latent) for latent in ABLATION.latents for init in ABLATION.inits]
    assert all(cut >= 0.9 for cut in cuts[:6])
    assert all(0.9 > cut >= 0.8 for cut in cuts[6:])
    assert len(cuts) == 12
    assert len({row.run for row in ablation if row.metric == "cache_cut"}) == 12


def test_without_recovery_only_step_0_is_measured(ablation: list[Row]) -> None:
    measured = [row for row in ablation if row.metric in ("velocity_error", "flow_loss")]
    assert {row.step for row in measured if row.run != "dense"} == {0}
    assert not [row for row in ablation if row.metric == "recover_seconds"]
    seconds = [row for row in ablation if row.metric == "convert_seconds"]
    assert len(seconds) == 12
    assert all(row.value > 0 for row in seconds)


def test_a_point_is_the_conversion_that_its_settings_make(
    ablation: list[Row], dense: CausalWanModel, measured: Statistics, held_out: HeldOut
) -> None:
    for cut, latent in ((0.9, "joint"), (0.8, "split")):
        point = replace(BUDGETED, latent=latent, size=Sizes(cut=cut))
        student = convert_model(dense, point, measured)
        name = run_name(student.config)
        (told,) = [r.value for r in ablation if (r.run, r.metric) == (name, "velocity_error")]
        assert told == pytest.approx(held_out.measure(student).velocity_error, rel=1e-4)


def test_a_sweep_without_recovery_goes_on_where_it_was(
    ablation: list[Row], dense: CausalWanModel, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(PowerCutError):
        run(dense, file, ABLATION, PowerCut("sweep", 5))
    assert len([row for row in read_rows(file) if row.metric == "velocity_error"]) == 5
    assert untimed(run(dense, file, ABLATION)) == untimed(ablation)
    before = file.read_bytes()
    run(dense, file, ABLATION)
    assert file.read_bytes() == before


def test_the_grid_has_every_latent_and_each_rope_beside_ranks() -> None:
    config = SweepConfig(
        products=("mla",),
        inits=("random",),
        latents=("joint", "split"),
        sizes=(Sizes(cut=0.8), Sizes(cut=0.9)),
        seeds=(0, 1),
    )
    shared = replace(BUDGETED, size=Sizes(cut=0.5), seed=9)
    of_cuts = grid(config, shared)
    explicit = tuple(Sizes(kv_lora_rank=r, qk_rope_head_dim=p) for r in (12, 8) for p in (4, 6))
    ranks = replace(config, mla_sizes=explicit)
    of_ranks = grid(ranks, shared)  # in place of sizes
    assert [len(set(of_cuts)), len(set(of_ranks))] == [2 * 2 * 2, 2 * 2 * 2 * 2]
    assert {point.latent for point in of_cuts} == {"joint", "split"}
    # Smallest caches first.
    assert [p.size for p in of_cuts] == 4 * [Sizes(cut=0.9)] + 4 * [Sizes(cut=0.8)]
    assert [p.size for p in of_ranks] == [
        Sizes(kv_lora_rank=r, qk_rope_head_dim=p) for r in (8, 12) for p in (4, 6) for _ in range(4)
    ]


def test_white_inputs_are_assumed_where_nothing_shall_be_measured(
    dense: CausalWanModel, held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: tuple[Product, ...] = ("codec", "mla")
    config = SweepConfig(products, sizes=(Sizes(cut=0.8),), inits=("calibrated",), recover=False)
    students: list[CausalWanModel] = []

    def noted(student: CausalWanModel, *_: object) -> list[Row]:
        students.append(student)
        return []

    monkeypatch.setattr(pipeline, "measure_point", noted)
    for calibrate in (True, False):
        common, folder = replace(BUDGETED, calibrate=calibrate), tmp_path / f"{calibrate}"
        sweep(dense, config, common, RECOVER, EVALUATE, folder / "rows.jsonl")
    errors = [held_out.measure(student).velocity_error for student in students]
    for measured, assumed in zip(errors[:2], errors[2:], strict=True):
        assert 0 < measured < assumed


BAD_GRIDS = {
    "misspelt init": (replace(GRID, inits=("random", "spectrl")), "spectral"),
    "rank over width": (replace(GRID, mla_sizes=(Sizes(kv_lora_rank=49),)), "48"),
    "odd rope": (replace(GRID, mla_sizes=(Sizes(kv_lora_rank=8, qk_rope_head_dim=5),)), "5"),
    "a size of MLA layers": (SweepConfig(sizes=(WIDER,)), "kv_lora_rank"),
    "more than a codec holds": (SweepConfig(sizes=(Sizes(16.0), Sizes(97.0))), "96"),
    "less than a channel": (SweepConfig(sizes=(Sizes(0.5),)), "0.5"),
    "no size": (SweepConfig(), "empty"),
}


@pytest.mark.parametrize("name", BAD_GRIDS)
def test_a_grid_with_a_bad_point_is_refused_before_any_work(
    name: str,
    dense: CausalWanModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
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
