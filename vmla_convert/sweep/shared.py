"""What the points of a sweep share: one calibration for each product, kept on a shelf."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from vmla_convert.checkpoint.tensor_store import TensorStore
from vmla_convert.config import ConvertConfig, Product
from vmla_convert.fitting.calibrate import LayerReads, calibrate, deployed_phases, model_blocks
from vmla_convert.fitting.codec import codec_specs, codec_tensors, fit_layer, plan_codec
from vmla_convert.fitting.conversion_steps import cast_finite
from vmla_convert.fitting.factors import (
    build_student,
    convert_model,
    layer_evidence,
    layer_weights,
)
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.codec import CodecFit, assume_codec
from vmla_convert.maths.evidence import Evidence, assume_evidence
from vmla_convert.maths.projections import KVWeights
from vmla_convert.media.clips import open_clips
from vmla_convert.progress import Progress


class Shared:
    """Makes the conversions of a sweep in memory.

    Args:
        teacher: The dense model.
        common: What the points have in common: calibration and data.
        shelves: Where each product's calibration is kept.
    """

    def __init__(
        self, teacher: CausalWanModel, common: ConvertConfig, shelves: Mapping[Product, TensorStore]
    ) -> None:
        self.teacher, self.common, self.shelves = teacher, common, shelves

    def reads(
        self, product: Product, progress: Progress | None = None
    ) -> Callable[[int], LayerReads]:
        """What is measured of a layer for a product; calibrates where the shelf lacks it."""
        teacher, common = self.teacher, self.common
        return calibrate(
            teacher,
            model_blocks(teacher),
            open_clips(common.data, teacher.config.cache.sink_frames),
            common.calibration_clips,
            common.seed,
            progress,
            self.shelves[product],
            product,
        )

    def student(self, conversion: ConvertConfig) -> CausalWanModel:
        """A conversion as a model.

        Raises:
            ConfigError: A size does not fit the model, or numbers came out that are not finite.
        """
        if conversion.product == "codec":
            return self._codec(conversion)
        return convert_model(self.teacher, conversion, self._evidence())

    def _codec(self, conversion: ConvertConfig) -> CausalWanModel:
        """A codec beside the dense model, rounded as in a file."""
        config = plan_codec(self.teacher.config, conversion)
        assert config.codec is not None
        specs, fit = codec_specs(config, conversion), self._fitter(config.codec.rank)
        tensors: dict[str, Tensor] = {}
        for layer in range(config.geometry.num_layers):
            for name, tensor in codec_tensors(fit(layer), layer).items():
                tensors[name] = cast_finite(name, tensor, specs[name].dtype).float()
        student = build_student(self.teacher, config, tensors)
        student.resize(config.codec.size)
        return student

    def _fitter(self, channels: int) -> Callable[[int], CodecFit]:
        if not self.common.calibrate:
            return lambda layer: assume_codec(self._weights(layer), channels)
        reads = self.reads("codec")
        return lambda layer: fit_layer(reads(layer), channels)

    def _evidence(self) -> Callable[[int], Evidence]:
        phases = deployed_phases(self.teacher.config)
        if not self.common.calibrate:
            return lambda layer: assume_evidence(self._weights(layer), phases)
        reads = self.reads("mla")
        return lambda layer: layer_evidence(reads(layer), self._weights(layer), phases)

    def _weights(self, layer: int) -> KVWeights:
        state = self.teacher.state_dict()
        return layer_weights(state.__getitem__, layer, self.teacher.config.geometry.num_heads)
