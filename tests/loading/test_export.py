"""An export opens again with the same tensors, under the names that other programs use."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import BUDGETED, MODEL, PowerCut, PowerCutError, Vmla, refused
from conftest import TINY_MLA, tiny_config, tiny_model
from family_files import GEOMETRY, write_skyreels
from safetensors import safe_open

from vmla_convert.checkpoint.families import (
    OpenCheckpoint,
    open_checkpoint,
)
from vmla_convert.checkpoint.geometry import block_of
from vmla_convert.checkpoint.layouts import DIFFUSERS
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.checkpoint.writer import CheckpointWriter, write_checkpoint
from vmla_convert.config import ConvertConfig, Sizes, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError, OutputError
from vmla_convert.fitting.convert import convert, read_plan
from vmla_convert.fitting.plan import plan_output
from vmla_convert.loading.export import EXPORT_LAYOUTS, export
from vmla_convert.loading.load import load, read_provenance
from vmla_convert.loading.metadata_files import transformer_config

pytest_plugins = ["checkpoints", "tiny_wan"]

CHEAP = ConvertConfig("mla", init="spectral", size=Sizes(cut=0.5))


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, to the bit and of the same dtype."""
    first, second = open_checkpoint(one), open_checkpoint(other)
    assert first.names
    assert first.specs() == second.specs()
    return all(torch.equal(first.read(name), second.read(name)) for name in first.names)


