"""Writing a checkpoint folder: planned from shapes, one tensor in memory, all there or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from vmla_convert.checkpoint.choose_file import INDEX_SUFFIX
from vmla_convert.checkpoint.layouts import NATIVE, Layout
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.errors import ConfigError, OutputError, refuse_existing

PICKLE_NAME = "model.pt"
SHARD_BYTES = 5 * 1000**3

_RECORD, _DRAFT = ".progress.json", ".progress.new"

# In the order in which safetensors lays tensors out.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointWriter:
    """A folder of safetensors shards and text files that appears whole or not at all.

    Use as a context manager. Shards have their full size and their header from the start, and a
    tensor goes to its place in its shard as soon as it is added: only that tensor is in memory.
    `<out>.partial/` beside `out` holds

        checkpoint/      what `out` will be; a clean exit renames it, which is one step
        .progress.json   the record of the last commit, where there is one

    An exception removes it all, unless there is a record and the exception is not a mistake of the
    user's (ConfigError). A later writer can then go on from the record. So it can
    after a kill at any instant: what a record counts as written was synced before the record was.
    What a kill left without a record is discarded by writers that commit nothing; a record never.
    """

    def __init__(
        self,
        out: Path,
        specs: dict[str, TensorSpec],
        shard_bytes: int = SHARD_BYTES,
        identity: Mapping[str, Any] | None = None,
        resume: bool = False,
        layout: Layout = NATIVE,
        copies: Mapping[str, Path] | None = None,
    ) -> None:
        """Plan the shards; nothing is written yet.

        Args:
            out: The folder to make; may exist when empty.
            specs: Every tensor that will be added, by native name.
            shard_bytes: Largest size of a shard; a tensor that is larger gets its own.
            identity: What is written, from what; JSON-able. None: nothing can be committed, nor
                gone on with.
            resume: Go on with what a writer of the same identity and specs left, if it left any.
            layout: Where in the folder the weights lie, and under which names.
            copies: Folders to copy as they are, by the name that they get in `out`.

        Raises:
            OutputError: `out` is taken, or a dtype is none of a checkpoint's.
            CheckpointError: A tensor has no name in the layout.
        """
        _refuse_foreign(out)
        self._stored = layout.stored_names(specs)
        named = {self._stored[name]: spec for name, spec in specs.items()}
        split = _split(named, shard_bytes, layout)
        self._out, self._layout = out, layout
        self._copies = dict(copies or {})
        self._partial, self._folder = _places(out)
        self._record = self._partial / _RECORD
        self._specs = dict(specs)
        self._file_of = split.tensor_to_filename
        self._shards = {
            file: _lay_out({name: named[name] for name in names})
            for file, names in split.filename_to_tensors.items()
        }
        # As JSON gives it back, so that it compares with a record.
        self._identity = None if identity is None else json.loads(json.dumps(dict(identity)))
        self._resume = None if identity is None else resume
        self._written: set[str] = set()
        self._unsynced = set(self._shards)
        self._texts: dict[str, str] = {}
        self._state: Any = None

    @property
    def written(self) -> frozenset[str]:
        """Names that need not be added: of the last commit, and those added since."""
        return frozenset(self._written)

    @property
    def state(self) -> Any:
        """What was last committed, as JSON gives it back; None before the first commit."""
        return self._state

    def __enter__(self) -> Self:
        """Make the partial folder, or go on with the one that is there.

        Raises:
            OutputError: It cannot be made, or there is no space for the weights; or one is there
                that is not to be resumed, was begun with another identity, or is damaged.
        """
        with self._reported(self._partial):
            if not self._take_up() and self._partial.exists():
                self._discard()
            self._check_space()
            try:
                self._make()
            except BaseException:
                self._clean_up()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Publish after a clean run; otherwise leave behind what can be resumed, or nothing.

        Raises:
            OutputError: A planned tensor was never added, or the disk refuses.
        """
        try:
            if error is None:
                self._publish()
        finally:
            self._clean_up(mistake=isinstance(error, ConfigError))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor to its place; any order will do.

        Raises:
            OutputError: The tensor is not planned, is added twice, or is of another shape or
                dtype; or the disk refuses.
        """
        if name not in self._specs:
            raise OutputError(f"'{name}' is not in the plan of {self._out}", _BUG)
        if name in self._written:
            raise OutputError(f"'{name}' was added twice to {self._out}", _BUG)
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if found != self._specs[name]:
            raise OutputError(f"'{name}' is {found}, planned was {self._specs[name]}", _BUG)
        stored = self._stored[name]
        file = self._file_of[stored]
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._unsynced.add(file)
        with self._reported(self._folder / file), (self._folder / file).open("r+b") as stream:
            stream.seek(self._shards[file].offsets[stored])
            stream.write(flat.view(torch.uint8).numpy().data)
        self._written.add(name)

    def commit(self, state: Any) -> None:
        """Make everything so far survive a kill or a power cut.

        Args:
            state: What the caller needs to go on from here; JSON-able.

        Raises:
            OutputError: There is no identity to know it by, or the disk refuses.
        """
        if self._identity is None:
            raise OutputError(f"{self._out} has no identity to resume it by", _BUG)
        record = {
            "identity": self._identity,
            "plan": self._plan_digest(),
            "written": sorted(self._written),
            "texts": self._texts,
            "state": state,
        }
        draft, text = self._partial / _DRAFT, json.dumps(record)
        with self._reported(self._record):
            self._sync_shards()
            draft.write_text(text, "utf-8")
            _sync(draft)
            os.replace(draft, self._record)
            _sync(self._partial)
            _sync(self._partial.parent)
        self._state = json.loads(text)["state"]

    def write_files(self, files: Mapping[str, str | dict[str, Any]]) -> None:
        """Put texts and JSON tables into the folder, by their names."""
        for name, content in files.items():
            if isinstance(content, str):
                self.write_text(name, content)
            else:
                self.write_json(name, content)

    def write_json(self, name: str, obj: Any) -> None:
        """Put a JSON file into the folder."""
        self.write_text(name, _as_json(obj))

    def write_text(self, name: str, text: str) -> None:
        """Put a text file into the folder; a second of that name takes the place of the first.

        Args:
            name: A file beside the weights, or a path in a layout that has folders.
            text: What it holds.

        Raises:
            OutputError: The name leads elsewhere or is the weights' own.
        """
        path = PurePosixPath(name)
        deep = len(path.parts) > (2 if self._layout.folder else 1)
        astray = not name or str(path) != name or ".." in path.parts or path.is_absolute() or deep
        if astray or name in self._shards or name == self._index:
            raise OutputError(f"'{name}' cannot be a file beside the weights", _BUG)
        self._texts[name] = text

    @property
    def _index(self) -> str:
        return self._layout.place(f"{self._layout.stem}{INDEX_SUFFIX}")

    def _take_up(self) -> bool:
        """Go on from the last commit; False where this run starts afresh."""
        _refuse_unfinished(self._out, self._resume)
        if self._identity is None or not (self._folder.exists() and self._record.exists()):
            return False
        try:
            record = json.loads(self._record.read_text("utf-8"))
            identity, plan = dict(record["identity"]), record["plan"]
            written, texts, state = set(record["written"]), record["texts"], record["state"]
        except (ValueError, LookupError, TypeError) as error:
            raise self._damaged(self._record) from error
        other = [
            key
            for key in sorted(identity.keys() | self._identity.keys())
            if identity.get(key, ...) != self._identity.get(key, ...)
        ]
        if other or plan != self._plan_digest():
            raise OutputError(
                f"{self._partial} was begun with another {', '.join(other) or 'set of tensors'}",
                f"run with the same settings as before, or remove {self._partial}",
            )
        for file in {self._file_of[self._stored[name]] for name in written}:
            path = self._folder / file
            if not path.exists() or path.stat().st_size != self._shards[file].nbytes:
                raise self._damaged(path)
        self._written, self._texts, self._state = written, texts, state
        return True

    def _plan_digest(self) -> str:
        """Stands for every name, shape, dtype and place."""
        digest = hashlib.sha256()
        for file, shard in self._shards.items():
            digest.update(file.encode() + shard.header)
        return digest.hexdigest()

    def _check_space(self) -> None:
        need = sum(shard.nbytes for shard in self._shards.values())
        need += copied_bytes(self._copies)
        for path in map(self._folder.joinpath, self._shards):
            if path.exists():  # with holes, where nothing was written yet
                need -= path.stat().st_blocks * 512
        _require_room(self._out, need)

    def _make(self) -> None:
        """Every shard at full size with its header; what was committed stays as it is."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.rglob("*"):
            if path.is_file() and path.relative_to(self._folder).as_posix() not in self._shards:
                path.unlink()
        for file, shard in self._shards.items():
            path = self._folder / file
            path.parent.mkdir(exist_ok=True)
            path.touch()
            with path.open("r+b") as stream:
                # Holes, not posix_fallocate: where a file system knows none, that writes every
                # block twice. A disk that fills up meanwhile is no loss: there is --resume.
                stream.truncate(shard.nbytes)
                stream.write(shard.header)

    def _publish(self) -> None:
        if missing := sorted(self._specs.keys() - self._written):
            raise OutputError(
                f"{len(missing)} planned tensors were never written: {', '.join(missing[:5])}", _BUG
            )
        texts = dict(self._texts)
        if len(self._shards) > 1:
            total = sum(spec.nbytes for spec in self._specs.values())
            places = {name: Path(file).name for name, file in self._file_of.items()}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            texts[self._index] = json.dumps(index, indent=2) + "\n"
        with self._reported(self._out):
            for name, text in texts.items():
                path = self._folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, "utf-8")
                _sync(path)
            for name, source in self._copies.items():
                _copy_folder(source, self._folder / name)
            self._sync_shards()
            os.rename(self._folder, self._out)
            _sync(self._out.parent)

    def _sync_shards(self) -> None:
        for file in sorted(self._unsynced):
            _sync(self._folder / file)
        for folder in (path for path in self._folder.rglob("*") if path.is_dir()):
            _sync(folder)
        _sync(self._folder)
        self._unsynced.clear()

    def _clean_up(self, mistake: bool = False) -> None:
        """Remove the partial folder, unless it can be resumed."""
        if mistake or not (self._record.exists() and self._folder.exists()):
            with suppress(OSError):
                self._discard()

    def _discard(self) -> None:
        # The record first: half a folder must not pass for one to go on with.
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self._partial)

    @contextmanager
    def _reported(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error}",
                "check the space and rights there, then add --resume to go on"
                if self._record.exists()
                else "check the space and rights there, or choose another -o",
            ) from error

    def _damaged(self, path: Path) -> OutputError:
        return OutputError(
            f"{path} is not as it was left", f"remove {self._partial} and start afresh"
        )


