"""Between prompts and pixels on one side, contexts and latents on the other.

A model needs two things around it: a text encoder (prompts to context) and a video codec (latents
to pixels). Those of the demo live here, in full; no others are wired in yet.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.config import ModelConfig
from vmla_convert.errors import ConfigError, VmlaError

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_GENERATE_HINT = (
    "generate runs the demo and its conversions: vmla generate demo --prompt 7 -o clip.mp4"
)
_CONVERT_HINT = (
    "convert takes --no-calibration, or --data FILE.safetensors with latents and context"
)


class DemoCodec:
    """Text and video of the moving-digits world; nothing is learned.

    A prompt names one digit, as a numeral or a word, and becomes a context with one entry that is
    not 0. A latent frame is the frame itself with 2x2 pixels folded into channels, so Wan's
    (1, 2, 2) patch applies.

    Attributes:
        default_prompts: What a model of this codec is asked for when nobody names a prompt.
    """

    default_prompts = tuple("0123456789")

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


def latent_frames_per_second(config: ModelConfig) -> float:
    """Latent frames in a second of video: Wan's VAE makes one of 4 frames, of 16 a second."""
    return 8.0 if config.codec == "demo" else 4.0


def open_codec(
    config: ModelConfig,
    purpose: str = "running this checkpoint",
    hint: str = _GENERATE_HINT,
) -> DemoCodec:
    """The codec a model names.

    Args:
        config: Of the model.
        purpose: What was to be done, as the subject of a sentence.
        hint: What can be done without; by default, what can be generated.

    Raises:
        ConfigError: It needs components that this version does not load yet.
    """
    require_demo_codec(config, purpose, hint)
    return DemoCodec()


def require_demo_codec(
    config: ModelConfig,
    purpose: str,
    hint: str = _CONVERT_HINT,
) -> None:
    """Refuse what only the demo model can do in this version.

    Args:
        config: Of the model.
        purpose: What was to be done, as the subject of a sentence.
        hint: What can be done without the demo's codec; by default, the way to convert.

    Raises:
        ConfigError: The model's text encoder and VAE are not the demo's.
    """
    if config.codec != "demo":
        raise ConfigError(
            f"{purpose} needs Wan's text encoder and VAE, which are not wired in yet",
            hint,
        )


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
