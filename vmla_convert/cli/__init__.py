"""`vmla`: parse, call a pipeline, print. Heavy imports happen inside the commands.

Commands that belong together share a file. Here they are put in the order that help lists them in.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vmla_convert import __version__
from vmla_convert.cli.checkpoints import convert, export, inspect
from vmla_convert.cli.generating import generate
from vmla_convert.cli.measuring import evaluate, report
from vmla_convert.cli.publishing import push
from vmla_convert.cli.recipes import demo, recipes_app, run, sweep
from vmla_convert.cli.recovering import recover

app = typer.Typer(
    name="vmla",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Give a pretrained causal video diffusion model a small latent KV cache.",
    epilog="New here? [bold]vmla demo[/bold] does the whole job on the model that ships with it.",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _version(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say it and stop."),
    ] = False,
) -> None:
    """Give a pretrained causal video diffusion model a small latent KV cache."""


app.command()(inspect)
app.command()(convert)
app.command()(recover)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(export)
app.command()(sweep)
app.command()(report)
app.command()(push)
app.command()(run)
app.command()(demo)
app.add_typer(recipes_app, name="recipes", help="List the recipes, or copy one to own.")
