"""`vmla doctor` tells what is installed, what the machine has, and what fits."""

from __future__ import annotations

import json
import re
import tomllib
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import Vmla, refused

from evals.memory import shared_models
from vmla_convert.config import CachePolicy, ConvertConfig, ModelConfig, Recipe
from vmla_convert.doctor import machine, stages
from vmla_convert.doctor.machine import EXTRAS, Device, Machine, examine, free_bytes, hub_login
from vmla_convert.doctor.stages import (
    RELEASED,
    SAVINGS,
    SMALLER_CACHES,
    STAGES,
    Room,
    Stage,
    first_fit,
    needs,
    room_of,
    stage_memory,
    with_savings,
)
from vmla_convert.fitting.codec import plan_codec
from vmla_convert.layers.memory import Memory
from vmla_convert.recipe.read import read_recipe

pytest_plugins = ["checkpoints"]

GB = 10**9
SMALL, LARGE = "Wan 1.3B 480p", "Wan 14B 480p"
TOKEN = "hf_secret"


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    named: dict[str, list[str]] = project["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        declared = {entry.partition(">=")[0] for entry in named[extra]}
        inner = {f"vmla-convert[{','.join(group)}]" for group in [("plots", "video")]}
        assert declared - inner <= set(packages)


def test_a_missing_package_comes_with_the_command_that_adds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = machine._version

    def without_av(package: str) -> str | None:
        return None if package == "av" else installed(package)

    monkeypatch.setattr(machine, "_version", without_av)
    found = examine({})
    assert found.versions["av"] is None
    assert found.versions["torch"] == torch.__version__
    assert "vmla-convert[video]" in found.missing_extras["video"]
    assert "plots" not in found.missing_extras


def test_nobody_is_asked_about_the_hub_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "whoami", refuse)
    assert "hf auth login" in hub_login()


@pytest.mark.parametrize(("status", "word"), [(401, "refuses"), (None, "not checked")])
def test_a_token_is_never_printed_and_no_network_is_no_error(
    status: int | None, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = namedtuple("Response", "status_code")(status)

    def fail() -> None:
        error = RuntimeError(f"no answer for {TOKEN}")
        error.response = response  # pyright: ignore[reportAttributeAccessIssue]
        raise error

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(huggingface_hub, "whoami", fail)
    told = hub_login()
    assert word in told and TOKEN not in told
    monkeypatch.setattr(huggingface_hub, "whoami", lambda: {"name": "ada"})
    assert hub_login().endswith("ada")


def test_free_space_of_a_folder_that_does_not_exist_yet_is_that_of_its_parent(
    tmp_path: Path,
) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.01)


