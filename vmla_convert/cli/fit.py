"""Say whether a command fits in memory, and choose settings that do."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vmla_convert.cli.options import RUNNING, option
from vmla_convert.config import ModelConfig, Recipe
from vmla_convert.console import out
from vmla_convert.errors import ConfigError
from vmla_convert.show import gigabytes

if TYPE_CHECKING:
    from vmla_convert.doctor.stages import Fit, Room, Stage

FitIn = Annotated[
    str | None, option("--fit", "SIZE", "Choose settings for this much memory, as 24GB.", RUNNING)
]

_UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}


def fitted(
    model: ModelConfig,
    read: Callable[[Sequence[str]], Recipe],
    stage: Stage,
    size: str | None,
    folder: Path,
    fixed: Collection[str],
) -> Recipe:
    """Say whether a stage fits, and return its settings.

    Args:
        model: The model, dense or converted.
        read: Gives the settings with some changes.
        stage: The stage.
        size: Value of `--fit`. With it the settings are those that fit; without it they are those
            asked for, and the ones that fit are named.
        folder: Where the command writes.
        fixed: Keys that the user set, or their options.

    Raises:
        ConfigError: No settings fit in the size that is asked for, or the size is not a size.
    """
    from vmla_convert.doctor.stages import first_fit, own_room

    room = own_room(folder, None if size is None else parse_size(size))
    found = first_fit(model, read, stage, room, fixed)
    has = gigabytes(room.device if room.device is not None else room.host)
    if not found.fits and size is not None:
        raise ConfigError(
            f"this takes {_peak(found, room)}, and no settings fit in {has}",
            "see docs/memory.md, or use a smaller model",
        )
    changes = " ".join(f"--set {change}" for change in found.changes)
    if not found.fits:
        out.say(f"does not fit in {has}: {_peak(found, room)}")
    elif changes and size is None:
        out.say(f"does not fit in {has}; this fits: {changes}")
    else:
        chosen = f", with {changes}" if changes else ""
        out.say(f"fits in {has}: {_peak(found, room)}{chosen}")
    return read(found.changes if size is not None else ())


def parse_size(text: str) -> int:
    """Bytes of a size such as `24GB`.

    Raises:
        ConfigError: The text is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]+)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"'{text}' is not a size of memory", "write --fit 24GB")
    return int(float(found[1]) * _UNITS[found[2]])


def given_keys(changes: Collection[str] | None) -> set[str]:
    """Keys of `--set`."""
    return {change.partition("=")[0].strip() for change in changes or ()}


def _peak(found: Fit, room: Room) -> str:
    """Peak memory of the GPU and the host, by formula."""
    host = gigabytes(room.host_bytes(found.memory))
    if room.device is None:
        return f"peak {host}"
    return f"peak {gigabytes(found.memory.device)}, and {host} of host memory"
