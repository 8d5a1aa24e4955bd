"""Clean latents that a video begins with, from an image or a video file.

A prefix has the shape (B, P, C, height, width): B clips, P frames, C channels.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from vmla_convert.config import ModelConfig
from vmla_convert.errors import ConfigError
from vmla_convert.media.base import Media
from vmla_convert.media.video import fit_frame, read_frames


def read_prefix(path: Path, media: Media, latent_size: tuple[int, int], frames: int) -> Tensor:
    """Encode an image or a video as latents (1, P, C, height, width).

    Frames are resized and cut at the centre to the model's size. Their rate is not changed. Where
    the number of pixel frames does not fill whole latent frames, the first ones are dropped, so
    that the generated frames follow the file's last frame.

    Args:
        path: Any file that PyAV plays.
        media: Media of the model.
        latent_size: Height and width of a latent frame.
        frames: Latent frames of the whole clip.

    Raises:
        ConfigError: The file cannot be read, or is as long as the clip.
        MissingExtraError: PyAV is not installed.
    """
    if not path.is_file():
        raise ConfigError(f"no image or video at {path}", "give a file: --image FILE")
    most, *size = media.pixel_shape(frames, latent_size)
    pixels = [fit_frame(frame, size) for frame in islice(read_frames(path), most)]
    if len(pixels) == most:
        raise ConfigError(
            f"{path} fills all {frames} latent frames of the clip", "ask for more: --seconds 60"
        )
    lengths = (media.pixel_shape(count, latent_size)[0] for count in range(frames, 0, -1))
    length = next((length for length in lengths if length <= len(pixels)), 0)
    if not length:
        raise ConfigError(f"{path} holds no frame", "give another image or video")
    return media.encode(torch.stack(pixels[-length:])[None])


def check_prefix(prefix: Tensor, config: ModelConfig, clips: int) -> None:
    """Refuse a prefix of another shape than (1 or `clips`, P, C, height, width)."""
    wanted = [config.geometry.in_dim, *config.latent_size]
    fits = prefix.ndim == 5 and prefix.shape[0] in (1, clips) and prefix.shape[1] > 0
    if not fits or list(prefix.shape[2:]) != wanted:
        raise ConfigError(
            f"a prefix of shape {list(prefix.shape)} does not fit {clips} clips of frames {wanted}",
            "encode it with this model's own VAE, one for all clips or one for each",
        )


def prefix_chunks(prefix: Tensor, chunk_frames: int) -> list[Tensor]:
    """Split a prefix into chunks of `chunk_frames` frames.

    Where the chunks do not divide the length, the first chunk is shorter. So an image, one latent
    frame, is a chunk of its own: models with an independent first frame were trained this way
    (Self-Forcing, causal inference).
    """
    whole, rest = divmod(prefix.shape[1], chunk_frames)
    return list(prefix.split([rest] * (rest > 0) + [chunk_frames] * whole, dim=1))