def test_a_driver_that_does_not_start_leaves_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise RuntimeError(f"no driver for {index}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert examine({}).devices == ()


def test_the_smallest_gpu_and_all_processes_count() -> None:
    devices = (Device("a", 24 * GB), Device("b", 16 * GB))
    room = room_of(Machine({}, {}, devices, 64 * GB, 60 * GB, {"outputs": 5 * GB}, ""))
    assert room == Room(16 * GB, 60 * GB, 5 * GB, 2)
    assert room.fits(Memory(14 * GB, 1 * GB, 59 * GB))
    assert not room.fits(Memory(14 * GB, 2 * GB, 59 * GB))
    assert not room.fits(Memory(16 * GB))
    assert not room.fits(Memory(0), 6 * GB)
    assert Room(None, 20 * GB).fits(Memory(15 * GB, 5 * GB, 30 * GB))


def test_more_memory_never_needs_more_savings() -> None:
    for name in (SMALL, LARGE):
        for stage in STAGES:
            rooms = [Room(size * GB, 2000 * GB) for size in (16, 24, 48, 80, 200)]
            found = [with_savings(name, RELEASED[name], stage, room, "krea_14b") for room in rooms]
            fits = [each.fits for each in found]
            assert fits == sorted(fits), (name, stage)
            strongest = [_strength(stage, each.changes) for each in found if each.fits]
            assert strongest == sorted(strongest, reverse=True), (name, stage)


def _strength(stage: Stage, changes: Sequence[str]) -> int:
    """How strong the strongest of some savings is."""
    return max((1 + SAVINGS[stage].index(change) for change in changes), default=0)


def test_a_24_gb_gpu_generates_with_a_codec_and_a_14b_model_does_not_fit() -> None:
    room = Room(24 * GB, 64 * GB)
    small = {need.stage: need for need in needs(SMALL, RELEASED[SMALL], room)}
    large = {need.stage: need for need in needs(LARGE, RELEASED[LARGE], room)}
    assert small["generate"].fits and small["generate dense"].fits
    assert small["generate"].device_bytes < small["generate dense"].device_bytes
    assert not large["generate"].fits and not large["recover"].fits


def test_each_saving_is_a_setting_of_recipes() -> None:
    for stage, savings in SAVINGS.items():
        read_recipe("self_forcing_1_3b", savings)
        small = with_savings(LARGE, RELEASED[LARGE], stage, Room(1, 1), "krea_14b")
        assert not small.fits and not small.changes


def test_no_saving_is_used_that_a_stage_fits_without() -> None:
    model, room = RELEASED["Wan 1.3B 720p"], Room(24 * GB, 64 * GB)

    def read(changes: Sequence[str]) -> Recipe:
        return read_recipe("self_forcing_1_3b", changes)

    found = first_fit(model, read, "recover", room)
    assert found.fits and found.changes
    for change in found.changes:
        fewer = [each for each in found.changes if each != change]
        memory, disk = stage_memory(model, read(fewer), "recover", room)
        assert not room.fits(memory, disk), change
    # A key that the user set stays.
    fixed = {change.partition("=")[0] for change in found.changes}
    assert not fixed & {c.partition("=")[0] for c in first_fit(
        model, read, "recover", room, fixed
    ).changes}  # fmt: skip


def test_a_smaller_cache_is_the_last_choice() -> None:
    dense = replace(RELEASED[LARGE], cache=CachePolicy(window_frames=120))
    model = plan_codec(dense, ConvertConfig())

    def read(changes: Sequence[str]) -> Recipe:
        return read_recipe("krea_14b", changes)

    sparing = [*SAVINGS["generate"], SMALLER_CACHES[1]]
    room = Room(None, stage_memory(model, read(sparing), "generate", Room(None, 0))[0].without_gpu)
    found = first_fit(model, read, "generate", room)
    assert found.fits and SMALLER_CACHES[1] in found.changes
    assert not first_fit(model, read, "generate", room, ["runtime.size.bytes_per_token"]).fits


HEAD = re.compile(
    r"# Fits (one|eight) (\d+) GB GPUs? by formula, with (\d+) GB of host memory and (\d+) GB"
)


@pytest.mark.parametrize(
    ("recipe", "model"),
    [(name, model) for names, model in shared_models().items() for name in names],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_fits_where_its_head_says(recipe: str, model: ModelConfig) -> None:
    text = (Path(__file__).parents[2] / "recipes" / f"{recipe}.toml").read_text()
    found = HEAD.search(text)
    assert found is not None
    processes = {"one": 1, "eight": 8}[found[1]]
    device, host, disk = (int(number) * GB for number in found.groups()[1:])
    room = Room(device, host, disk, processes)
    for stage in STAGES:
        need = with_savings(recipe, model, stage, room, recipe)
        assert need.fits and not need.changes, stage
    # One stage is too large for the next smaller memory.
    less = Room(device * 2 // 3, host, disk, processes)
    if recipe != "longlive_1_3b" and processes == 1:
        assert any(with_savings(recipe, model, s, less, recipe).changes for s in STAGES)


def test_fit_chooses_settings_for_a_size_of_memory(vmla: Vmla, tmp_path: Path) -> None:
    film = ("--prompt", "7", "--frames", 2)
    ran = vmla("generate", "demo", *film, "-o", tmp_path / "a.mp4", "--fit", "24GB")
    assert ran.code == 0 and "fits in 24.0 GB" in ran.err
    ran = vmla("generate", "demo", *film, "-o", tmp_path / "b.mp4", "--fit", "1MB")
    assert refused(ran) and not (tmp_path / "b.mp4").exists()
    ran = vmla("generate", "demo", *film, "-o", tmp_path / "b.mp4", "--fit", "much")
    assert refused(ran) and "much" in ran.err
    # Less than the demo model takes to be calibrated.
    ran = vmla("convert", "demo", "-o", tmp_path / "kv", "--fit", "10MB")
    assert ran.code == 0, ran.err
    assert "convert.calibrate=false" in ran.err
    ran = vmla("recover", tmp_path / "kv", "-o", tmp_path / "more", "--fit", "1MB")
    assert refused(ran) and not (tmp_path / "more").exists()


def test_a_command_says_which_settings_would_fit(
    vmla: Vmla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "own_room", lambda *_: Room(None, 10**7))
    ran = vmla("convert", "demo", "-o", tmp_path / "kv", "--set", "convert.calibration_clips=1")
    assert ran.code == 0, ran.err
    assert "this fits: --set convert.calibrate=false" in " ".join(ran.err.split())


def test_doctor_tells_about_a_checkpoint_as_one_json_document(vmla: Vmla, tmp_path: Path) -> None:
    ran = vmla("doctor", "demo", "-o", str(tmp_path / "later"), "--json")
    assert (ran.code, ran.out.count("\n")) == (0, 1)
    told: dict[str, Any] = json.loads(ran.out)
    models = {need["model"] for need in told["needs"]}
    assert models == {*RELEASED, "demo"}
    assert all(need["fits"] for need in told["needs"] if need["model"] == "demo")
    assert told["machine"]["free_disk_bytes"]["outputs"] > 0


def test_doctor_shows_the_machine_even_if_the_checkpoint_cannot_be_read(
    vmla: Vmla, tmp_path: Path
) -> None:
    ran = vmla("doctor", str(tmp_path / "none.pt"))
    assert ran.code == 2
    assert torch.__version__ in ran.out and SMALL in ran.out
    assert "none.pt" in ran.err and "Traceback" not in ran.err


def test_a_gpu_is_what_stages_must_fit_in(vmla: Vmla, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "found_devices", lambda: (Device("Card", 24 * GB),))
    ran = vmla("doctor")
    assert ran.code == 0
    assert "Card, 24.0 GB" in ran.out
    large = next(line for line in ran.out.splitlines() if line.startswith(LARGE))
    room = Room(24 * GB, 10**15)
    for need in needs(LARGE, RELEASED[LARGE], room):
        if not need.changes:
            assert f"{need.device_bytes / 1e9:.1f} no" in large
