"""Inputs: checkpoints and clips."""

from __future__ import annotations

from dataclasses import dataclass

from vmla_convert.config.checks import require_at_least


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from.

    Attributes:
        source: `demo` for the moving-digits world; a safetensors file, or a folder of them, with
            `latents` (N, F, C, height, width) and `context` (N, text_len, text_dim); for recovery
            also `self`, the dense model's own samples, or a video file or a folder of them.
        frames: Latent frames of a clip.
        sink_gap: Largest number of frames skipped after the sink in half of the training clips, so
            that the model meets the jump which a window with a sink makes; 0 for none.
        seed: Of the clips.
        prompts: Of `self`, one clip after the other; or the one of videos that have none beside
            them.
        clips: How many are sampled for `self`.
        base: Where the text encoder and VAE come from, as of `MediaConfig`; only for clips that
            are made.
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
        # One to train on, and one held out.
        require_at_least(self, 2, "clips")


@dataclass(frozen=True)
class SourceConfig:
    """A dense checkpoint, and what its tensors do not say.

    Attributes:
        checkpoint: A path, `demo`, or a Hub id `owner/name[@revision]`.
        file: Which file or folder of a Hub repository, or of the folder.
        key: Which state dict of a pickle that holds several.
        model: A known model, of `vmla_convert.checkpoint.known.KNOWN`: it brings chunk, window,
            sampler and licence.
        overrides: `key=value` for any of these, such as `cache.window_frames=12`.
        loras: LoRA files, `FILE` or `FILE:SCALE`, merged before anything else is done.
        base_model: The base model of a codec, a path or a Hub id; None for where it was, beside the
            codec, or on the Hub.
    """

    checkpoint: str = "demo"
    file: str | None = None
    key: str | None = None
    model: str | None = None
    overrides: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    base_model: str | None = None
