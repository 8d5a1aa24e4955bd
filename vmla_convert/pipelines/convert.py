"""Convert a dense checkpoint: factor each layer's keys and values, write a folder that reloads.

Everything but self-attention keeps its bytes. `plan_conversion` refuses what cannot be done before
the first byte is written.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from vmla_convert import __version__
from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.known import known_model
from vmla_convert.checkpoint.source import TensorSpec, fingerprint
from vmla_convert.checkpoint.writer import (
    CheckpointWriter,
    check_place,
    copied_bytes,
    partial_folder,
)
from vmla_convert.config import ConvertConfig, ModelConfig, RankPlan, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError, did_you_mean
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.factor import DATA_INITS, assume_evidence
from vmla_convert.pipelines.calibrate import calibrate, check_clips, deployed_phases
from vmla_convert.pipelines.data import (
    ClipSource,
    hash_files,
    latent_files,
    open_clips,
    recorded,
)
from vmla_convert.pipelines.factoring import (
    Branch,
    branch_from,
    branch_of,
    factor_layer,
    latent_tensors,
    layer_evidence,
    layer_weights,
    planned_config,
    with_branches,
)
from vmla_convert.pipelines.folders import (
    LAYOUTS,
    converted_files,
    named_layout,
    parts_to_copy,
)
from vmla_convert.pipelines.load import (
    CONVERSION_NAME,
    Source,
    build_shell,
    compute_device,
    is_remote,
    open_named,
    read_block,
)
from vmla_convert.pipelines.media import require_demo_media
from vmla_convert.pipelines.parallel import ahead, workers_for
from vmla_convert.pipelines.plan import (
    ReadEvidence,
    ReadWeights,
    check_sizes,
    plan_ranks,
    uniform_plan,
)
from vmla_convert.pipelines.shelf import FolderShelf, Shelf
from vmla_convert.pipelines.versions import versions
from vmla_convert.progress import Progress, Silent, Timed
from vmla_convert.tables import from_dict, to_dict

PRESETS = {"videomla": ConvertConfig(init="spectral", ranks="uniform")}
"""The paper: its init, its shares of 192 + 32 numbers; the key norm, which it drops, is kept."""


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


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        out: The folder.
        config: Of the converted model.
        convert_seconds: From start to end; of a resumed conversion the last start counts.
        factor_seconds: The part spent on factorisation.
        peak_rss_bytes: Largest resident size of the process so far.
        head_truncation_error: Of each layer, the share of the content keys' energy that truncating
            the heads dropped; empty when none were.
    """

    out: Path
    config: ModelConfig
    convert_seconds: float
    factor_seconds: float
    peak_rss_bytes: int
    head_truncation_error: tuple[float, ...] = ()


