"""A checkpoint folder appears whole or not at all, however it is cut into shards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vmla_convert.checkpoint.source import TensorSpec, open_source
from vmla_convert.checkpoint.writer import INDEX_NAME, CheckpointWriter, write_checkpoint
from vmla_convert.errors import OutputError

TENSORS = {
    "a": torch.arange(8, dtype=torch.float32).reshape(2, 4),
    "b": torch.ones(16, dtype=torch.bfloat16),
    "c": torch.full((5, 5), 2.0),
    "scalar": torch.tensor(3.0),
}
SPECS = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


@pytest.mark.parametrize("shard_bytes", [1, 40, 64, 10_000])
def test_shards_hold_what_one_file_holds(shard_bytes: int, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write_checkpoint(out, TENSORS, {"config.json": {"é": 1}, "README.md": "card"}, shard_bytes)
    source = open_source(out)
    assert source.specs() == SPECS
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())
    assert json.loads((out / "config.json").read_text("utf-8")) == {"é": 1}
    assert (out / "README.md").read_text() == "card"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_index_names_files_that_exist(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", TENSORS, {}, shard_bytes=64)
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    files = set(index["weight_map"].values())
    assert files == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as shard:
            held = set(shard.keys())
        assert held == {name for name, place in index["weight_map"].items() if place == file}


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", TENSORS, {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_shard_is_written_as_soon_as_it_is_complete(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    with CheckpointWriter(tmp_path / "out", SPECS, shard_bytes=1) as writer:
        for count, (name, tensor) in enumerate(TENSORS.items(), start=1):
            writer.add(name, tensor)
            assert len(list(partial.glob("*.safetensors"))) == count
            assert not (tmp_path / "out").exists()


def test_order_of_adding_does_not_matter(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS, shard_bytes=64) as writer:
        for name in reversed(TENSORS):
            writer.add(name, TENSORS[name])
    source = open_source(tmp_path / "out")
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())


def test_views_ties_and_reused_buffers_are_written_as_they_were_added(tmp_path: Path) -> None:
    buffer = torch.arange(12.0).reshape(3, 4)
    views = {"t": buffer.T, "tied": buffer.T, "rows": buffer[1:], "spread": buffer[:1].expand(3, 4)}
    expected = {name: view.clone() for name, view in views.items()}
    specs = {name: TensorSpec(tuple(view.shape), view.dtype) for name, view in views.items()}
    # One more tensor keeps the shard open while the buffer is cleared.
    with CheckpointWriter(tmp_path / "out", {**specs, **SPECS}) as writer:
        for name, view in views.items():
            writer.add(name, view)
        buffer.zero_()
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    source = open_source(tmp_path / "out")
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("added", range(len(TENSORS) + 1))
def test_a_run_that_dies_leaves_nothing(
    error: type[BaseException], added: int, tmp_path: Path
) -> None:
    def die() -> None:
        with CheckpointWriter(tmp_path / "out", SPECS, shard_bytes=64) as writer:
            writer.write_text("README.md", "card")
            for name in list(TENSORS)[:added]:
                writer.add(name, TENSORS[name])
            raise error

    with pytest.raises(error):
        die()
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_run_is_refused_by_name(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="1 planned tensors were never written: c"),
        CheckpointWriter(tmp_path / "out", SPECS) as writer,
    ):
        for name in TENSORS.keys() - {"c"}:
            writer.add(name, TENSORS[name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a", torch.ones(4, 2), r"\(4, 2\)"),
        ("a", torch.ones(2, 4, dtype=torch.float16), "float16"),
        ("z", torch.ones(1), "not in the plan"),
        ("b", TENSORS["b"], "twice"),
    ],
)
def test_tensors_off_the_plan_are_refused(
    name: str, tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(OutputError, match=message),
        CheckpointWriter(tmp_path / "out", SPECS, shard_bytes=1) as writer,
    ):
        writer.add("b", TENSORS["b"])
        writer.add(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_refused_and_untouched(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    file.write_text("mine")
    for out in (folder, file):
        with pytest.raises(OutputError, match="already there") as caught:
            CheckpointWriter(out, SPECS)
        assert "-o" in caught.value.hint
    assert (folder / "mine.txt").read_text() == file.read_text() == "mine"


def test_a_place_taken_meanwhile_is_refused_and_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="cannot be written") as caught,
        CheckpointWriter(out, {}) as writer,
    ):
        writer.write_text("README.md", "card")
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    assert caught.value.hint
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_folder_is_filled_and_a_stale_partial_cleared(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old.safetensors").write_text("old")
    write_checkpoint(tmp_path / "out", TENSORS, {})
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "model.safetensors"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written") as caught:
        write_checkpoint(tmp_path / "file" / "out", TENSORS, {})
    assert caught.value.hint


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        write_checkpoint(tmp_path / "out", TENSORS, {})
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "model.safetensors", INDEX_NAME, ""])
def test_files_stay_beside_the_weights(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be a file"):
        write_checkpoint(tmp_path / "out", TENSORS, {name: "x"})
    assert list(tmp_path.iterdir()) == []
