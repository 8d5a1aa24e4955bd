"""Settings of inputs: checkpoints and clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vmla_convert.config.checks import require_at_least


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from.

    Attributes:
        source: `demo` for the moving-digits world, or a safetensors file (or a folder of them) with
            `latents` (N clips, F frames, C channels, height, width) and `context` (N, text_len,
            text_dim). Recovery also takes `self`, samples of the dense model, and a video file or
            a folder of videos.
        frames: Latent frames per clip.
        sink_gap: Largest number of frames skipped after the sink in half of the training clips, so
            that training includes the jump from the sink to the recent frames; 0 for none.
        seed: Seed of the clips.
        prompts: Prompts of `self`, one for each clip in turn; or the one prompt of videos that have
            none beside them.
        clips: Number of clips that `self` samples.
        base: Text encoder and VAE for clips that have to be made, as in `MediaConfig`.
    """

    source: str = "demo"
    frames: int = 10
    sink_gap: int = 0
    seed: int = 0
    prompts: tuple[str, ...] = ()
    clips: int = 128
    base: str | None = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "frames")
        require_at_least(self, 0, "sink_gap")
        # One clip to train on, and one held-out clip.
        require_at_least(self, 2, "clips")


@dataclass(frozen=True)
class SourceConfig:
    """A checkpoint, and settings that tensors do not contain.

    Attributes:
        checkpoint: A path, `demo`, or a Hub id `owner/name[@revision]`.
        file: File or folder within the Hub repository or the folder.
        key: State dict in a pickle that holds several.
        model: Name of a known model (`vmla_convert.checkpoint.known.KNOWN`), which brings chunk,
            window, sampler and licence.
        overrides: Other values for these settings, as a table: `{"cache": {"window_frames": 12}}`.
        loras: LoRA files, `FILE` or `FILE:SCALE`, merged when the checkpoint is read.
        base_model: Base model of a codec, a path or a Hub id; None to look where it was when the
            codec was made, beside the codec, and on the Hub.
        verify: Compare weight files with the hashes in their record.
    """

    checkpoint: str = "demo"
    file: str | None = None
    key: str | None = None
    model: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict[str, Any])
    loras: tuple[str, ...] = ()
    base_model: str | None = None
    # How carefully a checkpoint is read does not make another checkpoint.
    verify: bool = field(default=True, compare=False)
