"""The plan of a conversion: its output is checked and known before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.geometry import block_of
from vmla_convert.checkpoint.layouts import CODEC, Layout
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.checkpoint.writer import planned_files
from vmla_convert.config import ConvertConfig, MediaConfig, ModelConfig, RankPlan
from vmla_convert.errors import ConfigError
from vmla_convert.fitting.calibrate import store_bytes
from vmla_convert.fitting.calibration_clips import calibration_needs, calibration_passes
from vmla_convert.fitting.codec import codec_specs, plan_codec
from vmla_convert.fitting.dense_source import refuse_converted
from vmla_convert.fitting.memory import conversion_memory
from vmla_convert.fitting.mla import planned_config
from vmla_convert.fitting.rank_plan import check_sizes, uniform_plan
from vmla_convert.generating.clip_cost import PlannedWork, clip_shape, plan_work
from vmla_convert.generating.make_clips import Clips, check_needs, like
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.memory import ClipShape
from vmla_convert.loading.load import Source, open_named
from vmla_convert.loading.metadata_files import named_layout, parts_to_copy
from vmla_convert.progress import Progress
from vmla_convert.storage.output import check_place, copied_bytes


@dataclass(frozen=True)
class ConversionPlan:
    """The folder that a conversion will write.

    Attributes:
        model: Config of the converted model. Rope pairs and phases of MLA layers are placeholders
            until the layers are factored.
        specs: Shape and dtype of every tensor, in the order of writing.
        layout: Layout of the folder.
        ranks: Sizes of every MLA layer; None for a codec.
        copies: Folders that are copied, text encoder and VAE, by name in the new folder.
    """

    model: ModelConfig
    specs: dict[str, TensorSpec]
    layout: Layout
    ranks: RankPlan | None = None
    copies: Mapping[str, Path] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and copied folders."""
        weights = sum(spec.nbytes for spec in self.specs.values())
        return weights + copied_bytes(self.copies)


def plan_conversion(
    checkpoint: OpenCheckpoint,
    config: ConvertConfig,
    layout: str = "native",
    ranks: RankPlan | None = None,
    progress: Progress | None = None,
) -> ConversionPlan:
    """Check that a conversion can be done, and plan the folder that it writes.

    Args:
        checkpoint: The dense model.
        config: The conversion.
        layout: Layout of the folder: `native`, or for MLA layers also `diffusers`.
        ranks: Sizes of every MLA layer. By default all layers have one size, as nothing is measured
            yet.
        progress: Shows where text encoder and VAE are found, when they are not copied.

    Raises:
        CheckpointError: The checkpoint is converted already.
        ConfigError: The init, a size or the layout does not fit.
    """
    refuse_converted(checkpoint)
    if config.product == "codec":
        if layout != "native":
            raise ConfigError(
                f"a codec is a file beside its base model and has no layout '{layout}'",
                f"convert without --layout, then: vmla export CODEC -o DIR --layout {layout}",
            )
        model = plan_codec(checkpoint.config, config)
        return ConversionPlan(model, codec_specs(model, config), CODEC)
    form = named_layout(layout)
    _check_mla(checkpoint.config, config)
    ranks = ranks or uniform_plan(checkpoint.config, config)
    model = planned_config(checkpoint.config, config, ranks)
    specs = _mla_specs(checkpoint, model, config)
    copies = parts_to_copy(checkpoint.source.path, form, progress)
    return ConversionPlan(model, specs, form, ranks, copies)


def _check_mla(dense: ModelConfig, config: ConvertConfig) -> None:
    if config.channels is not None:
        raise ConfigError(
            "channels is a setting of codecs, and this makes MLA layers",
            "leave it out, or convert without --preset",
        )
    check_sizes(dense, config)


def _mla_specs(
    checkpoint: OpenCheckpoint, model: ModelConfig, config: ConvertConfig
) -> dict[str, TensorSpec]:
    """Tensors outside the blocks first, then block by block."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in CausalWanModel(model).state_dict().items()}
    stored = checkpoint.specs()
    wanted = getattr(torch, config.dtype) if config.dtype else None

    def dtype(name: str) -> torch.dtype:
        return wanted or (stored[name].dtype if name in stored else torch.float32)

    ordered = sorted(shapes.items(), key=lambda item: block_of(item[0]))
    return {name: TensorSpec(tuple(shape), dtype(name)) for name, shape in ordered}


@dataclass(frozen=True)
class PlannedOutput:
    """The output that a conversion would write.

    Attributes:
        out: The folder.
        cache_bytes_per_token: Bytes of the cache per token and layer, two for each number that is
            not quantised.
        cache_cut: Share of the dense cache that is saved.
        files: Bytes of every file of weights.
        nbytes: Bytes of all files of weights together.
        working_bytes: Most bytes of calibration files beside the folder, until it is done.
        work: Clips, time and memory that the conversion takes.
    """

    out: str
    cache_bytes_per_token: float
    cache_cut: float
    files: dict[str, int]
    nbytes: int
    working_bytes: int
    work: PlannedWork


def plan_output(
    source: Source,
    out: Path,
    config: ConvertConfig,
    resume: bool = False,
    layout: str = "native",
    media: MediaConfig | None = None,
) -> PlannedOutput:
    """Check a conversion as `convert` does, and return what would be written.

    Raises:
        VmlaError: Every error that `convert` raises before reading weights.
    """
    checkpoint = open_named(source)
    plan = plan_conversion(checkpoint, config, layout)
    check_place(out, plan.nbytes, resume)
    works = check_needs(checkpoint, calibration_needs(config), media)
    files, media = planned_files(plan.specs, layout=plan.layout), media or MediaConfig()
    # Without clips, the shape does not matter.
    shape = clip_shape(checkpoint.config, works[0]) if works else ClipShape(1, 1, 1)
    memory = conversion_memory(checkpoint.config, config, shape)
    return PlannedOutput(
        out=str(out),
        cache_bytes_per_token=plan.model.cache_bytes_per_token(),
        cache_cut=plan.model.cache_cut(),
        files=files,
        nbytes=sum(files.values()),
        working_bytes=_working_bytes(checkpoint.config, config, works),
        work=plan_work(checkpoint, works, calibration_passes(config), media, memory),
    )


def _working_bytes(dense: ModelConfig, config: ConvertConfig, works: Sequence[Clips]) -> int:
    return sum(
        store_bytes(dense.geometry, like(work, dense), config.calibration_clips, config.product)
        for work in works
    )
