"""What a conversion would write and about how long it would take, before it does anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.layouts import CODEC
from vmla_convert.checkpoint.writer import check_place, copied_bytes, planned_files
from vmla_convert.config import ConvertConfig, Geometry
from vmla_convert.maths.spectra import truncate
from vmla_convert.pipelines.codec import codec_specs, planned_codec, refuse_layout
from vmla_convert.pipelines.conversion import measures, open_measured
from vmla_convert.pipelines.convert import plan_conversion
from vmla_convert.pipelines.folders import named_layout, parts_to_copy
from vmla_convert.pipelines.load import Source, open_named

# A common disk, bytes a second; nothing is written to find out.
READ_RATE, WRITE_RATE = 1e9, 300e6
# One factorisation by measured errors against one of the weights alone, measured on Wan 1.3B.
CALIBRATED_FACTOR = 40
_TRIAL_WIDTH = 512


@dataclass(frozen=True)
class Outlook:
    """A conversion foretold.

    Attributes:
        out: The folder.
        cache_bytes_per_token: Bytes per token and layer, two for a number that is whole.
        cache_cut: Share of the dense cache that would be saved.
        files: Bytes of every file of weights.
        nbytes: Together.
        working_bytes: Of what calibration lays beside the folder until it is done.
        seconds: A rough estimate, from a short trial of this machine.
    """

    out: str
    cache_bytes_per_token: float
    cache_cut: float
    files: dict[str, int]
    nbytes: int
    working_bytes: int
    seconds: float


def foresee(
    source: Source,
    out: Path,
    config: ConvertConfig,
    resume: bool = False,
    layout: str = "native",
) -> Outlook:
    """Check a conversion as `convert` would, and say what it would do.

    Raises:
        VmlaError: As `convert`, for all that shows before weights are read.
    """
    checkpoint = open_named(source)
    if config.product == "codec":
        refuse_layout(out, layout)
        model = planned_codec(checkpoint, config)
        form, specs, components = CODEC, codec_specs(model, config), {}
    else:
        plan = plan_conversion(checkpoint, config)
        model, form, specs = plan.config, named_layout(layout), plan.specs
        components = parts_to_copy(checkpoint.source.path, form)
    written = sum(spec.nbytes for spec in specs.values())
    check_place(out, written + copied_bytes(components), resume)
    geometry, tokens = checkpoint.config.geometry, _calibration_tokens(checkpoint, config)
    # Two squares of the width for the past, and for the own chunk clean and noisy.
    measured = 2 * 3 * geometry.dim**2 * 8 * geometry.num_layers
    # What each block reads, what the last one gives, and the gradients above and below a block.
    activations = 4 * tokens * geometry.dim * (geometry.num_layers + 3)
    return Outlook(
        out=str(out),
        cache_bytes_per_token=model.cache_bytes_per_token(),
        cache_cut=model.cache_cut(),
        files=(files := planned_files(specs, layout=form)),
        nbytes=sum(files.values()),
        working_bytes=measured + activations if tokens else 0,
        seconds=_seconds(checkpoint, config, written, tokens),
    )


def _calibration_tokens(checkpoint: OpenCheckpoint, config: ConvertConfig) -> int:
    """Clean and noisy tokens that walk through the model."""
    if not measures(config):
        return 0
    latents = open_measured(checkpoint.config, config).batch(0, 1).latents
    height, width = latents.shape[-2:]
    per_frame = checkpoint.config.geometry.tokens_per_frame((height, width))
    return 2 * latents.shape[1] * per_frame * config.calibration_clips


def _seconds(checkpoint: OpenCheckpoint, config: ConvertConfig, written: int, tokens: int) -> float:
    geometry = checkpoint.config.geometry
    stored = sum(spec.nbytes for spec in checkpoint.specs().values())
    # Read for the hash, to find what is not finite, and to convert.
    disk = 3 * stored / READ_RATE + written / WRITE_RATE
    factor = _factor_trial() * (geometry.dim / _TRIAL_WIDTH) ** 3 * geometry.num_layers
    if config.init == "calibrated":
        factor *= CALIBRATED_FACTOR
    # There once, and back with a second pass and its gradient.
    walk = 4 * tokens * _block_parameters(geometry) * geometry.num_layers * 2
    return disk + factor + (walk / _product_rate() if tokens else 0)


def _block_parameters(geometry: Geometry) -> int:
    return 8 * geometry.dim**2 + 2 * geometry.dim * geometry.ffn_dim


def _factor_trial() -> float:
    """Seconds that a narrow layer takes."""
    matrix = torch.randn(2 * _TRIAL_WIDTH, _TRIAL_WIDTH, dtype=torch.float64)
    started = perf_counter()
    truncate(matrix, _TRIAL_WIDTH // 8)
    return perf_counter() - started


def _product_rate() -> float:
    """Operations a second of a product of matrices."""
    matrix = torch.randn(1024, 1024)
    started = perf_counter()
    for _ in range(4):
        torch.mm(matrix, matrix)
    return 4 * 2 * 1024**3 / (perf_counter() - started)
