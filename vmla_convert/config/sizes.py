"""How many bytes a converted cache stores per token and layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmla_convert.config.geometry import DENSE_ITEMSIZE, LARGEST, Geometry
from vmla_convert.errors import ConfigError


@dataclass(frozen=True)
class RankPlan:
    """Sizes of MLA layers, layer by layer; a conversion saves its plan, and another can reuse it.

    Attributes:
        kv_lora_rank: Width of the content latent, per layer.
        rope_pairs: Number of RoPE pairs in the shared rope key, per layer.
        key_ranks: Width of the key's part of a split latent, per layer; empty for joint latents.
    """

    kv_lora_rank: tuple[int, ...]
    rope_pairs: tuple[int, ...]
    key_ranks: tuple[int, ...] = ()

    def check_fits(self, latent: Literal["joint", "split"]) -> None:
        """Refuse sizes that layers with such a latent cannot have.

        Raises:
            ConfigError: A layer has no rope pair, or a part of a split latent is empty.
        """
        hint = f"use the sizes of a conversion to a {latent} latent"
        if not all(self.rope_pairs):
            raise ConfigError("rope_pairs leave a layer without a rope key", hint)
        if not all(0 < rank <= LARGEST for rank in self.kv_lora_rank):
            raise ConfigError(f"a kv_lora_rank is not between 1 and {LARGEST}", hint)
        parts = list(zip(self.key_ranks, self.kv_lora_rank, strict=False))
        if len(self.key_ranks) != (len(self.kv_lora_rank) if latent == "split" else 0):
            raise ConfigError(f"key_ranks do not fit a {latent} latent", hint)
        if any(not 0 < key_rank < rank for key_rank, rank in parts):
            raise ConfigError("a part of a split latent is empty", "give it at least 2 numbers")


@dataclass(frozen=True)
class Sizes:
    """Size of a cache, given in exactly one form.

    A codec takes a budget (`bytes_per_token` or `cut`) or a `rank`. MLA layers take a budget,
    explicit ranks (`kv_lora_rank`, with or without `qk_rope_head_dim`), or a `plan`. Bytes count
    everything that is stored; an unquantised number counts two bytes, whatever its dtype.

    Attributes:
        bytes_per_token: Bytes per token and layer, averaged over layers.
        cut: Share of the dense cache's bytes to save.
        rank: Number of unquantised values per token and layer that take the same bytes.
        kv_lora_rank: Width of the content latent of every layer.
        qk_rope_head_dim: Width of the shared rope key of every layer, even.
        plan: Sizes layer by layer.
    """

    bytes_per_token: float | None = None
    cut: float | None = None
    rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    plan: RankPlan | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        forms = [name for name in given if name != "qk_rope_head_dim"]
        if len(forms) > 1:
            raise ConfigError(
                f"the size is given twice, as {' and as '.join(forms)}", "keep one of them"
            )
        if not forms:
            what = "qk_rope_head_dim goes with kv_lora_rank" if given else "a size is empty"
            raise ConfigError(what, "give a size once: --cut 0.95")
        if len(given) > 1 and self.kv_lora_rank is None:
            raise ConfigError(
                f"qk_rope_head_dim goes with kv_lora_rank, not with {forms[0]}", "leave one out"
            )
        if self.cut is not None and not 0 <= self.cut < 1:
            raise ConfigError(f"cut {self.cut:g} is not between 0 and 1", "try --cut 0.95")
        for name in ("bytes_per_token", "rank", "kv_lora_rank"):
            value: float | None = getattr(self, name)
            if value is not None and not 0 < value <= LARGEST:
                raise ConfigError(
                    f"{name} {value:g} is not between 1 and {LARGEST}", "try --cut 0.95"
                )

    @property
    def is_budget(self) -> bool:
        """Whether the size is a number of bytes that can be divided among layers."""
        return self.bytes_per_token is not None or self.cut is not None

    def token_bytes(self, geometry: Geometry) -> float:
        """Bytes per token and layer of a budget or a rank.

        Raises:
            ConfigError: The size is one of MLA layers only.
        """
        if self.bytes_per_token is not None:
            return self.bytes_per_token
        if self.cut is not None:
            return (1 - self.cut) * geometry.dense_token_bytes
        if self.rank is not None:
            return float(self.rank * DENSE_ITEMSIZE)
        name = "plan" if self.plan is not None else "kv_lora_rank"
        raise ConfigError(
            f"{name} is a size of MLA layers, and a codec has none",
            "use --bytes-per-token or --cut",
        )

    @staticmethod
    def default_codec(channels: int, geometry: Geometry) -> Sizes:
        """Default size of a codec's cache: a 20th of the dense cache."""
        size, most = Sizes(cut=0.95), Sizes(rank=channels)
        return min(most, size, key=lambda each: each.token_bytes(geometry))

    @staticmethod
    def default_mla(geometry: Geometry) -> Sizes:
        """Default size of MLA layers: the paper's 192 + 32 numbers for Wan 1.3B.

        A token costs an eighth of the width, a quarter of a head, and one number for the norm.
        """
        numbers = geometry.dim // 8 + default_rope_dim(geometry) + 1
        return Sizes(bytes_per_token=numbers * DENSE_ITEMSIZE)


def default_rope_dim(geometry: Geometry) -> int:
    """Default width of the shared rope key: a quarter of a head."""
    return 2 * (geometry.head_dim // 8)
