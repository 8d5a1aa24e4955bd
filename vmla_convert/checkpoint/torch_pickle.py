"""Read the state dict of a torch pickle through a memory map, without running any code in it."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from vmla_convert.checkpoint.specs import DTYPES, TensorSpec, quantised, refuse_many
from vmla_convert.errors import CheckpointError
from vmla_convert.storage.limits import HEADER_BYTES

# Trainers keep several state dicts in one file; the averaged generator is the one that is meant
# to be sampled from. "generator_lora" is left out: a LoRA is no model without its base.
STATE_KEYS = ("generator_ema", "generator", "model", "ema", "state_dict")

_MAPPED_SHARE = 1 / 64
"""Share of a file that is read from one memory map, before the file is mapped anew.

Pages of a map count as resident memory. Mapping the 825 tensors of Self-Forcing takes 0.06 s, so
the 64 maps of a whole pass take 4 s.
"""


class PickledState:
    """The state dict of a torch pickle.

    Attributes:
        key: Name of the state dict among several; None when the file is one state dict.
        specs: Shape and dtype of each tensor.

    Args:
        file: The pickle.
        key: The state dict to open; None takes the first of `STATE_KEYS` that is there, or the
            whole file.

    Raises:
        CheckpointError: The file is damaged, compressed, unsafe or quantised, or lacks the key.
    """

    def __init__(self, file: Path, key: str | None) -> None:
        _check_zip(file)
        self._file, self._stamp = file, _stamp(file)
        payload = _load(file)
        self.key = _pick_state(payload, key, file)
        self._state = _tensors(payload, self.key, file)
        self.specs = {name: _spec(file, name, tensor) for name, tensor in self._state.items()}
        self._used = 0

    def read(self, name: str) -> torch.Tensor:
        """Copy a tensor out of the memory map.

        Raises:
            OSError: The file has changed, or is gone.
        """
        # Reading the map of a file that was cut short would end the process with SIGBUS.
        if _stamp(self._file) != self._stamp:
            raise OSError("the file has changed since it was opened")
        if self._used > _MAPPED_SHARE * self._stamp[0]:
            self._state, self._used = _tensors(_load(self._file), self.key, self._file), 0
        tensor = self._state[name]
        self._used += tensor.nbytes
        return tensor.clone(memory_format=torch.contiguous_format)


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _check_zip(file: Path) -> None:
    """Refuse what is no zip, or a zip of compressed records, which a memory map cannot read."""
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file} is not a whole torch checkpoint",
            "download it again; if it is older than torch 1.6, save it again with torch.save",
        )
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    packed = [each.filename for each in records if each.compress_type != zipfile.ZIP_STORED]
    refuse_many(file, len(records))
    pickled = sum(each.file_size for each in records if each.filename.endswith(".pkl"))
    if pickled > HEADER_BYTES:
        raise CheckpointError(
            f"{file} has {pickled:,} bytes beside its tensors, more than {HEADER_BYTES:,}",
            "save the model's state dict alone with torch.save",
        )
    if packed:
        raise CheckpointError(
            f"{file} is compressed: {packed[0]}", "load it and torch.save it again"
        )


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{file} needs more than tensors to load: {culprit[1]}"
            if culprit
            else f"{file} does not load as tensors alone",
            "if you trust it, load it with weights_only=False and torch.save its state dict",
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        # torch maps the file as private memory: 28.6 GB failed on a machine with 24 GB.
        if "unable to mmap" in str(error):
            raise CheckpointError(
                f"{file} has {file.stat().st_size / 1e9:.1f} GB, more than this machine can map",
                "use a safetensors version, or allow the map: sysctl vm.overcommit_memory=1",
            ) from error
        raise CheckpointError(
            f"{file} is not a torch checkpoint, or is damaged", "download it again"
        ) from error


def _pick_state(payload: Any, key: str | None, file: Path) -> str | None:
    if not isinstance(payload, dict):
        raise CheckpointError(
            f"{file} holds no state dict but a {type(payload).__name__}",
            "save the model's state dict with torch.save",
        )
    nested = _nested(payload)
    if key is None:
        return next((known for known in STATE_KEYS if known in nested), None)
    if key not in nested:
        held = f"it holds: {', '.join(nested)}" if nested else "it is flat: leave the key out"
        raise CheckpointError(f"{file} has no '{key}'", held)
    return key


def _nested(payload: dict[Any, Any]) -> list[str]:
    """Keys of dicts that hold tensors; an average that has not begun holds none."""
    return [
        key
        for key, value in payload.items()
        if isinstance(key, str)
        and isinstance(value, dict)
        and any(isinstance(entry, torch.Tensor) for entry in value.values())
    ]


def _tensors(payload: dict[Any, Any], key: str | None, file: Path) -> dict[str, torch.Tensor]:
    state = payload if key is None else payload[key]
    odd = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if state and not odd:
        return {str(name): tensor.detach() for name, tensor in state.items()}
    hint, nested = "save the model's state dict alone with torch.save", _nested(payload)
    if nested == ["generator_lora"]:
        hint = "this is a LoRA alone: give the model that it was trained on"
    elif nested:
        hint = f"save one of these alone with torch.save: {', '.join(nested)}"
    what = f"holds entries that are not tensors: {', '.join(odd[:5])}" if odd else "is empty"
    raise CheckpointError(f"{file} {what}", hint)


def _spec(file: Path, name: str, tensor: torch.Tensor) -> TensorSpec:
    if tensor.dtype not in DTYPES.values():
        raise quantised(file, name, str(tensor.dtype).removeprefix("torch."))
    # A view can repeat a few stored numbers without end.
    if tensor.layout is torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{file} declares {tensor.nbytes:,} bytes for {name} and stores fewer",
            "load it, and torch.save a contiguous copy of each tensor",
        )
    # Sparse and nested tensors, tensors without data, and flags that change what the bytes mean.
    plain = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta)
    if not plain or tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(
            f"{file} does not hold {name} as plain numbers",
            "load it, make this tensor dense with resolve_conj, resolve_neg or to_dense, and "
            "torch.save it again",
        )
    return TensorSpec(tuple(tensor.shape), tensor.dtype)
