"""A dry run foretells what `convert` then writes, refuses what it refuses, and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import BUDGETED, CLIPS, CONVERT, MODEL, PowerCut, PowerCutError, Vmla, refused
from safetensors.torch import load_file, save_file

from vmla_convert.checkpoint import writer
from vmla_convert.config import ConvertConfig, DataConfig, SourceConfig
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.fitting.convert import convert
from vmla_convert.fitting.dry_run import foresee

pytest_plugins = ["checkpoints"]

SPECTRAL = replace(CONVERT, init="spectral")
PAPER = ConvertConfig(product="mla", init="spectral")
CODEC = ConvertConfig(calibration_clips=4, data=CLIPS)
CONFIGS = {
    "calibrated": CONVERT,
    "spectral": SPECTRAL,
    "float16": replace(SPECTRAL, dtype="float16"),
    "split": replace(PAPER, latent="split", cut=0.8),
    "no calibration": replace(CONVERT, calibrate=False),
    "codec": CODEC,
    "small codec": replace(CODEC, calibrate=False, channels=30, bytes_per_token=20),
    "float32 codec": replace(CODEC, dtype="float32"),
}


@pytest.mark.parametrize("shard", [writer.ONE_FILE_BYTES, 40_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_and_bytes_are_those_that_are_then_written(
    name: str, shard: int, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in (writer.CheckpointWriter.__init__, writer.planned_files):
        default = tuple(
            shard if d == writer.ONE_FILE_BYTES else d for d in function.__defaults__ or ()
        )
        monkeypatch.setattr(function, "__defaults__", default)
    out = tmp_path / "out"
    outlook = foresee(teacher, out, CONFIGS[name])
    assert not list(tmp_path.iterdir())
    done = convert(teacher, out, CONFIGS[name])
    written = {
        path.name: sum(tensor.nbytes for tensor in load_file(path).values())
        for path in out.glob("*.safetensors")
    }
    assert outlook.files == written
    assert (len(written) > 1) == (outlook.nbytes > shard and CONFIGS[name].product == "mla")
    assert outlook.nbytes == sum(written.values())
    assert outlook.out == str(out)
    assert outlook.cache_bytes_per_token == done.config.cache_bytes_per_token()
    assert outlook.cache_cut == done.config.cache_cut()


def test_a_budget_is_foretold_though_its_division_is_not(teacher: Path, tmp_path: Path) -> None:
    outlook = foresee(teacher, tmp_path / "out", BUDGETED)
    done = convert(teacher, tmp_path / "out", BUDGETED)
    assert outlook.cache_bytes_per_token == done.config.cache_bytes_per_token()
    weights = load_file(tmp_path / "out" / "model.safetensors").values()
    written = sum(tensor.nbytes for tensor in weights)
    assert sum(outlook.files.values()) == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize("clips", [1, 8])
@pytest.mark.parametrize("config", [BUDGETED, CODEC], ids=["mla", "codec"])
def test_working_files_take_about_what_was_foretold(
    config: ConvertConfig, clips: int, teacher: Path, tmp_path: Path
) -> None:
    config = replace(config, calibration_clips=clips)
    outlook, shelf = foresee(teacher, tmp_path / "out", config), tmp_path / "out.calibration"

    def lying() -> int:
        return sum(path.stat().st_size for path in shelf.iterdir())

    most = 0
    made = "predicting errors" if config.product == "mla" else "fitting codecs"
    moments = [("weighing errors", 0), ("weighing errors", 1), (made, 0)]
    for label, before in moments:
        with pytest.raises(PowerCutError):
            convert(teacher, tmp_path / "out", config, PowerCut(label, before))
        most = max(most, lying())
    assert most < outlook.working_bytes < 1.6 * most
    assert foresee(teacher, tmp_path / "new", SPECTRAL).working_bytes == 0


def nothing(_: Path, folder: Path) -> SourceConfig:
    return SourceConfig(str(folder / "no.pt"))


def as_it_is(source: Path, _: Path) -> SourceConfig:
    return SourceConfig(str(source))


def a_wan_media(source: Path, _: Path) -> SourceConfig:
    return SourceConfig(str(source), overrides=("media=wan",))


def a_taken_place(source: Path, folder: Path) -> SourceConfig:
    (folder / "out").write_text("mine")
    return as_it_is(source, folder)


def an_interrupted_conversion(source: Path, folder: Path) -> SourceConfig:
    with pytest.raises(PowerCutError):
        convert(source, folder / "out", SPECTRAL, PowerCut("converting", 1))
    return as_it_is(source, folder)


def clips_of_other_channels(source: Path, folder: Path) -> SourceConfig:
    shape = (3, 6, MODEL.geometry.in_dim + 1, *MODEL.latent_size)
    save_file({"latents": torch.ones(shape), "context": torch.ones(3, 1, 10)}, folder / "clips")
    return as_it_is(source, folder)


Make = Callable[[Path, Path], SourceConfig]
REFUSED: list[tuple[Make, ConvertConfig]] = [
    (nothing, SPECTRAL),
    (as_it_is, replace(PAPER, cut=1.5)),
    (as_it_is, replace(PAPER, init="calibratd")),
    (as_it_is, replace(CODEC, init="spectral")),
    (as_it_is, replace(CODEC, cut=1.5)),
    (as_it_is, replace(CONVERT, data=DataConfig("no.safetensors"))),
    (a_wan_media, CONVERT),
    (a_wan_media, CODEC),
    (a_taken_place, SPECTRAL),
    (a_taken_place, CODEC),
    (an_interrupted_conversion, SPECTRAL),
    (clips_of_other_channels, replace(CONVERT, data=DataConfig("clips"))),
]


@pytest.mark.parametrize(("make", "config"), REFUSED)
def test_what_convert_refuses_is_refused_in_the_same_words(
    make: Make,
    config: ConvertConfig,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = make(teacher, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    told: list[tuple[type, str, str]] = []
    for work in (foresee, convert):
        with pytest.raises(VmlaError) as caught:
            work(source, tmp_path / "out", config)
        told.append((caught.type, caught.value.message, caught.value.hint))
        assert sorted(tmp_path.rglob("*")) == before
    assert told[0] == told[1]


def test_a_codec_is_foretold_in_no_layout_but_its_own(teacher: Path, tmp_path: Path) -> None:
    for work in (foresee, convert):
        with pytest.raises(ConfigError):
            work(teacher, tmp_path / "out", CODEC, layout="diffusers")
    assert not list(tmp_path.iterdir())


def test_the_command_foretells_to_people_and_programs(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    words = ("convert", teacher, "-o", tmp_path / "out", "--preset", "videomla", "--dry-run")
    told = json.loads(vmla(*words, "--json").out)
    outlook = foresee(teacher, tmp_path / "out", PAPER)
    assert told == {
        "out": str(tmp_path / "out"),
        "cache_bytes_per_token": 26,
        "cache_cut": outlook.cache_cut,
        "files": outlook.files,
        "nbytes": outlook.nbytes,
        "working_bytes": 0,
    }
    people = vmla(*words)
    assert (people.code, people.err) == (0, "")
    assert all(word in people.out for word in (str(tmp_path / "out"), "model.safetensors", "86.5%"))
    assert refused(vmla(*words, "--cut", "2"))
    assert not list(tmp_path.iterdir())
