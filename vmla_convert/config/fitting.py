"""Settings of the convert stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vmla_convert.config.checks import require_at_least
from vmla_convert.config.sizes import Sizes
from vmla_convert.config.source import DataConfig

Product = Literal["codec", "mla"]
"""The two products of a conversion: a codec beside the dense model, or a model with MLA layers."""


@dataclass(frozen=True)
class ConvertConfig:
    """The convert stage.

    Attributes:
        product: `codec` makes a cache codec beside the dense model; `mla` makes a model with MLA
            layers.
        size: Default size of a codec's cache, which can run at any smaller size too; or size of
            the MLA layers. The init `calibrated` divides a budget among MLA layers by predicted
            error. None gives codecs a 20th of the dense cache, and MLA layers the paper's size.
        channels: Channels per layer in a codec's file, which bound its largest size. None for a
            sixth of the model's width, at least 256, at most the width.
        init: Init of MLA layers, one of `vmla_convert.maths.factor.INITS`.
        latent: Latent of MLA layers, as in `MLAConfig`.
        dtype: Dtype of the weights that are written. None writes a codec as bfloat16; for MLA it
            leaves kept weights as they are and writes new ones as float32.
        calibrate: Measure activations; False assumes white inputs.
        calibration_clips: Clips that activations are measured on.
        mixed_precision: Dtype of matrix products in the passes of calibration; `no` for float32.
            Moments are float64 sums in either case.
        data: Where calibration clips come from.
        seed: Seed of random projections and of calibration noise.
    """

    product: Product = "codec"
    size: Sizes | None = None
    channels: int | None = None
    init: str = "calibrated"
    latent: Literal["joint", "split"] = "joint"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    calibrate: bool = True
    calibration_clips: int = 24
    mixed_precision: Literal["no", "bf16"] = "no"
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(self, 1, "calibration_clips")
        if self.channels is not None:
            require_at_least(self, 1, "channels")
