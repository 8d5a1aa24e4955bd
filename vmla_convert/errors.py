"""The one exception family a user can meet, each with the next thing to try."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class VmlaError(Exception):
    """A mistake the user can mend: one sentence, and a hint that names the next command.

    Attributes:
        message: What is wrong, in one sentence without a final period.
        hint: What to try next; empty when the message says it all.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckpointError(VmlaError):
    """The source checkpoint cannot be read, recognised or mapped."""


class ConfigError(VmlaError):
    """A setting is misspelt, out of range, or contradicts the checkpoint."""


class NoClipsError(ConfigError):
    """There is nothing that clips can come from where a setting says."""


class OutputError(VmlaError):
    """The place to write to is taken or cannot be written."""


class MissingExtraError(VmlaError):
    """An optional dependency is not installed.

    Args:
        feature: What it is for, in words that may be of one thing or many.
        extra: What installs it.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"packages for {feature} are not installed",
            f'pip install "vmla-convert[{extra}]"',
        )


def refuse_existing(out: Path, hint: str = "choose another -o, or remove it") -> None:
    """Refuse an output that exists; an empty folder is free, unless it is a link or a mount.

    Raises:
        OutputError: Naming the output.
    """
    empty = out.is_dir() and not out.is_symlink() and not out.is_mount() and not any(out.iterdir())
    if (out.exists() or out.is_symlink()) and not empty:
        raise OutputError(f"{out} exists already", hint)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, after the type unless the error is written for users."""
    if isinstance(error, VmlaError):
        return error.message
    text, kind = str(error).strip(), type(error).__name__
    return f"{kind}: {text.splitlines()[0]}" if text else kind


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known spelling, or lists all of them."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
