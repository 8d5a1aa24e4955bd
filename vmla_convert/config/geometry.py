"""Shapes of a Wan-layout video transformer."""

from __future__ import annotations

from dataclasses import dataclass

from vmla_convert.config.checks import require_at_least, require_at_most
from vmla_convert.errors import ConfigError

LARGEST = 2**16
"""Largest number of channels, tokens or layers; Wan 14B's largest is 13,824."""

_SIZES = ("dim", "ffn_dim", "num_heads", "in_dim", "out_dim", "freq_dim", "text_dim", "text_len")

DENSE_ITEMSIZE = 2
"""Bytes that an unquantised number counts as when sizes are compared."""


@dataclass(frozen=True)
class Geometry:
    """Shapes of a Wan-layout video DiT, under Wan's names."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        require_at_least(self, 0, "num_layers")  # a model without its blocks
        require_at_least(self, 1, *_SIZES)
        require_at_most(self, LARGEST, "num_layers", *_SIZES)
        if not all(1 <= side <= LARGEST for side in self.patch_size):
            raise ConfigError(f"patch_size {list(self.patch_size)} is not of three sides")
        if not 0 < self.eps < 1:
            raise ConfigError(f"eps {self.eps:g} must be between 0 and 1")
        if self.num_heads < 1 or self.dim % self.num_heads or self.head_dim % 2:
            raise ConfigError(
                f"dim {self.dim} does not split into {self.num_heads} heads of even width"
            )
        if self.head_dim < 6:
            raise ConfigError(f"head dim {self.head_dim} is too small for 3D RoPE (at least 6)")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.num_heads

    @property
    def dense_cache_scalars(self) -> int:
        """Numbers in the dense cache per token and layer: a key and a value for every head."""
        return 2 * self.dim

    @property
    def dense_token_bytes(self) -> int:
        """Bytes of the dense cache per token and layer."""
        return DENSE_ITEMSIZE * self.dense_cache_scalars

    def tokens_per_frame(self, latent_size: tuple[int, int]) -> int:
        """Tokens of one latent frame of (height, width)."""
        return (latent_size[0] // self.patch_size[1]) * (latent_size[1] // self.patch_size[2])