def check_place(out: Path, nbytes: int, resume: bool) -> None:
    """Refuse, before any work, a place where a resumable checkpoint cannot be written.

    Args:
        out: The folder to make.
        nbytes: Of its weights.
        resume: Whether to go on with what is there.

    Raises:
        OutputError: `out` is taken, an interrupted conversion is in the way, or space is lacking.
    """
    refuse_taken(out, resume)
    if not _places(out)[1].exists():
        _require_room(out, nbytes)


def refuse_taken(out: Path, resume: bool | None = None) -> None:
    """Refuse, before any work, a place where a checkpoint cannot be written, however small.

    Args:
        out: The folder to make.
        resume: Whether to go on with what an interrupted run left there. None is for commands that
            cannot, and start anew: what a kill left of one of them is in nobody's way.

    Raises:
        OutputError: `out` is taken, or an interrupted conversion is in the way.
    """
    _refuse_foreign(out)
    _refuse_unfinished(out, resume)


def planned_files(
    specs: dict[str, TensorSpec], shard_bytes: int = SHARD_BYTES, layout: Layout = NATIVE
) -> dict[str, int]:
    """The weight files that a writer would make, and their bytes."""
    stored = layout.stored_names(specs)
    named = {stored[name]: spec for name, spec in specs.items()}
    split = _split(named, shard_bytes, layout)
    return {
        file: _lay_out({name: named[name] for name in names}).nbytes
        for file, names in split.filename_to_tensors.items()
    }


