"""The command that looks at the machine: doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.options import OUTPUT, ClipsDir, File, Json, Model, option
from vmla_convert.config import MediaConfig, ModelConfig, command_recipe
from vmla_convert.console import out
from vmla_convert.show import show_machine, show_needs

OptionalCheckpoint = Annotated[
    str | None,
    typer.Argument(help="A checkpoint, for which the table gets rows too.", metavar="CKPT"),
]
Folder = Annotated[
    Path, option("--out -o", "DIR", "Folder whose free space counts. Default: this one.", OUTPUT)
]


def doctor(
    checkpoint: OptionalCheckpoint = None,
    file: File = None,
    model: Model = None,
    folder: Folder = Path(),
    clips_dir: ClipsDir = None,
    json: Json = False,
) -> None:
    """Show what is installed, what the machine has, and which stages fit in its memory.

    Peaks of memory are calculated. Of a checkpoint on the Hub only headers are downloaded.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from vmla_convert.doctor.machine import examine
    from vmla_convert.doctor.stages import RELEASED, needs, room_of
    from vmla_convert.generating.clip_sets import clips_folder

    out.json = json
    clips = clips_folder(MediaConfig(clips_dir=clips_dir))
    caches = {"clips": clips, "downloads": Path(HF_HUB_CACHE)}
    machine = examine({"outputs": folder, **caches})
    models, room = dict[str, ModelConfig](), room_of(machine)
    try:
        models = named_model(checkpoint, file, model)
    finally:
        # Facts about the machine are shown even if the checkpoint cannot be read.
        found = [each for pair in {**RELEASED, **models}.items() for each in needs(*pair, room)]
        if json:
            out.data({"machine": machine, "needs": found})
        else:
            show_machine(machine)
            show_needs(found, room)


def named_model(
    checkpoint: str | None, file: str | None, model: str | None
) -> dict[str, ModelConfig]:
    """The config of a checkpoint by its name; empty where there is none."""
    if checkpoint is None:
        return {}
    from vmla_convert.loading.load import recognise_named

    options = {
        "source.checkpoint": checkpoint,
        "source.file": file,
        "source.model": model,
    }
    with out.progress() as progress:
        found = recognise_named(command_recipe(("source",), options, ()).dense, progress)
    return {Path(checkpoint).name: found.config}
