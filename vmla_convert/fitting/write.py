"""Write the tensors of a conversion layer by layer, so that an interrupted one can continue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.geometry import block_of
from vmla_convert.checkpoint.writer import CheckpointWriter
from vmla_convert.config import ConvertConfig, ModelConfig
from vmla_convert.fitting.calibrate import Statistics
from vmla_convert.fitting.codec import codec_fitter, codec_tensors
from vmla_convert.fitting.mla import (
    LayerRope,
    factor_layer,
    latent_tensors,
    layer_inputs,
    with_rope,
)
from vmla_convert.fitting.plan import ConversionPlan
from vmla_convert.fitting.prefetch import ahead, workers_for
from vmla_convert.fitting.weights import cast_finite
from vmla_convert.progress import Progress

T = TypeVar("T")


def write_codec(
    checkpoint: OpenCheckpoint,
    plan: ConversionPlan,
    config: ConvertConfig,
    statistics: Statistics | None,
    writer: CheckpointWriter,
    progress: Progress,
) -> ModelConfig:
    """Fit and write the codec of every layer that is not written yet.

    Args:
        checkpoint: The dense model.
        plan: The folder to write.
        config: The conversion.
        statistics: Calibration of every layer; None fits to the weights alone.
        writer: Writes the folder; the committed state is the number of layers done.
        progress: Where progress is drawn.
    """
    dim = checkpoint.config.geometry.dim
    # A worker needs about six float64 matrices (2d x 2d if calibrated, else d x d), and the 2d x 2d
    # matrix that weighs errors of [k; v].
    width = 2 * dim if statistics else dim
    nbytes = 6 * 8 * width**2 + 8 * (2 * dim) ** 2
    fit = codec_fitter(checkpoint.read, checkpoint.config, config, statistics)
    left = range(int(writer.state or 0), checkpoint.config.geometry.num_layers)
    for layer, codec in _made_ahead(fit, left, nbytes, progress, "fitting codecs"):
        for name, tensor in codec_tensors(codec, layer, plan.specs).items():
            writer.add(name, tensor)
        writer.commit(layer + 1)
    return plan.model


def write_mla(
    checkpoint: OpenCheckpoint,
    plan: ConversionPlan,
    config: ConvertConfig,
    statistics: Statistics | None,
    writer: CheckpointWriter,
    progress: Progress,
) -> ModelConfig:
    """Write tensors outside the blocks, then factor and write block by block.

    Arguments are those of `write_codec`; the committed state holds the rope pairs of layers done.

    Returns:
        The plan's config with the rope pairs that the layers chose.
    """
    ranks = plan.ranks
    assert ranks is not None
    rope = [LayerRope.from_json(*layer) for layer in writer.state or []]
    kept: dict[int, list[str]] = {}
    for name in plan.specs.keys() & checkpoint.names.keys() - writer.written:
        kept.setdefault(block_of(name), []).append(name)

    def add(name: str, tensor: Tensor) -> None:
        writer.add(name, cast_finite(name, tensor, plan.specs[name].dtype))

    def make(layer: int) -> tuple[LayerRope, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            return seen.setdefault(name, checkpoint.read(name))

        inputs = layer_inputs(read, checkpoint.config, config, statistics)
        weights, evidence = inputs(layer)
        factors = factor_layer(weights, evidence, ranks, config, layer)
        # Weights that were read for the factors and are kept need not be read again.
        copied = {name: seen[name] for name in kept[layer] if name in seen}
        return LayerRope.of(factors), copied | latent_tensors(factors, weights, layer)

    for name in sorted(kept.get(-1, [])):
        add(name, checkpoint.read(name))
    writer.commit(rope)
    left = range(len(rope), checkpoint.config.geometry.num_layers)
    # A dozen d x d matrices in float64, by measurement.
    nbytes = 12 * 8 * checkpoint.config.geometry.dim**2
    for layer, (chosen, tensors) in _made_ahead(make, left, nbytes, progress, "converting"):
        for name, tensor in tensors.items():
            add(name, tensor)
        for name in sorted(kept[layer]):
            if name not in tensors:
                add(name, checkpoint.read(name))
        rope.append(chosen)
        writer.commit(rope)
    return with_rope(plan.model, rope)


def _made_ahead(
    make: Callable[[int], T], layers: range, nbytes: int, progress: Progress, label: str
) -> Iterator[tuple[int, T]]:
    """Yield layers with what `make` returns, computed ahead in threads of `nbytes` each."""
    made = ahead(make, layers, workers_for(nbytes))
    return zip(layers, progress.track(made, label, len(layers)), strict=True)
