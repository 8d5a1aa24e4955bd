"""What is this checkpoint, what does its cache cost, and what would a latent cache cost?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint, open_checkpoint
from vmla_convert.config import ConvertConfig, ModelConfig
from vmla_convert.maths.spectra import effective_rank, energy_at_rank, weight_spectrum
from vmla_convert.pipelines.convert import layer_weights, planned_config
from vmla_convert.pipelines.load import checkpoint_path
from vmla_convert.pipelines.plan import check_sizes, uniform_plan
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
        parameters: Number of weights.
        model: Its full config.
        converted: What a conversion at the inspected sizes would make of it; itself if converted.
        window_cache_bytes: Bytes of a full window, batch 1, two bytes a number.
        converted_window_cache_bytes: The same after conversion.
        spectrum: Per layer; empty for converted checkpoints.
    """

    path: str
    parameters: int
    model: ModelConfig
    converted: ModelConfig
    window_cache_bytes: int
    converted_window_cache_bytes: int
    spectrum: list[LayerSpectrum]


def inspect_checkpoint(
    path: str | Path, config: ConvertConfig | None = None, progress: Progress | None = None
) -> Inspection:
    """Read a checkpoint's headers, and its key and value weights one layer at a time.

    Args:
        path: A file or folder, or `demo`.
        config: Sizes to compare with; the paper's shares by default.
        progress: Where to draw.

    Raises:
        CheckpointError: The path is no checkpoint of a known layout.
        ConfigError: The sizes do not fit it.
    """
    checkpoint = open_checkpoint(checkpoint_path(path))
    model = checkpoint.config
    converted = model
    spectrum: list[LayerSpectrum] = []
    if model.mla is None:
        config = config or ConvertConfig()
        check_sizes(model, config)
        ranks = uniform_plan(model, config)
        converted = planned_config(model, config, ranks)
        spectrum = _spectrum(checkpoint, ranks.kv_lora_rank[0], progress or Silent())
    frames = model.cache.window_frames
    return Inspection(
        path=str(path),
        parameters=checkpoint.parameters(),
        model=model,
        converted=converted,
        window_cache_bytes=model.cache_bytes(frames),
        converted_window_cache_bytes=converted.cache_bytes(frames),
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
