"""Find out what is installed and what the machine has. Nothing here raises."""

from __future__ import annotations

import platform
import shutil
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

EXTRAS = {
    "wan": ("diffusers", "ftfy", "sentencepiece", "transformers"),
    "video": ("av", "pillow"),
    "plots": ("matplotlib",),
    "lora": ("peft",),
    "demo": ("scikit-learn", "matplotlib", "av", "pillow"),
}
"""Packages of each extra that users need."""

_ALWAYS = ("torch", "accelerate", "huggingface-hub", "safetensors")
_PACKAGES = (*_ALWAYS, *sorted({name for names in EXTRAS.values() for name in names}))


@dataclass(frozen=True)
class Device:
    """A GPU: its name and the bytes of its memory."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Machine:
    """Installed packages, and the devices, memory and disks of the machine.

    Attributes:
        versions: Version by package; None where the package is not installed.
        missing_extras: Command that installs an extra, by name of the extra.
        devices: GPUs that torch can use.
        host_bytes: Bytes of host memory.
        free_host_bytes: Bytes of host memory that are free now.
        free_disk_bytes: Free bytes by what the folder is for; None where there is no folder.
        hub: Whether somebody is logged in to the Hub.
    """

    versions: dict[str, str | None]
    missing_extras: dict[str, str]
    devices: tuple[Device, ...]
    host_bytes: int
    free_host_bytes: int
    free_disk_bytes: dict[str, int | None]
    hub: str


def examine(folders: dict[str, Path]) -> Machine:
    """Describe this machine.

    Args:
        folders: Folders whose disk matters, by what they are for. They need not exist yet.
    """
    memory = psutil.virtual_memory()
    return Machine(
        _versions(),
        _missing_extras(),
        found_devices(),
        memory.total,
        memory.available,
        {name: free_bytes(folder) for name, folder in folders.items()},
        hub_login(),
    )


def free_bytes(folder: Path) -> int | None:
    """Free bytes of the disk that a folder is on, or will be; None where that cannot be told."""
    try:
        place = folder.absolute()
        return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
    except (OSError, StopIteration):
        return None


def hub_login() -> str:
    """Name of the user who is logged in to the Hub. The Hub is asked only if a token is here."""
    import huggingface_hub as hf

    from vmla_convert.checkpoint.hub_errors import why_away

    try:
        if hf.get_token() is None:
            return "not logged in; for gated models and for push: hf auth login"
        return f"logged in as {hf.whoami()['name']}"
    except Exception as error:  # the libraries let errors of the network through
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return "the Hub refuses the token: hf auth login"
        return f"a token is here, not checked: {why_away(error)}"


def _versions() -> dict[str, str | None]:
    found = {"vmla-convert": _version("vmla-convert"), "python": platform.python_version()}
    return found | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _missing_extras() -> dict[str, str]:
    return {
        extra: f'pip install "vmla-convert[{extra}]"'
        for extra, packages in EXTRAS.items()
        if any(_version(package) is None for package in packages)
    }


def found_devices() -> tuple[Device, ...]:
    """GPUs that torch can use."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a driver that is too old warns
            found = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
            properties = [torch.cuda.get_device_properties(index) for index in found]
    except (RuntimeError, AssertionError):
        return ()  # a driver that does not start is as good as none
    return tuple(Device(each.name, each.total_memory) for each in properties)
