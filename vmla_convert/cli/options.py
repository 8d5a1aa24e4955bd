"""Arguments and options that several commands have, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A .pt or .safetensors file, a folder that holds one checkpoint, a Hub id owner/name, "
        "or 'demo'.",
        metavar="CKPT",
    ),
]
File = Annotated[
    str | None, typer.Option(help="Which file or folder of the Hub repository or the folder.")
]
Key = Annotated[
    str | None,
    typer.Option(help="Which state dict of a .pt that holds several: generator_ema, generator …"),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="The known model that this is, such as self-forcing or longlive: brings chunk, "
        "window, sampler and licence, which no tensor tells. Hub ids are known by themselves."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override chunk_frames, latent_size, cache.*, sampler.*, media, licence, base_model: "
        "--set cache.window_frames=12",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", help="FILE or FILE:SCALE, merged before converting; repeat for more."),
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.")]
Teacher = Annotated[
    str, typer.Option(help="The dense checkpoint that the converted one came from, or 'demo'.")
]
TeacherFile = Annotated[
    str | None,
    typer.Option(
        "--file",
        help="Which file or folder of the teacher's repository or folder. Default: as when it was "
        "converted.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print data as JSON.")]
CacheScalars = Annotated[
    int | None,
    typer.Option(
        help="Numbers a token may cost per layer, divided among layers. Default: an eighth of the "
        "width plus a quarter of a head, 224 for Wan 1.3B, and one for the norm."
    ),
]
Cut = Annotated[
    float | None, typer.Option(help="The same as a share of the dense cache to save: 0.92.")
]
KvLoraRank = Annotated[
    int | None,
    typer.Option(help="R, the content latent's width, the same for every layer, instead."),
]
Data = Annotated[
    str, typer.Option(help="Clips: 'demo', or a safetensors file with latents and context.")
]
Deployment = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override the window or the sampler: --set cache.window_frames=12.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel="Wan's text encoder and VAE",
        help="Folder or Hub id in diffusers' layout that both come from. Default: "
        "what lies beside the checkpoint, else Wan's own.",
    ),
]
