"""What a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import version

from vmla_convert import __version__


def versions() -> dict[str, str]:
    """Of this package, torch and Python; torch is not imported for it."""
    return {
        "vmla_convert": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
    }
