"""The two worlds by name: their models, their clips, and what pictures of clips look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import typer

from evals.worlds.photographs import PhotographClips
from vmla_convert.config import DataConfig
from vmla_convert.loading.load import DEMO
from vmla_convert.media.clips import ClipSource, open_clips

TEACHER = Path(__file__).parent / "teacher"
"""The model of the photograph world."""


class World(NamedTuple):
    """A world to measure in.

    Attributes:
        checkpoint: Its dense model.
        clips: Makes its clips, from the frames of a clip and a seed.
    """

    checkpoint: str
    clips: Callable[[int, int], ClipSource]


WORLDS = {
    "digits": World(DEMO, lambda frames, seed: open_clips(DataConfig("demo", frames, seed=seed))),
    "photographs": World(str(TEACHER), PhotographClips),
}


def open_world(name: str) -> World:
    """The world of a name, for command lines."""
    if name not in WORLDS:
        raise typer.BadParameter(f"{name} is no world; choose {' or '.join(WORLDS)}")
    return WORLDS[name]
