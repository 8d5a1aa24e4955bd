"""Convert a dense checkpoint into a cache codec, or into a checkpoint with MLA layers."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from vmla_convert import __version__
from vmla_convert.checkpoint.families import OpenCheckpoint, open_checkpoint
from vmla_convert.checkpoint.integrity import NotFiniteError
from vmla_convert.checkpoint.source import fingerprint
from vmla_convert.checkpoint.writer import CheckpointWriter
from vmla_convert.config import ConvertConfig, DataConfig, MediaConfig, ModelConfig, RankPlan
from vmla_convert.errors import ConfigError
from vmla_convert.fitting.calibrate import Statistics, calibrate_checkpoint
from vmla_convert.fitting.calibration_clips import calibration_needs, measures
from vmla_convert.fitting.dense_source import (
    base_record,
    open_dense,
    source_record,
)
from vmla_convert.fitting.mla import layer_inputs
from vmla_convert.fitting.plan import plan_conversion
from vmla_convert.fitting.rank_plan import plan_ranks
from vmla_convert.fitting.write import write_codec, write_mla
from vmla_convert.generating.make_clips import ready_clips
from vmla_convert.loading.load import CONVERSION_NAME, Source, read_provenance
from vmla_convert.loading.metadata_files import LAYOUTS, converted_files
from vmla_convert.media.clips import open_clips
from vmla_convert.progress import Progress, Silent, Timed
from vmla_convert.results import library_versions
from vmla_convert.storage.lock import sole_writer
from vmla_convert.storage.output import check_place, partial_folder
from vmla_convert.storage.tensor_store import FolderStore
from vmla_convert.tables import from_dict, read_json, to_dict

PRESETS = {"videomla": ConvertConfig(product="mla", init="spectral")}
"""VideoMLA's init and sizes (192 + 32 numbers); the key norm, which VideoMLA drops, is kept."""


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        out: The folder.
        config: Config of the converted model.
        convert_seconds: Seconds from start to end; of a resumed conversion, since the last start.
        factor_seconds: Seconds after calibration.
        peak_rss_bytes: Largest resident size of the process so far.
    """

    out: Path
    config: ModelConfig
    convert_seconds: float
    factor_seconds: float
    peak_rss_bytes: int


def convert(
    source: Source,
    out: Path,
    config: ConvertConfig | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    layout: str = "native",
    media: MediaConfig | None = None,
) -> Conversion:
    """Convert a dense checkpoint into a folder that `load` and `generate` take.

    The result is a cache codec, or a checkpoint with MLA layers. The source is read block by block,
    so it need not fit in memory. Calibration is kept beside `out` until `out` is complete.

    Args:
        source: Checkpoint file or folder, `demo`, or a Hub id, with or without settings and LoRAs.
        out: Folder to write, which appears complete or not at all.
        config: Product, sizes and calibration.
        progress: Where progress is drawn.
        resume: Continue an interrupted conversion of the same source and settings.
        layout: `native`, or for MLA checkpoints `diffusers`, with text encoder and VAE if present.
        media: Text encoder and VAE for clips that have to be made, and the folder of these clips.

    Raises:
        CheckpointError: The source cannot be read, has an unknown layout, is converted already, or
            holds a number that is not finite.
        ConfigError: The init or a size does not fit the model, or the layout is unknown.
        OutputError: `out` exists already, cannot be written, or is written by another process.
    """
    with sole_writer(out):
        config = config or ConvertConfig()
        return _convert(source, out, config, progress, resume, layout, media)


def _convert(
    source: Source,
    out: Path,
    config: ConvertConfig,
    progress: Progress | None,
    resume: bool,
    layout: str,
    media: MediaConfig | None,
) -> Conversion:
    started, progress = perf_counter(), Timed(progress or Silent())
    checkpoint = open_dense(source, progress)
    plan = plan_conversion(checkpoint, config, layout, progress=progress)
    check_place(out, plan.nbytes, resume)
    clips = ready_clips(checkpoint, calibration_needs(config), media, progress)
    record = _read_source(source, checkpoint, config, progress)
    if clips:
        record["calibration"] = open_clips(clips[0]).record()
    basis = {
        **record,
        "version": __version__,
        "model": to_dict(checkpoint.config),
    }
    store = _calibration_store(out, basis, config)
    statistics = _calibrate(checkpoint, config, clips, store, progress)
    factoring = perf_counter()
    if plan.ranks:
        inputs = layer_inputs(checkpoint.read, checkpoint.config, config, statistics)
        ranks = plan_ranks(checkpoint.config, config, inputs, progress)
        plan = plan_conversion(checkpoint, config, layout, ranks)
        record["plan"] = to_dict(ranks)
    identity = {**basis, **record, "settings": to_dict(config)}
    with CheckpointWriter(
        out, plan.specs, identity=identity, resume=resume, layout=plan.layout, copies=plan.copies
    ) as writer:
        write = write_mla if plan.ranks else write_codec
        model = write(checkpoint, plan, config, statistics, writer, progress)
        now = perf_counter()
        done = Conversion(out, model, now - started, now - factoring, peak_rss_bytes())
        record |= _outcome(done, config, progress)
        writer.write_files(converted_files(model, record, plan.layout, plan.copies))
    if store:
        store.remove()
    return done


def read_conversion(out: Path) -> Conversion:
    """A conversion as `convert` returned it, from its folder."""
    record = read_provenance(out)
    figures = (record[name] for name in ("convert_seconds", "factor_seconds", "peak_rss_bytes"))
    return Conversion(out, open_checkpoint(out).config, *figures)


def _outcome(done: Conversion, config: ConvertConfig, progress: Timed) -> dict[str, Any]:
    """Part of the record that says what a conversion took, and with which settings."""
    return {
        "convert": to_dict(config),
        "versions": library_versions(),
        "convert_seconds": done.convert_seconds,
        "factor_seconds": done.factor_seconds,
        "stage_seconds": progress.seconds,
        "peak_rss_bytes": done.peak_rss_bytes,
    }


def _read_source(
    source: Source, checkpoint: OpenCheckpoint, config: ConvertConfig, progress: Progress
) -> dict[str, Any]:
    """Record the hash of the source, and refuse weights that are not finite.

    An MLA model and a calibrated codec depend on every weight, so all are hashed; a codec without
    calibration depends on keys and values only. Calibration checks each weight as it is read.
    """
    record: dict[str, Any] = {"source": source_record(source, checkpoint)}
    if measures(config) or config.product == "mla":
        record["source"]["sha256"] = fingerprint(checkpoint.source.path, progress)
    if config.product == "codec":
        record["base"] = base_record(source, checkpoint, progress)
    elif not measures(config):
        for name in progress.track(checkpoint.names, "checking weights"):
            checkpoint.read(name)
    return record


def _calibration_store(
    out: Path, basis: Mapping[str, Any], config: ConvertConfig
) -> FolderStore | None:
    """Store beside the output, which other conversions of the same source may share."""
    if not measures(config):
        return None
    settings = [
        config.product,
        to_dict(config.data),
        config.calibration_clips,
        config.seed,
        config.mixed_precision,
    ]
    return FolderStore(_store_folder(out), [dict(basis), settings])


def _calibrate(
    checkpoint: OpenCheckpoint,
    config: ConvertConfig,
    clips: Sequence[DataConfig],
    store: FolderStore | None,
    progress: Progress,
) -> Statistics | None:
    if store is None:
        return None
    try:
        ready = replace(config, data=clips[0])
        return calibrate_checkpoint(checkpoint, ready, store, progress)
    except NotFiniteError:
        store.remove()  # a mended file has another hash, so these measurements will not be used
        raise


def _store_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.calibration")


def can_resume(out: Path) -> bool:
    """Whether an interrupted conversion left files to continue from."""
    return _store_folder(out).exists() or partial_folder(out).exists()


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    # Preferred where it exists: a Linux child process inherits the parent's `ru_maxrss`.
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_plan(path: Path) -> RankPlan:
    """Read the sizes of an earlier conversion from its folder or its conversion.json.

    Raises:
        ConfigError: The file holds no plan.
    """
    file = path
    if path.is_dir():
        places = [layout.place(CONVERSION_NAME) for layout in LAYOUTS.values()]
        file = next((path / place for place in places if (path / place).is_file()), path)
    try:
        return from_dict(RankPlan, read_json(file)["plan"], "plan")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no plan", "give the folder of a conversion, or its conversion.json"
        ) from error
