"""Show what a command is about to do, and ask before it takes hours."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vmla_convert.cli.options import RUNNING, option
from vmla_convert.console import out
from vmla_convert.errors import VmlaError
from vmla_convert.show import duration, show_work

if TYPE_CHECKING:
    from vmla_convert.generating.clip_cost import PlannedWork

LONG_OPERATIONS = 5e14
"""About an hour on a few CPU cores. A count does not depend on how busy the machine is."""

Yes = Annotated[bool, option("--yes -y", None, "Do hours of work on a CPU unasked.", RUNNING)]


def agree(work: PlannedWork, yes: bool, cheaper: str) -> None:
    """Show planned work; on a CPU ask before about an hour of it.

    Args:
        work: The work.
        yes: The answer, given beforehand.
        cheaper: Settings that make the work shorter.

    Raises:
        VmlaError: There is no terminal to ask on, or the answer is no.
    """
    import torch

    show_work(work)
    if yes or torch.cuda.is_available() or work.operations < LONG_OPERATIONS:
        return
    time = duration(work.seconds)
    hint = f"add --yes to do it all the same; cheaper: {cheaper}"
    if not sys.stdin.isatty():
        raise VmlaError(f"this takes about {time} on a CPU", hint)
    out.say(f"This takes about {time} on a CPU. Cheaper: {cheaper}")
    if not typer.confirm("Go on?", err=True):
        raise VmlaError("nothing was done", hint)
