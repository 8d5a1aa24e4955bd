"""What a conversion would write, before it does anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.layouts import CODEC
from vmla_convert.checkpoint.output import copied_bytes
from vmla_convert.checkpoint.writer import planned_files
from vmla_convert.config import ConvertConfig
from vmla_convert.fitting.calibrate import shelf_bytes
from vmla_convert.fitting.codec import codec_specs, planned_codec, refuse_layout
from vmla_convert.fitting.conversion_steps import check_start, measures, open_measured
from vmla_convert.fitting.convert import plan_conversion
from vmla_convert.loading.load import Source, open_named
from vmla_convert.loading.metadata_files import named_layout, parts_to_copy


@dataclass(frozen=True)
class Outlook:
    """A conversion foretold.

    Attributes:
        out: The folder.
        cache_bytes_per_token: Bytes per token and layer, two for a number that is whole.
        cache_cut: Share of the dense cache that would be saved.
        files: Bytes of every file of weights.
        nbytes: Bytes of all files of weights together.
        working_bytes: Most bytes that calibration has beside the folder until it is done.
    """

    out: str
    cache_bytes_per_token: float
    cache_cut: float
    files: dict[str, int]
    nbytes: int
    working_bytes: int


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
    if config.product == "codec":
        refuse_layout(out, layout)
    checkpoint = open_named(source)
    if config.product == "codec":
        model = planned_codec(checkpoint, config)
        form, specs, components = CODEC, codec_specs(model, config), {}
    else:
        plan = plan_conversion(checkpoint, config)
        model, form, specs = plan.config, named_layout(layout), plan.specs
        components = parts_to_copy(checkpoint.source.path, form)
    written = sum(spec.nbytes for spec in specs.values())
    check_start(checkpoint, config, out, written + copied_bytes(components), resume)
    files = planned_files(specs, layout=form)
    return Outlook(
        out=str(out),
        cache_bytes_per_token=model.cache_bytes_per_token(),
        cache_cut=model.cache_cut(),
        files=files,
        nbytes=sum(files.values()),
        working_bytes=_working_bytes(checkpoint, config),
    )


def _working_bytes(checkpoint: OpenCheckpoint, config: ConvertConfig) -> int:
    if not measures(config):
        return 0
    clip = open_measured(checkpoint.config, config).batch(0, 1).latents
    geometry = checkpoint.config.geometry
    return shelf_bytes(geometry, clip, config.calibration_clips, config.product)
