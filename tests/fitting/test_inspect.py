"""`inspect` describes a checkpoint, and predicts the cache that a conversion would make."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from checkpoints import MODEL, Vmla, refused

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.config import ConvertConfig, Sizes
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.fitting.convert import convert
from vmla_convert.fitting.inspect import inspect_checkpoint
from vmla_convert.loading.load import load

pytest_plugins = ["checkpoints"]

GONE = ("blocks.1.cross_attn.o.bias", "head.modulation")
ODD = ("blocks.0.self_attn.q.lora_A.weight", "vae.conv.bias")
SIZED = [
    ConvertConfig(),
    ConvertConfig(size=Sizes(cut=0.9)),
    ConvertConfig(size=Sizes(7.5), channels=9),
]


def test_a_dense_checkpoint_is_described(teacher: Path) -> None:
    facts, model = inspect_checkpoint(teacher), load(teacher)
    assert facts.path == str(teacher)
    assert facts.model == MODEL
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert (facts.nbytes, facts.dtypes) == (2 * facts.parameters, ["bfloat16"])
    assert (facts.family, facts.known_model, facts.note) == ("self_forcing", None, "")
    assert (facts.unknown, facts.missing, facts.spectrum) == ((), (), [])
    # The model's cache holds four bytes a number, the prediction counts two.
    assert facts.window_cache_bytes == model.new_cache(1).nbytes // 2


@pytest.mark.parametrize("config", SIZED, ids=["default", "cut", "bytes"])
def test_the_predicted_cache_is_the_codecs(
    config: ConvertConfig, teacher: Path, tmp_path: Path
) -> None:
    facts = inspect_checkpoint(teacher, config)
    convert(teacher, tmp_path / "out", replace(config, calibrate=False))
    model = load(tmp_path / "out")
    assert facts.converted == replace(model.config, codec=facts.converted.codec)
    assert facts.converted.codec and model.config.codec
    assert facts.converted.codec.size == model.config.codec.size
    tokens = MODEL.cache.window_frames * MODEL.tokens_per_frame
    cached = model.new_cache(1).nbytes
    # Every layer stores whole bytes, and never more than asked for.
    assert facts.converted_window_cache_bytes - 2 * tokens < cached
    assert cached <= facts.converted_window_cache_bytes


def test_spectra_are_computed_only_when_asked_for(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spectrum = inspect_checkpoint(teacher, spectra=True).spectrum
    assert [layer.layer for layer in spectrum] == [0, 1]
    for layer in spectrum:
        assert 0 < layer.energy_at_rank < 1
        assert MODEL.geometry.dim // 8 < layer.effective_rank_99 <= MODEL.geometry.dim

    def refuse(*_: object) -> NoReturn:
        pytest.fail("a weight that should not have been read")

    monkeypatch.setattr(OpenCheckpoint, "read", refuse)
    assert inspect_checkpoint(teacher).spectrum == []


def test_a_converted_checkpoint_has_no_further_conversion(converted: Path) -> None:
    facts = inspect_checkpoint(converted, spectra=True)
    assert facts.converted == facts.model == load(converted).config
    assert facts.spectrum == []


def test_missing_checkpoints_and_bad_sizes_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect_checkpoint(tmp_path / "nothing")
    # 48 channels of two bytes are the most.
    inspect_checkpoint(teacher, ConvertConfig(size=Sizes(96)))
    for nbytes in (96.5, 0.5):
        with pytest.raises(ConfigError, match=f"{nbytes:g}"):
            inspect_checkpoint(teacher, ConvertConfig(size=Sizes(nbytes)))


@pytest.fixture
def damaged(teacher: Path, tmp_path: Path) -> Path:
    """The checkpoint without two of its tensors, and with two foreign ones."""
    folder = shutil.copytree(teacher, tmp_path / "damaged")
    state = torch.load(folder / "model.pt")["generator_ema"]
    for name in GONE:
        del state[f"model.{name}"]
    odd = {f"model.{name}": torch.ones(2) for name in ODD}
    torch.save({"generator_ema": state | odd}, folder / "model.pt")
    return folder


def test_missing_and_unknown_tensors_are_listed_and_not_converted(
    damaged: Path, teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    facts, whole = inspect_checkpoint(damaged), inspect_checkpoint(teacher)
    assert (facts.unknown, facts.missing) == (ODD, GONE)
    assert (facts.model, facts.converted) == (whole.model, whole.converted)
    ran = vmla("inspect", damaged)
    assert ran.code == 0
    assert all(name in ran.out for name in ODD + GONE)
    for ran in (
        vmla("inspect", damaged, "--spectra"),
        vmla("convert", damaged, "-o", tmp_path / "out"),
        vmla("convert", damaged, "-o", tmp_path / "out", "--dry-run"),
    ):
        assert refused(ran)
        assert all(name in ran.err for name in ODD)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_facts_as_json_and_as_tables(
    teacher: Path, converted: Path, vmla: Vmla
) -> None:
    facts = json.loads(vmla("inspect", teacher, "--json", "--bytes-per-token", "8").out)
    assert facts["model"]["geometry"]["dim"] == 48
    assert facts["converted"]["codec"]["size"]["bytes_per_token"] == 8
    assert facts["parameters"] == inspect_checkpoint(teacher).parameters
    assert facts["unknown"] == facts["missing"] == facts["spectrum"] == []
    ran = vmla("inspect", teacher, "--bytes-per-token", "12", "--spectra")
    assert ran.code == 0
    # 12 of 192 bytes in each layer.
    assert all(word in ran.out for word in ("93.8%", "self_forcing", "energy"))
    ran = vmla("inspect", converted)
    assert ran.code == 0
    assert "86.5%" in ran.out
    assert "energy" not in ran.out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--set", "source.key=generator"), "generator_ema"),
        (("--model", "self-forcng"), "self-forcing"),
        (("--model", "longlive"), "1536"),
        (("--lora", "nothing.safetensors"), "nothing.safetensors"),
        (("--file", "nothing.pt"), "nothing.pt"),
        (("--bytes-per-token", "97"), "97"),
    ],
)
def test_the_command_refuses_settings_that_do_not_fit(
    options: tuple[str, str], word: str, teacher: Path, vmla: Vmla
) -> None:
    assert refused(ran := vmla("inspect", teacher, *options))
    assert word in ran.err
