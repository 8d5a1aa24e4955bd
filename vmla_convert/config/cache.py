"""Settings of the cache: the kept window, and how a model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmla_convert.config.checks import require_at_least
from vmla_convert.config.sizes import Sizes
from vmla_convert.errors import ConfigError

DENSE_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
"""Bits per number of a quantised dense cache, by cache dtype."""


@dataclass(frozen=True)
class CachePolicy:
    """Which frames the cache keeps, and their time positions.

    Attributes:
        window_frames: Frames that a query can attend to: the sink, the recent past, and the chunk
            being denoised.
        sink_frames: First frames of the video that are kept for good.
        frame_positions: `relative` numbers the kept frames 0, 1, 2, … with the sink first, so that
            long rollouts stay within the positions of training; `absolute` keeps each frame's own
            index.
        dense_recent_frames: Newest past frames whose dense keys and values a codec's cache keeps
            as well.
    """

    window_frames: int
    sink_frames: int = 0
    frame_positions: Literal["absolute", "relative"] = "absolute"
    dense_recent_frames: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sink_frames < self.window_frames:
            raise ConfigError(
                f"a sink of {self.sink_frames} frames does not fit a window of "
                f"{self.window_frames}",
                "use a larger window (--set model.cache.window_frames=21) or a smaller sink",
            )
        require_at_least(self, 0, "dense_recent_frames")


@dataclass(frozen=True)
class RuntimeConfig:
    """How a model runs. Results differ by rounding, or by the error of a smaller cache.

    Attributes:
        size: Size of a codec's cache; None for the codec's own default.
        cache_dtype: `auto` gives each channel of a codec 0 to 8 bits or float16, and keeps other
            caches as they are. `model` keeps the model's dtype; a codec then keeps as many
            channels as the size pays for. `int8` to `int2` quantise a dense cache.
        backend: How MLA layers attend. `materialised` rebuilds keys and values of all heads;
            `absorbed` moves the queries into the latent space; `auto` counts operations, and times
            both once where the counts are near.
        attention_backend: Kernel of dense and rebuilt keys and values. `auto` takes the best that
            is installed, but never `sage`, which rounds to 8 bits. `sdpa` is torch's own choice.
            Kernels that do not take a GPU or a dtype give way to it.
        tile_mib: Largest MiB of rebuilt keys and values at a time. None for 64 on a CPU and 1024
            on a GPU.
        offload: Keep the cache in (pinned) host memory; each layer fetches what it attends to.
        dtype: Dtype of weights and cache; None for bfloat16 on a GPU and float32 on a CPU.
        compile: Compile all but the self-attention, for long rollouts.
    """

    size: Sizes | None = None
    cache_dtype: Literal["auto", "model", "int8", "int4", "int3", "int2"] = "auto"
    backend: Literal["auto", "materialised", "absorbed"] = "auto"
    attention_backend: Literal["auto", "sdpa", "cudnn", "flash", "flash3", "flash4", "sage"] = (
        "auto"
    )
    tile_mib: int | None = None
    offload: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.tile_mib is not None:
            require_at_least(self, 1, "tile_mib")
