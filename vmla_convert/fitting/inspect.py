"""Facts about a checkpoint: its model, its cache, and the cache that a conversion would make."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint, recognise, require_whole
from vmla_convert.checkpoint.known import known_model
from vmla_convert.config import ConvertConfig, ModelConfig, SourceConfig
from vmla_convert.fitting.codec import plan_codec
from vmla_convert.fitting.weights import layer_weights
from vmla_convert.loading.load import Source, locate, recognise_named
from vmla_convert.maths.spectra import effective_rank, energy_at_rank, weight_spectrum
from vmla_convert.progress import Progress, Silent


@dataclass(frozen=True)
class LayerSpectrum:
    """How low-rank the joint key and value weights of one layer are.

    Attributes:
        layer: Index of the layer.
        effective_rank_99: Number of directions that hold 99 % of the squared weights.
        energy_at_rank: Share of the squared weights in an eighth of the width.
    """

    layer: int
    effective_rank_99: int
    energy_at_rank: float


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint.

    Attributes:
        path: Path or name of the checkpoint, as given.
        family: Layout of the checkpoint.
        known_model: Known model that the settings were taken from, if any.
        note: What is uncertain about the known model.
        parameters: Number of weights.
        nbytes: Bytes of the weights in the file.
        dtypes: Dtypes that weights are stored in.
        model: Full config of the model.
        converted: Config that a conversion to the given size would make; the model's own config if
            the model is converted already.
        window_cache_bytes: Bytes of the cache for a full window, batch 1, two bytes a number.
        converted_window_cache_bytes: The same bytes after conversion.
        unknown: Tensors that are not part of the model; `convert` refuses such a checkpoint.
        missing: Tensors that the model lacks; `convert` refuses such a checkpoint.
        spectrum: Spectrum of each layer, if asked for.
    """

    path: str
    family: str
    known_model: str | None
    note: str
    parameters: int
    nbytes: int
    dtypes: list[str]
    model: ModelConfig
    converted: ModelConfig
    window_cache_bytes: int
    converted_window_cache_bytes: int
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    spectrum: list[LayerSpectrum]


def inspect_checkpoint(
    source: Source,
    config: ConvertConfig | None = None,
    progress: Progress | None = None,
    spectra: bool = False,
) -> Inspection:
    """Describe a checkpoint from its headers; from the Hub, only headers are downloaded.

    Args:
        source: A file or folder, `demo`, or a Hub id, optionally with settings.
        config: Size to compare with; the default size if None.
        progress: Where progress is drawn.
        spectra: Decompose the key and value weights of every layer too. The weights are downloaded
            if necessary.

    Raises:
        CheckpointError: The source has no known layout.
        ConfigError: The size does not fit the model.
    """
    checkpoint = recognise(*locate(source)) if spectra else recognise_named(source, progress)
    model = converted = checkpoint.config
    spectrum: list[LayerSpectrum] = []
    if model.is_dense:
        converted = plan_codec(model, config or ConvertConfig())
        if spectra:
            require_whole(checkpoint)
            spectrum = _spectrum(checkpoint, model.geometry.dim // 8, progress or Silent())
    specs, frames = checkpoint.specs().values(), model.cache.window_frames
    return Inspection(
        path=source.checkpoint if isinstance(source, SourceConfig) else str(source),
        family=checkpoint.family,
        known_model=checkpoint.known,
        note=known_model(checkpoint.known).note if checkpoint.known else "",
        parameters=checkpoint.parameters(),
        nbytes=sum(spec.nbytes for spec in specs),
        dtypes=sorted({str(spec.dtype).removeprefix("torch.") for spec in specs}),
        model=model,
        converted=converted,
        window_cache_bytes=model.cache_bytes(frames),
        converted_window_cache_bytes=converted.cache_bytes(frames),
        unknown=checkpoint.unknown,
        missing=checkpoint.missing,
        spectrum=spectrum,
    )


def _spectrum(checkpoint: OpenCheckpoint, rank: int, progress: Progress) -> list[LayerSpectrum]:
    geometry = checkpoint.config.geometry
    layers: list[LayerSpectrum] = []
    for layer in progress.track(range(geometry.num_layers), "reading spectra"):
        weights = layer_weights(checkpoint.read, layer, geometry.num_heads)
        spectrum = weight_spectrum(torch.cat([weights.key, weights.value]))
        layers.append(
            LayerSpectrum(layer, effective_rank(spectrum), energy_at_rank(spectrum, rank))
        )
    return layers
