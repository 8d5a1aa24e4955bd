"""A conversion appears whole, reloads bit for bit, loses less with more room, or is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CLIPS, CONVERT, EVALUATE, MODEL, Vmla, refused
from conftest import chunk_timesteps, tiny_clip
from safetensors.torch import save_file
from torch import Tensor

import vmla_convert
from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.config import ConvertConfig, DataConfig, to_dict
from vmla_convert.errors import CheckpointError, ConfigError, OutputError, VmlaError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.factor import Evidence
from vmla_convert.pipelines import convert as pipeline
from vmla_convert.pipelines.calibrate import calibrate
from vmla_convert.pipelines.convert import convert, convert_model
from vmla_convert.pipelines.data import open_clips
from vmla_convert.pipelines.evaluate import HeldOut
from vmla_convert.pipelines.load import load
from vmla_convert.pipelines.pretrain import save_self_forcing

pytest_plugins = ["checkpoints"]

FRAMES = 6
WEIGHTS = "model.safetensors"


@pytest.fixture
def evidence(dense: CausalWanModel) -> list[Evidence]:
    return calibrate(dense, open_clips(CLIPS), CONVERT.calibration_clips)


def velocity(model: CausalWanModel) -> Tensor:
    """What a model makes of one fixed clip."""
    latents, context = tiny_clip(MODEL, FRAMES)
    return model(latents, chunk_timesteps(MODEL, FRAMES), context, torch.arange(FRAMES))


def test_the_folder_holds_weights_config_provenance_and_card_and_nothing_else(
    converted: Path,
) -> None:
    names = {"config.json", "conversion.json", "README.md", WEIGHTS}
    assert {path.name for path in converted.iterdir()} == names
    assert [path.name for path in converted.parent.iterdir()] == ["converted"]


def test_reloading_gives_the_model_that_was_made_in_memory(
    converted: Path, dense: CausalWanModel, evidence: list[Evidence]
) -> None:
    made = convert_model(dense, CONVERT, evidence)
    loaded = load(converted)
    assert loaded.config == made.config
    assert torch.equal(velocity(loaded), velocity(made))
    assert torch.equal(velocity(loaded), velocity(load(converted)))
    assert not torch.equal(velocity(loaded), velocity(dense))


def test_converting_again_gives_the_same_bytes(
    teacher: Path, converted: Path, tmp_path: Path
) -> None:
    convert(teacher, tmp_path / "out", CONVERT)
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (converted / name).read_bytes()


def test_all_but_self_attention_keeps_bytes_and_dtype(teacher: Path, converted: Path) -> None:
    before, after = open_checkpoint(teacher), open_checkpoint(converted)
    dropped = {name for name in before.names if name not in after.names}
    parts = ("k.weight", "k.bias", "v.weight", "v.bias", "norm_k.weight")
    assert dropped == {f"blocks.{layer}.self_attn.{part}" for layer in (0, 1) for part in parts}
    for name in before.names.keys() - dropped:
        was, now = before.read(name), after.read(name)
        assert (was.dtype, now.dtype) == (torch.bfloat16, torch.bfloat16)
        assert torch.equal(was, now)


def test_the_new_projections_are_float32_and_alive(teacher: Path, converted: Path) -> None:
    kept, opened = open_checkpoint(teacher).names, open_checkpoint(converted)
    new = [opened.read(name) for name in opened.names if name not in kept]
    assert len(new) == 11 * MODEL.geometry.num_layers
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in new)


def test_config_json_names_sizes_and_keeps_the_rest(converted: Path) -> None:
    told = json.loads((converted / "config.json").read_text())["model"]
    mla = told.pop("mla")
    assert told == json.loads(json.dumps(to_dict(MODEL)))
    assert (mla["kv_lora_rank"], mla["init"]) == ([8, 8], "calibrated")
    assert [len(pairs) for pairs in mla["rope_pairs"]] == [2, 2]


def test_conversion_json_says_what_made_the_folder(teacher: Path, converted: Path) -> None:
    told = json.loads((converted / "conversion.json").read_text())
    assert told["source"] == {
        "name": "checkpoint",
        "sha256": hashlib.sha256((teacher / "model.pt").read_bytes()).hexdigest(),
        "state_key": "generator_ema",
        "family": "self_forcing",
    }
    assert told["convert"] == to_dict(CONVERT)
    assert told["versions"]["vmla_convert"] == vmla_convert.__version__
    assert told["convert_seconds"] > 0
    assert told["peak_rss_bytes"] > 2**20


def test_the_card_inherits_the_licence_and_leaves_an_unknown_base_model_out(
    converted: Path,
) -> None:
    _, front, _ = (converted / "README.md").read_text().split("---\n", 2)
    assert "license: apache-2.0" in front
    assert "base_model" not in front


def test_the_card_names_a_known_base_model(tmp_path: Path, dense: CausalWanModel) -> None:
    config = replace(MODEL, base_model="Wan-AI/Wan2.1-T2V-1.3B")
    save_self_forcing(dense.state_dict(), config, tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out", replace(CONVERT, init="spectral"))
    _, front, _ = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert "base_model: Wan-AI/Wan2.1-T2V-1.3B" in front


def test_the_promised_cache_is_the_one_that_is_kept(converted: Path) -> None:
    model = load(converted)
    assert model.config.mla is not None
    widths = [sum(attention.entry_widths) for attention in model.self_attentions()]
    assert widths == [8 + 4 + 1, 8 + 4 + 1]
    assert widths == [model.config.mla.cache_scalars(layer) for layer in range(2)]
    assert model.config.cache_cut() == pytest.approx(1 - 13 / 96)


def test_sizes_default_to_the_papers_shares(teacher: Path) -> None:
    planned = pipeline.plan_conversion(open_checkpoint(teacher), ConvertConfig("spectral"))
    assert planned.budget == (48 // 8, 24 // 8)


@pytest.mark.parametrize("moment", [0, 1])
def test_killed_midway_it_leaves_nothing(
    moment: int, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = pipeline.factor_layer

    def killed(read: pipeline.Read, plan: object, config: object, layer: int, known: object) -> ...:
        if layer == moment:
            assert (tmp_path / "deep" / "out.partial").is_dir()
            raise KeyboardInterrupt
        return factor(read, plan, config, layer, known)  # pyright: ignore

    monkeypatch.setattr(pipeline, "factor_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(teacher, tmp_path / "deep" / "out", CONVERT)
    assert not list((tmp_path / "deep").iterdir())


# Of `calibrated` alone: `spectral` promises less error in the weights, which test_factor proves,
# and that may cost velocity.
def test_more_rank_loses_less(dense: CausalWanModel, evidence: list[Evidence]) -> None:
    held_out = HeldOut(dense, EVALUATE)
    sizes = [replace(CONVERT, kv_lora_rank=rank) for rank in (2, 6, 16, 32, 48)]
    errors = [held_out.measure(convert_model(dense, s, evidence)).velocity_error for s in sizes]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("rank", [2, 6, 16])
def test_calibration_beats_the_weights_alone(
    rank: int, dense: CausalWanModel, evidence: list[Evidence]
) -> None:
    held_out = HeldOut(dense, EVALUATE)
    calibrated, spectral = (
        held_out.measure(
            convert_model(dense, replace(CONVERT, init=init, kv_lora_rank=rank), evidence)
        ).velocity_error
        for init in ("calibrated", "spectral")
    )
    assert calibrated < spectral


def test_the_seed_decides_random_projections(dense: CausalWanModel) -> None:
    first, again, other = (
        velocity(convert_model(dense, replace(CONVERT, init="random", seed=seed), None))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_dry_run_writes_nothing_and_foretells_the_size(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    sizes = ("--kv-lora-rank", "8", "--qk-rope-head-dim", "4")
    ran = vmla("convert", teacher, "-o", tmp_path / "out", "--dry-run", "--json", *sizes)
    assert ran.code == 0
    told = json.loads(ran.out)
    header = (converted / WEIGHTS).stat().st_size - told["weights (bytes)"]
    assert 0 < header < 20_000
    assert told["numbers cached per token and layer"] == 13
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_the_pipeline_writes(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    sizes = ("--kv-lora-rank", "8", "--qk-rope-head-dim", "4", "--init", "spectral")
    ran = vmla("convert", teacher, "-o", tmp_path / "out", *sizes)
    assert ran.code == 0
    assert f"wrote: {tmp_path / 'out'}" in ran.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in converted.iterdir()
    }


def a_missing_file(folder: Path, _: Path) -> Path:
    return folder / "no.pt"


def a_garbage_pickle(folder: Path, _: Path) -> Path:
    (folder / "x.pt").write_bytes(b"\x80garbage" * 9)
    return folder / "x.pt"


def a_garbage_safetensors(folder: Path, _: Path) -> Path:
    (folder / "x.safetensors").write_bytes(b"\xffgarbage" * 9)
    return folder / "x.safetensors"


def an_unknown_layout(folder: Path, _: Path) -> Path:
    save_file({"encoder.weight": torch.ones(2, 2)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def an_empty_folder(folder: Path, _: Path) -> Path:
    return folder


def a_converted_folder(_: Path, converted: Path) -> Path:
    return converted


Source = Callable[[Path, Path], Path]
BAD_SOURCES: list[Source] = [
    a_missing_file,
    a_garbage_pickle,
    a_garbage_safetensors,
    an_unknown_layout,
    an_empty_folder,
    a_converted_folder,
]


@pytest.mark.parametrize("source", BAD_SOURCES)
def test_a_bad_source_is_refused(
    source: Source, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    path = source(tmp_path, converted)
    before = list(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "out", CONVERT)
    assert caught.value.hint
    assert refused(ran := vmla("convert", path, "-o", tmp_path / "out"))
    assert caught.value.message in ran.err
    assert list(tmp_path.iterdir()) == before


# The settings, and what the message or the hint must name.
BAD_SETTINGS = {
    "rank over width": (replace(CONVERT, kv_lora_rank=49), "48"),
    "rank zero": (replace(CONVERT, kv_lora_rank=0), "kv_lora_rank 0"),
    "odd rope": (replace(CONVERT, qk_rope_head_dim=5), "even"),
    "rope over head": (replace(CONVERT, qk_rope_head_dim=26), "24"),
    "rope zero": (replace(CONVERT, qk_rope_head_dim=0), "qk_rope_head_dim 0"),
    "misspelt init": (replace(CONVERT, init="calibratd"), "did you mean 'calibrated'?"),
    "no such data": (replace(CONVERT, data=DataConfig("no.safetensors")), "no.safetensors"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting_is_refused(name: str, teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    settings, word = BAD_SETTINGS[name]
    with pytest.raises(ConfigError) as caught:
        convert(teacher, tmp_path / "out", settings)
    assert caught.value.hint
    assert word in caught.value.message + caught.value.hint
    options = {
        "--init": settings.init,
        "--kv-lora-rank": str(settings.kv_lora_rank),
        "--qk-rope-head-dim": str(settings.qk_rope_head_dim),
        "--data": settings.data.source,
    }
    words = [word for option in options.items() for word in option]
    ran = vmla("convert", teacher, "-o", tmp_path / "out", *words)
    assert refused(ran)
    assert caught.value.message in ran.err
    assert not list(tmp_path.iterdir())


def test_calibration_without_clips_is_refused(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    with pytest.raises(ConfigError, match="calibration_clips 0"):
        convert(teacher, tmp_path / "out", replace(CONVERT, calibration_clips=0))
    ran = vmla("convert", teacher, "-o", tmp_path / "out", "--calibration-clips", "0")
    assert ran.code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_a_taken_place_is_refused_and_kept(
    taken: str, teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    out = tmp_path / "out"
    mine = out / "mine" if taken == "folder" else out
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(OutputError) as caught:
        convert(teacher, out, CONVERT)
    assert caught.value.hint
    assert refused(vmla("convert", teacher, "-o", out))
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


def test_a_wan_checkpoint_cannot_be_calibrated_on_the_demo_world(
    dense: CausalWanModel, tmp_path: Path
) -> None:
    save_self_forcing(dense.state_dict(), replace(MODEL, codec="wan"), tmp_path / "dense")
    with pytest.raises(VmlaError) as caught:
        convert(tmp_path / "dense", tmp_path / "out", CONVERT)
    assert "--init spectral" in caught.value.hint
    convert(tmp_path / "dense", tmp_path / "out", replace(CONVERT, init="spectral"))
    assert (tmp_path / "out").is_dir()