@pytest.mark.parametrize("layout", EXPORT_LAYOUTS)
@pytest.mark.parametrize("source", ["teacher", "converted", "budgeted"])
def test_an_export_opens_as_the_same_model(
    source: str, layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(source)
    export(folder, tmp_path / "out", layout)
    assert same(folder, tmp_path / "out")
    config = load(tmp_path / "out").config
    assert replace(config, family="self_forcing") == load(folder).config
    was, now = read_provenance(folder), read_provenance(tmp_path / "out")
    for record in (was, now):  # the hashes of the files differ by layout
        record.pop("weights", None)
    assert now == was
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("source", ["teacher", "converted"])
def test_there_and_back_again(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(source)
    export(folder, tmp_path / "pipeline", "diffusers")
    export(tmp_path / "pipeline", tmp_path / "back", "self_forcing")
    assert same(folder, tmp_path / "back")


@pytest.mark.parametrize("key", [None, "generator", "model"])
def test_a_pt_equals_the_file_of_its_trainer(
    key: str | None, teacher: Path, tmp_path: Path
) -> None:
    file = export(teacher, tmp_path / "out", None, key)
    assert file == tmp_path / "out" / "model.pt"
    written = torch.load(file, weights_only=True)
    assert list(written) == [key or "generator_ema"]
    source = torch.load(teacher / "model.pt", weights_only=True)["generator_ema"]
    state = written[key or "generator_ema"]
    assert state.keys() == source.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in source.items())


@pytest.mark.parametrize(
    ("source", "layout", "file"),
    [
        ("teacher", "native", "diffusion_pytorch_model.safetensors"),
        ("converted", "native", "model.safetensors"),
        ("teacher", "diffusers", "transformer/diffusion_pytorch_model.safetensors"),
        ("converted", "diffusers", "transformer/diffusion_pytorch_model.safetensors"),
    ],
)
def test_weights_have_the_place_and_names_of_the_layout(
    source: str, layout: str, file: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    assert export(request.getfixturevalue(source), tmp_path / "out", layout) == tmp_path / "out"
    with safe_open(tmp_path / "out" / file, "pt") as opened:
        names = set(opened.keys())
    query, norm = ("attn1.to_q", 2) if layout == "diffusers" else ("self_attn.q", 3)
    assert {f"blocks.0.{query}.weight", f"blocks.1.norm{norm}.weight"} < names
    if source == "converted":
        assert f"blocks.0.{query.removesuffix('.to_q').removesuffix('.q')}.q_rope_map" in names


def test_a_family_has_its_own_layout_and_keeps_settings(
    wan_folder: Path, teacher: Path, tmp_path: Path
) -> None:
    source = SourceConfig(str(wan_folder), overrides={"chunk_frames": 1, "licence": "apache-2.0"})
    export(source, tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    config = load(tmp_path / "pipeline").config
    assert (config.chunk_frames, config.licence) == (1, "apache-2.0")
    export(teacher, tmp_path / "native", "native")
    export(tmp_path / "native", tmp_path / "wan")
    assert (tmp_path / "wan" / "diffusion_pytorch_model.safetensors").is_file()
    table = json.loads((tmp_path / "wan" / "config.json").read_text())
    assert (table["_class_name"], table["vmla"]["chunk_frames"]) == ("WanModel", 2)


@pytest.mark.parametrize("layout", EXPORT_LAYOUTS)
def test_a_frame_rate_survives_an_export(layout: str, tmp_path: Path) -> None:
    """The embedding of the rate is merged into a bias, so the names are those of Wan."""
    tensors = dict(tiny_model(tiny_config(GEOMETRY)).state_dict())
    export(write_skyreels(tmp_path / "source", tensors), tmp_path / "out", layout)
    config = open_checkpoint(tmp_path / "out").config
    assert (config.family == "skyreels", config.frames_per_second) == (False, 24)


def test_a_conversion_may_be_written_as_a_pipeline(
    wan_folder: Path, tmp_path: Path, vmla: Vmla
) -> None:
    words = ("--preset", "videomla", "--no-calibration", "--cut", "0.5")
    common = ("convert", wan_folder, *words)
    assert vmla(*common, "-o", tmp_path / "native").code == 0
    assert vmla(*common, "-o", tmp_path / "pipe", "--layout", "diffusers").code == 0
    assert same(tmp_path / "native", tmp_path / "pipe")
    assert load(tmp_path / "native").config == load(tmp_path / "pipe").config
    assert read_plan(tmp_path / "native") == read_plan(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    base = json.loads((wan_folder / "model_index.json").read_text())
    for name in ("vae", "text_encoder", "tokenizer"):
        assert index[name] == base[name] != [None, None]
        copied = {p.name: p.read_bytes() for p in (tmp_path / "pipe" / name).iterdir()}
        assert copied == {p.name: p.read_bytes() for p in (wan_folder / name).iterdir()}
    assert not (tmp_path / "native" / "vae").exists()


def test_a_source_without_components_leaves_their_places_empty(
    teacher: Path, tmp_path: Path
) -> None:
    convert(teacher, tmp_path / "out", CHEAP, layout="diffusers")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "VMLAPipeline"
    assert index["vae"] == index["text_encoder"] == index["tokenizer"] == [None, None]
    scheduler = json.loads((tmp_path / "out" / "scheduler/scheduler_config.json").read_text())
    assert scheduler["shift"] == MODEL.sampler.shift


def test_single_components_beside_a_checkpoint_are_copied(wan_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(wan_folder / "transformer", source)
    shutil.copytree(wan_folder / "vae", source / "vae")
    (source / "tokenizer").mkdir()  # empty
    export(source, tmp_path / "out", "diffusers")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    assert {place.name for place in (tmp_path / "out").iterdir() if place.is_dir()} == {
        "scheduler",
        "transformer",
        "vae",
    }


def test_a_dry_run_names_the_files_of_the_layout(teacher: Path, tmp_path: Path) -> None:
    planned = plan_output(teacher, tmp_path / "out", BUDGETED, layout="diffusers")
    assert list(planned.files) == ["transformer/diffusion_pytorch_model.safetensors"]


def test_a_pipeline_continues_after_an_interruption(tmp_path: Path) -> None:
    config = tiny_config(mla=TINY_MLA)
    state = tiny_model(config).state_dict()
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in state.items()}
    vae = tmp_path / "base" / "vae"
    vae.mkdir(parents=True)
    (tmp_path / "blob").write_text("weights")
    (vae / "config.json").symlink_to(tmp_path / "blob")  # as the Hub's cache has it
    files = {"transformer/config.json": transformer_config(config), "README.md": "card"}

    def write(out: str, cut: bool) -> None:
        how: dict[str, Any] = {"one_file_bytes": 20_000, "layout": DIFFUSERS}
        how["copies"] = {"vae": vae}
        with CheckpointWriter(tmp_path / out, specs, identity={}, resume=True, **how) as writer:
            for block, names in groupby(sorted(state, key=block_of), block_of):
                if cut and block == 1:
                    raise KeyboardInterrupt
                for name in names:
                    if name not in writer.written:
                        writer.add(name, state[name])
                writer.commit(None)
            writer.write_files(files)

    with pytest.raises(KeyboardInterrupt):
        write("cut", cut=True)
    assert [path.name for path in tmp_path.glob("cut*")] == ["cut.partial"]
    write("cut", cut=False)
    write("whole", cut=False)
    one, other = (
        {path.relative_to(root).as_posix(): path.read_bytes() for path in files_of(root)}
        for root in (tmp_path / "cut", tmp_path / "whole")
    )
    assert one == other
    assert one["vae/config.json"] == b"weights"
    assert not (tmp_path / "cut" / "vae" / "config.json").is_symlink()
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in one
    assert all(torch.equal(load(tmp_path / "cut").state_dict()[n], t) for n, t in state.items())


def files_of(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_a_tensor_without_a_name_in_the_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="odd"):
        write_checkpoint(tmp_path / "out", {"odd": torch.zeros(1)}, {}, layout=DIFFUSERS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", EXPORT_LAYOUTS)
def test_an_export_that_fails_leaves_nothing(
    layout: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(OutputError, match="no space left"):
        export(converted, tmp_path / "out", layout)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when weights are read."""

    def refuse(_: OpenCheckpoint, name: str) -> torch.Tensor:
        pytest.fail(f"{name} was read")

    monkeypatch.setattr(OpenCheckpoint, "read", refuse)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("layout", EXPORT_LAYOUTS)
def test_a_taken_folder_is_refused_before_weights_are_read(
    layout: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    file.write_text("mine")
    for out in (taken, file, file / "out"):
        with pytest.raises(OutputError, match=r"taken|file"):
            export(converted, out, layout)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="GB are free"):
        export(converted, tmp_path / "out", layout)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "taken"]


def test_a_taken_folder_is_refused_before_a_download(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(OutputError, match="exists already"):
        export("owner/that-nobody-asks-for", tmp_path / "taken")


def killed(source: Path, out: Path, layout: str, touch: int) -> bool:
    """Export in a process that is killed before the given read of a tensor or sync of a file."""
    child = os.fork()
    if child == 0:
        left = iter(range(touch))

        def end(read: Any) -> Any:
            def or_end(*args: Any, **more: Any) -> Any:
                if next(left, None) is None:
                    os._exit(9)
                return read(*args, **more)

            return or_end

        try:
            OpenCheckpoint.read = end(OpenCheckpoint.read)
            os.fsync = end(os.fsync)
            export(source, out, layout)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("layout", EXPORT_LAYOUTS)
def test_a_killed_export_can_be_repeated(layout: str, converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "whole", layout)
    whole = {path.name: path.read_bytes() for path in files_of(tmp_path / "whole")}
    tensors = len(open_checkpoint(converted).names)
    for touch in (3, tensors):
        place = tmp_path / str(touch)
        place.mkdir()
        assert killed(converted, place / "out", layout, touch)
        assert (place / "out.partial").is_dir()
        export(converted, place / "out", layout)
        assert [path.name for path in place.iterdir()] == ["out"]
        assert {path.name: path.read_bytes() for path in files_of(place / "out")} == whole


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("layout", EXPORT_LAYOUTS)
def test_an_export_keeps_files_of_others(layout: str, converted: Path, tmp_path: Path) -> None:
    for name in ("other", "out"):
        (tmp_path / f"{name}.partial" / "checkpoint").mkdir(parents=True)
    (tmp_path / "other.partial" / "mine").write_text("mine")
    (tmp_path / "out.partial" / "identity.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="in the way: it holds other files"):
        export(converted, tmp_path / "other", layout)
    with pytest.raises(OutputError, match="holds an interrupted conversion") as caught:
        export(converted, tmp_path / "out", layout)
    assert "--resume" in caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_keeps_an_interrupted_conversion(
    teacher: Path, converted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(PowerCutError):
        convert(teacher, out, CHEAP, PowerCut("converting", 1))
    for layout in EXPORT_LAYOUTS:
        with pytest.raises(OutputError, match="holds an interrupted conversion"):
            export(converted, out, layout)
    convert(teacher, out, CHEAP, resume=True)
    assert not (tmp_path / "out.partial").exists()


def test_wrong_options_are_refused(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    with pytest.raises(ConfigError, match="unknown layout 'difusers'") as caught:
        export(teacher, tmp_path / "out", "difusers")
    assert "diffusers" in caught.value.hint
    with pytest.raises(ConfigError, match="no state dicts"):
        export(teacher, tmp_path / "out", "native", "generator")
    with pytest.raises(ConfigError, match="no reader"):
        export(teacher, tmp_path / "out", "self_forcing", "generatr")
    assert refused(vmla("convert", teacher, "-o", tmp_path / "out", "--layout", "wan"))
    assert not (tmp_path / "out").exists()
    ran = vmla("export", teacher, "-o", tmp_path / "out", "--layout", "self_forcing")
    assert ran.code == 0
    assert "model.pt" in ran.out.replace("\n", "")
