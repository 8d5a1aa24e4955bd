"""Limits on what a file or a setting may ask for, checked before memory is taken.

A file of a few megabytes can otherwise ask for hours or for all memory of a machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open

from vmla_convert.errors import ConfigError

HEADER_BYTES = 8 * 2**20
"""Most bytes of a table of tensors: the header of Wan 14B in one file takes 0.13 MB."""

TENSORS = 20_000
"""Most tensors of a checkpoint: Wan 14B has 1,095."""

MEMORY_SHARE = 0.9
"""Share of the free memory that one allocation may take."""


@contextmanager
def opened_safetensors(file: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file whose header is of a sensible size.

    Raises:
        SafetensorError: The header is too large, or the file is damaged.
        OSError: The file cannot be read.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
    # A size beyond the end of the file is left to the library, which names the fault.
    if HEADER_BYTES < size < file.stat().st_size:
        raise SafetensorError(f"its header takes {size:,} bytes, more than {HEADER_BYTES:,}")
    with safe_open(file, framework=framework) as tensors:
        yield tensors


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def require_memory(nbytes: int, device: torch.device, what: str, hint: str) -> None:
    """Refuse an allocation that the device has no room for.

    Raises:
        ConfigError: Naming the bytes needed and free.
    """
    free = free_memory(device)
    if nbytes > MEMORY_SHARE * free:
        raise ConfigError(
            f"{what} takes {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free", hint
        )
