"""Arguments and options that several commands have, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.config import Sizes

SIZE = "Size of the cache"
MLA = "MLA layers, with --preset videomla"

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
    typer.Option(
        "--lora", help="FILE or FILE:SCALE, merged into the dense weights; repeat for more."
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.")]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="The dense checkpoint that the converted one came from. Default for a codec: its base "
        "model."
    ),
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
Cut = Annotated[
    float | None,
    typer.Option(
        help="Share of the dense cache to save: 0.95 is a 20th of its bytes.", rich_help_panel=SIZE
    ),
]
BytesPerToken = Annotated[
    float | None,
    typer.Option(
        help="Bytes of a codec's cache per token and layer, averaged over layers.",
        rich_help_panel=SIZE,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        help="The same as the bytes of so many unquantised numbers.",
        metavar="R",
        rich_help_panel=SIZE,
    ),
]
CacheDtype = Annotated[
    str,
    typer.Option(
        help="auto (bits by channel for a codec), model (nothing quantised), or int8, int4, int3, "
        "int2 for the cache of a dense model.",
        rich_help_panel=SIZE,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        metavar="CKPT",
        help="Base model of a codec, a path or Hub id. Default: the one that the codec names.",
    ),
]
KvLoraRank = Annotated[
    int | None,
    typer.Option(
        help="R, the content latent's width, the same for every layer, instead.",
        rich_help_panel=MLA,
    ),
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


def asked_size(
    bytes_per_token: float | None, cut: float | None, rank: int | None = None
) -> Sizes | None:
    """The size asked for; None where there is none."""
    if bytes_per_token is cut is rank is None:
        return None
    return Sizes(bytes_per_token, cut, rank)
