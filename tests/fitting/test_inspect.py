"""What inspect says is what a conversion would make."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from checkpoints import MODEL, Vmla, refused

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.known import KNOWN, KnownModel
from vmla_convert.config import CachePolicy, ConvertConfig, Sizes
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.fitting.convert import convert
from vmla_convert.fitting.inspect import inspect_checkpoint
from vmla_convert.loading.load import load
from vmla_convert.tables import to_dict

pytest_plugins = ["checkpoints"]


def test_a_dense_checkpoint_is_described_as_it_is(teacher: Path) -> None:
    told, model = inspect_checkpoint(teacher), load(teacher)
    assert told.path == str(teacher)
    assert told.model == MODEL
    assert told.parameters == sum(p.numel() for p in model.parameters())
    assert (told.nbytes, told.dtypes) == (2 * told.parameters, ["bfloat16"])
    assert (told.family, told.known_model, told.note) == ("self_forcing", None, "")
    assert (told.unknown, told.missing) == ((), ())
    cache = model.new_cache(1)
    assert told.window_cache_bytes == cache.nbytes // 2  # four bytes a number there, two here


SIZED = [
    ConvertConfig(),
    ConvertConfig(size=Sizes(cut=0.9)),
    ConvertConfig(size=Sizes(7.5), channels=9),
]


@pytest.mark.parametrize("config", SIZED, ids=["default", "cut", "bytes"])
def test_the_foretold_cache_is_the_codecs(
    config: ConvertConfig, teacher: Path, tmp_path: Path
) -> None:
    told = inspect_checkpoint(teacher, config)
    convert(teacher, tmp_path / "out", replace(config, calibrate=False))
    model = load(tmp_path / "out")
    assert told.converted == replace(model.config, codec=told.converted.codec)
    assert told.converted.codec and model.config.codec
    assert told.converted.codec.size == model.config.codec.size
    tokens = MODEL.cache.window_frames * MODEL.tokens_per_frame
    cached = model.new_cache(1).nbytes
    # Whole bytes in every layer, and never more than was asked for.
    assert told.converted_window_cache_bytes - 2 * tokens < cached
    assert cached <= told.converted_window_cache_bytes


def test_every_layer_has_a_spectrum(teacher: Path) -> None:
    spectrum = inspect_checkpoint(teacher, spectra=True).spectrum
    assert [layer.layer for layer in spectrum] == [0, 1]
    for layer in spectrum:
        assert 0 < layer.energy_at_rank < 1
        # An eighth of the width is 6.
        assert 6 < layer.effective_rank_99 <= MODEL.geometry.dim


def test_spectra_are_read_only_when_asked_for(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(OpenCheckpoint, "read", read)
    assert inspect_checkpoint(teacher).spectrum == []
    with pytest.raises(AssertionError):
        inspect_checkpoint(teacher, spectra=True)


def test_a_converted_folder_is_compared_with_nothing(converted: Path) -> None:
    told = inspect_checkpoint(converted, spectra=True)
    assert told.converted == told.model == load(converted).config
    assert told.spectrum == []


def test_sizes_that_do_not_fit_are_refused(teacher: Path) -> None:
    # 48 channels of two bytes.
    inspect_checkpoint(teacher, ConvertConfig(size=Sizes(96)))
    for nbytes in (96.5, 0.5):
        with pytest.raises(ConfigError, match=f"{nbytes:g} bytes"):
            inspect_checkpoint(teacher, ConvertConfig(size=Sizes(nbytes)))


def test_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect_checkpoint(tmp_path / "nothing")


@pytest.fixture
def damaged(teacher: Path, tmp_path: Path) -> Path:
    """The checkpoint without two of its tensors, and with two of somebody else's."""
    folder = shutil.copytree(teacher, tmp_path / "damaged")
    state = torch.load(folder / "model.pt")["generator_ema"]
    for name in GONE:
        del state[f"model.{name}"]
    odd = {f"model.{name}": torch.ones(2) for name in ODD}
    torch.save({"generator_ema": state | odd}, folder / "model.pt")
    return folder


GONE = ("blocks.1.cross_attn.o.bias", "head.modulation")
ODD = ("blocks.0.self_attn.q.lora_A.weight", "vae.conv.bias")


def test_what_lacks_and_what_is_odd_is_told(damaged: Path, teacher: Path, vmla: Vmla) -> None:
    told, whole = inspect_checkpoint(damaged), inspect_checkpoint(teacher)
    assert (told.unknown, told.missing) == (ODD, GONE)
    assert (told.model, told.converted) == (whole.model, whole.converted)
    ran = vmla("inspect", damaged)
    assert ran.code == 0
    assert "Unknown tensors" in ran.out
    assert "Missing tensors" in ran.out
    assert all(name in ran.out for name in ODD + GONE)
    assert "tensors:" not in vmla("inspect", teacher).out


