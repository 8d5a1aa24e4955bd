"""Text encoder and VAE of the demo world of moving digits; neither has weights.

B clips, F frames; h, w and H, W are the sizes of latent and pixel frames.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.config import ModelConfig
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.media.base import VideoDecoder

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_HINT = "leave --data out: the model then samples clips of its own"


class DemoMedia:
    """Text encoder and VAE of the moving-digits world.

    A prompt names one digit, as a numeral or a word. A latent frame is a pixel frame with 2x2
    pixels folded into channels, so that Wan's (1, 2, 2) patch applies.
    """

    name = "demo"
    enlarged = 8

    def __init__(self, frames_per_second: int = 8) -> None:
        self.frames_per_second = frames_per_second

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Return contexts (B, 1, 10) of the digits that the prompts name."""
        return self.encode_labels(torch.tensor([prompted_digit(prompt) for prompt in prompts]))

    def encode_labels(self, labels: Tensor) -> Tensor:
        """Return contexts (B, 1, 10) of digit labels (B,).

        A context is √10 at the digit and 0 elsewhere, so its mean square is 1, as for the output
        of a text encoder.
        """
        classes = len(DIGIT_WORDS)
        return classes**0.5 * F.one_hot(labels, classes).float()[:, None]

    def free_text_encoder(self) -> None:
        """Do nothing, because there are no weights."""

    def pixel_shape(self, frames: int, latent_size: tuple[int, int]) -> tuple[int, int, int]:
        """Return frames, height and width of the pixels that encode to latents of this shape."""
        height, width = latent_size
        return frames, 2 * height, 2 * width

    def encode(self, video: Tensor) -> Tensor:
        """Encode pixels (B, F, 3, H, W) to latents (B, F, 12, H/2, W/2)."""
        return F.pixel_unshuffle(video, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, F, 12, h, w) to pixels (B, F, 3, 2h, 2w)."""
        return F.pixel_shuffle(latents, 2)

    def decoder(self) -> VideoDecoder:
        """Return the media, because the demo's frames are decoded independently."""
        return self


def prompted_digit(prompt: str) -> int:
    """Return the one digit that a prompt names.

    Raises:
        VmlaError: The prompt names no digit, or several.
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


def require_demo_media(config: ModelConfig, purpose: str, hint: str = _HINT) -> None:
    """Refuse a task, named as the subject of a sentence, that needs a model of the demo world."""
    if config.media != "demo":
        raise ConfigError(f"{purpose} needs the demo's latents, and this model's are Wan's", hint)
