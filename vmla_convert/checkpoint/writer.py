"""Write a checkpoint folder block by block; the folder appears whole or not at all.

Every block becomes one finished safetensors file, its part. Parts are the shards of a large
checkpoint. The parts of a small one are joined into a single file at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from vmla_convert.checkpoint.choose_file import INDEX_SUFFIX
from vmla_convert.checkpoint.geometry import block_of
from vmla_convert.checkpoint.integrity import seal
from vmla_convert.checkpoint.layouts import NATIVE, Layout
from vmla_convert.checkpoint.specs import TensorSpec
from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.storage.output import (
    OTHER_PLACE,
    PARTS,
    STATE_NAME,
    UNFINISHED,
    copied_bytes,
    discard,
    is_resumable,
    new_folder,
    partial_folder,
    publish,
    refuse_taken,
    reported,
    require_room,
    unfinished_folder,
    write_files,
    write_whole,
)
from vmla_convert.storage.tensor_store import FolderStore, Tensors, save_pickle, save_tensors
from vmla_convert.tables import read_json

PICKLE_NAME = "model.pt"

ONE_FILE_BYTES = 500_000_000
"""Size up to which the weights are one file. Larger checkpoints have one file per block.

All parts of that file are mapped into memory while it is written. Python and torch take 0.35 GB,
and a conversion of 1.3B is to stay below 1.2 GB (measured by `python -m evals.scale`).
"""

_BUG = "this is a fault of the program: please report it"


class CheckpointWriter:
    """Writes the tensors and files of a checkpoint folder; a context manager.

    A part is written when the last of its tensors is added. Until then its tensors are in memory,
    so tensors are best added block by block. `<out>.partial/` beside `out` holds

        checkpoint/      what `out` will be; a clean exit renames it, which is one step
        parts/           parts that are to be joined
        identity.json    what is written, from what
        state.json       the last commit

    An exception removes all of it, unless there is a commit and the exception is not a mistake of
    the user (ConfigError). A later writer can continue from the commit, also after a kill.

    Args:
        out: The folder to make; may exist when empty.
        specs: Every tensor that will be added, by native name.
        identity: What is written, from what; JSON-able. None: nothing can be committed.
        resume: Continue what a writer of the same identity and tensors left, if it left anything.
        layout: Where in the folder the weights lie, and under which names.
        copies: Folders to copy as they are, by the name that they get in `out`.
        one_file_bytes: Size up to which the weights are one file.

    Raises:
        OutputError: `out` is taken.
        CheckpointError: A tensor has no name in the layout.
    """

    def __init__(
        self,
        out: Path,
        specs: Mapping[str, TensorSpec],
        identity: Mapping[str, Any] | None = None,
        resume: bool = False,
        layout: Layout = NATIVE,
        copies: Mapping[str, Path] | None = None,
        one_file_bytes: int = ONE_FILE_BYTES,
    ) -> None:
        self._resume = resume and identity is not None
        refuse_taken(out, self._resume)
        self._out, self._layout, self._specs = out, layout, dict(specs)
        self._copies = dict(copies or {})
        self._plan = _plan(self._specs, layout, one_file_bytes)
        self._part_of = {name: part for part, names in self._plan.parts.items() for name in names}
        self._identity, self._hint = None, OTHER_PLACE
        if identity is not None:
            self._identity = {**identity, "parts": self._plan.parts, "tensors": _table(specs)}
            self._hint = "check the space and rights there, then add --resume to continue"
        self._pending: dict[str, Tensors] = {}
        self._done: list[str] = []
        self._state: Any = None

    @property
    def written(self) -> frozenset[str]:
        """Names that need not be added, by the last commit and what was added since."""
        done = (name for part in self._done for name in self._plan.parts[part])
        return frozenset(done).union(*self._pending.values())

    @property
    def state(self) -> Any:
        """The state of the last commit, as JSON gives it back; None before the first commit."""
        return self._state

    def __enter__(self) -> Self:
        """Make the partial folder, or continue with the one that is there.

        Raises:
            OutputError: The disk refuses or has no room, or an interrupted run left files that are
                damaged or have another identity.
        """
        if not (self._resume and is_resumable(self._out)):
            discard(self._out)
        partial = partial_folder(self._out)
        self._store = FolderStore(partial, self._identity, self._hint)
        with reported(partial, self._hint):
            self._take_up()
            self._require_room()
            unfinished_folder(self._out).mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Publish after a clean run; otherwise leave behind what can be continued, or nothing.

        Raises:
            OutputError: A planned tensor was never added, or the disk refuses.
        """
        try:
            if error is None:
                self._publish()
        finally:
            self._clean_up(mistake=isinstance(error, ConfigError))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one planned tensor; any order will do.

        Raises:
            OutputError: The tensor is not planned, is added twice, or has another shape or dtype;
                or the disk refuses.
        """
        found, planned = TensorSpec(tuple(tensor.shape), tensor.dtype), self._specs.get(name)
        if found != planned or name in self.written:
            raise OutputError(f"'{name}' is {found}, planned was once {planned}", _BUG)
        part = self._part_of[name]
        pending = self._pending.setdefault(part, {})
        pending[name] = tensor
        stored = self._plan.parts[part]
        if len(pending) == len(stored):
            self._store.put(part, {stored[name]: pending[name] for name in stored})
            self._done.append(part)
            del self._pending[part]

    def commit(self, state: Any) -> None:
        """Make all parts so far survive a kill or a power cut.

        Args:
            state: What the caller needs to continue from here; JSON-able.

        Raises:
            OutputError: The writer has no identity, a part is incomplete, or the disk refuses.
        """
        if self._identity is None or any(self._pending.values()):
            raise OutputError(f"{self._out} cannot be resumed from here", _BUG)
        text = json.dumps({"done": self._done, "state": state})
        with reported(self._out, self._hint):
            write_whole(self._state_file, text)
        self._state = json.loads(text)["state"]

    def write_files(self, files: Mapping[str, str | dict[str, Any]]) -> None:
        """Put texts and JSON tables into the folder, by their paths in it."""
        with reported(self._out, self._hint):
            write_files(unfinished_folder(self._out), files)

    @property
    def _state_file(self) -> Path:
        return partial_folder(self._out) / STATE_NAME

    def _take_up(self) -> None:
        """Continue from the last commit, without what was written after it."""
        if self._state_file.is_file():
            try:
                record = read_json(self._state_file)
                self._done, self._state = list(record["done"]), record["state"]
                for part in self._done:
                    with safe_open(self._store.file(part), framework="pt"):
                        pass
            except (ValueError, LookupError, TypeError, OSError, SafetensorError) as error:
                partial = partial_folder(self._out)
                raise OutputError(
                    f"{partial} is not as it was left: {error}",
                    f"remove {partial} and start again",
                ) from error
        kept = {self._store.file(part) for part in self._done}
        for folder in (unfinished_folder(self._out), partial_folder(self._out) / PARTS):
            for path in folder.rglob("*"):
                if path.is_file() and path not in kept:
                    path.unlink()

    def _require_room(self) -> None:
        written = self.written
        need = sum(spec.nbytes for name, spec in self._specs.items() if name not in written)
        if self._plan.joined:
            need += sum(spec.nbytes for spec in self._specs.values())
        require_room(self._out, need + copied_bytes(self._copies))

    def _publish(self) -> None:
        if missing := sorted(self._specs.keys() - self.written):
            raise OutputError(
                f"{len(missing)} planned tensors were never written: {', '.join(missing[:5])}", _BUG
            )
        folder, plan = unfinished_folder(self._out), self._plan
        with reported(self._out, self._hint):
            if plan.joined:
                groups = (self._store.get(part) for part in self._done)
                tensors = {name: tensor for group in groups for name, tensor in group.items()}
                (folder / plan.joined).parent.mkdir(exist_ok=True)
                save_tensors(tensors, folder / plan.joined)
            elif len(plan.parts) > 1:
                write_files(folder, {plan.index: plan.weight_map(self._specs)})
            seal(folder)
            for name, source in self._copies.items():
                # Links are followed: in the Hub's cache the files are links out of the folder.
                copy = shutil.copyfile
                shutil.copytree(source, folder / name, copy_function=copy, dirs_exist_ok=True)
            publish(self._out)

    def _clean_up(self, mistake: bool = False) -> None:
        """Remove the partial folder, unless it can be resumed."""
        unfinished = unfinished_folder(self._out).exists()
        if mistake or not (unfinished and self._state_file.is_file()):
            discard(self._out)


def planned_files(
    specs: Mapping[str, TensorSpec],
    layout: Layout = NATIVE,
    one_file_bytes: int = ONE_FILE_BYTES,
) -> dict[str, int]:
    """The weight files that a writer would make, and the bytes of their tensors."""
    plan = _plan(specs, layout, one_file_bytes)
    sizes = {part: sum(specs[name].nbytes for name in names) for part, names in plan.parts.items()}
    if plan.joined:
        return {plan.joined: sum(sizes.values())}
    return {f"{part.partition('/')[2]}.safetensors": size for part, size in sizes.items()}


def write_checkpoint(
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, str | dict[str, Any]],
    layout: Layout = NATIVE,
    one_file_bytes: int = ONE_FILE_BYTES,
) -> None:
    """Write a folder from tensors that are in memory.

    Args:
        out: The folder to make.
        tensors: Tensors by native name.
        files: Texts or tables, by their paths in `out`.
        layout: The layout of the folder.
        one_file_bytes: Size up to which the weights are one file.

    Raises:
        OutputError: `out` is taken or cannot be written.
    """
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with CheckpointWriter(out, specs, layout=layout, one_file_bytes=one_file_bytes) as writer:
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
        nbytes: Bytes of all tensors; a full disk is refused before the first tensor is asked for.
        tensors: Names and tensors; all are in memory while they are written.
        key: Name of the state dict in the pickle.
        files: Texts or tables, by name.

    Returns:
        The pickle in `out`.

    Raises:
        OutputError: `out` is taken or cannot be written.
    """
    with new_folder(out, nbytes) as folder:
        save_pickle({key: dict(tensors)}, folder / PICKLE_NAME)
        write_files(folder, files)
        seal(folder)
    return out / PICKLE_NAME


