"""Convert a dense checkpoint into a codec, or into a checkpoint with MLA layers.

Of an MLA checkpoint everything but self-attention keeps its bytes. `plan_conversion` refuses what
cannot be done before the first byte is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmla_convert import __version__
from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.output import copied_bytes
from vmla_convert.checkpoint.source import TensorSpec, fingerprint
from vmla_convert.checkpoint.tensor_store import TensorStore
from vmla_convert.checkpoint.writer import CheckpointWriter
from vmla_convert.config import ConvertConfig, ModelConfig, RankPlan
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.fitting.calibrate import deployed_phases
from vmla_convert.fitting.codec import convert_to_codec
from vmla_convert.fitting.conversion_steps import (
    Clock,
    Conversion,
    calibration_shelf,
    cast_finite,
    check_start,
    clips_hash,
    made_ahead,
    measure_layers,
    measures,
    open_dense,
    origin_of,
    refuse_converted,
    require_finite,
    weights_of,
)
from vmla_convert.fitting.factors import (
    Branch,
    branch_from,
    branch_of,
    factor_layer,
    latent_tensors,
    layer_evidence,
    planned_config,
    with_branches,
)
from vmla_convert.fitting.rank_plan import (
    ReadEvidence,
    check_sizes,
    plan_ranks,
    uniform_plan,
)
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import CONVERSION_NAME, Source
from vmla_convert.loading.metadata_files import (
    LAYOUTS,
    converted_files,
    named_layout,
    parts_to_copy,
)
from vmla_convert.maths.evidence import assume_evidence
from vmla_convert.maths.factor import DATA_INITS
from vmla_convert.media.demo import require_demo_media
from vmla_convert.progress import Progress, Silent, Timed
from vmla_convert.tables import from_dict, to_dict

PRESETS = {"videomla": ConvertConfig(product="mla", init="spectral")}
"""The paper: its init, its shares of 192 + 32 numbers; the key norm, which it drops, is kept."""


_CODEC_ONLY = ("channels", "bytes_per_token")


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will do, known before any arithmetic.

    Attributes:
        config: Of the converted model; its rope pairs and phases are placeholders until its layers
            are factored.
        ranks: Sizes of every layer.
        kept: Names of tensors that keep their bytes.
        specs: Every tensor that will be written, in writing order.
    """

    config: ModelConfig
    ranks: RankPlan
    kept: tuple[str, ...]
    specs: dict[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that will be written."""
        return sum(spec.nbytes for spec in self.specs.values())


def convert(
    source: Source,
    out: Path,
    config: ConvertConfig | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    layout: str = "native",
) -> Conversion:
    """Convert a dense checkpoint into a folder that `load` and `generate` take.

    The product is a cache codec beside the untouched checkpoint, or a checkpoint with MLA layers.
    The source is read block by block, so it need not fit in memory. Calibration is kept beside the
    folder until the folder is done.

    Args:
        source: Checkpoint file or folder, `demo`, or a Hub id; with settings and LoRAs if need be.
        out: Folder to write; it appears whole or not at all.
        config: Product, sizes and calibration.
        progress: Where to draw.
        resume: Go on with a conversion of the same source and settings that was interrupted.
        layout: Layout of an MLA checkpoint: `native`, our own; or `diffusers`, a pipeline's, with
            text encoder and VAE where the source has them. A codec has one layout.

    Raises:
        CheckpointError: The source cannot be read, is of no known layout, is converted already, or
            holds a number that is not finite.
        ConfigError: The init or a size does not fit the model, or the layout is unknown.
        OutputError: `out` is taken, or cannot be written.
    """
    config = config or ConvertConfig()
    if config.product == "codec":
        return convert_to_codec(source, out, config, progress, resume, layout)
    return _convert_to_mla(source, out, config, progress, resume, layout)


def _convert_to_mla(
    source: Source,
    out: Path,
    config: ConvertConfig,
    progress: Progress | None,
    resume: bool,
    layout: str,
) -> Conversion:
    """A model whose self-attention is MLA; all else keeps its bytes."""
    clock, progress = Clock(), Timed(progress or Silent())
    checkpoint = open_dense(source, progress)
    rough = plan_conversion(checkpoint, config)
    form = named_layout(layout)
    components = parts_to_copy(checkpoint.source.path, form, progress)
    check_start(checkpoint, config, out, rough.nbytes + copied_bytes(components), resume)
    sha256 = fingerprint(checkpoint.source.path, progress)
    origin = origin_of(source, checkpoint) | {"sha256": sha256}
    for name in progress.track(checkpoint.names, "checking weights"):
        require_finite(name, checkpoint.read(name), checkpoint.source.path)
    basis = {"source": origin, "model": to_dict(checkpoint.config), "clips": clips_hash(config)}
    shelf = calibration_shelf(out, basis, config)
    evidence = gather_evidence(checkpoint, config, shelf, progress)
    clock.start_factoring()
    weights = weights_of(checkpoint)
    try:
        ranks = plan_ranks(checkpoint.config, config, weights, evidence, progress)
    except ConfigError as error:
        kept = f"what was measured is kept in {shelf.folder}" if shelf else ""
        raise ConfigError(error.message, "; ".join(filter(None, (error.hint, kept)))) from error
    plan = plan_conversion(checkpoint, config, ranks)
    identity = {
        **basis,
        "version": __version__,
        "settings": to_dict(config),
        "plan": to_dict(ranks),
    }
    with CheckpointWriter(
        out, plan.specs, identity=identity, resume=resume, layout=form, copies=components
    ) as writer:
        branches = _write_tensors(checkpoint, plan, config, evidence, writer, progress)
        final = with_branches(plan.config, branches)
        provenance = clock.record(config, progress, source=origin, plan=to_dict(ranks))
        writer.write_files(converted_files(final, provenance, form, components))
    if shelf is not None:
        shelf.remove()
    return Conversion.recorded(out, final, provenance)


def convert_config(
    preset: str | None,
    sizes: Mapping[str, Any],
    others: Mapping[str, Any],
) -> ConvertConfig:
    """A config from what a user typed; None means that it was left out.

    Args:
        preset: `videomla` starts from the paper's init and shares.
        sizes: Cache sizes.
        others: Further fields of `ConvertConfig`.

    Raises:
        ConfigError: An unknown preset, or a value that its field cannot have.
    """
    if preset not in (None, *PRESETS):
        raise ConfigError(f"unknown preset '{preset}'", did_you_mean(str(preset), PRESETS))
    base = PRESETS[preset] if preset else ConvertConfig()
    typed = {name: value for name, value in {**sizes, **others}.items() if value is not None}
    plain = {name: to_dict(v) if name == "plan" else v for name, v in typed.items()}
    return from_dict(ConvertConfig, {**to_dict(base), **plain})


def read_plan(path: Path) -> RankPlan:
    """The sizes that an earlier conversion chose, from its folder or its conversion.json.

    Raises:
        ConfigError: There is no plan.
    """
    file = path
    if path.is_dir():
        places = [layout.place(CONVERSION_NAME) for layout in LAYOUTS.values()]
        file = next((path / place for place in places if (path / place).is_file()), path)
    try:
        return from_dict(RankPlan, json.loads(file.read_text())["plan"], "plan")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no plan", "give the folder of a conversion, or its conversion.json"
        ) from error


def plan_conversion(
    checkpoint: OpenCheckpoint, config: ConvertConfig, ranks: RankPlan | None = None
) -> ConversionPlan:
    """Check that a conversion can be done, and say what it will write.

    Args:
        checkpoint: The dense model.
        config: The conversion.
        ranks: Sizes of every layer; by default the same for all, as long as no layer is measured.

    Raises:
        CheckpointError: The checkpoint is converted already.
        ConfigError: The init or a size does not fit the model.
    """
    dense = checkpoint.config
    refuse_converted(checkpoint)
    for name in _CODEC_ONLY:
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name} is a setting of codecs, and this makes MLA layers",
                "leave it out, or convert without --preset",
            )
    check_sizes(dense, config)
    if measures(config) and config.data.source == "demo":
        require_demo_media(dense, "calibration on the demo world")
    ranks = ranks or uniform_plan(dense, config)
    planned = planned_config(dense, config, ranks)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in CausalWanModel(planned).state_dict().items()}
    specs = checkpoint.specs()
    wanted = getattr(torch, config.dtype) if config.dtype else None
    written = {
        name: TensorSpec(
            tuple(shape),
            wanted or (specs[name].dtype if name in specs else torch.float32),
        )
        # What is outside the blocks first, then block by block.
        for name, shape in sorted(shapes.items(), key=lambda item: _block_of(item[0]))
    }
    kept = tuple(name for name in written if name in specs)
    return ConversionPlan(planned, ranks, kept, written)


def _block_of(name: str) -> int:
    """Number of a tensor's block; -1 outside."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


def gather_evidence(
    checkpoint: OpenCheckpoint, config: ConvertConfig, shelf: TensorStore | None, progress: Progress
) -> ReadEvidence | None:
    """What the init needs to know of every layer; the dense model is read block by block."""
    if config.init not in DATA_INITS:
        return None
    weights, phases = weights_of(checkpoint), deployed_phases(checkpoint.config)
    if not config.calibrate:
        return lambda layer: assume_evidence(weights(layer), phases)
    reads = measure_layers(checkpoint, config, shelf, progress)
    return lambda layer: layer_evidence(reads(layer), weights(layer), phases)


def _write_tensors(
    checkpoint: OpenCheckpoint,
    plan: ConversionPlan,
    config: ConvertConfig,
    evidence: ReadEvidence | None,
    writer: CheckpointWriter,
    progress: Progress,
) -> list[Branch]:
    """Everything outside the blocks, then block by block, each committed when it is written."""
    branches = [branch_from(*branch) for branch in writer.state or []]
    heads = plan.config.geometry.num_heads

    def add(name: str, tensor: Tensor) -> None:
        writer.add(name, cast_finite(name, tensor, plan.specs[name].dtype))

    def factored(layer: int) -> tuple[Branch, dict[str, Tensor]]:
        factors = factor_layer(checkpoint.read, plan.ranks, heads, config, layer, evidence)
        return branch_of(factors), latent_tensors(factors, checkpoint.read, layer)

    blocks: dict[int, list[str]] = {}
    for name in plan.kept:
        if name not in writer.written:
            blocks.setdefault(_block_of(name), []).append(name)
    for name in blocks.pop(-1, []):
        add(name, checkpoint.read(name))
    writer.commit(branches)
    left = range(len(branches), plan.config.geometry.num_layers)
    nbytes = _factor_bytes(plan.config)
    for layer, (branch, tensors) in made_ahead(factored, left, nbytes, progress, "converting"):
        for name, tensor in tensors.items():
            add(name, tensor)
        for name in blocks[layer]:
            add(name, checkpoint.read(name))
        branches.append(branch)
        writer.commit(branches)
    return branches


def _factor_bytes(config: ModelConfig) -> int:
    """What factoring a layer takes: a dozen d x d matrices in float64, by measurement."""
    return 12 * 8 * config.geometry.dim**2
