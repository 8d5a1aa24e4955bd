"""Inspecting a checkpoint on the Hub downloads its headers, and says the same as a local one."""

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
from vmla_convert.config import SourceConfig
from vmla_convert.errors import CheckpointError
from vmla_convert.fitting.inspect import Inspection, inspect_checkpoint
from vmla_convert.loading.load import load
from vmla_convert.loading.metadata_files import wan_config
from vmla_convert.progress import Silent

pytest_plugins = ["checkpoints", "hub_stub"]

REPO = "someone/causal"
INDEX = "model.safetensors.index.json"
# huggingface-hub asks for this many bytes of a file to read its header.
HEADER_REQUEST = 100_001
# Every shard is much larger than that request.
LARGE = replace(MODEL, geometry=replace(MODEL.geometry, dim=192, ffn_dim=768, num_layers=4))


@pytest.fixture(scope="module")
def dense_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "dense"
    config = wan_config(LARGE)
    del config["vmla"]["base_model"]
    state = tiny_model(LARGE).state_dict()
    write_checkpoint(folder, state, {"config.json": config}, one_file_bytes=4_000_000)
    return folder


def put(stub: Hub, folder: Path, inside: str = "") -> None:
    files = {f"{inside}{file.name}": file.read_bytes() for file in folder.iterdir()}
    stub.put(REPO, {"README.md": b"", **files})


def facts(found: Inspection) -> dict[str, Any]:
    """All facts but the place of the checkpoint."""
    table = asdict(found)
    for model in (table["model"], table["converted"]):
        del model["base_model"]
    del table["path"]
    return table


def cached() -> set[str]:
    snapshots = Path(constants.HF_HUB_CACHE).rglob("snapshots/*/**/*")
    return {path.name for path in snapshots if path.is_file()}


@pytest.mark.parametrize("inside", ["", "transformer/"])
def test_headers_describe_a_dense_checkpoint(inside: str, dense_shards: Path, stub: Hub) -> None:
    put(stub, dense_shards, inside)
    found = inspect_checkpoint(REPO)
    assert facts(found) == facts(inspect_checkpoint(dense_shards))
    assert (found.path, found.model.base_model) == (REPO, REPO)
    small = ("config.json", INDEX)
    sizes = [path.stat().st_size for path in dense_shards.iterdir() if path.name not in small]
    beside = sum((dense_shards / name).stat().st_size for name in small)
    assert stub.served <= len(sizes) * HEADER_REQUEST + beside < sum(sizes) / 10
    assert cached() == set(small), "a part of a file must not look like the whole file"
    changed = inspect_checkpoint(SourceConfig(REPO, overrides={"cache": {"window_frames": 8}}))
    assert changed.model.cache.window_frames == 8
    assert inspect_checkpoint(REPO, spectra=True).spectrum
    assert cached() == {path.name for path in dense_shards.iterdir()}, "spectra need the weights"


def test_headers_describe_a_conversion_until_it_is_in_the_cache(
    converted: Path, stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(stub, converted)
    found = inspect_checkpoint(f"{REPO}@main")
    assert facts(found) == facts(inspect_checkpoint(converted))
    assert (found.family, found.model.base_model) == ("vmla", "unknown")
    assert "model.safetensors" not in cached()
    load(REPO)
    served = stub.served
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert facts(inspect_checkpoint(REPO)) == facts(found)
    assert stub.served == served


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_note_comes_before_the_download_of_a_pickle(teacher: Path, stub: Hub) -> None:
    put(stub, teacher)
    progress = Notes()
    assert facts(inspect_checkpoint(REPO, progress=progress)) == facts(inspect_checkpoint(teacher))
    (note,) = progress.notes
    assert f"model.pt of {REPO}" in note
    inspect_checkpoint(REPO, progress=progress)
    assert len(progress.notes) == 1, "the second time the file is in the cache"


def test_a_damaged_or_quantised_file_is_refused_by_its_header(
    tmp_path: Path, stub: Hub, vmla: Vmla
) -> None:
    stub.put(REPO, {"model.safetensors": b"\xff" * 20})
    ran = vmla("inspect", REPO)
    assert refused(ran)
    assert REPO in ran.err
    assert "'model.safetensors'" in ran.err
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    put(stub, tmp_path)
    ran = vmla("inspect", REPO)
    assert refused(ran)
    assert f"{REPO}/model.safetensors is quantised" in ran.err


def test_an_index_that_does_not_fit_its_shards_is_refused(dense_shards: Path, stub: Hub) -> None:
    index = json.loads((dense_shards / INDEX).read_text())
    index["weight_map"]["more"] = next(iter(index["weight_map"].values()))
    files = {file.name: file.read_bytes() for file in dense_shards.iterdir()}
    stub.put(REPO, {**files, INDEX: json.dumps(index).encode()})
    with pytest.raises(CheckpointError, match="more"):
        inspect_checkpoint(REPO)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_refusal_is_reported(method: str, dense_shards: Path, stub: Hub, vmla: Vmla) -> None:
    put(stub, dense_shards)
    stub.refusals.append(Refusal(method, "*.safetensors", 403))
    ran = vmla("inspect", REPO)
    assert refused(ran)
    assert REPO in ran.err
    assert "hf auth login" in ran.err