@dataclass(frozen=True)
class _Plan:
    """The files of a checkpoint.

    Attributes:
        parts: Native names and names in the file, by name of the part in the store.
        joined: Path of the one file that all parts are joined into; None where parts are shards.
        index: Path of the index of shards.
    """

    parts: dict[str, dict[str, str]]
    joined: str | None
    index: str

    def weight_map(self, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
        """The content of the index of shards."""
        files = {part: f"{part.rpartition('/')[2]}.safetensors" for part in self.parts}
        total = sum(spec.nbytes for spec in specs.values())
        places = {n: files[part] for part, names in self.parts.items() for n in names.values()}
        return {"metadata": {"total_size": total}, "weight_map": places}


def _plan(specs: Mapping[str, TensorSpec], layout: Layout, one_file_bytes: int) -> _Plan:
    stored, blocks = layout.stored_names(specs), dict[int, dict[str, str]]()
    for name in specs:
        blocks.setdefault(block_of(name), {})[name] = stored[name]
    groups, index = [blocks[i] for i in sorted(blocks)], layout.place(layout.stem + INDEX_SUFFIX)
    small = sum(spec.nbytes for spec in specs.values()) <= one_file_bytes
    if len(groups) > 1 and (small or layout.one_file):
        parts = {f"{PARTS}/{i:05d}": names for i, names in enumerate(groups)}
        return _Plan(parts, layout.place(f"{layout.stem}.safetensors"), index)
    shard = "" if len(groups) == 1 else "-{:05d}-of-" + f"{len(groups):05d}"
    stems = (layout.place(layout.stem + shard.format(i + 1)) for i in range(len(groups)))
    return _Plan({f"{UNFINISHED}/{s}": n for s, n in zip(stems, groups, strict=True)}, None, index)


def _table(specs: Mapping[str, TensorSpec]) -> dict[str, list[Any]]:
    """Shapes and dtypes as JSON."""
    return {name: [list(spec.shape), str(spec.dtype)] for name, spec in specs.items()}
