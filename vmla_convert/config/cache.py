"""The cache: its window, its size, and how a model runs with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmla_convert.config.checks import require_at_least
from vmla_convert.config.geometry import Geometry
from vmla_convert.errors import ConfigError

DENSE_ITEMSIZE = 2
"""Bytes that a dense number counts as when sizes are compared."""

DENSE_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
"""Bits of a number in a quantised dense cache, by cache dtype."""


@dataclass(frozen=True)
class CachePolicy:
    """Which frames the cache keeps and where it places them.

    The window counts every frame a query may see: the sink, the recent past and the chunk being
    denoised. `relative` places the kept frames at 0, 1, 2, … with the sink first, so that a rollout
    is not bounded by the positions seen in training; `absolute` keeps each frame's own index.

    Attributes:
        window_frames: How many frames are kept, the open chunk among them.
        sink_frames: How many of the first are kept for good.
        positions: See above.
        dense_recent_frames: How many of the newest past frames a codec's cache keeps exactly as
            well; where attention looks most, the model then is the dense one.
    """

    window_frames: int
    sink_frames: int = 0
    positions: Literal["absolute", "relative"] = "absolute"
    dense_recent_frames: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sink_frames < self.window_frames:
            raise ConfigError(
                f"a sink of {self.sink_frames} frames does not fit a window of "
                f"{self.window_frames}",
                "make the window larger, as with --set cache.window_frames=21, or the sink smaller",
            )
        require_at_least(self, 0, "dense_recent_frames")


@dataclass(frozen=True)
class CacheSize:
    """How much a codec stores of a token and layer, averaged over layers; one of three ways.

    Bytes count every byte that is stored. A dense number counts two bytes, whatever its dtype.

    Attributes:
        bytes_per_token: Bytes.
        cut: Share of the dense cache to save.
        rank: As many bytes as so many unquantised numbers take.
    """

    bytes_per_token: float | None = None
    cut: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            said = f"given twice, as {' and as '.join(given)}" if given else "missing"
            raise ConfigError(f"the size of the cache is {said}", "give it once: --cut 0.95")
        if self.cut is not None and not 0 <= self.cut < 1:
            raise ConfigError(f"cut {self.cut:g} is not between 0 and 1", "try --cut 0.95")
        if self.cut is None and min(given.values()) <= 0:
            name, value = next(iter(given.items()))
            raise ConfigError(f"{name} {value:g} must be above 0", "try --cut 0.95")

    def token_bytes(self, geometry: Geometry) -> float:
        """Bytes of a token and layer."""
        if self.bytes_per_token is not None:
            return self.bytes_per_token
        if self.rank is not None:
            return float(self.rank * DENSE_ITEMSIZE)
        assert self.cut is not None
        return (1 - self.cut) * geometry.dense_cache_scalars * DENSE_ITEMSIZE


@dataclass(frozen=True)
class RuntimeConfig:
    """How a model runs, whatever it is; results differ by rounding, or by what the cache loses.

    Attributes:
        size: Size of a codec's cache; None for the size that the model has.
        cache_dtype: `auto` gives a codec's channels 0 to 8 bits or float16, and keeps other caches
            as they are; `model` keeps all numbers in the model's dtype, of a codec as many as the
            size pays for; `int8` to `int2` quantise a dense cache.
        backend: How MLA layers attend. `materialised` rebuilds keys and values of all heads;
            `absorbed` takes the queries into the latent space; `auto` counts operations, and times
            both once where counts are near.
        tile_mib: Most MiB of rebuilt keys and values at a time, at least one head's. None for 64 on
            a CPU and 1024 on a GPU.
        offload: Keep the cache in (pinned) host memory; each layer fetches what it attends to.
    """

    size: CacheSize | None = None
    cache_dtype: Literal["auto", "model", "int8", "int4", "int3", "int2"] = "auto"
    backend: Literal["auto", "materialised", "absorbed"] = "auto"
    tile_mib: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.tile_mib is not None:
            require_at_least(self, 1, "tile_mib")
