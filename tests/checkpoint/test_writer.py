"""A checkpoint folder appears whole or not at all, and a run that was cut short can go on."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vmla_convert.checkpoint import source, writer
from vmla_convert.checkpoint.source import TensorSpec, open_source
from vmla_convert.checkpoint.writer import (
    CheckpointWriter,
    check_place,
    planned_files,
    write_checkpoint,
)
from vmla_convert.errors import CheckpointError, ConfigError, OutputError

INDEX_NAME = "model.safetensors.index.json"
TENSORS = {
    "a": torch.arange(8, dtype=torch.float32).reshape(2, 4),
    "b": torch.ones(16, dtype=torch.bfloat16),
    "c": torch.full((5, 5), 2.0),
    "scalar": torch.tensor(3.0),
}


def _specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


SPECS = _specs(TENSORS)


@pytest.mark.parametrize("shard_bytes", [1, 40, 64, 10_000])
def test_shards_hold_what_one_file_holds(shard_bytes: int, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write_checkpoint(out, TENSORS, {"config.json": {"é": 1}, "README.md": "card"}, shard_bytes)
    found = open_source(out)
    assert found.specs() == SPECS
    assert all(torch.equal(found.read(name), tensor) for name, tensor in TENSORS.items())
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shard_bytes", [1, 100, 10_000])
def test_shards_are_what_save_file_writes(shard_bytes: int, seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = ["b", "a", "B", "l.10.w", "l.9.w", "é", "ü\u2028", "名", "😀", 'q"\\\n\t\x01\x7f/']
    shapes = [(3,), (), (0,), (2, 0, 3), (1, 5), (7, 2)]
    kinds = [(f"{name} {dtype}", dtype) for dtype in writer._DTYPES for name in names]
    random.Random(seed).shuffle(kinds)
    tensors = {}
    for count, (name, dtype) in enumerate(kinds):
        shape = shapes[count % len(shapes)]
        size = (prod(shape) * dtype.itemsize,)
        raw = torch.randint(0, 2, size, generator=generator, dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(shape)
    with CheckpointWriter(tmp_path / "out", _specs(tensors), shard_bytes) as opened:
        for name in sorted(tensors):
            opened.add(name, tensors[name])
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10_000)
    for file in files:
        with safe_open(file, framework="pt") as shard:
            held = [name for name in tensors if name in set(shard.keys())]
        save_file({name: tensors[name] for name in held}, tmp_path / "x", {"format": "pt"})
        assert file.read_bytes() == (tmp_path / "x").read_bytes()


def test_what_can_be_read_can_be_written() -> None:
    written = {kind: dtype for dtype, kind in writer._DTYPES.items()}
    assert source._DTYPES.items() <= written.items()


def test_a_dtype_that_safetensors_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"'x' is torch\.complex128"):
        write_checkpoint(tmp_path / "out", {"x": torch.ones(1, dtype=torch.complex128)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_on_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS) as opened:
        (file,) = (tmp_path / "out.partial").rglob("*.safetensors")
        for name in ("c", "b"):
            opened.add(name, TENSORS[name])
            with safe_open(file, framework="pt") as shard:
                assert torch.equal(shard.get_tensor(name), TENSORS[name])
        assert not (tmp_path / "out").exists()
        for name in ("a", "scalar"):
            opened.add(name, TENSORS[name])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux knows the peak")
def test_one_tensor_is_in_memory(tmp_path: Path) -> None:
    code = """
import sys
import torch
from pathlib import Path
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.checkpoint.writer import CheckpointWriter

def peak():  # getrusage would count the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def write(out, size):
    specs = {f"t{i}": TensorSpec((size,), torch.bfloat16) for i in range(8)}
    with CheckpointWriter(out, specs) as writer:
        for name in specs:
            writer.add(name, torch.ones(size, dtype=torch.bfloat16))

