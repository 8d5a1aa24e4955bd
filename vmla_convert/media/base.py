"""The parts around a model: a text encoder and a VAE, as protocols.

B clips, F latent frames, F' pixel frames, C latent channels; h, w and H, W are the sizes of latent
and pixel frames.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vmla_convert.config import ModelConfig

WAN_TEMPORAL_STRIDE = 4
"""Pixel frames per latent frame in all of Wan's VAEs, after the first, which is one of each."""


class TextEncoder(Protocol):
    """Encodes prompts."""

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Return contexts (B, text_len, text_dim) on the CPU, 0 after the end of a prompt.

        Raises:
            VmlaError: The encoder does not understand a prompt.
        """
        ...


class VideoDecoder(Protocol):
    """Decodes one video chunk by chunk, and remembers what later chunks need."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latents (B, F, C, h, w) to pixels (B, F', 3, H, W), about −1 … 1."""
        ...


class Media(TextEncoder, Protocol):
    """A text encoder and a VAE.

    Attributes:
        name: Identifies the encoder and the VAE, for records of the clips that they made.
        frames_per_second: Rate of the pixel frames.
        enlarged: Side in files, in pixels, of one decoded pixel.
    """

    name: str
    frames_per_second: int
    enlarged: int

    def free_text_encoder(self) -> None:
        """Drop the text encoder's weights until prompts come again."""
        ...

    def pixel_shape(self, frames: int, latent_size: tuple[int, int]) -> tuple[int, int, int]:
        """Return frames, height and width of the pixels that encode to latents of this shape."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """Encode pixels (B, F', 3, H, W) to normalised latents (B, F, C, h, w) on the CPU.

        F' must be a number of frames that `pixel_shape` returns.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode a whole clip; equals `decoder().decode`."""
        ...

    def decoder(self) -> VideoDecoder:
        """Return a decoder at the start of a video. Several decoders may run in turns."""
        ...


def latent_frames_per_second(config: ModelConfig) -> float:
    """Return the latent frames per second of a model's video, after the first frame."""
    stride = 1 if config.media == "demo" else WAN_TEMPORAL_STRIDE
    return config.frames_per_second / stride