def write_checkpoint(
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, str | dict[str, Any]],
    shard_bytes: int = SHARD_BYTES,
    layout: Layout = NATIVE,
) -> None:
    """Write tensors that are already in memory, with text files and JSON tables beside them.

    Args:
        out: The folder to make.
        tensors: By native name.
        files: Text, or a table, by the path in `out`.
        shard_bytes: Largest size of a shard.
        layout: Where in the folder the weights lie, and under which names.

    Raises:
        OutputError: `out` is taken or cannot be written.
    """
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with CheckpointWriter(out, specs, shard_bytes, layout=layout) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.write_files(files)


def write_pickle(
    out: Path,
    nbytes: int,
    tensors: Iterable[tuple[str, torch.Tensor]],
    key: str,
    files: Mapping[str, str | dict[str, Any]],
) -> Path:
    """Write one torch pickle of a state dict, with text files and JSON tables beside it.

    Args:
        out: The folder to make.
        nbytes: Of all tensors; the place is refused before the first is asked for.
        tensors: The state dict by name; all of it is in memory while it is written.
        key: The name of the state dict in the pickle.
        files: Text, or a table, by name.

    Returns:
        The pickle in `out`.

    Raises:
        OutputError: `out` is taken or cannot be written.
    """
    refuse_taken(out)
    partial, folder = _places(out)
    try:
        with _told(out):
            if partial.exists():  # what a kill left
                shutil.rmtree(partial)
            _require_room(out, nbytes)
            folder.mkdir(parents=True)
        state = dict(tensors)
        with _told(out):
            torch.save({key: state}, folder / PICKLE_NAME)
            for name, content in files.items():
                text = content if isinstance(content, str) else _as_json(content)
                (folder / name).write_text(text, "utf-8")
            for path in (*folder.iterdir(), folder):
                _sync(path)
            os.rename(folder, out)
            _sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / PICKLE_NAME


