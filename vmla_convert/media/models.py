"""Between prompts and pixels on one side, contexts and latents on the other.

A model needs two things around it: a text encoder (prompts to context) and a video media (latents
to pixels). Those of the demo live here, in full; Wan's are in `wan.py`, on top of diffusers and
transformers, which are imported only when they are needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.config import MediaConfig, ModelConfig
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.progress import Progress, Silent

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_CONVERT_HINT = (
    "convert takes --no-calibration, or --data FILE.safetensors with latents and context"
)


class TextEncoder(Protocol):
    """Reads prompts."""

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Contexts (B, text_len, text_dim), 0 after the end of a prompt; on the CPU.

        Raises:
            VmlaError: A prompt cannot be read.
        """
        ...


class VideoDecoder(Protocol):
    """Decodes one video chunk by chunk, with what it remembers of the chunks before."""

    def decode(self, latents: Tensor) -> Tensor:
        """The next latents (B, F, C, h, w) to pixels (B, F', 3, H, W), about −1 … 1."""
        ...


class VideoVAE(Protocol):
    """Turns pixels into latents, and back.

    Attributes:
        frames_per_second: Of pixels.
        enlarged: Side of the square that one pixel becomes in files.
    """

    frames_per_second: int
    enlarged: int

    def pixel_shape(self, frames: int, latent_size: tuple[int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the pixels that become latents of this many and this size."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """Pixels (B, F', 3, H, W) to latents (B, F, C, h, w), as the model sees them; on the CPU.

        F' is a number of frames that `pixel_shape` can give.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """A whole clip at once; as `decoder` does it."""
        ...

    def decoder(self) -> VideoDecoder:
        """A decoder at the start of a video; several may be used in turns."""
        ...


class Media(TextEncoder, VideoVAE, Protocol):
    """Both.

    Attributes:
        name: What the latents and contexts that it makes depend on.
        default_prompts: What a model of this media is asked for when nobody names a prompt.
    """

    name: str
    default_prompts: tuple[str, ...]

    def free_text_encoder(self) -> None:
        """Forget the text encoder's weights until prompts come again."""
        ...


class KnownPrompts:
    """Contexts of prompts that were read in one go, after which their encoder was let go."""

    def __init__(
        self, media: Media, prompts: Iterable[str], progress: Progress | None = None
    ) -> None:
        """Read them all; that takes as long as loading the encoder does.

        Raises:
            VmlaError: A prompt cannot be read.
        """
        unique = list(dict.fromkeys(prompts))
        for named in (progress or Silent()).track([unique], "reading prompts"):
            self._contexts = dict(zip(named, media.encode_prompts(named), strict=True))
        media.free_text_encoder()

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Contexts (B, text_len, text_dim) of prompts that were read."""
        return torch.stack([self._contexts[prompt] for prompt in prompts])


class DemoMedia:
    """Text and video of the moving-digits world; nothing is learned.

    A prompt names one digit, as a numeral or a word, and becomes a context with one entry that is
    not 0. A latent frame is the frame itself with 2x2 pixels folded into channels, so Wan's
    (1, 2, 2) patch applies.
    """

    name = "demo"
    default_prompts = tuple("0123456789")
    enlarged = 8

    def __init__(self, frames_per_second: int = 8) -> None:
        """Of the world itself there is only one; how fast it is shown may differ."""
        self.frames_per_second = frames_per_second

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Contexts (B, 1, 10) of the digits that the prompts name, as of `encode_labels`.

        Raises:
            VmlaError: A prompt names no digit, or several.
        """
        return self.encode_labels(torch.tensor([prompted_digit(prompt) for prompt in prompts]))

    def encode_labels(self, labels: Tensor) -> Tensor:
        """Contexts (B, 1, 10) of digit labels (B,).

        √10 at the digit and 0 elsewhere: scaled to mean square 1, as an encoder's output is.
        """
        classes = len(DIGIT_WORDS)
        return classes**0.5 * F.one_hot(labels, classes).float()[:, None]

    def pixel_shape(self, frames: int, latent_size: tuple[int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the pixels that become latents of this many and this size."""
        height, width = latent_size
        return frames, 2 * height, 2 * width

    def encode(self, video: Tensor) -> Tensor:
        """Pixels (B, F, 3, H, W) to latents (B, F, 12, H/2, W/2)."""
        return F.pixel_unshuffle(video, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, F, 12, h, w) to pixels (B, F, 3, 2h, 2w)."""
        return F.pixel_shuffle(latents, 2)

    def decoder(self) -> VideoDecoder:
        """Itself: frames know nothing of each other."""
        return self

    def free_text_encoder(self) -> None:
        """There are no weights to forget."""


def open_media(
    config: ModelConfig,
    how: MediaConfig | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Media:
    """The media a model names. Wan's weights are read, or fetched, when they are first needed.

    Args:
        config: Of the model.
        how: Where its weights come from, and how they run.
        checkpoint: File or folder that the model was read from; components beside it are taken.
        device: Where it works.
        dtype: Of its weights; by default bfloat16 on a GPU, else float32.

    Raises:
        CheckpointError: The components are not there.
        ConfigError: None are known, or they do not fit the model.
        MissingExtraError: diffusers or transformers are not installed.
    """
    if config.media == "demo":
        return DemoMedia(config.frames_per_second)
    from vmla_convert.media.wan import open_wan_media

    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return open_wan_media(config, how or MediaConfig(), checkpoint, device, dtype)


def latent_frames_per_second(config: ModelConfig) -> float:
    """Latent frames a second of a model's video, but for the first, which is one of pixels."""
    stride = 1 if config.media == "demo" else WAN_TEMPORAL_STRIDE
    return config.frames_per_second / stride


WAN_TEMPORAL_STRIDE = 4
"""Frames of pixels that become one latent frame, after the first, in all of Wan's VAEs."""


def check_prompts(config: ModelConfig, prompts: Iterable[str]) -> None:
    """Refuse a prompt that a model cannot read, before any work is done with it or others.

    Raises:
        VmlaError: The demo model is asked for something else than one digit.
    """
    if config.media == "demo":
        for prompt in prompts:
            prompted_digit(prompt)


def require_demo_media(
    config: ModelConfig,
    purpose: str,
    hint: str = _CONVERT_HINT,
) -> None:
    """Refuse what only a model of the demo world can do.

    Args:
        config: Of the model.
        purpose: What was to be done, as the subject of a sentence.
        hint: What can be done without the demo's media; by default, the way to convert.

    Raises:
        ConfigError: The model's text encoder and VAE are not the demo's.
    """
    if config.media != "demo":
        raise ConfigError(f"{purpose} needs the demo's latents, and this model's are Wan's", hint)


def prompted_digit(prompt: str) -> int:
    """The one digit that a prompt names.

    Raises:
        VmlaError: It names none, or several.
    """
    words = re.findall(r"[a-z]+|\d", prompt.lower())
    found = {int(w) for w in words if w.isdigit()}
    found |= {DIGIT_WORDS.index(w) for w in words if w in DIGIT_WORDS}
    if len(found) != 1:
        raise VmlaError(
            f"the prompt {prompt!r} must name one digit for the demo model",
            'try --prompt "a bouncing seven"',
        )
    return found.pop()
