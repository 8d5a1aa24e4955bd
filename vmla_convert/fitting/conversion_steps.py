"""What conversions of both products do: open, check, calibrate, work layer by layer, record."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from vmla_convert import __version__
from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.known import known_model
from vmla_convert.checkpoint.output import check_place, partial_folder
from vmla_convert.checkpoint.source import fingerprint
from vmla_convert.checkpoint.tensor_store import FolderStore, TensorStore
from vmla_convert.config import ConvertConfig, ModelConfig, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.fitting.calibrate import LayerReads, calibrate, check_clips
from vmla_convert.fitting.factors import layer_weights
from vmla_convert.fitting.prefetch import ahead, workers_for
from vmla_convert.fitting.rank_plan import ReadWeights
from vmla_convert.loading.load import (
    Source,
    build_shell,
    compute_device,
    is_remote,
    open_named,
    read_block,
)
from vmla_convert.maths.factor import DATA_INITS
from vmla_convert.media.clips import (
    ClipSource,
    hash_files,
    latent_files,
    open_clips,
    recorded,
)
from vmla_convert.media.demo import require_demo_media
from vmla_convert.progress import Progress, Timed
from vmla_convert.results import library_versions
from vmla_convert.tables import to_dict

T = TypeVar("T")


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        out: The folder.
        config: Of the converted model.
        convert_seconds: From start to end; of a resumed conversion the last start counts.
        factor_seconds: The part spent on factorisation.
        peak_rss_bytes: Largest resident size of the process so far.
    """

    out: Path
    config: ModelConfig
    convert_seconds: float
    factor_seconds: float
    peak_rss_bytes: int

    @classmethod
    def recorded(cls, out: Path, config: ModelConfig, record: Mapping[str, Any]) -> Conversion:
        """With the figures of its record."""
        times = record["convert_seconds"], record["factor_seconds"]
        return cls(out, config, *times, record["peak_rss_bytes"])


class Clock:
    """The time that a conversion takes, from the making of the clock on."""

    def __init__(self) -> None:
        self._started = self._factoring = perf_counter()

    def start_factoring(self) -> None:
        """Note that calibration is over."""
        self._factoring = perf_counter()

    def record(
        self, config: ConvertConfig, progress: Timed, **parts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The record of a conversion that ends now.

        Args:
            config: The conversion.
            progress: What timed its stages.
            **parts: Source, plan and base model, where there are such.
        """
        now = perf_counter()
        return {
            **parts,
            "convert": to_dict(replace(config, data=recorded(config.data))),
            "versions": library_versions(),
            "convert_seconds": now - self._started,
            "factor_seconds": now - self._factoring,
            "stage_seconds": progress.seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def open_dense(source: Source, progress: Progress) -> OpenCheckpoint:
    """Open what is to be converted, with a note on what is known of it."""
    checkpoint = open_named(source)
    if checkpoint.known and (note := known_model(checkpoint.known).note):
        progress.note(f"{checkpoint.known}: {note}")
    return checkpoint


def check_start(
    checkpoint: OpenCheckpoint, config: ConvertConfig, out: Path, nbytes: int, resume: bool
) -> None:
    """Refuse, before anything is read, what would fail later.

    Args:
        checkpoint: The dense model.
        config: The conversion.
        out: The folder to write.
        nbytes: Bytes that will be written there.
        resume: Whether a conversion may have begun there.

    Raises:
        ConfigError: Its clips do not fit the model.
        OutputError: The folder is taken, or has no room.
    """
    check_place(out, nbytes, resume)
    if measures(config):
        open_measured(checkpoint.config, config)


def measure_layers(
    checkpoint: OpenCheckpoint, config: ConvertConfig, shelf: TensorStore | None, progress: Progress
) -> Callable[[int], LayerReads]:
    """Calibrate here and now; the dense model is read block by block."""
    device = compute_device()
    return calibrate(
        build_shell(checkpoint, device),
        lambda layer: read_block(checkpoint, layer, device),
        open_measured(checkpoint.config, config),
        config.calibration_clips,
        config.seed,
        progress,
        shelf,
        config.product,
    )


def made_ahead(
    make: Callable[[int], T], layers: range, nbytes: int, progress: Progress, label: str
) -> Iterator[tuple[int, T]]:
    """Yield layers with what is made of each, the next ones made in threads meanwhile.

    Args:
        make: Makes something of a layer by its index.
        layers: What is left to do.
        nbytes: Memory that one takes.
        progress: Where to draw.
        label: Of the bar.
    """
    made = ahead(make, layers, workers_for(nbytes))
    return zip(layers, progress.track(made, label, len(layers)), strict=True)


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    # Where there is one: Linux lets a process inherit the other figure from the one that began it.
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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


def require_finite(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse a tensor of the source that holds a NaN or an infinite number.

    Raises:
        CheckpointError: Naming it.
    """
    # A sum finds what is not finite without a second tensor; its overflow is told apart after.
    if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
        raise CheckpointError(
            f"'{name}' of {path} holds NaN or infinite numbers",
            "download the checkpoint again; if it is the same, its training had failed",
        )


def cast_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that was made, in the dtype that it is written in.

    Raises:
        ConfigError: It holds a NaN, or a number that the dtype cannot hold.
    """
    cast = tensor.to(dtype)
    if cast.isfinite().all():
        return cast
    if dtype == torch.float16:
        raise ConfigError(f"'{name}' has numbers that float16 cannot hold", "use bfloat16")
    raise ConfigError(
        f"'{name}' came out with NaN or infinite numbers", "calibrate on other clips: --data"
    )


def refuse_converted(checkpoint: OpenCheckpoint) -> None:
    """Refuse a source that is not dense.

    Raises:
        CheckpointError: It is converted already.
    """
    if not checkpoint.config.is_dense:
        raise CheckpointError(
            f"{checkpoint.source.path} is converted already",
            "convert the dense checkpoint that it came from",
        )


def origin_of(source: Source, checkpoint: OpenCheckpoint) -> dict[str, Any]:
    """What was converted, for people and for later commands; hashes are the caller's to add."""
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
        "state_key": checkpoint.source.key,
        "family": checkpoint.family,
        "known_model": checkpoint.known,
        "asked": asked,
        "loras": loras,
    }


def clips_hash(config: ConvertConfig) -> str | None:
    """SHA-256 of the clips that are measured, where they are files."""
    if not measures(config) or config.data.source == "demo":
        return None
    return hash_files(latent_files(Path(config.data.source)))


def is_begun(out: Path) -> bool:
    """Whether an interrupted conversion left something to go on with."""
    return _shelf_folder(out).exists() or partial_folder(out).exists()


def _shelf_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.calibration")


def calibration_shelf(
    out: Path, basis: Mapping[str, Any], config: ConvertConfig
) -> FolderStore | None:
    """The store beside the output, for this and other conversions of the source; None without need.

    Args:
        out: The folder to write.
        basis: What calibration depends on beside the settings.
        config: The conversion.
    """
    if not measures(config):
        return None
    how = [config.product, to_dict(config.data), config.calibration_clips, config.seed]
    return FolderStore(_shelf_folder(out), [__version__, dict(basis), how])
