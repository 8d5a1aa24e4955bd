"""Peak memory of Wan's text encoder and VAE, by formula."""

from __future__ import annotations

from vmla_convert.config import ModelConfig
from vmla_convert.layers.memory import FLOAT32, Memory
from vmla_convert.maths.tiles import cover
from vmla_convert.media.wan import TILE_OVERLAP, TILE_PIXELS

VAE_STRIDE, VAE_CHANNELS = 8, 16
"""Pixels per latent, and latent channels, of Wan 2.1's VAE."""

# `AutoencoderKLWan` of Wan 2.1, counted over fake tensors at three sizes and two dtypes: weights,
# features that its causal convolutions keep from frame to frame, and other tensors of the fullest
# moment. The last two are numbers for each pixel of a frame.
_VAE_WEIGHTS, _VAE_KEPT, _VAE_PASSING = 126_892_531, 2377, 2684

# UMT5-XXL's config.json: vocabulary, width, hidden width, layers, heads.
_VOCABULARY, _WIDTH, _HIDDEN, _LAYERS, _HEADS = 256_384, 4096, 10_240, 24, 64


def text_encoder_memory(config: ModelConfig, itemsize: int = 2) -> Memory:
    """Peak of Wan's text encoder UMT5-XXL alone, which encodes one prompt at a time.

    Counted are weights, the hidden tensors of one layer, and one layer's attention weights. The
    weights are read into host memory first.
    """
    matrices = _LAYERS * (4 * _WIDTH**2 + 3 * _WIDTH * _HIDDEN)
    weights = itemsize * (matrices + _VOCABULARY * _WIDTH)
    length = config.geometry.text_len
    hidden = itemsize * length * (3 * _HIDDEN + 6 * _WIDTH)
    scores = _HEADS * length**2 * (FLOAT32 + 2 * itemsize)
    return Memory(weights + hidden + scores, staging=weights)


def vae_kept_bytes(latent_size: tuple[int, int], itemsize: int, tiled: bool = False) -> int:
    """Bytes of weights and features that a decoder keeps on the device between chunks.

    Features of several tiles wait in host memory.
    """
    pixels = _tile_pixels(latent_size, tiled)
    return itemsize * (_VAE_WEIGHTS + (_VAE_KEPT * pixels[0] if len(pixels) == 1 else 0))


def decoding_memory(latent_size: tuple[int, int], itemsize: int, tiled: bool = False) -> Memory:
    """Peak of decoding one video frame by frame with Wan 2.1's VAE, one tile after the other."""
    pixels = _tile_pixels(latent_size, tiled)
    device = itemsize * (_VAE_WEIGHTS + (_VAE_KEPT + _VAE_PASSING) * max(pixels))
    return Memory(device, itemsize * _VAE_KEPT * sum(pixels) if len(pixels) > 1 else 0)


def _tile_pixels(latent_size: tuple[int, int], tiled: bool) -> list[int]:
    """Pixels of every tile of a frame."""
    side, overlap = TILE_PIXELS // VAE_STRIDE, TILE_OVERLAP // VAE_STRIDE
    tiles = cover(latent_size, side if tiled else max(latent_size), overlap if tiled else 0)
    spans = [[end - start for start, end in tile] for tile in tiles]
    return [height * width * VAE_STRIDE**2 for height, width in spans]
