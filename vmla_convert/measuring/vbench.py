"""VBench (arXiv 2311.17982) and VBench-Long: videos for their prompts, and rows from their results.

VBench runs in an environment of its own, because it needs other versions of its many packages. The
user's copy of VBench holds the prompts, in `VBench_full_info.json`. VBench looks for each video as
`{prompt}-{index}.mp4`, and writes `*_eval_results.json`: for each dimension the score, and the
score of each video.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.config import MediaConfig, RuntimeConfig, SourceConfig
from vmla_convert.errors import ConfigError
from vmla_convert.generating.clip_cost import PlannedWork, flops_per_second, sampling_flops
from vmla_convert.generating.generate import generate, track_chunks
from vmla_convert.generating.memory import generation_memory
from vmla_convert.layers.runtime import check_runtime
from vmla_convert.loading.load import build, compute_device, open_named
from vmla_convert.measuring.video import interval
from vmla_convert.media.base import Media
from vmla_convert.media.open import check_prompts, open_media
from vmla_convert.media.prompts import EncodedPrompts
from vmla_convert.media.video import open_mp4
from vmla_convert.progress import Progress, Silent
from vmla_convert.results import Metric, Row
from vmla_convert.storage.lock import sole_writer

LONGEST_NAME = 255
"""Bytes of a file name that file systems take."""


@dataclass(frozen=True)
class VideoSuite:
    """The videos that VBench asks for.

    Attributes:
        info: `VBench_full_info.json` of a copy of VBench.
        dimensions: Dimensions to measure; empty for all.
        samples: Videos of each prompt. VBench asks for 5, and for 25 for temporal flickering.
        frames: Latent frames of a video.
    """

    info: Path
    dimensions: tuple[str, ...] = ()
    samples: int = 5
    frames: int = 21

    def entries(self) -> list[tuple[str, list[str]]]:
        """Prompts with their dimensions, those asked for only.

        Raises:
            ConfigError: The file is not VBench's, or has no prompt of these dimensions.
        """
        try:
            found = [
                (str(entry["prompt_en"]), list(map(str, entry["dimension"])))
                for entry in json.loads(self.info.read_text("utf-8"))
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.info} holds no prompts of VBench", "name its VBench_full_info.json"
            ) from error
        known = sorted({name for _, names in found for name in names})
        if unknown := set(self.dimensions) - set(known):
            raise ConfigError(
                f"VBench has no dimension {', '.join(sorted(unknown))}",
                f"it has {', '.join(known)}",
            )
        asked = set(self.dimensions or known)
        return [(prompt, names) for prompt, names in found if asked & set(names)]

    def videos(self) -> list[tuple[str, int]]:
        """Prompt and index of every video; dimensions share the videos of a prompt.

        Raises:
            ConfigError: As `entries` raises, or a prompt cannot be the name of a file.
        """
        prompts = list(dict.fromkeys(prompt for prompt, _ in self.entries()))
        for prompt in prompts:
            if "/" in prompt or len(_name(prompt, self.samples).encode()) > LONGEST_NAME:
                raise ConfigError(f"the prompt {prompt!r} cannot be the name of a file")
        return [(prompt, index) for prompt in prompts for index in range(self.samples)]

    def missing(self, folder: Path) -> list[tuple[str, int]]:
        """Prompt and index of the videos that a folder does not hold."""
        return [video for video in self.videos() if not (folder / _name(*video)).exists()]


def _name(prompt: str, index: int) -> str:
    return f"{prompt}-{index}.mp4"


def plan_videos(
    source: SourceConfig, suite: VideoSuite, folder: Path, runtime: RuntimeConfig
) -> tuple[int, PlannedWork]:
    """Check `write_videos`; return the number of missing videos, and the work that they take."""
    opened, missing = _opened(source, runtime), suite.missing(folder)
    check_prompts(opened.config, {prompt for prompt, _ in missing})
    operations = float(len(missing) * sampling_flops(opened.config, suite.frames))
    seconds = operations / flops_per_second(opened) if missing else 0.0
    memory = generation_memory(opened.config, runtime, 2 if torch.cuda.is_available() else 4)
    work = PlannedWork(str(folder), memory, passing_seconds=seconds, operations=operations)
    return len(missing), work


def write_videos(
    source: SourceConfig,
    suite: VideoSuite,
    folder: Path,
    runtime: RuntimeConfig | None = None,
    media: MediaConfig | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the videos of a suite that a folder does not hold yet; the index is the seed.

    Raises:
        CheckpointError: The checkpoint cannot be opened.
        ConfigError: The suite or the runtime does not fit.
        OutputError: A file cannot be written.
        VmlaError: The text encoder does not understand a prompt.
    """
    runtime, progress = runtime or RuntimeConfig(), progress or Silent()
    with sole_writer(folder):
        opened, missing = _opened(source, runtime), suite.missing(folder)
        check_prompts(opened.config, {prompt for prompt, _ in missing})
        device = compute_device()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        own = open_media(opened.config, media, opened.model_path, device, dtype)
        text = EncodedPrompts(own, (prompt for prompt, _ in missing), progress)
        model, paths = build(opened, device, dtype), list[Path]()
        for prompt, index in progress.track(missing, "videos for VBench"):
            paths.append(folder / _name(prompt, index))
            stream = generate(model, prompt, suite.frames, index, runtime, text=text)
            _write(paths[-1], track_chunks(Silent(), stream, "", model.config, suite.frames), own)
        return paths


