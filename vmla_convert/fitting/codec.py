"""Cache codecs: settings, stored tensors, and the fit of a layer or of a model in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.config import CodecConfig, ConvertConfig, Geometry, ModelConfig, Sizes
from vmla_convert.errors import ConfigError
from vmla_convert.fitting.calibrate import Statistics
from vmla_convert.fitting.layer_statistics import LayerStatistics
from vmla_convert.fitting.weights import Read, cast_finite, layer_weights, with_tensors
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.runtime import check_size
from vmla_convert.maths.codec import CodecFit, assume_codec, fit_codec

LEAST_CHANNELS, CHANNEL_SHARE = 256, 6
"""Default channels per layer: a sixth of the width, at least 256, at most the width.

At 16 bits each, a sixth of the width takes 8 % of the dense bytes.
"""

_MLA_ONLY = ("init", "latent")
_WIDE = ("encode", "decode")


def plan_codec(dense: ModelConfig, config: ConvertConfig) -> ModelConfig:
    """Config of a dense model with the codec that a conversion makes.

    Raises:
        ConfigError: A setting does not fit the model, or belongs to MLA layers.
    """
    for name in _MLA_ONLY:
        if getattr(config, name) != getattr(ConvertConfig, name):
            raise ConfigError(
                f"{name} is a setting of MLA layers, and this makes a codec",
                "leave it out, or add --preset videomla",
            )
    codec = codec_settings(dense, config)
    planned = replace(dense, codec=codec)
    check_size(planned, codec.size)
    return planned


def default_channels(geometry: Geometry) -> int:
    """Channels per layer that a codec stores by default."""
    return min(max(LEAST_CHANNELS, geometry.dim // CHANNEL_SHARE), geometry.dim)


def codec_settings(dense: ModelConfig, config: ConvertConfig) -> CodecConfig:
    """Channels and default size of the codec that a conversion makes."""
    channels = config.channels or default_channels(dense.geometry)
    size = config.size or Sizes.default_codec(channels, dense.geometry)
    return CodecConfig(channels, size, config.calibrate)


def codec_specs(model: ModelConfig, config: ConvertConfig) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor of a codec, by native name."""
    geometry, codec = model.geometry, model.codec
    assert codec is not None
    dtype = getattr(torch, config.dtype or "bfloat16")
    with torch.device("meta"):
        state = LayerCodec(geometry.dim, geometry.num_heads, codec.rank).state_dict()
    return {
        f"blocks.{layer}.codec.{name}": TensorSpec(
            tuple(t.shape), dtype if name in _WIDE else torch.float32
        )
        for layer in range(geometry.num_layers)
        for name, t in state.items()
    }


def codec_fitter(
    read: Read, dense: ModelConfig, config: ConvertConfig, statistics: Statistics | None
) -> Callable[[int], CodecFit]:
    """Give the function that fits the codec of a layer by index.

    Args:
        read: Reads a tensor of the dense model by native name.
        dense: Config of the dense model.
        config: The conversion.
        statistics: Calibration of every layer; None fits to the weights alone.
    """
    channels = codec_settings(dense, config).rank

    def fit(layer: int) -> CodecFit:
        if statistics is None:
            return assume_codec(layer_weights(read, layer, dense.geometry.num_heads), channels)
        return fit_measured(statistics(layer), channels)

    return fit


def fit_measured(measured: LayerStatistics, channels: int) -> CodecFit:
    """Fit the codec of a layer to the layer's statistics."""
    assert measured.samples is not None
    return fit_codec(*measured.past, measured.samples, channels)


def codec_tensors(fit: CodecFit, layer: int, specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
    """Tensors of a fitted layer by native name, in the dtypes of a codec file.

    Raises:
        ConfigError: A number is not finite, or is out of the dtype's range.
    """
    named = {f"blocks.{layer}.codec.{name}": tensor for name, tensor in fit._asdict().items()}
    return {name: cast_finite(name, tensor, specs[name].dtype) for name, tensor in named.items()}


def fit_model(
    dense: CausalWanModel, config: ConvertConfig, statistics: Statistics | None = None
) -> CausalWanModel:
    """Fit a codec to a model in memory, with the numbers that a codec file would hold.

    Args:
        dense: The dense model, which the result has a copy of.
        config: Channels, default size and dtype.
        statistics: Calibration of every layer; None fits to the weights alone.
    """
    model = plan_codec(dense.config, config)
    assert model.codec is not None
    fit = codec_fitter(dense.state_dict().__getitem__, dense.config, config, statistics)
    specs, tensors = codec_specs(model, config), dict[str, Tensor]()
    for layer in range(model.geometry.num_layers):
        tensors |= codec_tensors(fit(layer), layer, specs)
    fitted = with_tensors(dense, model, {name: t.float() for name, t in tensors.items()})
    fitted.resize(model.codec.size)
    return fitted
