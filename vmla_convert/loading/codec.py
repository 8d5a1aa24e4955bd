"""A cache codec apart from its base model, for programs that run the base model themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint, open_checkpoint
from vmla_convert.checkpoint.layouts import CODEC
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import ModelConfig, Sizes
from vmla_convert.errors import CheckpointError
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.layers.runtime import codec_rates
from vmla_convert.loading.load import Source, is_codec, locate, read_provenance
from vmla_convert.loading.metadata_files import converted_files
from vmla_convert.maths.rates import Rate


@dataclass(frozen=True)
class Codec:
    """The codecs of all layers of a model.

    Attributes:
        config: Config of the base model with this codec.
        layers: Codec of each layer, on the CPU.
        record: The record conversion.json: how the codec was made, and hashes of its base model.
    """

    config: ModelConfig
    layers: tuple[LayerCodec, ...]
    record: Mapping[str, Any]

    def rates(
        self,
        size: Sizes | None = None,
        quantised: bool = True,
        layers: Sequence[int] | None = None,
    ) -> list[Rate]:
        """Channels and bits that each layer stores of a token.

        Args:
            size: Bytes per token and layer; None for the codec's default.
            quantised: False keeps channels in the host's dtype.
            layers: Numbers of the layers that are encoded; None for all.

        Raises:
            ConfigError: The codec does not have the size.
        """
        assert self.config.codec is not None
        chosen = range(len(self.layers)) if layers is None else layers
        codecs = [self.layers[layer] for layer in chosen]
        return codec_rates(self.config, codecs, size or self.config.codec.size, quantised)

    def save(self, out: str | Path) -> None:
        """Write the folder that `vmla convert` writes.

        Raises:
            OutputError: `out` is taken or cannot be written.
        """
        tensors = {
            f"blocks.{index}.codec.{name}": tensor.to(torch.bfloat16) if tensor.ndim > 1 else tensor
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.state_dict().items()
        }
        files = converted_files(self.config, self.record, CODEC, {})
        write_checkpoint(Path(out), tensors, files, CODEC)


def open_codec(source: Source) -> Codec:
    """Open a codec folder, file or Hub id without its base model.

    Raises:
        CheckpointError: There is no codec, or its tensors do not fit its config.
    """
    path, how = locate(source)
    if not is_codec(path):
        raise CheckpointError(
            f"{path} is not a cache codec",
            "give a folder of vmla convert, or of codec.save in your own pipeline",
        )
    opened = open_checkpoint(path, replace(how, base_model=None))
    _check_shapes(opened)
    layers = range(opened.config.geometry.num_layers)
    return Codec(
        opened.config, tuple(_read_layer(opened, layer) for layer in layers), read_provenance(path)
    )


def _check_shapes(opened: OpenCheckpoint) -> None:
    found, layers = opened.specs(), range(opened.config.geometry.num_layers)
    for layer in layers:
        for name, tensor in _empty(opened).state_dict().items():
            spec = found.get(f"blocks.{layer}.codec.{name}")
            if spec is None or spec.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"layer {layer} of {opened.source.path} has {name} of shape "
                    f"{spec and spec.shape}, its config asks for {tuple(tensor.shape)}",
                    "fit or convert again",
                )


def _empty(opened: OpenCheckpoint) -> LayerCodec:
    geometry, settings = opened.config.geometry, opened.config.codec
    assert settings is not None
    return LayerCodec(geometry.dim, geometry.num_heads, settings.rank)


def _read_layer(opened: OpenCheckpoint, layer: int) -> LayerCodec:
    codec = _empty(opened)
    state = {name: opened.read(f"blocks.{layer}.codec.{name}") for name in codec.state_dict()}
    codec.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return codec.requires_grad_(False)
