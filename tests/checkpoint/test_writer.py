"""A checkpoint folder appears whole or not at all, and a run that was cut short can continue."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vmla_convert.checkpoint import writer
from vmla_convert.checkpoint.layouts import CODEC, DIFFUSERS, NATIVE, Layout
from vmla_convert.checkpoint.source import open_source
from vmla_convert.checkpoint.specs import TensorSpec
from vmla_convert.checkpoint.writer import (
    CheckpointWriter,
    planned_files,
    write_checkpoint,
    write_pickle,
)
from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.storage import output, tensor_store
from vmla_convert.storage.output import (
    check_place,
    copied_bytes,
    new_folder,
    refuse_taken,
)

TENSORS = {
    "head.head.bias": torch.arange(8, dtype=torch.float32).reshape(2, 4),
    "blocks.0.norm3.bias": torch.ones(16, dtype=torch.bfloat16),
    "blocks.10.norm3.bias": torch.full((5, 5), 2.0),
    "blocks.2.norm3.bias": torch.tensor(3.0),
    "blocks.2.norm3.weight": torch.arange(12.0).reshape(3, 4).T,
}
SLOW = pytest.mark.slow
BLOCKS = {name: name.split(".")[1] if name.startswith("blocks") else "" for name in TENSORS}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


SPECS = specs_of(TENSORS)
NBYTES = sum(spec.nbytes for spec in SPECS.values())
# Sizes of one file that give shards, and one file.
SHARDS, ONE = NBYTES - 1, NBYTES


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("layout", [NATIVE, CODEC, DIFFUSERS])
@pytest.mark.parametrize("one_file_bytes", [SHARDS, ONE])
def test_tensors_and_files_come_back(layout: Layout, one_file_bytes: int, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write_checkpoint(out, TENSORS, {"a/c.json": {"é": 1}, "c.md": "é"}, layout, one_file_bytes)
    assert names_in(out.parent) == ["out"]
    found, stored = open_source(out), layout.stored_names(TENSORS)
    assert found.specs() == {stored[name]: spec for name, spec in SPECS.items()}
    assert all(torch.equal(found.read(stored[name]), t) for name, t in TENSORS.items())
    assert json.loads((out / "a" / "c.json").read_text("utf-8")) == {"é": 1}
    assert (out / "c.md").read_text("utf-8") == "é"
    weights = {
        path.relative_to(out).as_posix(): sum(t.nbytes for t in load_file(path).values())
        for path in out.rglob("*.safetensors")
    }
    assert planned_files(SPECS, layout, one_file_bytes) == weights
    assert (len(weights) == 1) == (one_file_bytes == ONE or layout is CODEC)


def test_every_block_is_a_shard_that_the_index_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", TENSORS, {}, one_file_bytes=SHARDS)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == NBYTES
    shards = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert names_in(tmp_path / "out") == [*shards, "model.safetensors.index.json"]
    for file, block in zip(shards, ["", "0", "2", "10"], strict=True):
        held = load_file(tmp_path / "out" / file).keys()
        assert held == {name for name in TENSORS if BLOCKS[name] == block}
        assert held == {name for name, place in index["weight_map"].items() if place == file}


def test_order_of_adding_and_shared_memory_do_not_matter(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    views = {"t": wide.T, "rows": wide[1:], "wide": wide, "spread": wide[:1].expand(3, 4)}
    with CheckpointWriter(tmp_path / "out", {**specs_of(views), **SPECS}) as opened:
        for name, tensor in reversed({**TENSORS, **views}.items()):
            opened.add(name, tensor)
    found = open_source(tmp_path / "out")
    assert all(torch.equal(found.read(name), t) for name, t in {**TENSORS, **views}.items())


def test_a_complete_part_is_on_disk_and_leaves_memory(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS, one_file_bytes=SHARDS) as opened:
        for name, tensor in TENSORS.items():
            opened.add(name, tensor)
            assert opened.written == set(list(TENSORS)[: list(TENSORS).index(name) + 1])
            files = len(list((tmp_path / "out.partial").rglob("*.safetensors")))
            assert files + len(opened._pending) == len({BLOCKS[n] for n in opened.written})
        assert not opened._pending
        assert not (tmp_path / "out").exists()


def test_links_in_copied_folders_are_followed(tmp_path: Path) -> None:
    (tmp_path / "vae" / "deep").mkdir(parents=True)
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "vae" / "deep" / "link").symlink_to(tmp_path / "blob")
    copies = {"vae": tmp_path / "vae"}
    assert copied_bytes(copies) == 7
    with CheckpointWriter(tmp_path / "out", SPECS, copies=copies) as opened:
        for name, tensor in TENSORS.items():
            opened.add(name, tensor)
    copy = tmp_path / "out" / "vae" / "deep" / "link"
    assert copy.read_text() == "weights" and not copy.is_symlink()


def test_a_pickle_is_what_trainers_write(tmp_path: Path) -> None:
    file = write_pickle(tmp_path / "out", NBYTES, iter(TENSORS.items()), "ema", {"a.md": "card"})
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["a.md", "model.pt"]
    state = torch.load(file)
    assert list(state) == ["ema"]
    assert all(torch.equal(state["ema"][name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("added", [0, 2, len(TENSORS)])
def test_a_run_that_dies_without_a_commit_leaves_nothing(
    error: type[BaseException], added: int, tmp_path: Path
) -> None:
    def die() -> None:
        with CheckpointWriter(tmp_path / "out", SPECS, identity=IDENTITY) as opened:
            opened.write_files({"README.md": "card"})
            for name in list(TENSORS)[:added]:
                opened.add(name, TENSORS[name])
            raise error

    def die_in_pickle() -> None:
        def tensors() -> Any:
            yield from list(TENSORS.items())[:added]
            raise error

        write_pickle(tmp_path / "out", 1, tensors(), "model", {})

    for work in (die, die_in_pickle):
        with pytest.raises(error):
            work()
        assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("blocks.2.norm3.bias", torch.ones(4, 2), "(4, 2)"),
        ("blocks.2.norm3.bias", torch.ones((), dtype=torch.float16), "float16"),
        ("z", torch.ones(1), "'z'"),
        ("blocks.0.norm3.bias", TENSORS["blocks.0.norm3.bias"], "'blocks.0.norm3.bias'"),
        ("blocks.10.norm3.bias", TENSORS["blocks.10.norm3.bias"], "blocks.2.norm3.bias"),
    ],
    ids=["shape", "dtype", "not planned", "twice", "incomplete"],
)
def test_tensors_off_the_plan_are_refused(
    name: str, tensor: torch.Tensor, named: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(OutputError) as caught,
        CheckpointWriter(tmp_path / "out", SPECS) as opened,
    ):
        opened.add("blocks.0.norm3.bias", TENSORS["blocks.0.norm3.bias"])
        opened.add(name, tensor)
    assert named in caught.value.message
    assert names_in(tmp_path) == []


def test_taken_places_are_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder/mine", "file"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = files_of(tmp_path)
    for name in ("folder", "file", "link", "dangling", "file/out"):
        for refuse in (refuse_taken, lambda out: check_place(out, 1, resume=True)):
            with pytest.raises(OutputError) as caught:
                refuse(tmp_path / name)
            assert str(tmp_path / name) in caught.value.message and "-o" in caught.value.hint
    assert files_of(tmp_path) == before


def test_a_place_taken_meanwhile_is_refused_and_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def work() -> None:
        with new_folder(out, 1) as folder:
            (folder / "README.md").write_text("card")
            out.mkdir()
            (out / "mine.txt").write_text("mine")

    with pytest.raises(OutputError, match="cannot be written") as caught:
        work()
    assert caught.value.hint
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_folder_is_filled_and_a_stale_partial_cleared(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out.partial" / "checkpoint" / "old.safetensors").write_text("old")
    write_checkpoint(tmp_path / "out", TENSORS, {})
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "model.safetensors"]


def test_a_partial_folder_of_somebody_else_is_never_cleared(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    for refused in (
        lambda: write_checkpoint(tmp_path / "out", TENSORS, {}),
        lambda: check_place(tmp_path / "out", 1, resume=True),
    ):
        with pytest.raises(OutputError, match="in the way"):
            refused()
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "out", TENSORS, {"README.md": "card"}, one_file_bytes=SHARDS)
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


IDENTITY = {"source": "sha", "config": {"rank": (192, 32)}, "version": 1}


def convert(out: Path, resume: bool = True, one_file_bytes: int = SHARDS) -> None:
    """Write as a conversion does: a block, then a commit."""
    how: dict[str, Any] = {"resume": resume, "one_file_bytes": one_file_bytes}
    with CheckpointWriter(out, SPECS, IDENTITY, **how) as opened:
        blocks: list[str] = opened.state or []
        for block in sorted(set(BLOCKS.values()) - set(blocks)):
            for name in (name for name in TENSORS if BLOCKS[name] == block):
                opened.add(name, TENSORS[name])
            blocks.append(block)
            opened.commit(blocks)
        opened.write_files({"README.md": "card", "config.json": {"a": 1}})


def interrupt(out: Path, error: type[BaseException], one_file_bytes: int = SHARDS) -> None:
    """Write a block, commit it, write another block and a file; then fail."""

    def fail() -> None:
        with CheckpointWriter(out, SPECS, IDENTITY, one_file_bytes=one_file_bytes) as opened:
            opened.add("head.head.bias", TENSORS["head.head.bias"])
            opened.commit([""])
            opened.add("blocks.0.norm3.bias", TENSORS["blocks.0.norm3.bias"] * 0)
            opened.write_files({"notes.txt": "not committed"})
            raise error("stop")

    with pytest.raises(error):
        fail()


@pytest.fixture(scope="module", params=[SHARDS, ONE], ids=["shards", "one file"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, bytes]]:
    """The size of one file, and what an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(out, one_file_bytes=request.param)
    assert names_in(out.parent) == ["out"]
    return request.param, files_of(out)


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Run in a process of its own that ends on the spot before its nth touch of the disk."""
    child = os.fork()
    if child == 0:
        touches = iter(range(step))

        def end(event: str, _: tuple[Any, ...]) -> None:
            if event.split(".")[0] in ("open", "os", "shutil") and next(touches, None) is None:
                os._exit(9)

        try:
            sys.addaudithook(end)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "before", ["new", *(pytest.param(n, marks=SLOW) for n in ("resumed", "mistake"))]
)
def test_a_run_killed_anywhere_continues(
    before: str, whole: tuple[int, dict[str, bytes]], tmp_path: Path
) -> None:
    size, expected = whole
    step, killed = 0, True
    while killed:
        place = tmp_path / str(step)
        place.mkdir()
        out = place / "out"
        if before == "resumed":
            interrupt(out, KeyboardInterrupt, size)

        def work(out: Path = out) -> None:
            if before == "mistake":
                interrupt(out, ConfigError, size)
            else:
                convert(out, one_file_bytes=size)

        killed = killed_at(step, work)
        if not out.exists():
            convert(out, one_file_bytes=size)
            assert names_in(place) == ["out"]
        assert files_of(out) == expected
        step += 1
    assert step > 30


@SLOW
# Ctrl-C may come before a `with` closes its file.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_run_interrupted_at_any_line_continues(
    whole: tuple[int, dict[str, bytes]], tmp_path: Path
) -> None:
    size, expected = whole
    step, interrupted = 0, True
    while interrupted:
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        interrupted = interrupted_at(step, lambda out=out: convert(out, one_file_bytes=size))
        if not out.exists():
            convert(out, one_file_bytes=size)
            assert names_in(out.parent) == ["out"]
        assert files_of(out) == expected
        step += 1
    assert step > 100


def interrupted_at(step: int, work: Callable[[], None]) -> bool:
    """Press Ctrl-C at the nth line of the writer and its store."""
    lines = iter(range(step))
    files = {module.__file__ for module in (writer, output, tensor_store)}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and next(lines, None) is None:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OutputError, ConfigError])
def test_a_commit_outlives_all_but_a_mistake(error: type[BaseException], tmp_path: Path) -> None:
    interrupt(tmp_path / "out", error)
    assert names_in(tmp_path) == ([] if error is ConfigError else ["out.partial"])


def test_a_resumed_run_sees_the_last_commit(
    whole: tuple[int, dict[str, bytes]], tmp_path: Path
) -> None:
    size, expected = whole
    interrupt(tmp_path / "out", KeyboardInterrupt, size)
    how: dict[str, Any] = {"resume": True, "one_file_bytes": size}
    with CheckpointWriter(tmp_path / "out", SPECS, IDENTITY, **how) as opened:
        assert opened.written == {"head.head.bias"}
        assert opened.state == [""]
        for name in TENSORS.keys() - opened.written:
            opened.add(name, TENSORS[name])
        opened.write_files({"README.md": "card", "config.json": {"a": 1}})
    assert files_of(tmp_path / "out") == expected


def test_an_interrupted_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", KeyboardInterrupt)
    before = files_of(tmp_path)
    for work in (
        lambda: convert(tmp_path / "out", resume=False),
        lambda: write_checkpoint(tmp_path / "out", TENSORS, {}),
        lambda: write_pickle(tmp_path / "out", 1, [], "model", {}),
        lambda: check_place(tmp_path / "out", 1, resume=False),
    ):
        with pytest.raises(OutputError, match=r"out\.partial") as caught:
            work()
        assert "--resume" in caught.value.hint
    check_place(tmp_path / "out", 1, resume=True)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("identity", "specs", "named"),
    [
        (IDENTITY | {"source": "other"}, SPECS, "source"),
        (IDENTITY | {"seed": 0}, SPECS, "seed"),
        ({"source": "sha", "version": 1}, SPECS, "config"),
        (IDENTITY, {**SPECS, "blocks.2.norm3.bias": TensorSpec((2,), torch.float32)}, "tensors"),
        (IDENTITY, {**SPECS, "d": TensorSpec((0,), torch.int32)}, "parts"),
    ],
)
def test_a_run_of_another_kind_does_not_continue(
    identity: dict[str, Any], specs: dict[str, TensorSpec], named: str, tmp_path: Path
) -> None:
    interrupt(tmp_path / "out", KeyboardInterrupt)
    before = files_of(tmp_path)
    how: dict[str, Any] = {"resume": True, "one_file_bytes": SHARDS}
    with (
        pytest.raises(OutputError, match=named) as caught,
        CheckpointWriter(tmp_path / "out", specs, identity, **how),
    ):
        pass
    assert "same settings" in caught.value.hint
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("damage", ["part gone", "part short", "no JSON", "not a record"])
def test_a_damaged_partial_folder_is_refused(damage: str, tmp_path: Path) -> None:
    interrupt(tmp_path / "out", KeyboardInterrupt)
    partial = tmp_path / "out.partial"
    for file in partial.rglob("*.safetensors"):
        if damage == "part gone":
            file.unlink()
        if damage == "part short":
            file.write_bytes(file.read_bytes()[:-1])
    if damage in ("no JSON", "not a record"):
        (partial / "state.json").write_text("{" if damage == "no JSON" else "[]")
    with pytest.raises(OutputError, match="not as it was left") as caught:
        convert(tmp_path / "out")
    assert f"remove {partial}" in caught.value.hint


def test_what_cannot_be_resumed_is_not_committed(tmp_path: Path) -> None:
    for identity, name in ((None, "head.head.bias"), (IDENTITY, "blocks.2.norm3.bias")):
        with (
            pytest.raises(OutputError),
            CheckpointWriter(tmp_path / "out", SPECS, identity) as opened,
        ):
            opened.add(name, TENSORS[name])
            opened.commit(None)
        assert names_in(tmp_path) == []


@pytest.mark.parametrize("after", [0, 3, 6, 9, 12])
def test_a_disk_that_fills_up_loses_nothing(
    after: int,
    whole: tuple[int, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size, expected = whole
    room, fsync = iter(range(after)), os.fsync

    def filling(handle: int) -> None:
        if next(room, None) is None:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        with pytest.raises(OutputError, match="No space left") as caught:
            convert(tmp_path / "out", one_file_bytes=size)
    assert caught.value.hint
    assert (tmp_path / "out.partial").exists() == (after > 5)
    convert(tmp_path / "out", one_file_bytes=size)
    assert files_of(tmp_path / "out") == expected


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux knows a handle's path")
def test_a_commit_follows_its_parts_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (log.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append("replace"), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("rename"), rename(a, b)))
    with CheckpointWriter(tmp_path / "out", {"a": SPECS["head.head.bias"]}, IDENTITY) as opened:
        opened.add("a", TENSORS["head.head.bias"])
        opened.commit(None)
    identity = ["identity.json.new", "replace", "out.partial"]
    part = ["model.partial", "replace", "checkpoint"]
    commit = ["state.json.new", "replace", "out.partial"]
    assert log[:9] == [*identity, *part, *commit]
    assert log[9:] == ["model.safetensors", "checkpoint", "rename", tmp_path.name]


def test_a_full_disk_is_refused_before_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = {name: TensorSpec((5_000_000,), torch.float32) for name in ("a", "blocks.0.b")}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=35_000_000))
    for work in (
        lambda: CheckpointWriter(tmp_path / "deep" / "out", specs).__enter__(),
        lambda: write_pickle(tmp_path / "deep" / "out", 40_000_000, [], "model", {}),
        lambda: check_place(tmp_path / "deep" / "out", 40_000_000, resume=False),
    ):
        with pytest.raises(OutputError, match=r"0\.04 GB are free") as caught:
            work()
        assert "make room" in caught.value.hint
        assert names_in(tmp_path) == []


def test_a_resumed_run_needs_room_for_the_rest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(tmp_path / "out", KeyboardInterrupt)
    rest = NBYTES - TENSORS["head.head.bias"].nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=rest - 1))
    with pytest.raises(OutputError, match="needs"):
        convert(tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=rest))
    convert(tmp_path / "out")
    assert open_source(tmp_path / "out").specs() == SPECS
