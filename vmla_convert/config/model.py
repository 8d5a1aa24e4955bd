"""Models: geometry, sampler, and what a conversion made of the self-attention."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import inf
from typing import Literal

from vmla_convert.config.cache import DENSE_BITS, CachePolicy, RuntimeConfig
from vmla_convert.config.checks import require_at_least, require_at_most
from vmla_convert.config.geometry import DENSE_ITEMSIZE, LARGEST, Geometry
from vmla_convert.config.sizes import RankPlan, Sizes
from vmla_convert.errors import ConfigError

CONFIG_VERSION = 1


@dataclass(frozen=True)
class SamplerConfig:
    """Few-step flow sampling.

    Attributes:
        denoising_step_list: Timesteps of 1000, descending, before the shift is applied.
        shift: Timestep shift s: sigma' = s·sigma / (1 + (s − 1)·sigma).
        renoise: True for distilled few-step models, which predict the clean chunk and add fresh
            noise at each step (Self-Forcing); False follows the flow by Euler steps.
    """

    denoising_step_list: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    renoise: bool = True

    def __post_init__(self) -> None:
        steps = self.denoising_step_list
        descending = all(a > b for a, b in itertools.pairwise(steps))
        if not (steps and descending and steps[-1] >= 1 and steps[0] <= 1000):
            raise ConfigError(
                f"denoising_step_list {list(steps)} is not a descending list from 1000 to 1"
            )
        if not 0 < self.shift < inf:
            raise ConfigError(f"shift {self.shift:g} must be above 0")


@dataclass(frozen=True)
class MediaConfig:
    """Wan's text encoder and VAE; the demo world needs neither.

    Attributes:
        base: A folder or Hub id in diffusers' layout. None takes the files beside the checkpoint,
            else the known base of the model.
        vae_tiling: Decode and encode frames in overlapping tiles, in less memory.
        cpu_offload: Keep both in host memory, and on the device only while they work.
    """

    base: str | None = None
    vae_tiling: bool = False
    cpu_offload: bool = False


@dataclass(frozen=True)
class MLAConfig:
    """MLA layers: what each layer stores per token.

    Attributes:
        kv_lora_rank: Width of the content latent, per layer.
        rope_pairs: For each layer the RoPE pairs (of the D/2 of a head, in Wan's order t, h, w)
            that the shared rope key carries. A pair may appear more than once.
        init: Name of the init of the projections.
        latent: `joint` latents serve keys and values; `split` latents have a part for each.
        key_ranks: Width of the key's part of a split latent, per layer; empty for joint latents.
        phases: For each layer and head, the angle and length of the constant that stands for each
            RoPE pair's rotation in the content key; empty when nothing is folded. The phases
            are valid for the measured window, sink and frame size only.
    """

    kv_lora_rank: tuple[int, ...]
    rope_pairs: tuple[tuple[int, ...], ...]
    init: str
    latent: Literal["joint", "split"] = "joint"
    key_ranks: tuple[int, ...] = ()
    phases: tuple[tuple[tuple[tuple[float, float], ...], ...], ...] = ()

    def __post_init__(self) -> None:
        ranks = RankPlan(self.kv_lora_rank, tuple(map(len, self.rope_pairs)), self.key_ranks)
        ranks.check_fits(self.latent)

    def qk_rope_head_dim(self, layer: int) -> int:
        """Width of the shared rope key: two numbers for each pair."""
        return 2 * len(self.rope_pairs[layer])

    def latent_parts(self, layer: int) -> tuple[int, int]:
        """Widths of the key's and the value's part of the latent."""
        rank = self.kv_lora_rank[layer]
        if not self.key_ranks:
            return rank, rank
        return self.key_ranks[layer], rank - self.key_ranks[layer]

    def cache_scalars(self, layer: int) -> int:
        """Numbers cached per token: content latent, rope key, and the key's norm."""
        return self.kv_lora_rank[layer] + self.qk_rope_head_dim(layer) + 1


@dataclass(frozen=True)
class CodecConfig:
    """A cache codec beside a dense model.

    Attributes:
        rank: Channels per layer in the file, which bound the largest size.
        size: Default size of the cache.
        calibrated: Whether the codec was fitted to activations; False assumed white inputs.
    """

    rank: int
    size: Sizes
    calibrated: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rank")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that `vmla_convert.load` needs to rebuild a model, dense or converted.

    Attributes:
        geometry: Shapes of the layers.
        latent_size: Height and width of a latent frame.
        chunk_frames: Latent frames that are generated together.
        cache: Window of the cache.
        sampler: Sampler of a chunk.
        media: Text encoder and VAE: the demo world's or Wan's.
        family: Layout of the checkpoint.
        licence: Hub identifier of the licence of the weights.
        base_model: Hub id of the model that the weights were trained from.
        frames_per_second: Pixel frames per second of video.
        mla: MLA layers; None for dense self-attention.
        codec: Cache codec beside dense self-attention; None without one.
    """

    geometry: Geometry
    latent_size: tuple[int, int]
    chunk_frames: int
    cache: CachePolicy
    sampler: SamplerConfig
    media: Literal["demo", "wan"] = "wan"
    family: str = "wan"
    licence: str = "unknown"
    base_model: str = "unknown"
    frames_per_second: int = 16
    mla: MLAConfig | None = None
    codec: CodecConfig | None = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "chunk_frames", "frames_per_second")
        require_at_most(self, LARGEST, "chunk_frames", "frames_per_second")
        if self.mla and self.codec:
            raise ConfigError("a model has an MLA layer and a codec", "make one of them")
        if self.codec and self.codec.rank > self.geometry.dense_cache_scalars:
            raise ConfigError(
                f"a codec of {self.codec.rank} channels for keys and values of "
                f"{self.geometry.dense_cache_scalars} numbers",
                f"store at most {self.geometry.dense_cache_scalars} channels",
            )
        _, rows, columns = self.geometry.patch_size
        height, width = self.latent_size
        if not 1 <= min(height, width) <= max(height, width) <= LARGEST:
            raise ConfigError(f"latent_size {height} x {width} is not between 1 and {LARGEST}")
        if height % rows or width % columns:
            raise ConfigError(
                f"latent_size {height} x {width} is not divided by patches of {rows} x {columns}"
            )
        if not self.licence:
            raise ConfigError("licence is empty", "say 'unknown' when it is not known")
        if self.cache.window_frames - self.cache.sink_frames < self.chunk_frames:
            raise ConfigError(
                f"a window of {self.cache.window_frames} frames with a sink of "
                f"{self.cache.sink_frames} has no room for a chunk of {self.chunk_frames}",
                "use a larger window (--set model.cache.window_frames=21) or a smaller sink",
            )
        room = self.cache.window_frames - self.cache.sink_frames - self.chunk_frames
        if self.cache.dense_recent_frames > room:
            raise ConfigError(
                f"dense_recent_frames {self.cache.dense_recent_frames} is more than the {room} "
                "past frames that the window keeps beside its sink"
            )
        if self.cache.dense_recent_frames and self.mla:
            raise ConfigError(
                "dense_recent_frames needs dense keys and values, and MLA layers have none",
                "--set model.cache.dense_recent_frames=0",
            )
        if self.mla and not (
            len(self.mla.kv_lora_rank) == len(self.mla.rope_pairs) == self.geometry.num_layers
        ):
            raise ConfigError(
                f"mla must name ranks and pairs for {self.geometry.num_layers} layers"
            )
        pairs = self.geometry.head_dim // 2
        if self.mla and not all(0 <= pair < pairs for each in self.mla.rope_pairs for pair in each):
            raise ConfigError(f"mla has rope_pairs that a head of {pairs} pairs does not have")

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.geometry.tokens_per_frame(self.latent_size)

    @property
    def is_dense(self) -> bool:
        """Whether the cache keeps dense keys and values: neither MLA layers nor a codec."""
        return self.mla is None and self.codec is None

    def cache_bytes_per_token(self, runtime: RuntimeConfig | None = None) -> float:
        """Bytes cached per token and layer, averaged over layers; unquantised numbers count two."""
        runtime, geometry = runtime or RuntimeConfig(), self.geometry
        if self.codec is not None:
            return (runtime.size or self.codec.size).token_bytes(geometry)
        if self.mla is not None:
            layers = range(geometry.num_layers)
            return DENSE_ITEMSIZE * sum(map(self.mla.cache_scalars, layers)) / len(layers)
        bits = DENSE_BITS.get(runtime.cache_dtype)
        if bits is None:
            return float(geometry.dense_token_bytes)
        # Each key channel of a chunk and each value head of a token stores a least value and a
        # step, both float16.
        grids = 4 * geometry.dim / (self.chunk_frames * self.tokens_per_frame)
        codes = 2 * -(-geometry.dim * bits // 8)
        return codes + grids + 4 * geometry.num_heads

    def cache_cut(self, runtime: RuntimeConfig | None = None) -> float:
        """Share of the dense cache that the conversion saves: 1 − converted / dense."""
        return 1.0 - self.cache_bytes_per_token(runtime) / self.geometry.dense_token_bytes

    def cache_bytes(self, frames: int, batch: int = 1, runtime: RuntimeConfig | None = None) -> int:
        """Bytes of the whole cache that holds `frames` frames; unquantised numbers count two."""
        tokens = batch * self.tokens_per_frame * self.geometry.num_layers
        held = frames * self.cache_bytes_per_token(runtime)
        if self.codec is not None:
            recent = min(self.cache.dense_recent_frames, frames)
            held += recent * self.geometry.dense_token_bytes
        return round(tokens * held)
