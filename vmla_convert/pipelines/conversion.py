"""What conversions of both products do: open clips, check weights, keep what was calibrated."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmla_convert import __version__
from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.source import fingerprint
from vmla_convert.checkpoint.writer import partial_folder
from vmla_convert.config import ConvertConfig, ModelConfig, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.maths.factor import DATA_INITS
from vmla_convert.pipelines.calibrate import check_clips
from vmla_convert.pipelines.data import ClipSource, hash_files, latent_files, open_clips
from vmla_convert.pipelines.factoring import layer_weights
from vmla_convert.pipelines.load import Source, is_remote
from vmla_convert.pipelines.media import require_demo_media
from vmla_convert.pipelines.plan import ReadWeights
from vmla_convert.pipelines.shelf import FolderShelf
from vmla_convert.tables import to_dict


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


def calibration_shelf(out: Path, basis: Mapping[str, Any], config: ConvertConfig) -> FolderShelf:
    """Beside the output; another conversion of the same source may go on with it."""
    how = [config.product, to_dict(config.data), config.calibration_clips, config.seed]
    return FolderShelf(_shelf_folder(out), [__version__, dict(basis), how])
