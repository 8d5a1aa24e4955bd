"""Fit a cache codec to a dense checkpoint, layer by layer, and write its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmla_convert import __version__
from vmla_convert.checkpoint.base import base_tensors, tensor_hash
from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.hub import cached_repo
from vmla_convert.checkpoint.layouts import CODEC
from vmla_convert.checkpoint.settings import converted_config
from vmla_convert.checkpoint.source import TensorSpec, fingerprint
from vmla_convert.checkpoint.tensor_store import TensorStore
from vmla_convert.checkpoint.writer import CheckpointWriter
from vmla_convert.config import (
    CacheSize,
    CodecConfig,
    ConvertConfig,
    Geometry,
    ModelConfig,
    SourceConfig,
)
from vmla_convert.errors import ConfigError
from vmla_convert.fitting.calibrate import LayerReads, calibrate, model_blocks
from vmla_convert.fitting.conversion_steps import (
    Clock,
    Conversion,
    calibration_shelf,
    cast_finite,
    check_start,
    clips_hash,
    made_ahead,
    measure_layers,
    measures,
    open_dense,
    open_measured,
    origin_of,
    refuse_converted,
    require_finite,
    weights_of,
)
from vmla_convert.fitting.factors import layer_weights
from vmla_convert.layers.dit import CausalWanModel, check_size
from vmla_convert.loading.card import CARD_NAME, model_card
from vmla_convert.loading.load import CONVERSION_NAME, DEMO, Source
from vmla_convert.maths.codec import CodecFit, assume_codec, fit_codec
from vmla_convert.media.clips import ClipSource
from vmla_convert.progress import Progress, Silent, Timed
from vmla_convert.tables import to_dict

LEAST_CHANNELS, CHANNEL_SHARE = 256, 6
"""Channels per layer by default: a sixth of the width, at least 256, at most the width.

They hold 8 % of the dense bytes at 16 bits each. In the demo model, whose width is less, 1/20 of
the dense bytes is spent on 24 to 82 channels of a layer.
"""

# What makes sense only for the other product; a codec has no other value of these.
_MLA_ONLY = ("init", "latent", "cache_scalars", "kv_lora_rank", "qk_rope_head_dim", "plan")
_WIDE = ("encode", "decode")


def convert_to_codec(
    source: Source,
    out: Path,
    config: ConvertConfig,
    progress: Progress | None = None,
    resume: bool = False,
    layout: str = "native",
) -> Conversion:
    """Fit a codec; arguments and errors as of `convert`. The source is read and never written."""
    clock, progress = Clock(), Timed(progress or Silent())
    refuse_layout(out, layout)
    checkpoint = open_dense(source, progress)
    planned = planned_codec(checkpoint, config)
    specs = codec_specs(planned, config)
    check_start(checkpoint, config, out, sum(spec.nbytes for spec in specs.values()), resume)
    base = _base_record(source, checkpoint, progress)
    origin = origin_of(source, checkpoint)
    basis = {
        "source": origin,
        "base": base["tensors"],
        "model": to_dict(checkpoint.config),
        "clips": clips_hash(config),
        # All of the source decides what its layers attend to.
        "weights": fingerprint(checkpoint.source.path, progress) if measures(config) else None,
    }
    shelf = calibration_shelf(out, basis, config)
    fit = _fitter(checkpoint, config, shelf, progress)
    clock.start_factoring()
    identity = {**basis, "version": __version__, "settings": to_dict(config)}
    with CheckpointWriter(out, specs, identity=identity, resume=resume, layout=CODEC) as writer:
        left = range(int(writer.state or 0), checkpoint.config.geometry.num_layers)
        nbytes = _fit_bytes(planned, config)
        for layer, codec in made_ahead(fit, left, nbytes, progress, "fitting codecs"):
            for name, tensor in codec_tensors(codec, layer).items():
                writer.add(name, cast_finite(name, tensor, specs[name].dtype))
            writer.commit(layer + 1)
        record = clock.record(config, progress, source=origin, base=base)
        writer.write_files(codec_files(planned, record))
    if shelf is not None:
        shelf.remove()
    return Conversion.recorded(out, planned, record)


def refuse_layout(out: Path, layout: str) -> None:
    """Refuse a layout that no codec has.

    Raises:
        ConfigError: It is not our own.
    """
    if layout != "native":
        raise ConfigError(
            f"a codec is a file beside its base model and has no layout '{layout}'",
            f"convert first, then: vmla export {out} -o DIR --layout {layout}",
        )


def planned_codec(checkpoint: OpenCheckpoint, config: ConvertConfig) -> ModelConfig:
    """The settings of a dense checkpoint with the codec that a conversion will make.

    Raises:
        CheckpointError: The checkpoint is converted already.
        ConfigError: As `plan_codec`.
    """
    refuse_converted(checkpoint)
    return plan_codec(checkpoint.config, config)


def plan_codec(dense: ModelConfig, config: ConvertConfig) -> ModelConfig:
    """The settings of a dense model with the codec that a conversion will make.

    Raises:
        ConfigError: A setting does not fit the model, or is one of MLA layers.
    """
    plain = {f.name: f.default for f in fields(ConvertConfig)}
    for name in _MLA_ONLY:
        if getattr(config, name) != plain[name]:
            raise ConfigError(
                f"{name} is a setting of MLA layers, and this makes a codec",
                "leave it out, or add --preset videomla",
            )
    codec = codec_settings(dense, config)
    planned = replace(dense, codec=codec)
    check_size(planned, codec.size)
    return planned


def default_channels(geometry: Geometry) -> int:
    """Channels per layer that a codec stores where none are asked for."""
    return min(max(LEAST_CHANNELS, geometry.dim // CHANNEL_SHARE), geometry.dim)


def codec_settings(dense: ModelConfig, config: ConvertConfig) -> CodecConfig:
    """Channels and default size of the codec that a conversion makes."""
    channels = config.channels or default_channels(dense.geometry)
    size, whole = CodecConfig(channels).size, CacheSize(rank=channels)
    most = whole.token_bytes(dense.geometry)
    if config.bytes_per_token is not None or config.cut is not None:
        size = CacheSize(config.bytes_per_token, config.cut)
    elif size.token_bytes(dense.geometry) > most:
        size = whole
    return CodecConfig(channels, size, config.calibrate)


def codec_specs(config: ModelConfig, how: ConvertConfig) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor of a codec, by native name."""
    dtype = getattr(torch, how.dtype or "bfloat16")
    with torch.device("meta"):
        state = CausalWanModel(config).state_dict()
    return {
        name: TensorSpec(tuple(t.shape), dtype if name.endswith(_WIDE) else torch.float32)
        for name, t in state.items()
        if ".codec." in name
    }


