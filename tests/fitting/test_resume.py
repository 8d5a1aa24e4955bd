"""A conversion that was stopped goes on to the same bytes, does nothing twice, knows its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from checkpoints import CONVERT, MODEL, PowerCut
from conftest import tiny_model
from safetensors.torch import save_file

from vmla_convert.checkpoint.writer import CheckpointWriter
from vmla_convert.config import ConvertConfig, DataConfig, Sizes, SourceConfig
from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.fitting import calibrate as conversion
from vmla_convert.fitting import write as pipeline
from vmla_convert.fitting.convert import convert
from vmla_convert.layers.block import Block
from vmla_convert.loading.load import load
from vmla_convert.maths.projections import Factors
from vmla_convert.storage.tensor_store import FolderStore, Tensors
from vmla_convert.tables import to_dict
from vmla_convert.training.pretrain import save_self_forcing

pytest_plugins = ["checkpoints"]

LAYERS = 3
DEEP = replace(MODEL, geometry=replace(MODEL.geometry, num_layers=LAYERS))
SOME = ConvertConfig(
    "mla", calibration_clips=2, data=DataConfig("demo", frames=4), size=Sizes(cut=0.8)
)
CASES = {"spectral": replace(CONVERT, init="spectral"), "default": SOME}
WALK = ("calibrating", "weighing errors", "predicting errors", "converting")
MOMENTS = [
    ("spectral", "converting", 1),
    *(("default", label, before) for label in WALK for before in (0, LAYERS - 1)),
]
FILES = ("model.safetensors", "config.json")


class Counted(NamedTuple):
    """Blocks that were read for calibration and layers that were factored, in order."""

    blocks: list[int]
    layers: list[int]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of three blocks."""
    folder = tmp_path_factory.mktemp("deep") / "checkpoint"
    save_self_forcing(tiny_model(DEEP).state_dict(), DEEP, folder)
    return folder