def _opened(source: SourceConfig, runtime: RuntimeConfig) -> OpenCheckpoint:
    opened = open_named(source)
    check_runtime(opened.config, runtime)
    return opened


def _write(path: Path, chunks: Any, media: Media) -> None:
    """Write a video alone: VBench takes every file in the folder for a video."""
    decoder = media.decoder()
    with open_mp4(path, media.frames_per_second, media.enlarged) as write:
        for chunk in chunks:
            write(decoder.decode(chunk)[0])


def evaluation_command(suite: VideoSuite, folder: Path, long: bool) -> str:
    """The command that measures the videos, to run in a copy of VBench."""
    dimensions = suite.dimensions or sorted(
        {name for _, names in suite.entries() for name in names}
    )
    script = "vbench2_beta_long/eval_long.py" if long else "evaluate.py"
    options = ["--videos_path", str(folder.resolve()), "--full_json_dir", str(suite.info.resolve())]
    if long:
        options += ["--mode", "long_vbench_standard"]
        options += ["--num_of_samples_per_prompt", str(suite.samples)]
    return shlex.join(["python", script, *options, "--dimension", *dimensions])


def result_rows(path: Path, fields: dict[str, Any]) -> list[Row]:
    """Rows of VBench's results, one for each dimension, with a bootstrap interval over videos.

    Args:
        path: `*_eval_results.json`.
        fields: Fields of all rows, such as `run`.

    Raises:
        ConfigError: The file holds no results of VBench.
    """
    try:
        results = json.loads(path.read_text("utf-8"))
        rows = [_row(str(name), score, videos, fields) for name, (score, videos) in results.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no results of VBench", "name a file that ends in _eval_results.json"
        ) from error
    if not rows:
        raise ConfigError(f"{path} holds no dimension")
    return rows


def _row(name: str, score: Any, videos: Sequence[Any], fields: dict[str, Any]) -> Row:
    # Dimensions with other results than one number for each video get no interval.
    each = [video.get("video_results") if isinstance(video, dict) else None for video in videos]
    known = bool(each) and all(isinstance(value, int | float) for value in each)
    ends = interval(torch.tensor(each, dtype=torch.float64)) if known else (None, None)
    low, high = ends
    return Row(Metric.VBENCH, float(score), "score", **fields, note=name, low=low, high=high)
