"""Commands about whole checkpoints: inspect, export, verify, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.options import (
    OTHER,
    OUTPUT,
    BaseModel,
    BytesPerToken,
    Checkpoint,
    Cut,
    File,
    Json,
    Loras,
    Model,
    NoVerify,
    OutFolder,
)
from vmla_convert.config import SourceConfig, command_recipe
from vmla_convert.console import out
from vmla_convert.show import show_inspection, show_push, show_verified


def inspect(
    checkpoint: Checkpoint,
    file: File = None,
    model: Model = None,
    loras: Loras = None,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    spectra: Annotated[
        bool,
        typer.Option(
            "--spectra",
            help="Also show the effective rank of each layer's weights; reads the weights.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    json: Json = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Keys of source, model and convert: --set model.cache.window_frames=12",
            rich_help_panel=OTHER,
        ),
    ] = None,
) -> None:
    """Show a checkpoint, the size of its KV cache, and the size with a codec."""
    from vmla_convert.fitting.inspect import inspect_checkpoint

    out.json = json
    options = {
        "source.checkpoint": checkpoint,
        "source.file": file,
        "source.model": model,
        "source.loras": loras,
        "convert.size.bytes_per_token": bytes_per_token,
        "convert.size.cut": cut,
    }
    recipe = command_recipe(("source", "model", "convert"), options, changes)
    with out.progress() as progress:
        inspection = inspect_checkpoint(recipe.dense, recipe.convert, progress, spectra)
    if json:
        out.data(inspection)
    else:
        show_inspection(inspection)


def export(
    checkpoint: Checkpoint,
    folder: OutFolder,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            metavar="NAME",
            help="native (safetensors with Wan's names), diffusers (a pipeline's folder) or "
            "self_forcing (one model.pt). Default: the layout of the checkpoint's family.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            "--state",
            metavar="NAME",
            help="State dict to write into a self_forcing file. Default: generator_ema.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    file: File = None,
    model: Model = None,
    loras: Loras = None,
    base_model: BaseModel = None,
    no_verify: NoVerify = False,
    json: Json = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Keys of source and model: --set source.key=generator_ema",
            rich_help_panel=OTHER,
        ),
    ] = None,
) -> None:
    """Write a checkpoint in another program's layout; a codec with its base model."""
    from vmla_convert.loading.export import export as run

    out.json = json
    options = {
        "source.checkpoint": checkpoint,
        "source.file": file,
        "source.model": model,
        "source.loras": loras,
        "source.base_model": base_model,
        "source.verify": False if no_verify else None,
    }
    recipe = command_recipe(("source", "model"), options, changes)
    with out.progress() as progress:
        written = run(recipe.dense, folder, layout, state, progress)
    out.path("wrote", written)


def verify(checkpoint: Checkpoint, file: File = None, json: Json = False) -> None:
    """Check hashes, shapes and numbers of a checkpoint, and the base model of a codec.

    Every weight is read. The exit code is 2 where something is wrong.
    """
    from vmla_convert.loading.verify import verify as run

    out.json = json
    with out.progress() as progress:
        found = run(SourceConfig(checkpoint, file), progress)
    show_verified(found)


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder from 'vmla convert' or 'vmla recover'.", metavar="DIR")
    ],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub.", metavar="OWNER/NAME")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    tag: Annotated[
        str | None, typer.Option("--tag", metavar="NAME", help="Tag for this version.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", metavar="TEXT", help="Message of the commit.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded, and stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Publish a conversion on the Hugging Face Hub, with a model card.

    Run an interrupted upload again: files that were uploaded are not sent twice. Log in first:
    hf auth login
    """
    from vmla_convert.loading import publish

    out.json = json
    with out.progress() as progress:
        pushed = publish.push(folder, repo, private, tag, message, dry_run, progress)
    show_push(pushed, dry_run)
