"""A codec file: contents, bytes, sizes, and the errors of sizes and settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CLIPS, EVALUATE, MODEL, PowerCut, PowerCutError, Vmla
from codec_files import (
    CODEC,
    DIM,
    LAYERS,
    MADE,
    NAMES,
    QUICK,
    TRAINED,
    Pair,
    codec_state,
    near,
    velocity,
)
from safetensors.torch import load_file

from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.config import ConvertConfig, RankPlan, RuntimeConfig, Sizes
from vmla_convert.errors import CheckpointError, ConfigError, OutputError
from vmla_convert.fitting.calibrate import calibrate, model_blocks
from vmla_convert.fitting.codec import fit_model
from vmla_convert.fitting.convert import convert
from vmla_convert.generating.generate import generate
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.maths.quantise import TABLE_SIZE, WHOLE_BITS, WIDTHS
from vmla_convert.maths.rates import Rate
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.media.clips import open_clips

pytest_plugins = ["checkpoints", "codec_files"]

TOKENS = MODEL.cache.window_frames * MODEL.tokens_per_frame


def test_the_folder_holds_the_codec_and_no_copy_of_the_base(teacher: Path, codec: Path) -> None:
    assert {path.name for path in codec.iterdir()} == NAMES
    stored = load_file(codec / CODEC)
    parts = ("encode", "decode", "mean", "energies", "tables", "distortions")
    assert stored.keys() == {f"blocks.{i}.codec.{p}" for i in range(LAYERS) for p in parts}
    assert not stored.keys() & open_checkpoint(teacher).names.keys()
    assert [path.name for path in codec.parent.iterdir()] == [codec.name]


@pytest.mark.parametrize(("dtype", "itemsize"), [(None, 2), ("float16", 2), ("float32", 4)])
def test_the_file_has_the_bytes_of_the_formula(
    dtype: Any, itemsize: int, teacher: Path, tmp_path: Path
) -> None:
    channels = 24
    before = {path: path.read_bytes() for path in teacher.iterdir()}
    convert(teacher, tmp_path / "kv", replace(QUICK, channels=channels, dtype=dtype))
    content = (tmp_path / "kv" / CODEC).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    maps = 2 * channels * 2 * DIM * itemsize
    rest = 4 * (2 * DIM + channels + TABLE_SIZE + len(WIDTHS))
    assert len(content) - header == LAYERS * (maps + rest)
    assert {path: path.read_bytes() for path in teacher.iterdir()} == before


def test_a_loaded_model_runs_with_the_stored_numbers(codec: Path) -> None:
    stored = load_file(codec / CODEC)
    running, narrow = (codec_state(load(codec, dtype=d)) for d in (torch.float32, torch.bfloat16))
    assert stored.keys() == running.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.bfloat16 if name in TRAINED else torch.float32)
        assert torch.equal(running[name].to(tensor.dtype), tensor)
        assert tensor.isfinite().all() and tensor.any()
        # Tables stay float32 in a bfloat16 model.
        assert torch.equal(narrow[name], tensor)


def test_converting_twice_gives_the_same_bytes(teacher: Path, codec: Path, tmp_path: Path) -> None:
    convert(teacher, tmp_path / "again", MADE)
    for name in (CODEC, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (codec / name).read_bytes()
    convert(teacher, tmp_path / "other", replace(MADE, seed=1))
    assert (tmp_path / "other" / CODEC).read_bytes() != (codec / CODEC).read_bytes()


@pytest.mark.parametrize("before", range(LAYERS))
@pytest.mark.parametrize("label", ["calibrating", "weighing errors", "fitting codecs"])
def test_an_interrupted_conversion_resumes_to_the_same_bytes(
    label: str, before: int, teacher: Path, codec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "kv"
    with pytest.raises(PowerCutError):
        convert(teacher, out, MADE, PowerCut(label, before))
    assert not out.exists()
    assert list(tmp_path.iterdir())
    convert(teacher, out, MADE, resume=True)
    assert (out / CODEC).read_bytes() == (codec / CODEC).read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_a_conversion_of_changed_weights_is_not_resumed(pair: Pair, tmp_path: Path) -> None:
    """Calibration depends on every weight, not only on those of keys and values."""
    out = tmp_path / "new"
    with pytest.raises(PowerCutError):
        convert(pair.base, out, MADE, PowerCut("fitting codecs", 1))
    pair.change_base(lambda state: state["blocks.0.ffn.0.bias"].add_(1))
    with pytest.raises(OutputError):
        convert(pair.base, out, MADE, resume=True)


def test_calibration_and_size_lower_the_error(
    teacher: Path, codec: Path, dense: CausalWanModel, tmp_path: Path
) -> None:
    convert(teacher, tmp_path / "kv", QUICK)
    held_out = HeldOut(dense, EVALUATE)

    def error(folder: Path, nbytes: float) -> float:
        return held_out.measure(load(folder, bytes_per_token=nbytes)).velocity_error

    errors = [error(codec, nbytes) for nbytes in (2, 8, 40, 80)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]
    assert 0 < errors[1] < error(tmp_path / "kv", 8) < 1
    config = load(tmp_path / "kv").config
    assert config.codec and not config.codec.calibrated


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (QUICK, Sizes(cut=0.95)),
        (replace(QUICK, size=Sizes(cut=0.8)), Sizes(cut=0.8)),
        (replace(QUICK, size=Sizes(12.5)), Sizes(12.5)),
        # A 20th of the dense cache is more than two channels.
        (replace(QUICK, channels=2), Sizes(rank=2)),
    ],
    ids=["default", "cut", "bytes", "few channels"],
)
def test_the_default_size_is_the_given_one_or_fits_the_file(
    config: ConvertConfig, size: Sizes, teacher: Path, tmp_path: Path
) -> None:
    convert(teacher, tmp_path / "kv", config)
    model = load(tmp_path / "kv")
    assert model.config.codec and model.config.codec.size == size
    asked = size.token_bytes(MODEL.geometry)
    assert asked * LAYERS - 2 < model.new_cache(1).nbytes / TOKENS <= asked * LAYERS


def test_the_size_can_be_chosen_when_a_codec_is_loaded(codec: Path) -> None:
    assert load(codec, bytes_per_token=20).new_cache(1).nbytes == 20 * LAYERS * TOKENS
    assert load(codec, cut=0.9).new_cache(1).nbytes == 19 * 2 * TOKENS
    model = load(codec)
    runtime = RuntimeConfig(Sizes(rank=5), "model")
    assert model.new_cache(1, runtime).nbytes == 5 * LAYERS * 4 * TOKENS
    assert model.cache_bytes(1, runtime) == model.new_cache(1, runtime).nbytes


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_codec_at_a_size_is_the_codec_of_that_size(
    calibrated: bool, dense: CausalWanModel
) -> None:
    clips = open_clips(CLIPS)
    statistics = calibrate(dense, model_blocks(dense), clips, 1) if calibrated else None
    config = replace(MADE, dtype="float32")
    whole = fit_model(dense, config, statistics)
    for channels in (1, 5, 21):
        alone = fit_model(dense, replace(config, channels=channels), statistics)
        alone.resize(Sizes(rank=channels), quantised=False)
        for part, block in zip(alone.all_blocks(), whole.all_blocks(), strict=True):
            assert part.codec and block.codec
            block.codec.rate = Rate((WHOLE_BITS,) * channels, quantised=False)
            assert part.codec.rate == block.codec.rate
            assert near(block.codec.encode[:channels], part.codec.encode)
            assert near(block.codec.decode[:, :channels], part.codec.decode)
        assert near(velocity(whole), velocity(alone))
        rolled = [torch.cat(list(generate(m, "7", 4, seed=1)), 1) for m in (whole, alone)]
        assert near(rolled[0], rolled[1], 1e-4)


@pytest.mark.parametrize("size", [Sizes(0.5), Sizes(81), Sizes(rank=41), Sizes(cut=0.1)])
def test_a_size_that_a_file_cannot_have_is_refused(size: Sizes, codec: Path) -> None:
    with pytest.raises(ConfigError):
        load(codec).new_cache(1, RuntimeConfig(size))
    with pytest.raises(ConfigError):
        load(codec, bytes_per_token=size.token_bytes(MODEL.geometry))


@pytest.mark.parametrize("dtype", ["int4", "model"])
def test_a_cache_dtype_that_a_codec_cannot_have_is_refused(
    dtype: str, codec: Path, tmp_path: Path, vmla: Vmla
) -> None:
    words = ("--prompt", "7", "-o", tmp_path / "a.mp4", "--frames", "2")
    size = ("--bytes-per-token", "1") if dtype == "model" else ()
    assert vmla("generate", codec, *words, "--cache-dtype", dtype, *size).code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["teacher", "converted"])
def test_only_a_codec_has_a_size(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    with pytest.raises(ConfigError):
        load(folder, cut=0.9)
    with pytest.raises(ConfigError):
        load(folder, bytes_per_token=8)


@pytest.mark.parametrize(
    "config",
    [
        replace(QUICK, size=Sizes(0.5)),
        replace(QUICK, size=Sizes(97)),
        replace(QUICK, size=Sizes(cut=0.4)),
        replace(QUICK, size=Sizes(kv_lora_rank=8)),
        replace(QUICK, size=Sizes(plan=RankPlan((8, 8), (1, 1)))),
        replace(QUICK, channels=97),
        replace(QUICK, init="spectral"),
        replace(QUICK, latent="split"),
    ],
)
def test_settings_that_make_no_codec_are_refused(
    config: ConvertConfig, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(teacher, tmp_path / "kv", config)
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_channels_make_no_mla_layers(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        convert(teacher, tmp_path / "kv", ConvertConfig("mla", channels=8))


def test_a_converted_checkpoint_is_not_converted_again(
    codec: Path, converted: Path, tmp_path: Path
) -> None:
    for folder in (codec, converted):
        with pytest.raises(CheckpointError):
            convert(folder, tmp_path / "kv", MADE)
    assert not list(tmp_path.iterdir())


def test_convert_inspect_generate_and_eval_work_one_after_the_other(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    kv, video = tmp_path / "kv", tmp_path / "a.mp4"
    words = ("convert", teacher, "-o", kv, "--no-calibration", "--json")
    planned = json.loads(vmla(*words, "--dry-run").out)
    assert not list(tmp_path.iterdir())
    assert vmla(*words).code == 0
    (planned_bytes,) = planned["files"].values()
    header = (kv / CODEC).stat().st_size - planned_bytes
    assert 0 < header < 4096
    assert planned["cache_bytes_per_token"] == pytest.approx(9.6)
    inspected = json.loads(vmla("inspect", kv, "--json").out)
    assert inspected["converted"] == inspected["model"]
    assert inspected["parameters"] == sum(t.numel() for t in load_file(kv / CODEC).values())
    words = ("--prompt", "7", "--frames", "4", "-o", video, "--cut", "0.9", "--json")
    assert vmla("generate", kv, *words).code == 0
    assert video.is_file()
    ran = vmla("eval", kv, "--clips", "2", "--json", "--bytes-per-token", "20")
    values = {(row["run"], row["metric"]): row["value"] for row in json.loads(ran.out)}
    assert values["codec", "cache_bytes_per_token"] == pytest.approx(20)
    assert 0 < values["codec", "velocity_error"] < 1
    assert values["dense", "cache_bytes_per_token"] == 2 * 96
