"""Arguments and options that several commands have, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.config import Recipe, SourceConfig
from vmla_convert.errors import ConfigError

CHECKPOINT = "Checkpoint"
SIZE = "Size of the cache"
CLIPS = "Clips"
OUTPUT = "Output"
RUNNING = "Running"
OTHER = "All other settings"

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A .pt or .safetensors file, a folder with one checkpoint, a Hub id owner/name, or "
        "'demo'.",
        metavar="CKPT",
    ),
]
File = Annotated[
    str | None,
    typer.Option(
        "--file",
        metavar="NAME",
        help="File or folder within the Hub repository or the folder.",
        rich_help_panel=CHECKPOINT,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="Known model, such as self-forcing: brings chunk, window, sampler and licence, which "
        "no tensor tells. Hub ids are known.",
        rich_help_panel=CHECKPOINT,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE",
        help="LoRA to merge, FILE or FILE:SCALE. May be repeated.",
        rich_help_panel=CHECKPOINT,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="CKPT",
        help="Base model of a codec. Default: the one that the codec names.",
        rich_help_panel=CHECKPOINT,
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="CKPT",
        help="Dense checkpoint that the conversion came from. Default: a codec's base model.",
        rich_help_panel=CHECKPOINT,
    ),
]
TeacherFile = Annotated[
    str | None,
    typer.Option(
        "--file",
        metavar="NAME",
        help="File of the dense checkpoint's repository or folder. Default: as when it was "
        "converted.",
        rich_help_panel=CHECKPOINT,
    ),
]
BytesPerToken = Annotated[
    float | None,
    typer.Option(
        "--bytes-per-token",
        metavar="N",
        help="Bytes per token and layer, averaged over layers.",
        rich_help_panel=SIZE,
    ),
]
Cut = Annotated[
    float | None,
    typer.Option(
        "--cut",
        metavar="SHARE",
        help="Share of the dense cache to save: 0.95 keeps a 20th.",
        rich_help_panel=SIZE,
    ),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        "--cache-dtype",
        metavar="NAME",
        help="auto (a codec's channels get 0 to 8 bits, or 16), model (not quantised); or int8, "
        "int4, int3, int2 for a dense cache. Default: auto.",
        rich_help_panel=SIZE,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Safetensors file or folder with latents and context, or 'demo'. Default: demo.",
        rich_help_panel=CLIPS,
    ),
]
OutFolder = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Folder to write; must not exist.",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print data as JSON.", rich_help_panel=OUTPUT)]


def named_teacher(recipe: Recipe, teacher: str | None) -> SourceConfig | None:
    """The dense checkpoint of a conversion; None where a codec's base model is meant."""
    if teacher is None and recipe.source == SourceConfig():
        return None
    if teacher is None and recipe.source.checkpoint == SourceConfig.checkpoint:
        raise ConfigError(
            "settings of source describe the dense checkpoint, which has no name here",
            "add --teacher CKPT",
        )
    return recipe.source