def convert(
    source: Source,
    out: Path,
    config: ConvertConfig | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    layout: str = "native",
) -> Conversion:
    """Convert a dense checkpoint into a folder that `load` and `generate` take.

    The source is read block by block and the folder written tensor by tensor, so neither has to fit
    in memory. What was calibrated lies beside the folder until it is done.

    Args:
        source: Checkpoint file or folder, `demo`, or a Hub id; with settings and LoRAs if need be.
        out: Folder to write; it appears whole or not at all.
        config: Init, latent, sizes and calibration.
        progress: Where to draw.
        resume: Go on with a conversion of the same source and settings that was interrupted.
        layout: Of the folder: `native`, our own; or `diffusers`, a pipeline's, with text encoder
            and VAE where the source has them.

    Raises:
        CheckpointError: The source cannot be read, is of no known layout, is converted already, or
            holds a number that is not finite.
        ConfigError: The init or a size does not fit the model, or the layout is unknown.
        OutputError: `out` is taken, or cannot be written.
    """
    started = perf_counter()
    config, progress = config or ConvertConfig(), Timed(progress or Silent())
    checkpoint = open_named(source)
    if checkpoint.known and (note := known_model(checkpoint.known).note):
        progress.note(f"{checkpoint.known}: {note}")
    rough = plan_conversion(checkpoint, config)
    form = named_layout(layout)
    components = parts_to_copy(checkpoint.source.path, form, progress)
    check_place(out, rough.nbytes + copied_bytes(components), resume)
    if measures(config):
        open_measured(checkpoint.config, config)
    origin = _origin(source, checkpoint, progress)
    check_finite(checkpoint, progress)
    basis = {"source": origin, "model": to_dict(checkpoint.config), "clips": _clips(config)}
    shelf = _shelf(out, basis, config) if measures(config) else None
    evidence = gather_evidence(checkpoint, config, shelf, progress)
    factor_started = perf_counter()
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
        factor_seconds = perf_counter() - factor_started
        final = with_branches(plan.config, branches)
        truncation = tuple(b.truncation for b in branches if b.truncation is not None)
        seconds, peak = perf_counter() - started, peak_rss_bytes()
        provenance = {
            "source": origin,
            "convert": to_dict(replace(config, data=recorded(config.data))),
            "plan": to_dict(ranks),
            **({"head_truncation_error": truncation} if truncation else {}),
            "versions": versions(),
            "convert_seconds": seconds,
            "factor_seconds": factor_seconds,
            "stage_seconds": progress.seconds,
            "peak_rss_bytes": peak,
        }
        writer.write_files(converted_files(final, provenance, form, components))
    if shelf is not None:
        shelf.remove()
    return Conversion(out, final, seconds, factor_seconds, peak, truncation)


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
    if dense.mla is not None:
        raise CheckpointError(
            f"{checkpoint.source.path} is converted already",
            "convert the dense checkpoint that it came from",
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


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    # Where there is one: Linux lets a process inherit the other figure from the one that began it.
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gather_evidence(
    checkpoint: OpenCheckpoint, config: ConvertConfig, shelf: Shelf | None, progress: Progress
) -> ReadEvidence | None:
    """What the init needs to know of every layer; the dense model is read block by block."""
    if config.init not in DATA_INITS:
        return None
    model, weights = checkpoint.config, weights_of(checkpoint)
    phases = deployed_phases(model)
    if not config.calibrate:
        return lambda layer: assume_evidence(weights(layer), phases)
    device = compute_device()
    reads = calibrate(
        build_shell(checkpoint, device),
        lambda layer: read_block(checkpoint, layer, device),
        open_measured(model, config),
        config.calibration_clips,
        config.seed,
        progress,
        shelf,
    )
    return lambda layer: layer_evidence(reads(layer), weights(layer), phases)


def measures(config: ConvertConfig) -> bool:
    """Whether a conversion looks at clips."""
    return config.calibrate and config.init in DATA_INITS


def open_measured(dense: ModelConfig, config: ConvertConfig) -> ClipSource:
    """The clips that a conversion looks at; one of them is read.

    Raises:
        ConfigError: There are none, or they do not fit the model.
    """
    if config.data.source == "demo":
        require_demo_media(dense, "calibration on the demo world")
    clips = open_clips(config.data, dense.cache.sink_frames)
    check_clips(dense, clips.batch(0, 1))
    return clips


def weights_of(checkpoint: OpenCheckpoint) -> ReadWeights:
    """Reads the key and value weights of a layer."""
    heads = checkpoint.config.geometry.num_heads
    return lambda layer: layer_weights(checkpoint.read, layer, heads)


def check_finite(checkpoint: OpenCheckpoint, progress: Progress) -> None:
    """Read every tensor once, before anything is made of them.

    Raises:
        CheckpointError: One holds a NaN or an infinite number.
    """
    for name in progress.track(checkpoint.names, "checking weights"):
        tensor = checkpoint.read(name)
        # A sum finds what is not finite without a second tensor; its overflow is told apart after.
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            raise CheckpointError(
                f"'{name}' of {checkpoint.source.path} holds NaN or infinite numbers",
                "download the checkpoint again; if it is the same, its training had failed",
            )


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
        cast = tensor.to(plan.specs[name].dtype)
        if not cast.isfinite().all():
            raise _unbounded(name, cast.dtype)
        writer.add(name, cast)

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
    work = ahead(factored, left, workers_for(_factor_bytes(plan.config)))
    for layer, (branch, tensors) in zip(
        left, progress.track(work, "converting", len(left)), strict=True
    ):
        for name, tensor in tensors.items():
            add(name, tensor)
        for name in blocks[layer]:
            add(name, checkpoint.read(name))
        branches.append(branch)
        writer.commit(branches)
    return branches


def _unbounded(name: str, dtype: torch.dtype) -> ConfigError:
    if dtype == torch.float16:
        return ConfigError(f"'{name}' has numbers that float16 cannot hold", "use bfloat16")
    return ConfigError(
        f"'{name}' came out with NaN or infinite numbers", "calibrate on other clips: --data"
    )


def _factor_bytes(config: ModelConfig) -> int:
    """What factoring a layer takes: a dozen d x d matrices in float64, by measurement."""
    return 12 * 8 * config.geometry.dim**2


def _origin(source: Source, checkpoint: OpenCheckpoint, progress: Progress) -> dict[str, Any]:
    """What was converted, by content: for people, for later commands, and to know it again."""
    how = source if isinstance(source, SourceConfig) else SourceConfig(str(source))
    loras = [
        {
            "name": lora.path.name,
            "sha256": fingerprint(lora.path),
            "scale": lora.scale,
            "licence": lora.licence,
        }
        for lora in checkpoint.loras
    ]
    # A repository is named, which `file` is then a path in; where a folder lay is nobody's affair.
    asked = to_dict(how)
    if not is_remote(how.checkpoint):
        del asked["checkpoint"]
    return {
        "name": Path(how.checkpoint).resolve().name,
        "sha256": fingerprint(checkpoint.source.path, progress),
        "state_key": checkpoint.source.key,
        "family": checkpoint.family,
        "known_model": checkpoint.known,
        "asked": asked,
        "loras": loras,
    }


def _clips(config: ConvertConfig) -> str | None:
    """SHA-256 of the clips that are measured, where they are files."""
    if not measures(config) or config.data.source == "demo":
        return None
    return hash_files(latent_files(Path(config.data.source)))


def is_begun(out: Path) -> bool:
    """Whether an interrupted conversion left something to go on with."""
    return _shelf_folder(out).exists() or partial_folder(out).exists()


def _shelf_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.calibration")


def _shelf(out: Path, basis: Mapping[str, Any], config: ConvertConfig) -> FolderShelf:
    """Beside the output; another conversion of the same source may go on with it."""
    how = [to_dict(config.data), config.calibration_clips, config.seed]
    return FolderShelf(_shelf_folder(out), [__version__, dict(basis), how])