@pytest.fixture(scope="module")
def whole(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Conversions that nothing stopped."""
    place = tmp_path_factory.mktemp("whole")

    def made(case: str) -> Path:
        if not (place / case).exists():
            convert(deep, place / case, CASES[case])
        return place / case

    return made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counts, read, factor = Counted([], []), conversion.read_block, pipeline.factor_layer

    def reading(checkpoint: Any, layer: int, device: Any) -> Block:
        counts.blocks.append(layer)
        return read(checkpoint, layer, device)

    def factoring(*args: Any) -> Factors:
        counts.layers.append(args[4])
        return factor(*args)

    monkeypatch.setattr(conversion, "read_block", reading)
    monkeypatch.setattr(pipeline, "factor_layer", factoring)
    return counts


def stopped(deep: Path, out: Path, config: ConvertConfig, label: str, before: int = 1) -> None:
    """Interrupt a conversion before an item of a bar."""
    with pytest.raises(KeyboardInterrupt):
        convert(deep, out, config, PowerCut(label, before, KeyboardInterrupt))
    assert not out.exists()


def assert_same(out: Path, expected: Path) -> None:
    """Whole, the same bytes, and nothing else left."""
    for name in FILES:
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
    assert list(out.parent.iterdir()) == [out]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("case", "label", "before"), MOMENTS)
def test_stopped_at_any_block_it_goes_on_with_the_next(
    case: str,
    label: str,
    before: int,
    deep: Path,
    whole: Callable[[str], Path],
    counted: Counted,
    tmp_path: Path,
) -> None:
    expected, out = whole(case), tmp_path / "out"
    counted.blocks.clear()
    stopped(deep, out, CASES[case], label, before)
    factored = before if label == "converting" else 0
    counted.layers.clear()
    done = convert(deep, out, CASES[case], resume=True)
    there_and_back = [*range(LAYERS), *reversed(range(LAYERS))]
    # Of both runs together.
    assert counted.blocks == ([] if case == "spectral" else there_and_back)
    assert counted.layers == list(range(factored, LAYERS))
    assert_same(out, expected)
    assert done.config == load(out).config
    assert hash(done.config) == hash(load(out).config)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("moment", range(1 + LAYERS))
def test_killed_around_a_commit_it_goes_on_from_the_last(
    moment: int,
    after: bool,
    deep: Path,
    whole: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, commit, states = whole("spectral"), CheckpointWriter.commit, list[Any]()

    def killed(writer: CheckpointWriter, state: Any) -> None:
        if len(states) < moment or after:
            commit(writer, state)
        states.append(state)
        if len(states) > moment:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(deep, tmp_path / "out", CASES["spectral"])
    assert (tmp_path / "out.partial").exists() == (after or moment > 0)
    convert(deep, tmp_path / "out", CASES["spectral"], resume=True)
    assert_same(tmp_path / "out", expected)


# Forwards: input-0 to input-3 and gradient-3; backwards: a gradient and statistics, three times.
@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", range(LAYERS + 2 + 2 * LAYERS))
def test_killed_around_a_file_of_the_calibration_it_redoes_one_block_at_most(
    moment: int,
    after: bool,
    deep: Path,
    whole: Callable[[str], Path],
    counted: Counted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, put, names = whole("default"), FolderStore.put, list[str]()
    counted.blocks.clear()

    def killed(store: FolderStore, name: str, tensors: Tensors) -> None:
        names.append(name)
        if len(names) <= moment or after:
            put(store, name, tensors)
        if len(names) > moment:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(deep, tmp_path / "out", CASES["default"])
    convert(deep, tmp_path / "out", CASES["default"])
    assert len(counted.blocks) <= 2 * LAYERS + 1
    assert_same(tmp_path / "out", expected)


def test_calibration_keeps_only_the_files_of_blocks_to_come(deep: Path, tmp_path: Path) -> None:
    stopped(deep, tmp_path / "out", SOME, "weighing errors", 2)
    store = tmp_path / "out.calibration"
    files = (path.relative_to(store) for path in store.rglob("*.safetensors"))
    groups = {str(file.with_suffix("")) for file in files}
    assert groups == {"input-0/0000", "gradient-1/0000", "statistics-1-0", "statistics-2-0"}


def test_before_anything_is_written_it_goes_on_unasked(
    deep: Path, whole: Callable[[str], Path], counted: Counted, tmp_path: Path
) -> None:
    expected = whole("default")
    counted.blocks.clear()
    stopped(deep, tmp_path / "out", SOME, "weighing errors")
    assert [path.name for path in tmp_path.iterdir()] == ["out.calibration"]
    convert(deep, tmp_path / "out", SOME)
    assert len(counted.blocks) == 2 * LAYERS
    assert_same(tmp_path / "out", expected)


def test_what_can_be_resumed_is_not_thrown_away_unasked(deep: Path, tmp_path: Path) -> None:
    stopped(deep, tmp_path / "out", CASES["spectral"], "converting", 0)
    before = digests(tmp_path)
    with pytest.raises(OutputError) as caught:
        convert(deep, tmp_path / "out", CASES["spectral"])
    assert "--resume" in caught.value.hint
    assert digests(tmp_path) == before


def test_resume_without_anything_to_resume_just_converts(
    deep: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(deep, tmp_path / "out", CASES["spectral"], resume=True)
    assert_same(tmp_path / "out", whole("spectral"))


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (replace(CASES["spectral"], size=Sizes(kv_lora_rank=9)), "plan"),
        (replace(CASES["spectral"], dtype="bfloat16"), "settings"),
        (replace(CASES["spectral"], init="random"), "settings"),
    ],
)
def test_other_settings_are_not_resumed_with(
    other: ConvertConfig, word: str, deep: Path, tmp_path: Path
) -> None:
    stopped(deep, tmp_path / "out", CASES["spectral"], "converting")
    before = digests(tmp_path)
    with pytest.raises(OutputError, match=word) as caught:
        convert(deep, tmp_path / "out", other, resume=True)
    assert str(tmp_path / "out.partial") in caught.value.message
    assert digests(tmp_path) == before


def changed_weights(folder: Path) -> SourceConfig:
    """Change the bytes at the same place."""
    state = torch.load(folder / "model.pt", weights_only=True)
    state["generator_ema"]["model.head.head.bias"] += 1
    torch.save(state, folder / "model.pt")
    return SourceConfig(str(folder))


def changed_config(folder: Path) -> SourceConfig:
    """Call the same weights another model."""
    config = json.loads((folder / "config.json").read_text())
    config["vmla"]["cache"]["window_frames"] = 12
    (folder / "config.json").write_text(json.dumps(config))
    return SourceConfig(str(folder))


def changed_settings(folder: Path) -> SourceConfig:
    """Change the model by a setting of the source."""
    return SourceConfig(str(folder), overrides={"cache": {"window_frames": 12}})


Change = Callable[[Path], SourceConfig]


@pytest.fixture
def mine(deep: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(deep, tmp_path / "mine")


@pytest.mark.parametrize("change", [changed_weights, changed_config, changed_settings])
@pytest.mark.parametrize(
    ("case", "label"),
    [("spectral", "converting"), ("default", "converting"), ("default", "predicting errors")],
)
def test_another_source_is_not_resumed_with(
    case: str, label: str, change: Change, mine: Path, counted: Counted, tmp_path: Path
) -> None:
    out = tmp_path / "here" / "out"
    stopped(mine, out, CASES[case], label)
    source = change(mine)
    counted.blocks.clear()
    with pytest.raises(OutputError):
        convert(source, out, CASES[case], resume=True)
    assert not counted.blocks


def clips(file: Path, seed: int) -> DataConfig:
    """A file of random clips."""
    noise, geometry = torch.Generator().manual_seed(seed), DEEP.geometry
    shapes = {
        "latents": (4, 4, geometry.in_dim, *DEEP.latent_size),
        "context": (4, geometry.text_len, geometry.text_dim),
    }
    save_file({n: torch.randn(shape, generator=noise) for n, shape in shapes.items()}, file)
    return DataConfig(str(file))


@pytest.mark.parametrize("label", ["weighing errors", "converting"])
def test_other_clips_under_the_same_name_are_in_the_way(
    label: str, deep: Path, counted: Counted, tmp_path: Path
) -> None:
    config = replace(SOME, data=clips(tmp_path / "clips", 0), size=Sizes(kv_lora_rank=8))
    out = tmp_path / "here" / "out"
    stopped(deep, out, config, label)
    clips(tmp_path / "clips", 1)
    counted.blocks.clear()
    with pytest.raises(OutputError):
        convert(deep, out, config, resume=True)
    assert not counted.blocks


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({"seed": 1}, True),
        ({"calibration_clips": 3}, True),
        ({"data": DataConfig("demo", frames=6)}, True),
        ({"latent": "split"}, False),
        ({"size": Sizes(cut=0.9)}, False),
    ],
)
def test_calibration_depends_on_its_clips_and_not_on_sizes(
    change: dict[str, Any], anew: bool, deep: Path, counted: Counted, tmp_path: Path
) -> None:
    stopped(deep, tmp_path / "out", SOME, "predicting errors")
    counted.blocks.clear()
    with pytest.raises(OutputError) if anew else nullcontext():
        convert(deep, tmp_path / "out", replace(SOME, **change))
    assert not counted.blocks


def test_a_budget_that_turns_out_too_small_costs_no_second_calibration(
    deep: Path, counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise ConfigError("too small", "raise --bytes-per-token")

    with monkeypatch.context() as patch:
        patch.setattr("vmla_convert.fitting.convert.plan_ranks", refuse)
        with pytest.raises(ConfigError, match="too small"):
            convert(deep, tmp_path / "out", SOME)
    calibration, smaller = tmp_path / "out.calibration", replace(SOME, size=Sizes(cut=0.7))
    assert list(tmp_path.iterdir()) == [calibration]
    counted.blocks.clear()
    convert(deep, tmp_path / "out", smaller)
    assert counted.blocks == []
    assert not calibration.exists()
    convert(deep, tmp_path / "again" / "out", smaller)
    one, other = (tmp_path / name / FILES[0] for name in ("out", "again/out"))
    assert one.read_bytes() == other.read_bytes()


def test_a_full_disk_leaves_what_can_be_resumed(
    deep: Path, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count > 12:
            raise OSError(28, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left") as caught:
            convert(deep, tmp_path / "out", CASES["spectral"])
    assert "--resume" in caught.value.hint
    convert(deep, tmp_path / "out", CASES["spectral"], resume=True)
    assert_same(tmp_path / "out", whole("spectral"))


def test_the_record_is_the_same_but_for_its_costs(
    deep: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    stopped(deep, tmp_path / "out", SOME, "converting")
    convert(deep, tmp_path / "out", SOME, resume=True)
    resumed, expected = (
        json.loads((folder / "conversion.json").read_text())
        for folder in (tmp_path / "out", whole("default"))
    )
    for record in (resumed, expected):
        for cost in ("convert_seconds", "factor_seconds", "stage_seconds", "peak_rss_bytes"):
            assert record.pop(cost)
    assert resumed == expected
    assert resumed["convert"] == to_dict(SOME)
