"""Rows of `rows.jsonl`: the one contract between evals, sweep and report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

from vmla_convert.errors import VmlaError, did_you_mean
from vmla_convert.storage.lock import in_turn

ROWS_NAME = "rows.jsonl"
RECIPE_NAME = "recipe.json"
"""File with the settings of a run, beside the rows."""


class Metric(StrEnum):
    """Names of measured figures in rows. The row holds the unit."""

    # Held-out errors, against the dense model or the data
    VELOCITY_ERROR = "velocity_error"
    FLOW_LOSS = "flow_loss"
    FLOW_LOSS_OTHER_PAST = "flow_loss_other_past"
    FLOW_LOSS_ABOVE_DENSE = "flow_loss_above_dense"
    LORA_ERROR_RATIO = "lora_error_ratio"
    NESTED_DIFFERENCE = "nested_difference"

    # Rollouts
    BACKGROUND_PSNR = "background_psnr"
    DIGIT_ACCURACY = "digit_accuracy"
    DRIFT = "drift"
    REVISIT_PSNR = "revisit_psnr"
    MOTION_ERROR = "motion_error"
    NEEDLE_PSNR = "needle_psnr"
    FLICKER = "flicker"
    SHARPNESS = "sharpness"
    DYNAMIC_DEGREE = "dynamic_degree"
    CHUNK_SEAM = "chunk_seam"
    COLOUR_DRIFT = "colour_drift"
    FEATURE_CONSISTENCY = "feature_consistency"
    PROMPT_AGREEMENT = "prompt_agreement"
    SLOPE = "slope"

    # Agreement with the dense model's rollout from the same noise
    FRAME_PSNR = "frame_psnr"
    FRAME_SSIM = "frame_ssim"
    AGREEING_FRAMES = "agreeing_frames"
    FEATURE_AGREEMENT = "feature_agreement"
    LPIPS = "lpips"
    VBENCH = "vbench"
    LAYER_ERROR = "layer_error"

    # Size of the cache
    CACHE_BYTES = "cache_bytes"
    CACHE_BYTES_PER_TOKEN = "cache_bytes_per_token"
    CACHE_CUT = "cache_cut"
    STREAMS = "streams"
    BYTES_AT_ERROR = "bytes_at_error"
    BYTES_RATIO_AT_ERROR = "bytes_ratio_at_error"
    BITS_SAVED = "bits_saved"
    KV_LORA_RANK = "kv_lora_rank"
    QK_ROPE_HEAD_DIM = "qk_rope_head_dim"

    # Weights and activations
    ENERGY_AT_RANK = "energy_at_rank"
    EFFECTIVE_RANK_99 = "effective_rank_99"
    ROPE_PAIR = "rope_pair"
    PHASE_LENGTH = "phase_length"
    PHASE_ANGLE = "phase_angle"

    # Time, memory and disk
    STEP_SECONDS = "step_seconds"
    SECONDS_RATIO = "seconds_ratio"
    CONVERT_SECONDS = "convert_seconds"
    FACTOR_SECONDS = "factor_seconds"
    STAGE_SECONDS = "stage_seconds"
    RECOVER_SECONDS = "recover_seconds"
    SWEEP_SECONDS = "sweep_seconds"
    PEAK_RSS_BYTES = "peak_rss_bytes"
    PEAK_DEVICE_BYTES = "peak_device_bytes"
    WRITTEN_BYTES = "written_bytes"

    # A run
    LEARNING_RATE = "learning_rate"
    FAILED = "failed"


METRICS = frozenset[str](Metric)
"""Values of all metrics: Python 3.11 cannot test whether a string is in an enumeration."""


@dataclass(frozen=True)
class Row:
    """One measured figure.

    `metric`, `value` and `unit` say what was measured; `run` names the thing measured (`dense`, a
    converted checkpoint, a sweep point); the optional fields say under which settings. Names of
    metrics and fields are fixed in the design, so that reports and checks can rely on them.

    Attributes:
        point: Key of a sweep's point: its settings but the seed.
        product: `codec` or `mla`.
        bytes_per_token: Bytes of the cache per token and layer, averaged over layers, two per
            unquantised number.
        recovery_steps: Steps of distillation that were asked for; None without recovery.
        pair: RoPE pair of a head, in Wan's order time, height, width.
        batch: Clips at once.
        chunk: Number of a chunk of the video.
        window_frames: Frames that the cache holds, where a row's window is not the model's own.
        age: Frames since a place was last seen: the least of a range that ends before the age of
            the next row.
        timestep: Timestep of a sampler's step.
        low: Lower end of the 95 % bootstrap interval over clips.
        high: Upper end of this interval.
        clip_seconds: Length of a clip.
        card_gb: Memory of a GPU, in GB.
        note: Text for which there is no field: why a point failed, the axis of a RoPE pair.
    """

    metric: Metric
    value: float
    unit: str
    run: str
    seed: int = 0
    device: str = "cpu"
    point: str | None = None
    product: str | None = None
    bytes_per_token: float | None = None
    layer: int | None = None
    init: str | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    latent: str | None = None
    recovery_steps: int | None = None
    backend: str | None = None
    cache_dtype: str | None = None
    dense_recent_frames: int | None = None
    step: int | None = None
    frames: int | None = None
    segment: int | None = None
    pair: int | None = None
    batch: int | None = None
    clip_seconds: float | None = None
    card_gb: int | None = None
    chunk: int | None = None
    window_frames: int | None = None
    age: int | None = None
    timestep: float | None = None
    low: float | None = None
    high: float | None = None
    note: str | None = None

    @property
    def figure(self) -> Row:
        """The row without its value: the figure that was measured, and its settings."""
        return dataclasses.replace(self, value=0.0, low=None, high=None)

    def to_json(self) -> str:
        """One line of JSON; fields that do not apply are left out."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return json.dumps(fields)


