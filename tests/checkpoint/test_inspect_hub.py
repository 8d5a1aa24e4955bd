"""Inspecting a checkpoint on the Hub takes its headers, and says what a local one would."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODEL, Vmla, refused
from conftest import tiny_model
from hub_stub import Hub, Refusal
from huggingface_hub import constants
from safetensors.torch import save_file

from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import ModelConfig, SourceConfig
from vmla_convert.errors import CheckpointError
from vmla_convert.fitting.inspect import Inspection, inspect_checkpoint
from vmla_convert.loading.load import load
from vmla_convert.progress import Silent
from vmla_convert.tables import to_dict

pytest_plugins = ["checkpoints", "hub_stub"]

REPO = "someone/causal"
# Of a header more is asked than most need: hence a model that is much larger than that.
ASKED = 100_001
LARGE = replace(MODEL, geometry=replace(MODEL.geometry, dim=192, ffn_dim=768, num_layers=4))


def settings_of(config: ModelConfig) -> dict[str, Any]:
    kept = ("latent_size", "chunk_frames", "cache", "sampler", "media", "licence")
    return {name: to_dict(config)[name] for name in kept}


@pytest.fixture(scope="module")
def dense_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "dense"
    own = {"num_heads": LARGE.geometry.num_heads, "vmla": settings_of(LARGE)}
    texts: dict[str, Any] = {"config.json": own}
    write_checkpoint(folder, tiny_model(LARGE).state_dict(), texts, one_file_bytes=4_000_000)
    return folder


def put(stub: Hub, folder: Path, inside: str = "") -> None:
    files = {f"{inside}{file.name}": file.read_bytes() for file in folder.iterdir()}
    stub.put(REPO, {"README.md": b"", **files})


def facts(told: Inspection) -> dict[str, Any]:
    """All but whose it is."""
    table = asdict(told)
    for model in (table["model"], table["converted"]):
        del model["base_model"]
    del table["path"]
    return table


def cached() -> set[str]:
    snapshots = Path(constants.HF_HUB_CACHE).rglob("snapshots/*/**/*")
    return {path.name for path in snapshots if path.is_file()}


@pytest.mark.parametrize("inside", ["", "transformer/"])
def test_headers_tell_of_a_dense_checkpoint_what_it_tells_itself(
    inside: str, dense_shards: Path, stub: Hub
) -> None:
    put(stub, dense_shards, inside)
    told = inspect_checkpoint(REPO)
    assert facts(told) == facts(inspect_checkpoint(dense_shards))
    assert (told.path, told.model.base_model) == (REPO, REPO)
    small = ("config.json", "model.safetensors.index.json")
    sizes = [path.stat().st_size for path in dense_shards.iterdir() if path.name not in small]
    beside = sum((dense_shards / name).stat().st_size for name in small)
    assert stub.served <= len(sizes) * ASKED + beside < sum(sizes) / 10
    assert cached() == set(small), "a part of a file must not pass for the whole"


def test_headers_tell_of_a_conversion_what_it_tells_itself(converted: Path, stub: Hub) -> None:
    put(stub, converted)
    told = inspect_checkpoint(f"{REPO}@main")
    assert facts(told) == facts(inspect_checkpoint(converted))
    assert told.family == "vmla"
    assert told.model.base_model == "unknown", "it says itself what it came from"
    assert "model.safetensors" not in cached()


def test_what_is_in_the_cache_is_read_there(
    converted: Path, stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(stub, converted)
    load(REPO)
    served = stub.served
    told = inspect_checkpoint(REPO)
    assert stub.served == served
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert facts(inspect_checkpoint(REPO)) == facts(told)


def test_spectra_need_the_weights(dense_shards: Path, stub: Hub) -> None:
    put(stub, dense_shards)
    assert inspect_checkpoint(REPO, spectra=True).spectrum
    assert {path.name for path in dense_shards.iterdir()} == cached()


class Notes(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def test_a_pickle_is_downloaded_and_that_is_said_before(teacher: Path, stub: Hub) -> None:
    put(stub, teacher)
    notes = Notes()
    told = inspect_checkpoint(REPO, progress=notes)
    assert facts(told) == facts(inspect_checkpoint(teacher))
    assert notes.told == [
        f"model.pt of {REPO} is a torch pickle, which has no header: downloading 0.00 GB"
    ]
    inspect_checkpoint(REPO, progress=notes)
    assert len(notes.told) == 1, "it is here now"


def test_a_setting_is_taken_as_of_a_local_one(dense_shards: Path, stub: Hub) -> None:
    put(stub, dense_shards)
    told = inspect_checkpoint(SourceConfig(REPO, overrides=("cache.window_frames=8",)))
    assert told.model.cache.window_frames == 8


def test_a_file_that_is_not_whole_is_told_of(stub: Hub, vmla: Vmla) -> None:
    stub.put(REPO, {"model.safetensors": b"\xff" * 20})
    ran = vmla("inspect", REPO)
    assert refused(ran)
    assert REPO in ran.err
    assert "'model.safetensors'" in ran.err


def test_what_cannot_be_converted_is_refused_by_its_header(
    tmp_path: Path, stub: Hub, vmla: Vmla
) -> None:
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    put(stub, tmp_path)
    ran = vmla("inspect", REPO)
    assert refused(ran)
    assert f"{REPO}/model.safetensors is quantised" in ran.err


def test_an_index_that_does_not_fit_is_refused(dense_shards: Path, stub: Hub) -> None:
    put(stub, dense_shards)
    index = json.loads((dense_shards / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = next(iter(index["weight_map"].values()))
    files = {name: blob.content for name, blob in stub.repos[REPO].files.items()}
    stub.put(REPO, {**files, "model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(CheckpointError, match="lists tensors that its shards do not hold: more"):
        inspect_checkpoint(REPO)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_refusal_is_told(method: str, dense_shards: Path, stub: Hub, vmla: Vmla) -> None:
    put(stub, dense_shards)
    stub.refusals.append(Refusal(method, "*.safetensors", 403))
    ran = vmla("inspect", REPO)
    assert refused(ran)
    assert f"the Hub does not let you read {REPO}" in ran.err
