"""Conversions of a sweep's points in memory, made from one calibration for each product."""

from __future__ import annotations

from collections.abc import Mapping

from vmla_convert.config import ConvertConfig, Product
from vmla_convert.fitting.calibrate import Statistics, calibrate, model_blocks
from vmla_convert.fitting.codec import fit_model
from vmla_convert.fitting.mla import convert_model
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.media.clips import open_clips
from vmla_convert.progress import Progress
from vmla_convert.storage.tensor_store import TensorStore


class Shared:
    """Makes the conversions of a sweep in memory.

    Args:
        teacher: The dense model.
        common: Calibration and data that all points share.
        stores: Store of each product's calibration.
    """

    def __init__(
        self, teacher: CausalWanModel, common: ConvertConfig, stores: Mapping[Product, TensorStore]
    ) -> None:
        self.teacher, self.common, self.stores = teacher, common, stores

    def statistics(self, product: Product, progress: Progress | None = None) -> Statistics:
        """Statistics of every layer for a product; calibrates where the store lacks them."""
        return calibrate(
            self.teacher,
            model_blocks(self.teacher),
            open_clips(self.common.data, self.teacher.config.cache.sink_frames),
            self.common.calibration_clips,
            self.common.seed,
            progress,
            self.stores[product],
            product,
            self.common.mixed_precision,
        )

    def student(self, conversion: ConvertConfig) -> CausalWanModel:
        """Convert the dense model.

        Raises:
            ConfigError: A size does not fit the model, or a fitted number is not finite.
        """
        convert = fit_model if conversion.product == "codec" else convert_model
        calibrates = self.common.calibrate
        statistics = self.statistics(conversion.product) if calibrates else None
        return convert(self.teacher, conversion, statistics)
