"""Whether clips fit a model, and how many pass it together.

B clips, F latent frames, C channels.
"""

from __future__ import annotations

from torch import Tensor

from vmla_convert.config import Geometry, ModelConfig
from vmla_convert.errors import ConfigError
from vmla_convert.media.clips import Batch

CLIPS_AT_ONCE = 8
# Tokens of all clips in a batch: the feed-forward layer holds a few tensors with this many rows.
TOKENS_AT_ONCE = 8192


def check_clips(config: ModelConfig, batch: Batch) -> None:
    """Refuse clips that do not fit a model, or that have no chunk with a past.

    Raises:
        ConfigError: A shape does not fit, clips are too short, or numbers are not finite.
    """
    latents, context = batch
    if latents.ndim != 5 or context.ndim != 3 or context.shape[-1] != config.geometry.text_dim:
        raise ConfigError(
            f"latents must have 5 dimensions, not {latents.ndim}, and contexts the shape "
            f"(N, text_len, {config.geometry.text_dim}), not {tuple(context.shape)}",
            "store latents (N, F, C, height, width) and context (N, text_len, text_dim)",
        )
    if not (latents.isfinite().all() and context.isfinite().all()):
        raise ConfigError("clips hold NaN or infinite numbers", "encode the clips again")
    frames, channels, *size = latents.shape[1:]
    _, rows, columns = config.geometry.patch_size
    if channels != config.geometry.in_dim or size[0] % rows or size[1] % columns:
        raise ConfigError(
            f"clips have frames of {[channels, *size]}, the model takes "
            f"{[config.geometry.in_dim, *config.latent_size]}, or sizes that its patches divide",
            "give latents of this model's own VAE: --data FILE.safetensors",
        )
    if frames < 2 * config.chunk_frames:
        raise ConfigError(
            f"clips of {frames} frames have no chunk with a past",
            f"use at least {2 * config.chunk_frames} frames",
        )


def clip_tokens(geometry: Geometry, latents: Tensor) -> int:
    """Tokens of one clip of latents (B, F, C, height, width), clean and noisy."""
    height, width = latents.shape[-2:]
    return 2 * latents.shape[1] * geometry.tokens_per_frame((height, width))


def clips_at_once(geometry: Geometry, latents: Tensor) -> int:
    """Clips like these (B, F, C, height, width) that pass a model together, clean and noisy.

    The number depends on the size of clips and not on free memory, so that results do not depend
    on the machine.
    """
    return max(1, min(CLIPS_AT_ONCE, TOKENS_AT_ONCE // clip_tokens(geometry, latents)))
