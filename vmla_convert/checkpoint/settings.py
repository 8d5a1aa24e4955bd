"""The settings of a model that its tensors cannot tell, and the config.json that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmla_convert.checkpoint.known import known_model
from vmla_convert.config import (
    CONFIG_VERSION,
    CachePolicy,
    Geometry,
    ModelConfig,
    SamplerConfig,
    SourceConfig,
)
from vmla_convert.errors import CheckpointError, ConfigError, did_you_mean
from vmla_convert.tables import from_dict, merged, read_json, to_dict

FORMAT = "vmla-convert"

# Settings that tensors cannot tell. A known model (`--model`), a table "vmla" in config.json and
# `SourceConfig.overrides` (`--set model.*`) replace them, in this order.
DEFAULTS: dict[str, Any] = {
    "latent_size": (60, 104),
    "chunk_frames": 3,
    "cache": to_dict(CachePolicy(window_frames=21)),
    "sampler": to_dict(SamplerConfig()),
    "media": "wan",
    "licence": "unknown",
    "base_model": "unknown",
    "frames_per_second": ModelConfig.frames_per_second,
}
DEPLOYMENT = {"cache", "sampler"}
"""Those of `DEFAULTS` that can still be set for a converted folder."""
# Wan 2.2's other VAE has 48 channels and 16 pixels per latent side; its model makes 24 frames per
# second.
_WIDE_VAE = {48: {"latent_size": (44, 80), "frames_per_second": 24}}


def is_ours(file_config: Mapping[str, Any]) -> bool:
    """Whether a config.json was written by this program."""
    return file_config.get("format") == FORMAT


def converted_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of our own folders, which `open_checkpoint` reads back."""
    return {"format": FORMAT, "version": CONFIG_VERSION, "model": to_dict(config)}


def read_config(file: Path) -> dict[str, Any]:
    """Read a config.json or another JSON table; empty when the file does not exist.

    Raises:
        CheckpointError: The file is damaged or cannot be read.
    """
    if not file.is_file():
        return {}
    try:
        config = read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}", "correct or remove it") from error
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}", "check its permissions"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON table", "correct or remove it")
    return config


def dense_model(
    geometry: Geometry,
    family: str,
    frames_per_second: int,
    how: SourceConfig,
    file_config: Mapping[str, Any],
    path: Path,
) -> ModelConfig:
    """The config of a dense model; each source of settings overrides those before it."""
    settings = {**DEFAULTS, "frames_per_second": frames_per_second}
    settings = merged(settings, _WIDE_VAE.get(geometry.in_dim, {}))
    if how.model:
        known = known_model(how.model)
        if geometry.dim not in known.widths:
            raise ConfigError(
                f"{known.title} has a width of {' or '.join(map(str, known.widths))}, "
                f"{path} one of {geometry.dim}",
                "drop --model, or name the model that this is",
            )
        settings = merged(settings, known.settings)
    beside = file_config.get("vmla", {})
    if not isinstance(beside, dict):
        raise CheckpointError(
            f"'vmla' in the config.json of {path} is not a table", "make it a table or remove it"
        )
    for table, where in (
        (beside, f"'vmla.{{}}' in the config.json of {path}"),
        (how.overrides, "'model.{}'"),
    ):
        for name in table:
            if name not in DEFAULTS:
                raise ConfigError(f"unknown key {where.format(name)}", did_you_mean(name, DEFAULTS))
        settings = merged(settings, table)
    try:
        return from_dict(ModelConfig, {**settings, "geometry": to_dict(geometry), "family": family})
    except ConfigError as error:
        raise ConfigError(
            f"the settings of {path} do not fit: {error.message}",
            error.hint or "correct them with --set model.KEY=…, or in the config.json beside it",
        ) from error
