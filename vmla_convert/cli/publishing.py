"""A conversion, published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.options import Json
from vmla_convert.console import out
from vmla_convert.show import show_push


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder from 'vmla convert' or 'vmla recover'.", metavar="OUT")
    ],
    repo: Annotated[str, typer.Argument(help="Where to: owner/name.", metavar="OWNER/NAME")],
    private: Annotated[
        bool, typer.Option("--private", help="Make it so that only its owner sees it.")
    ] = False,
    tag: Annotated[
        str | None, typer.Option(help="Name this state of it: --tag v1, for OWNER/NAME@v1.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Show what would go up, and how large it is; stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Publish a conversion on the Hugging Face Hub, with a card that says what it is.

    Interrupted, run it again: what went up is not sent twice. Log in with: hf auth login
    """
    from vmla_convert.loading import publish

    out.json = json
    with out.progress() as progress:
        told = publish.push(folder, repo, private, tag, message, dry_run, progress)
    show_push(told, dry_run)
