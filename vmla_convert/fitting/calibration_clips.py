"""Clips that a conversion is calibrated on, counted into batches."""

from __future__ import annotations

from vmla_convert.config import ConvertConfig, Geometry
from vmla_convert.generating.make_clips import Need
from vmla_convert.maths.factor import DATA_INITS
from vmla_convert.media.clip_checks import clips_at_once
from vmla_convert.media.clips import ClipSource


def measures(config: ConvertConfig) -> bool:
    """Whether a conversion measures activations."""
    return config.calibrate and config.init in DATA_INITS


def calibration_needs(config: ConvertConfig) -> list[Need]:
    """The clips that a conversion is calibrated on, if it measures activations."""
    return [Need(config.data, "train", config.calibration_clips)] if measures(config) else []


def calibration_passes(config: ConvertConfig) -> list[float]:
    """Forward passes of a clip, for each need: one forward, and one more forward and backward."""
    return [4.0 * config.calibration_clips for _ in calibration_needs(config)]


def batch_sizes(geometry: Geometry, clips: ClipSource, count: int) -> list[int]:
    """How many clips each batch holds when `count` clips are calibrated on."""
    most = clips_at_once(geometry, clips.batch(0, 1).latents)
    return [min(most, count - start) for start in range(0, count, most)]
