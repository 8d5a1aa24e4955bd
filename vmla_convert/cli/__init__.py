"""The `vmla` commands: parse options into a recipe, call a wing, print the result.

Heavy imports happen inside the commands, so that `vmla --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from vmla_convert import __version__
from vmla_convert.cli.checkpoints import export, inspect, push, verify
from vmla_convert.cli.convert import convert
from vmla_convert.cli.doctor import doctor
from vmla_convert.cli.generate import generate
from vmla_convert.cli.measure import claims, clips, evaluate, report
from vmla_convert.cli.recipes import demo, recipes_app, run, sweep
from vmla_convert.cli.recover import recover
from vmla_convert.cli.vbench import vbench_app

app = typer.Typer(
    name="vmla",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Give a pretrained causal video diffusion model a small latent KV cache.",
    epilog="New here? [bold]vmla demo[/bold] does the whole job on the model in the package.",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _version(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Give a pretrained causal video diffusion model a small latent KV cache."""


COMMANDS: dict[str, tuple[Callable[..., Any], str]] = {
    "doctor": (doctor, "vmla doctor model.pt"),
    "inspect": (inspect, "vmla inspect model.pt"),
    "convert": (convert, "vmla convert gdhe17/Self-Forcing -o kv --cut 0.95"),
    "recover": (recover, "vmla recover kv -o kv-recovered --nested --steps 200"),
    "generate": (generate, 'vmla generate kv --prompt "a red fox" -o fox.mp4'),
    "eval": (evaluate, "vmla eval kv --bytes-per-token 16"),
    "claims": (claims, "vmla claims model.pt --steps 100"),
    "clips": (clips, "vmla clips"),
    "export": (export, "vmla export kv -o whole --layout self_forcing"),
    "sweep": (sweep, "vmla sweep size_ablation -o runs/sizes --demo"),
    "report": (report, "vmla report runs/sizes"),
    "verify": (verify, "vmla verify kv"),
    "push": (push, "vmla push kv owner/name --tag v1"),
    "run": (run, "vmla run self_forcing_1_3b -o runs/self_forcing --demo"),
    "demo": (demo, "vmla demo -o runs/quickstart"),
}
for _name, (_command, _example) in COMMANDS.items():
    app.command(_name, epilog=f"Example: [bold]{_example}[/bold]")(_command)
app.add_typer(vbench_app, name="vbench")
app.add_typer(recipes_app, name="recipes", help="List the recipes, or copy one.")