write(Path(sys.argv[1], "small"), 1000)
before = peak()
write(Path(sys.argv[1], "large"), 25_000_000)
print(peak() - before)
"""
    grown = int(subprocess.check_output([sys.executable, "-c", code, str(tmp_path)]))
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 400_000_000
    shutil.rmtree(tmp_path / "large")
    assert 40_000_000 < grown < 75_000_000  # one is 50_000_000


def test_order_of_adding_does_not_matter(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS, shard_bytes=64) as opened:
        for name in reversed(TENSORS):
            opened.add(name, TENSORS[name])
    found = open_source(tmp_path / "out")
    assert all(torch.equal(found.read(name), tensor) for name, tensor in TENSORS.items())


def test_views_ties_and_reused_buffers_are_written_as_they_were_added(tmp_path: Path) -> None:
    buffer = torch.arange(12.0).reshape(3, 4)
    views = {"t": buffer.T, "tied": buffer.T, "rows": buffer[1:], "spread": buffer[:1].expand(3, 4)}
    expected = {name: view.clone() for name, view in views.items()}
    specs = _specs(views)
    with CheckpointWriter(tmp_path / "out", {**specs, **SPECS}) as opened:
        for name, view in views.items():
            opened.add(name, view)
        buffer.zero_()
        for name, tensor in TENSORS.items():
            opened.add(name, tensor)
    found = open_source(tmp_path / "out")
    assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("added", range(len(TENSORS) + 1))
def test_a_run_that_dies_leaves_nothing(
    error: type[BaseException], added: int, tmp_path: Path
) -> None:
    def die() -> None:
        with CheckpointWriter(tmp_path / "out", SPECS, shard_bytes=64) as opened:
            opened.write_text("README.md", "card")
            for name in list(TENSORS)[:added]:
                opened.add(name, TENSORS[name])
            raise error

    with pytest.raises(error):
        die()
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_run_is_refused_by_name(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="1 planned tensors were never written: c"),
        CheckpointWriter(tmp_path / "out", SPECS) as opened,
    ):
        for name in TENSORS.keys() - {"c"}:
            opened.add(name, TENSORS[name])
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
        CheckpointWriter(tmp_path / "out", SPECS, shard_bytes=1) as opened,
    ):
        opened.add("b", TENSORS["b"])
        opened.add(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_refused_and_untouched(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    file.write_text("mine")
    for out in (folder, file):
        with pytest.raises(OutputError, match="exists already") as caught:
            CheckpointWriter(out, SPECS)
        assert "-o" in caught.value.hint
    assert (folder / "mine.txt").read_text() == file.read_text() == "mine"


def test_a_place_taken_meanwhile_is_refused_and_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="cannot be written") as caught,
        CheckpointWriter(out, {}) as opened,
    ):
        opened.write_text("README.md", "card")
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    assert caught.value.hint
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_folder_is_filled_and_a_stale_partial_cleared(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out.partial" / "checkpoint" / "old.safetensors").write_text("old")
    write_checkpoint(tmp_path / "out", TENSORS, {})
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "model.safetensors"]


def test_a_folder_of_somebody_else_is_never_cleared(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="in the way"):
        write_checkpoint(tmp_path / "out", TENSORS, {})
    with pytest.raises(OutputError, match="in the way"):
        check_place(tmp_path / "out", 1, resume=True)
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


def test_places_that_a_rename_cannot_take_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for name in ("link", "dangling", "file/out"):
        with pytest.raises(OutputError):
            check_place(tmp_path / name, 1, resume=False)


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


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "out", TENSORS, {"README.md": "card"}, shard_bytes=64)
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


IDENTITY = {"source": "sha", "config": {"rank": (192, 32)}, "version": 1}


def _convert(out: Path, resume: bool = True) -> None:
    """What a caller does: tensors, two to a commit, then files."""
    with CheckpointWriter(out, SPECS, 64, IDENTITY, resume) as opened:
        layers: list[str] = opened.state or []
        if opened.state is None:
            opened.commit(layers)
        for name in [name for name in TENSORS if name not in opened.written]:
            opened.add(name, TENSORS[name])
            layers.append(name)
            if len(layers) % 2 == 0:
                opened.commit(layers)
        assert sorted(layers) == sorted(TENSORS)
        opened.write_text("README.md", "card")
        opened.write_json("config.json", {"a": 1})


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    _convert(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert len(_files(out)) > 4
    return _files(out)


def _killed_at(step: int, work: Callable[[], None]) -> bool:
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


def _spoil(partial: Path) -> None:
    """Uncommitted bytes may be anything after a kill."""
    record = partial / ".progress.json"
    kept = json.loads(record.read_text())["written"] if record.exists() else []
    for file in partial.rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        if start == 8:
            continue
        for name, entry in json.loads(data[8:start]).items():
            if name not in ("__metadata__", *kept):
                first, last = entry["data_offsets"]
                data[start + first : start + last] = b"\xff" * (last - first)
        file.write_bytes(data)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_killed_anywhere_goes_on(
    resumed: bool, whole: dict[str, bytes], tmp_path: Path
) -> None:
    step, killed, published = 0, True, 0
    while killed:
        place = tmp_path / str(step)
        place.mkdir()
        if resumed:
            _interrupt(place / "out", KeyboardInterrupt)
        killed = _killed_at(step, lambda out=place / "out": _convert(out))
        if (place / "out").exists():
            published += 1
        else:
            _spoil(place / "out.partial")
            _convert(place / "out")
            assert [path.name for path in place.iterdir()] == ["out"]
        assert _files(place / "out") == whole
        step += 1
    assert step > 40
    assert published > 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_mistake_killed_while_it_is_cleaned_up_is_no_run_to_go_on_with(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    step, killed = 0, True
    while killed:
        place = tmp_path / str(step)
        place.mkdir()
        killed = _killed_at(step, lambda out=place / "out": _interrupt(out, ConfigError))
        _spoil(place / "out.partial")
        _convert(place / "out")
        assert _files(place / "out") == whole
        step += 1
    assert step > 20


# Ctrl-C may come before a `with` closes its file.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_run_interrupted_at_any_line_goes_on(whole: dict[str, bytes], tmp_path: Path) -> None:
    step, interrupted, published = 0, True, 0
    while interrupted:
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        interrupted = _interrupted_at(step, lambda out=out: _convert(out))
        if out.exists():
            published += 1
            assert _files(out) == whole
            # What lies about, if anything, stands in nobody's way.
            shutil.rmtree(out)
            _convert(out, resume=False)
        else:
            _convert(out)
        assert _files(out) == whole
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        step += 1
    assert step > 200
    assert published > 1


def _interrupted_at(step: int, work: Callable[[], None]) -> bool:
    """Press Ctrl-C at the nth line of the writer that runs."""
    lines = iter(range(step))

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != writer.__file__:
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


def _interrupt(out: Path, error: type[BaseException], committed: bool = True) -> None:
    """Write a file and some tensors, commit, write more; then fail."""

    def fail() -> None:
        with CheckpointWriter(out, SPECS, 64, IDENTITY) as opened:
            opened.add("c", TENSORS["c"])
            if committed:
                opened.commit(["c"])
            opened.add("a", TENSORS["a"] * 0)
            opened.write_text("notes.txt", "not committed")
            raise error("stop")

    with pytest.raises(error):
        fail()


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize(
    ("error", "mistake"),
    [
        (KeyboardInterrupt, False),
        (SystemExit, False),
        (RuntimeError, False),
        (OutputError, False),
        (ConfigError, True),
        (CheckpointError, False),
    ],
)
def test_what_was_committed_outlives_all_but_a_mistake(
    error: type[BaseException], mistake: bool, committed: bool, tmp_path: Path
) -> None:
    _interrupt(tmp_path / "out", error, committed)
    left = ["out.partial"] if committed and not mistake else []
    assert [path.name for path in tmp_path.iterdir()] == left


def test_a_resumed_run_sees_the_last_commit(whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    _interrupt(out, KeyboardInterrupt)
    (tmp_path / "out.partial" / "checkpoint" / "notes.txt").write_text("a kill while publishing")
    with CheckpointWriter(out, SPECS, 64, IDENTITY, resume=True) as opened:
        assert opened.written == {"c"}
        assert opened.state == ["c"]
        for name in ("a", "b", "scalar"):
            opened.add(name, TENSORS[name])
        assert opened.written == TENSORS.keys()
        opened.write_text("README.md", "card")
        opened.write_json("config.json", {"a": 1})
    assert _files(out) == whole


def test_files_are_committed_like_tensors(tmp_path: Path) -> None:
    def write(resume: bool) -> None:
        with CheckpointWriter(tmp_path / "out", {}, 64, IDENTITY, resume) as opened:
            if resume:
                return
            opened.write_text("README.md", "card")
            opened.commit(None)
            opened.write_text("README.md", "another")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(resume=False)
    write(resume=True)
    assert _files(tmp_path / "out") == {"README.md": b"card"}


def test_a_committed_state_is_what_a_resumed_run_reads(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {}, 64, IDENTITY) as opened:
        state = {"pairs": (1, 2)}
        opened.commit(state)
        state["pairs"] = (3, 4)
        assert opened.state == {"pairs": [1, 2]}


def test_an_interrupted_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    _interrupt(tmp_path / "out", KeyboardInterrupt)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=r"out\.partial holds an interrupted") as caught:
        _convert(tmp_path / "out", resume=False)
    assert "--resume" in caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_to_resume_starts_afresh(whole: dict[str, bytes], tmp_path: Path) -> None:
    left = tmp_path / "out.partial" / "checkpoint"
    left.mkdir(parents=True)
    (left / "old.safetensors").write_text("old")
    _convert(tmp_path / "out", resume=True)
    assert _files(tmp_path / "out") == whole
    with pytest.raises(OutputError, match="exists already"):
        _convert(tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("identity", "specs", "named"),
    [
        (IDENTITY | {"source": "other"}, SPECS, "another source$"),
        (IDENTITY | {"source": "other", "version": 2}, SPECS, "another source, version$"),
        (IDENTITY | {"seed": 0}, SPECS, "another seed$"),
        ({"source": "sha", "version": 1}, SPECS, "another config$"),
        (IDENTITY, {**SPECS, "a": TensorSpec((4, 2), torch.float32)}, "another set of tensors$"),
        (IDENTITY, {**SPECS, "a": TensorSpec((2, 4), torch.int32)}, "another set of tensors$"),
        (IDENTITY, {**SPECS, "d": TensorSpec((0,), torch.int32)}, "another set of tensors$"),
    ],
)
def test_a_run_of_another_kind_does_not_go_on(
    identity: dict[str, Any],
    specs: dict[str, TensorSpec],
    named: str,
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    _interrupt(tmp_path / "out", KeyboardInterrupt)
    with (
        pytest.raises(OutputError, match=named) as caught,
        CheckpointWriter(tmp_path / "out", specs, 64, identity, resume=True),
    ):
        pass
    assert "same settings" in caught.value.hint
    _convert(tmp_path / "out")
    assert _files(tmp_path / "out") == whole


def test_another_plan_of_shards_does_not_go_on(tmp_path: Path) -> None:
    _interrupt(tmp_path / "out", KeyboardInterrupt)
    with (
        pytest.raises(OutputError, match="another set of tensors"),
        CheckpointWriter(tmp_path / "out", SPECS, 1, IDENTITY, resume=True),
    ):
        pass


@pytest.mark.parametrize("damage", ["shard gone", "shard short", "no JSON", "not a record"])
def test_a_damaged_partial_folder_is_refused(damage: str, tmp_path: Path) -> None:
    _interrupt(tmp_path / "out", KeyboardInterrupt)
    partial = tmp_path / "out.partial"
    for file in partial.rglob("*.safetensors"):
        if damage == "shard gone":
            file.unlink()
        if damage == "shard short":
            file.write_bytes(file.read_bytes()[:-1])
    if damage in ("no JSON", "not a record"):
        (partial / ".progress.json").write_text("{" if damage == "no JSON" else "[]")
    with pytest.raises(OutputError, match="not as it was left") as caught:
        _convert(tmp_path / "out")
    assert f"remove {partial}" in caught.value.hint


def test_a_writer_without_identity_commits_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="no identity"),
        CheckpointWriter(tmp_path / "out", SPECS) as opened,
    ):
        opened.commit(None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", range(12))
def test_a_disk_that_fills_up_loses_nothing(
    after: int, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, fsync = iter(range(after)), os.fsync

    def filling(handle: int) -> None:
        if next(room, None) is None:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        with pytest.raises(OutputError, match="No space left") as caught:
            _convert(tmp_path / "out")
    kept = (tmp_path / "out.partial").exists()
    assert kept == ("--resume" in caught.value.hint)
    assert kept or after < 8
    _convert(tmp_path / "out")
    assert _files(tmp_path / "out") == whole


def test_a_disk_that_is_full_at_once_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OutputError, match="No space left"):
        _convert(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux knows a handle's path")
def test_a_record_follows_what_it_counts_on_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (log.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append("replace"), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("rename"), rename(a, b)))
    with CheckpointWriter(tmp_path / "out", SPECS, 10_000, IDENTITY) as opened:
        for name, tensor in TENSORS.items():
            opened.add(name, tensor)
            if name in ("a", "b"):
                opened.commit(None)
        opened.write_text("README.md", "card")
    commit = ["model.safetensors", "checkpoint", ".progress.new", "replace", "out.partial"]
    publish = ["README.md", "model.safetensors", "checkpoint", "rename"]
    assert log == [*commit, tmp_path.name, *commit, tmp_path.name, *publish, tmp_path.name]


def test_weights_that_do_not_fit_are_refused_before_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = {name: TensorSpec((5_000_000,), torch.float32) for name in "ab"}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=35_000_000))
    with (
        pytest.raises(OutputError, match=r"needs 0\.04 GB more, and 0\.04 GB are free") as caught,
        CheckpointWriter(tmp_path / "deep" / "out", specs),
    ):
        pass
    assert "make room" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_needs_space_for_the_rest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = {name: TensorSpec((1_000_000,), torch.float32) for name in "ab"}

    def write(name: str, resume: bool) -> None:
        with CheckpointWriter(tmp_path / "out", specs, identity={}, resume=resume) as opened:
            opened.add(name, torch.ones(1_000_000))
            opened.commit(None)
            if not resume:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("a", resume=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    with pytest.raises(OutputError, match="needs"):
        write("b", resume=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    write("b", resume=True)
    assert open_source(tmp_path / "out").specs() == specs


def test_a_place_is_checked_as_the_writer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_place(tmp_path / "deep" / "out", 1, resume=False)
    _interrupt(tmp_path / "out", KeyboardInterrupt)
    check_place(tmp_path / "out", 1, resume=True)
    with pytest.raises(OutputError, match="holds an interrupted"):
        check_place(tmp_path / "out", 1, resume=False)
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        check_place(tmp_path / "taken", 1, resume=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match="needs"):
        check_place(tmp_path / "new", 11, resume=False)


@pytest.mark.parametrize("shard_bytes", [1, 64, 10_000])
def test_planned_files_are_the_files_written(shard_bytes: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", TENSORS, {}, shard_bytes)
    files = (tmp_path / "out").glob("*.safetensors")
    assert planned_files(SPECS, shard_bytes) == {path.name: path.stat().st_size for path in files}
