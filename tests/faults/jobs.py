"""Kills and faults of one command, in a process with inputs and a Hub of its own.

Processes that are spawned cannot import the runner itself. PYTEST_DONT_REWRITE, because the runner
imports this module without pytest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import MODEL
from codec_files import MADE
from conftest import tiny_model
from faults.kills import (
    Command,
    Faults,
    Killed,
    Reference,
    commands,
    run_faults,
    run_kills,
    run_small_disks,
)
from hub_stub import served

from vmla_convert.fitting.convert import convert
from vmla_convert.training.pretrain import save_self_forcing

SHARES = (0.2, 0.5, 0.8, 0.95)
KINDS = ("full disk", "read-only disk", "vanished input")


def models(place: Path) -> tuple[Path, Path]:
    """A dense model and its codec, which nobody else moves or changes."""
    teacher, codec = place / "teacher", place / "codec"
    save_self_forcing(tiny_model(MODEL).state_dict(), MODEL, teacher)
    convert(teacher, codec, MADE)
    return teacher, codec


@contextmanager
def tested(place: Path, name: str) -> Iterator[Command]:
    """A command with inputs and a Hub of its own."""
    place.mkdir()
    with pytest.MonkeyPatch.context() as patch, served(place / "hf-home", patch) as hub:
        yield commands(place / "commands", *models(place), hub=hub)[name]


def killed(place: Path, name: str, kills: int) -> tuple[int, Killed]:
    with tested(place, name) as command:
        reference = Reference(command, place / "work")
        return reference.events, run_kills(reference, kills)


def failed(place: Path, name: str, stages: int) -> dict[str, Faults | None]:
    with tested(place, name) as command:
        reference = Reference(command, place / "work")
        found: dict[str, Faults | None] = {
            kind: run_faults(reference, kind, stages) for kind in KINDS
        }
        if command.hub is None:
            found["small disk"] = run_small_disks(command, place / "small", SHARES)
        return found
