"""Arguments and options that several commands have, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vmla_convert.config import Recipe, SourceConfig
from vmla_convert.errors import ConfigError

CHECKPOINT = "Checkpoint"
SIZE = "Size of the cache"
CLIPS = "Clips"
OUTPUT = "Output"
RUNNING = "Running"
OTHER = "All other settings"


def option(flags: str, metavar: str | None, text: str, panel: str, min: int | None = None) -> Any:
    """A typer option: its flags, the word that stands for its value, its help, and its panel."""
    return typer.Option(*flags.split(), metavar=metavar, help=text, rich_help_panel=panel, min=min)


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
    option("--file", "NAME", "File or folder within the Hub repository or the folder.", CHECKPOINT),
]
Model = Annotated[
    str | None,
    option(
        "--model",
        "NAME",
        "Known model, such as self-forcing: brings chunk, window, sampler and "
        "licence, which no tensor tells. Hub ids are known.",
        CHECKPOINT,
    ),
]
Loras = Annotated[
    list[str] | None,
    option("--lora", "FILE", "LoRA to merge, FILE or FILE:SCALE. May be repeated.", CHECKPOINT),
]
BaseModel = Annotated[
    str | None,
    option(
        "--base-model",
        "CKPT",
        "Base model of a codec. Default: the one that the codec names.",
        CHECKPOINT,
    ),
]
NoVerify = Annotated[
    bool,
    option(
        "--no-verify", None, "Do not compare files with the hashes in their record.", CHECKPOINT
    ),
]
Teacher = Annotated[
    str | None,
    option(
        "--teacher",
        "CKPT",
        "Dense checkpoint that the conversion came from. Default: a codec's base model.",
        CHECKPOINT,
    ),
]
TeacherFile = Annotated[
    str | None,
    option(
        "--file",
        "NAME",
        "File of the dense checkpoint's repository or folder. Default: as when it was converted.",
        CHECKPOINT,
    ),
]
BytesPerToken = Annotated[
    float | None,
    option("--bytes-per-token", "N", "Bytes per token and layer, averaged over layers.", SIZE),
]
Cut = Annotated[
    float | None,
    option("--cut", "SHARE", "Share of the dense cache to save: 0.95 keeps a 20th.", SIZE),
]
CacheDtype = Annotated[
    str | None,
    option(
        "--cache-dtype",
        "NAME",
        "auto (a codec's channels get 0 to 8 bits, or 16), model (not quantised); "
        "or int8, int4, int3, int2 for a dense cache. Default: auto.",
        SIZE,
    ),
]
Data = Annotated[
    str | None,
    option(
        "--data",
        "FILE",
        "Safetensors file or folder with latents and context, or 'demo'. Default: demo.",
        CLIPS,
    ),
]
OutFolder = Annotated[Path, option("--out -o", "DIR", "Folder to write; must not exist.", OUTPUT)]
Json = Annotated[bool, option("--json", None, "Print data as JSON.", OUTPUT)]


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
