"""Settings of inputs: checkpoints and clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vmla_convert.config.checks import require_at_least


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from.

    Attributes:
        source: `auto`, `demo`, `self`, or a path. `auto` means `demo` for a model of the demo world
            and `self` for every other. `self` are samples of the dense model. A path names a video
            file, a folder of videos, or a safetensors file (or a folder of them) with `latents` (N
            clips, F frames, C channels, height, width) and `context` (N, text_len, text_dim).
        frames: Latent frames per clip; None for as many whole chunks as the model's window holds.
        latent_size: Height and width of the latents of clips that are sampled or encoded; None for
            the model's own.
        sink_gap: Largest number of frames skipped after the sink in half of the training clips, so
            that training includes the jump from the sink to the recent frames; 0 for none.
        seed: Seed of the clips.
        prompts: Prompts of `self`, whose last quarter is held out; or the one prompt of videos that
            have none beside them. Empty for the prompts of the package.
        clips: Clips at most. None for as many samples of the dense model as a stage needs, and for
            all clips that files hold.
    """

    source: str = "auto"
    frames: int | None = None
    latent_size: tuple[int, int] | None = None
    sink_gap: int = 0
    seed: int = 0
    prompts: tuple[str, ...] = ()
    clips: int | None = None

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink_gap")
        for name in (name for name in ("frames", "clips") if getattr(self, name) is not None):
            require_at_least(self, 1, name)


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
        loras: LoRA files, `FILE` or `FILE:SCALE`, merged when the checkpoint is read. A file of the
            Hub is `owner/name/FILE`.
        base_model: Base model of a codec, a path or a Hub id; None to look where it was when the
            codec was made, beside the codec, and on the Hub.
        verify: Compare tensors with the checksums in their record.
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