@contextmanager
def _told(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer knows no OSError
        raise OutputError(
            f"{out} cannot be written: {error}",
            "check the space and rights there, or choose another -o",
        ) from error


def _as_json(table: Any) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


_BUG = "this is a fault of the program: please report it"


@dataclass(frozen=True)
class _Shard:
    """Where things lie in a safetensors file.

    Attributes:
        header: Its first bytes, up to the data.
        offsets: Of each tensor, from the start of the file.
        nbytes: Of the whole file.
    """

    header: bytes
    offsets: dict[str, int]
    nbytes: int


def _lay_out(specs: dict[str, TensorSpec]) -> _Shard:
    """As `safetensors.torch.save_file` does, to the byte."""
    if odd := sorted(name for name, spec in specs.items() if spec.dtype not in _DTYPES):
        raise OutputError(
            f"'{odd[0]}' is {specs[odd[0]].dtype}: safetensors files hold none such", _BUG
        )
    order, end = list(_DTYPES), 0
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    for name in sorted(specs, key=lambda name: (order.index(specs[name].dtype), name)):
        spec = specs[name]
        starts[name], end = end, end + spec.nbytes
        table[name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (starts[name], end),
        }
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return _Shard(header, offsets, len(header) + end)


def partial_folder(out: Path) -> Path:
    """Where a checkpoint is until it is whole."""
    return out.with_name(f"{out.name}.partial")


def _places(out: Path) -> tuple[Path, Path]:
    """The partial folder, and what will be `out` in it."""
    partial = partial_folder(out)
    return partial, partial / "checkpoint"


def _refuse_foreign(out: Path) -> None:
    """Refuse what somebody else put there, or another run finished."""
    refuse_existing(out)
    place = next(path for path in out.absolute().parents if path.exists())
    if not place.is_dir():
        raise OutputError(f"{out} cannot be written: {place} is a file", "choose another -o")
    partial, folder = _places(out)
    ours = {folder.name, _RECORD, _DRAFT}
    if partial.exists() and not (
        partial.is_dir() and {path.name for path in partial.iterdir()} <= ours
    ):
        raise OutputError(
            f"{partial} is in the way: it holds other files", "choose another -o or move it"
        )


def _refuse_unfinished(out: Path, resume: bool | None) -> None:
    """Refuse what an interrupted run left, if it is to be kept and not gone on with."""
    partial, folder = _places(out)
    if resume or not folder.exists():  # without it, this is what a kill left after publishing
        return
    if resume is None and not (partial / _RECORD).exists():
        return
    raise OutputError(
        f"{partial} holds an interrupted conversion",
        "go on with it by vmla convert with --resume, remove it, or choose another -o"
        if resume is None
        else "add --resume to go on with it, or remove it",
    )


def _require_room(out: Path, need: int) -> None:
    place = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise OutputError(
            f"{out} needs {need / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free",
            "make room there, or choose another -o",
        )


def copied_bytes(copies: Mapping[str, Path]) -> int:
    """Bytes of folders that are copied."""
    files = (path for folder in copies.values() for path in folder.rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def _copy_folder(source: Path, target: Path) -> None:
    """Contents only, also of links: the files of the Hub's cache are links out of the folder."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            _sync(copy)


def _split(specs: dict[str, TensorSpec], shard_bytes: int, layout: Layout) -> StateDictSplit:
    return split_state_dict_into_shards_factory(
        specs,
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=layout.place(f"{layout.stem}{{suffix}}.safetensors"),
        max_shard_size=shard_bytes,
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