def test_what_is_not_whole_is_neither_measured_nor_converted(
    damaged: Path, tmp_path: Path, vmla: Vmla
) -> None:
    for ran in (
        vmla("inspect", damaged, "--spectra"),
        vmla("convert", damaged, "-o", tmp_path / "out"),
        vmla("convert", damaged, "-o", tmp_path / "out", "--dry-run"),
    ):
        assert refused(ran)
        assert all(name in ran.err for name in ODD)
    assert not (tmp_path / "out").exists()


def test_the_command_speaks_json(teacher: Path, damaged: Path, vmla: Vmla) -> None:
    ran = vmla("inspect", teacher, "--json", "--bytes-per-token", "8")
    assert ran.code == 0
    told = json.loads(ran.out)
    assert told["model"]["geometry"]["dim"] == 48
    assert told["model"]["licence"] == MODEL.licence
    assert told["converted"]["codec"]["size"]["bytes_per_token"] == 8
    assert told["parameters"] == inspect_checkpoint(teacher).parameters
    assert (told["family"], told["known_model"]) == ("self_forcing", None)
    assert told["unknown"] == told["missing"] == told["spectrum"] == []
    told = json.loads(vmla("inspect", damaged, "--json").out)
    assert (told["unknown"], told["missing"]) == (list(ODD), list(GONE))
    told = json.loads(vmla("inspect", teacher, "--json", "--spectra").out)
    assert [layer["layer"] for layer in told["spectrum"]] == [0, 1]


def test_the_command_takes_what_tensors_do_not_tell(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, vmla: Vmla
) -> None:
    note = "nobody knows how it was trained"
    # The checkpoint's own config.json says the rest.
    monkeypatch.setitem(KNOWN, "tiny", KnownModel("Tiny", ("a/b",), (48,), {}, note=note))
    settings = ("--set", "licence=other", "--set", "cache.window_frames=8")
    options = (teacher, "--key", "generator_ema", "--model", "tiny", *settings)
    told = json.loads(vmla("inspect", *options, "--json").out)
    assert (told["known_model"], told["note"]) == ("tiny", note)
    assert told["model"]["licence"] == "other"
    cache = to_dict(CachePolicy(8, 2, "relative"))
    assert told["model"]["cache"] == cache
    assert told["converted"]["cache"] == cache
    assert 3 * told["window_cache_bytes"] == 4 * inspect_checkpoint(teacher).window_cache_bytes
    shown = vmla("inspect", *options)
    assert shown.code == 0
    assert all(text in shown.out for text in ("tiny", note, "2, 8, 2"))
    # Its config.json tells; of a checkpoint about which nobody says anything, --model may.
    assert "--model" not in vmla("inspect", teacher).out
    assert "--model" in vmla("inspect", teacher, "--set", "licence=unknown").out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--key", "generator"), "generator_ema"),
        (("--model", "self-forcng"), "'self-forcing'"),
        (("--model", "longlive"), "1536"),
        (("--set", "chunk=2"), "'chunk' in --set"),
        (("--set", "cache.window_frames=3"), "no room"),
        (("--lora", "nothing.safetensors"), "nothing.safetensors"),
        (("--file", "nothing.pt"), "nothing.pt"),
    ],
)
def test_the_command_refuses_settings_that_do_not_fit(
    options: tuple[str, str], word: str, teacher: Path, vmla: Vmla
) -> None:
    assert refused(ran := vmla("inspect", teacher, *options))
    assert word in ran.err


def test_the_command_shows_the_cut_and_the_spectrum(teacher: Path, vmla: Vmla) -> None:
    ran = vmla("inspect", teacher, "--bytes-per-token", "12", "--spectra")
    assert ran.code == 0
    # 12 bytes of 192 in each of two layers.
    assert "93.8%" in ran.out
    assert re.search(r"\b192\s+384\s", ran.out)
    assert re.search(r"\b12\s+24\s", ran.out)
    assert "energy at R = 6" in ran.out
    assert "self_forcing" in ran.out
    assert "energy" not in vmla("inspect", teacher).out


def test_the_command_shows_a_converted_folder(converted: Path, vmla: Vmla) -> None:
    ran = vmla("inspect", converted)
    assert ran.code == 0
    assert "86.5%" in ran.out
    assert "energy" not in ran.out


def test_the_command_refuses_nothing_and_bad_sizes(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    assert refused(vmla("inspect", tmp_path / "nothing"))
    assert refused(vmla("inspect", teacher, "--bytes-per-token", "97"))
    assert refused(vmla("inspect", teacher, "--cut", "0.9", "--bytes-per-token", "8"))
