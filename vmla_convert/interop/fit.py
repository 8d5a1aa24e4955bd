"""Fit a codec to what was seen of a running program."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from vmla_convert.checkpoint.base import PRECISION, tensor_hash
from vmla_convert.checkpoint.families import recognise_source, require_whole
from vmla_convert.checkpoint.source import TensorSource
from vmla_convert.checkpoint.specs import TensorSpec
from vmla_convert.config import (
    CachePolicy,
    ConvertConfig,
    Geometry,
    ModelConfig,
    SamplerConfig,
    Sizes,
    SourceConfig,
)
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.fitting.codec import codec_specs, codec_tensors, fit_measured, plan_codec
from vmla_convert.interop.attach import base_tensors_of
from vmla_convert.interop.host import model_of, sizes_of
from vmla_convert.interop.observe import Seen
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.loading.codec import Codec
from vmla_convert.progress import Progress, Silent
from vmla_convert.results import library_versions
from vmla_convert.tables import to_dict

_GEOMETRY = {field.name for field in fields(Geometry)}


def fit(
    seen: Seen,
    *,
    bytes_per_token: float | None = None,
    cut: float | None = None,
    channels: int | None = None,
    progress: Progress | None = None,
) -> Codec:
    """Fit a codec to the keys and values that a program cached.

    Args:
        seen: Measurements of `observe`.
        bytes_per_token: Default size of the cache; any smaller size can be attached too.
        cut: Default size as the share of the dense cache to remove. By default 0.95.
        channels: Channels per layer, which bound the largest size. By default a sixth of the
            model's width, at least 256, at most the width.
        progress: Where progress is drawn.

    Raises:
        ConfigError: Too few tokens were seen, or none that attends to an earlier chunk.
    """
    sized = bytes_per_token is not None or cut is not None
    config = ConvertConfig(channels=channels, size=Sizes(bytes_per_token, cut) if sized else None)
    if seen.deployment is None:
        raise ConfigError("nothing was observed", "run the program inside the with block")
    dense = _wan_config(seen) or _unknown_config(seen)
    model = plan_codec(dense, config)
    assert model.codec is not None
    _require_enough(seen, model.codec.rank)
    specs, layers = codec_specs(model, config), list[LayerCodec]()
    for index, layer in enumerate((progress or Silent()).track(seen.layers, "fitting codecs")):
        tensors = codec_tensors(fit_measured(layer.statistics(), model.codec.rank), index, specs)
        codec = LayerCodec(model.geometry.dim, model.geometry.num_heads, model.codec.rank)
        codec.load_state_dict({name.rpartition(".")[2]: t.float() for name, t in tensors.items()})
        layers.append(codec.requires_grad_(False))
    return Codec(model, tuple(layers), _record(seen, config))


def _require_enough(seen: Seen, channels: int) -> None:
    """Refuse statistics that do not determine a codec."""
    tokens = min(layer.tokens for layer in seen.layers)
    if tokens < channels:
        raise ConfigError(
            f"{tokens} kept tokens were observed, and a codec of {channels} channels needs at "
            f"least {channels}",
            "run more prompts inside observe, or ask for less: fit(seen, channels=N)",
        )
    if any(layer.stats is None for layer in seen.layers):
        raise ConfigError(
            "no observed chunk attended to an earlier chunk",
            "generate clips of two chunks or more inside observe",
        )


def _wan_config(seen: Seen) -> ModelConfig | None:
    """Config of a model with Wan's tensors, and with no others; else None.

    A codec of such a model also works with `vmla generate` and `vmla.load`.
    """
    model = model_of(seen.program, seen.host)
    if model is None:
        return None
    state = model.state_dict()
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in state.items()}
    source = TensorSource(Path(type(model).__name__), None, specs, state.__getitem__)
    stated = {name: value for name, value in vars(model).items() if name in _GEOMETRY}
    stated["num_heads"] = sizes_of(seen.host.layers[0])[1]
    try:
        opened = recognise_source(source, stated, SourceConfig(overrides=_deployment(seen)))
        require_whole(opened)
    except VmlaError:
        return None
    return opened.config


def _unknown_config(seen: Seen) -> ModelConfig:
    """Config of a model with other layers around the self-attention; unknown sizes are 1."""
    dim, heads = sizes_of(seen.host.layers[0])
    geometry = Geometry(
        dim, 1, heads, len(seen.layers), in_dim=1, out_dim=1, freq_dim=1, text_dim=1, text_len=1
    )
    settings = _deployment(seen)
    return ModelConfig(
        geometry,
        settings["latent_size"],
        settings["chunk_frames"],
        CachePolicy(**settings["cache"]),
        SamplerConfig(),
        family="unknown",
    )


def _deployment(seen: Seen) -> dict[str, Any]:
    """Settings that the program's passes show."""
    assert seen.deployment is not None
    (rows, columns), chunk_tokens, slots = seen.deployment
    sink = int(getattr(seen.host.layers[0], "sink_size", 0))
    chunk = chunk_tokens // (rows * columns)
    window = max(slots // (rows * columns), sink + chunk)
    # Every supported model has patches of 2 x 2.
    return {
        "latent_size": (2 * rows, 2 * columns),
        "chunk_frames": chunk,
        "cache": to_dict(CachePolicy(window, sink)),
    }


def _record(seen: Seen, config: ConvertConfig) -> dict[str, Any]:
    """The record of a codec that was fitted to a running program."""
    name = type(model_of(seen.program, seen.host) or seen.program).__name__
    tensors = base_tensors_of(seen.host)
    return {
        "source": {"name": name, "family": "host", "asked": {}, "loras": []},
        "base": {
            "name": name,
            "precision": PRECISION,
            "tensors": {name: tensor_hash(tensor) for name, tensor in tensors.items()},
        },
        "observed": {"program": type(seen.program).__name__, "tokens": seen.layers[0].tokens},
        "convert": to_dict(config),
        "versions": library_versions(),
    }
