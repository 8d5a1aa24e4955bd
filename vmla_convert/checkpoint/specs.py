"""Shape and dtype of tensors, and the dtypes that a checkpoint may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from vmla_convert.errors import CheckpointError
from vmla_convert.storage.limits import TENSORS

# The dtypes that store every number by itself. All others are quantised or packed.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def stored(cls, file: Path, name: str, dtype: str, shape: Sequence[int]) -> TensorSpec:
        """The spec of an entry of a safetensors header.

        Raises:
            CheckpointError: The dtype is quantised or packed.
        """
        if dtype not in DTYPES:
            raise quantised(file, name, dtype)
        return cls(tuple(shape), DTYPES[dtype])


def refuse_many(file: Path, tensors: int) -> None:
    """Refuse a checkpoint of more tensors than a model has.

    Raises:
        CheckpointError: Naming the number.
    """
    if tensors > TENSORS:
        raise CheckpointError(
            f"{file} lists {tensors:,} tensors, more than {TENSORS:,}",
            "check that it is a Wan video model",
        )


def quantised(file: Path, name: str, dtype: str) -> CheckpointError:
    """The error for a tensor of a quantised dtype."""
    return CheckpointError(
        f"{file} is quantised: {name} is stored as {dtype}",
        "use a bf16, fp16 or fp32 version of this checkpoint",
    )