def codec_tensors(codec: CodecFit, layer: int) -> dict[str, Tensor]:
    """A fitted layer by native names."""
    return {f"blocks.{layer}.codec.{name}": tensor for name, tensor in codec._asdict().items()}


def codec_files(config: ModelConfig, record: Mapping[str, Any]) -> dict[str, str | dict[str, Any]]:
    """What lies beside the weights of a codec."""
    return {
        "config.json": converted_config(config),
        CONVERSION_NAME: dict(record),
        CARD_NAME: model_card(config, record),
    }


def fit_layer(reads: LayerReads, channels: int) -> CodecFit:
    """The codec of a layer that calibration measured."""
    assert reads.samples is not None
    return fit_codec(*reads.past, reads.samples, channels)


def fit_model(
    teacher: CausalWanModel,
    config: ConvertConfig,
    clips: ClipSource | None = None,
    progress: Progress | None = None,
) -> CausalWanModel:
    """A dense model in memory with a codec beside its attention, float32; its weights are shared.

    Args:
        teacher: The dense model.
        config: Channels, default size and calibration.
        clips: Where calibration clips come from; None for those of `config`.
        progress: Where to draw.
    """
    geometry, dense = teacher.config.geometry, teacher.config
    codec = codec_settings(dense, config)
    if config.calibrate:
        clips = clips or open_measured(dense, config)
        blocks, count = model_blocks(teacher), config.calibration_clips
        reads = calibrate(teacher, blocks, clips, count, config.seed, progress)
        fits = [fit_layer(reads(layer), codec.rank) for layer in range(geometry.num_layers)]
    else:
        state = teacher.state_dict()
        layers = range(geometry.num_layers)
        weights = (layer_weights(state.__getitem__, i, geometry.num_heads) for i in layers)
        fits = [assume_codec(each, codec.rank) for each in weights]
    return with_codec(teacher, fits, codec)


def with_codec(
    teacher: CausalWanModel, fits: Sequence[CodecFit], codec: CodecConfig
) -> CausalWanModel:
    """A dense model with fitted codecs, its weights shared, at the codec's default size."""
    with torch.device("meta"):
        model = CausalWanModel(replace(teacher.config, codec=codec))
    device = teacher.patch_embedding.weight.device
    state = dict(teacher.state_dict())
    for layer, fit in enumerate(fits):
        state |= {
            name: t.to(device, torch.float32) for name, t in codec_tensors(fit, layer).items()
        }
    model.load_state_dict(state, assign=True)
    model.resize(codec.size)
    return model.eval().requires_grad_(False)


def _fitter(
    checkpoint: OpenCheckpoint, config: ConvertConfig, shelf: TensorStore | None, progress: Progress
) -> Callable[[int], CodecFit]:
    """Fits the codec of a layer by its index; calibration happens here and now."""
    channels = codec_settings(checkpoint.config, config).rank
    if not config.calibrate:
        weights = weights_of(checkpoint)
        return lambda layer: assume_codec(weights(layer), channels)
    reads = measure_layers(checkpoint, config, shelf, progress)
    return lambda layer: fit_layer(reads(layer), channels)


def _base_record(source: Source, checkpoint: OpenCheckpoint, progress: Progress) -> dict[str, Any]:
    """How a codec finds its base model again, and knows it by what keys and values depend on."""
    how = source if isinstance(source, SourceConfig) else SourceConfig(str(source))
    plain, hashes = replace(checkpoint, loras=()), dict[str, str]()
    names = base_tensors(checkpoint.config.geometry.num_layers)
    for name in progress.track(names, "hashing keys and values"):
        tensor = plain.read(name)
        require_finite(name, tensor, checkpoint.source.path)
        hashes[name] = tensor_hash(tensor)
    path = checkpoint.source.path
    record: dict[str, Any] = {"name": path.name, "path": str(path.absolute())}
    if how.checkpoint == DEMO:
        record = {"name": DEMO, "repo": DEMO}
    elif repo := cached_repo(path):
        name, _, revision = repo.partition("@")
        record = {"name": name.rpartition("/")[2], "repo": name, "revision": revision}
        inside = path.parts[path.parts.index(revision) + 1 :]
        record |= {"file": "/".join(inside)} if inside else {}
    if checkpoint.loras:
        record["loras"] = [f"{lora.path.absolute()}:{lora.scale!r}" for lora in checkpoint.loras]
    return record | {"tensors": hashes}


def _fit_bytes(config: ModelConfig, how: ConvertConfig) -> int:
    """Memory of one fit: half a dozen matrices of keys and values, or of inputs, in float64."""
    width = config.geometry.dim * (2 if how.calibrate else 1)
    return 6 * 8 * width**2 + 8 * (2 * config.geometry.dim) ** 2
