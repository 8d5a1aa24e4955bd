"""Checks that settings share."""

from __future__ import annotations

from typing import Any

from vmla_convert.errors import ConfigError


def require_nonnegative(config: Any, *names: str) -> None:
    """Raise a ConfigError that names the first setting below 0."""
    for name in names:
        value: float = getattr(config, name)
        if value < 0:
            raise ConfigError(f"{name} {value:g} must be at least 0")


def require_at_most(config: Any, most: int, *names: str) -> None:
    """Raise a ConfigError that names the first setting above `most`."""
    for name in names:
        value: int = getattr(config, name)
        if value > most:
            raise ConfigError(f"{name} {value} must be at most {most}")


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Raise a ConfigError that names the first setting below `least`."""
    for name in names:
        value: int = getattr(config, name)
        if value < least:
            raise ConfigError(f"{name} {value} must be at least {least}")