def put_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a JSONL file in one step; a row of the same figure is replaced.

    A killed process leaves the file as it was, and several processes may write to it.

    Raises:
        VmlaError: A line of the file is not a row.
        OutputError: The file cannot be written.
    """
    with in_turn(path):
        written = read_rows(path) if path.exists() else []
        write_rows(path, {row.figure: row for row in [*written, *rows]}.values())


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the rows of a file, in one step."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(row.to_json() + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def count_failures(path: Path) -> int:
    """How many points of a sweep failed; 0 where there are no rows."""
    return sum(row.metric == Metric.FAILED for row in read_rows(path)) if path.is_file() else 0


def read_rows(path: Path) -> list[Row]:
    """Read a JSONL file of rows.

    Raises:
        VmlaError: The file is missing, a line is not a row, or its metric is unknown.
    """
    if not path.is_file():
        raise VmlaError(
            f"no rows at {path}", "run a sweep or an eval first: vmla sweep RECIPE -o DIR"
        )
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            fields = json.loads(line)
            name = str(fields["metric"])
            if name not in METRICS:
                raise VmlaError(
                    f"line {number} of {path} has the unknown metric '{name}'",
                    did_you_mean(name, METRICS),
                )
            rows.append(Row(**fields | {"metric": Metric(name), "value": float(fields["value"])}))
        except (KeyError, TypeError, ValueError) as error:
            raise VmlaError(f"line {number} of {path} is not a row: {error}") from error
    return rows


def bytes_at_error(curve: Iterable[tuple[float, float]], error: float) -> float | None:
    """Smallest bytes at which a method reaches an error, between measured sizes by interpolation.

    The logarithm of the error is taken as linear in the bytes between two neighbouring sizes.

    Args:
        curve: Bytes and error of each measured size.
        error: The error to reach.

    Returns:
        None where no measured size is as good.
    """
    before: tuple[float, float] | None = None
    for size, met in sorted(curve):
        if met <= error:
            if before is None or met <= 0:
                return size
            share = math.log(before[1] / error) / math.log(before[1] / met)
            return before[0] + share * (size - before[0])
        before = size, met
    return None


def library_versions() -> dict[str, str]:
    """Versions of this package, torch and Python, without importing torch."""
    return {
        "vmla_convert": version("vmla-convert"),
        "torch": version("torch"),
        "python": platform.python_version(),
    }
