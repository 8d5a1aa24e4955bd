"""A dry run predicts what `convert` then writes, refuses what it refuses, and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from checkpoints import BUDGETED, CLIPS, CONVERT, MODEL, PowerCut, PowerCutError, Vmla
from safetensors.torch import load_file, save_file

from vmla_convert.checkpoint import writer
from vmla_convert.config import ConvertConfig, DataConfig, Sizes, SourceConfig
from vmla_convert.errors import VmlaError
from vmla_convert.fitting.convert import convert
from vmla_convert.fitting.plan import plan_output
from vmla_convert.storage.tensor_store import FolderStore, Tensors

pytest_plugins = ["checkpoints"]

SPECTRAL = replace(CONVERT, init="spectral")
PAPER = ConvertConfig(product="mla", init="spectral")
CODEC = ConvertConfig(calibration_clips=4, data=CLIPS)
CONFIGS = {
    "float16": replace(SPECTRAL, dtype="float16"),
    "split": replace(PAPER, latent="split", size=Sizes(cut=0.8)),
    "no calibration": replace(CONVERT, calibrate=False),
    "codec": CODEC,
    "small codec": replace(CODEC, calibrate=False, channels=30, size=Sizes(20)),
    "float32 codec": replace(CODEC, calibrate=False, dtype="float32"),
}


@pytest.mark.parametrize("shard", [writer.ONE_FILE_BYTES, 40_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_predicted_files_and_bytes_are_written(
    name: str, shard: int, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in (writer.CheckpointWriter.__init__, writer.planned_files):
        defaults = function.__defaults__ or ()
        changed = tuple(shard if d == writer.ONE_FILE_BYTES else d for d in defaults)
        monkeypatch.setattr(function, "__defaults__", changed)
    out = tmp_path / "out"
    planned = plan_output(teacher, out, CONFIGS[name])
    assert not list(tmp_path.iterdir())
    done = convert(teacher, out, CONFIGS[name])
    written = {
        path.name: sum(tensor.nbytes for tensor in load_file(path).values())
        for path in out.glob("*.safetensors")
    }
    assert planned.files == written
    assert (len(written) > 1) == (planned.nbytes > shard and CONFIGS[name].product == "mla")
    assert planned.nbytes == sum(written.values())
    assert planned.out == str(out)
    assert planned.cache_bytes_per_token == done.config.cache_bytes_per_token()
    assert planned.cache_cut == done.config.cache_cut()


def test_a_budget_is_predicted_before_its_division_is_known(
    teacher: Path, tmp_path: Path, budgeted: Path
) -> None:
    planned = plan_output(teacher, tmp_path / "out", BUDGETED)
    written = sum(t.nbytes for t in load_file(budgeted / "model.safetensors").values())
    assert planned.cache_bytes_per_token == 2 * 13
    assert planned.nbytes == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize("clips", [1, 8])
@pytest.mark.parametrize("config", [BUDGETED, CODEC], ids=["mla", "codec"])
def test_calibration_files_take_about_the_predicted_bytes(
    config: ConvertConfig,
    clips: int,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(config, calibration_clips=clips)
    planned, held = plan_output(teacher, tmp_path / "out", config), list[int]()
    put = FolderStore.put

    def watched(store: FolderStore, name: str, tensors: Tensors) -> None:
        put(store, name, tensors)
        if store.folder.name == "out.calibration":
            held.append(sum(path.stat().st_size for path in store.folder.rglob("*.safetensors")))

    monkeypatch.setattr(FolderStore, "put", watched)
    made = "predicting errors" if config.product == "mla" else "fitting codecs"
    with pytest.raises(PowerCutError):
        convert(teacher, tmp_path / "out", config, PowerCut(made, 0))
    # Headers of files are not counted.
    assert 0.95 * max(held) < planned.working_bytes < 1.3 * max(held)
    assert plan_output(teacher, tmp_path / "new", SPECTRAL).working_bytes == 0


def a_missing_source(_: Path, folder: Path) -> SourceConfig:
    return SourceConfig(str(folder / "no.pt"))


def as_it_is(source: Path, _: Path) -> SourceConfig:
    return SourceConfig(str(source))


def a_wan_media(source: Path, _: Path) -> SourceConfig:
    return SourceConfig(str(source), overrides={"media": "wan"})


def an_existing_output(source: Path, folder: Path) -> SourceConfig:
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
REFUSED: list[tuple[Make, ConvertConfig, str]] = [
    (a_missing_source, SPECTRAL, "native"),
    (as_it_is, replace(PAPER, size=Sizes(cut=0.99)), "native"),
    (as_it_is, replace(PAPER, init="calibratd"), "native"),
    (as_it_is, PAPER, "no such layout"),
    (as_it_is, replace(CODEC, init="spectral"), "native"),
    (as_it_is, replace(CODEC, size=Sizes(rank=9999)), "native"),
    (as_it_is, CODEC, "diffusers"),
    (as_it_is, replace(CONVERT, data=DataConfig("no.safetensors")), "native"),
    (a_wan_media, CONVERT, "native"),
    (a_wan_media, CODEC, "native"),
    (an_existing_output, SPECTRAL, "native"),
    (an_existing_output, CODEC, "native"),
    (an_interrupted_conversion, SPECTRAL, "native"),
    (clips_of_other_channels, replace(CONVERT, data=DataConfig("clips")), "native"),
]


@pytest.mark.parametrize(("make", "config", "layout"), REFUSED)
def test_a_dry_run_raises_the_error_of_convert(
    make: Make,
    config: ConvertConfig,
    layout: str,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = make(teacher, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    errors: list[tuple[type, str, str]] = []
    for work in (plan_output, convert):
        with pytest.raises(VmlaError) as caught:
            work(source, tmp_path / "out", config, layout=layout)
        errors.append((caught.type, caught.value.message, caught.value.hint))
        assert sorted(tmp_path.rglob("*")) == before
    assert errors[0] == errors[1]


def test_the_command_shows_the_plan_to_people_and_programs(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    words = ("convert", teacher, "-o", tmp_path / "out", "--preset", "videomla", "--dry-run")
    planned = plan_output(teacher, tmp_path / "out", PAPER)
    shown, expected = json.loads(vmla(*words, "--json").out), asdict(planned)
    assert shown.pop("work").keys() == expected.pop("work").keys()  # which holds a measured time
    assert shown == expected
    people = vmla(*words)
    assert (people.code, people.err) == (0, "")
    assert all(word in people.out for word in (str(tmp_path / "out"), "model.safetensors", "86.5%"))
    assert not list(tmp_path.iterdir())
