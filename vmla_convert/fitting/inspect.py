"""What is this checkpoint, what does its cache cost, and what would a latent cache cost?"""

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
        layer: Index.
        effective_rank_99: Directions that hold 99 % of the squared weights.
        energy_at_rank: Share that the inspected R holds.
    """

    layer: int
    effective_rank_99: int
    energy_at_rank: float


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint.

    Attributes:
        path: As given.
        family: Its layout.
        known_model: Whose settings it took; None when nobody said which model it is.
        note: What is uncertain about that model.
        parameters: Number of weights.
        nbytes: Their bytes in the file.
        dtypes: They are stored as.
        model: Its full config.
        converted: What a conversion at the inspected sizes would make of it; itself if converted.
        window_cache_bytes: Bytes of a full window, batch 1, two bytes a number.
        converted_window_cache_bytes: The same after conversion.
        unknown: Tensors that are no part of its model; `convert` refuses them.
        missing: Tensors that its model lacks; likewise.
        spectrum: Per layer, when asked for.
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
    """Read a checkpoint's headers; of one on the Hub no more than those are downloaded.

    Args:
        source: A file or folder, `demo`, or a Hub id; with settings if need be.
        config: Sizes to compare with; the default ones if None.
        progress: Where to draw.
        spectra: Read key and value weights too, and decompose them layer by layer; they are
            downloaded if they must be.

    Raises:
        CheckpointError: The source is no checkpoint of a known layout.
        ConfigError: The sizes do not fit it.
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
