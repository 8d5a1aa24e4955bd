"""Every setting as a frozen dataclass; no torch, so that `vmla --help` stays quick.

Letters for shapes, here and everywhere: B batch, T query tokens, S cached tokens, L tokens of any
kind, H heads, D head dim (H·D = `dim`), R latent rank, F frames, C channels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

from vmla_convert.errors import ConfigError

CONFIG_VERSION = 1


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
        if self.num_heads < 1 or self.dim % self.num_heads or self.head_dim % 2:
            raise ConfigError(
                f"dim {self.dim} does not split into {self.num_heads} heads of even width"
            )
        if self.head_dim < 6:
            raise ConfigError(f"head dim {self.head_dim} is too small for 3D RoPE (at least 6)")

    @property
    def head_dim(self) -> int:
        """D: channels of one head."""
        return self.dim // self.num_heads

    @property
    def dense_cache_scalars(self) -> int:
        """Numbers the dense cache keeps per token and layer: a key and a value for every head."""
        return 2 * self.dim

    def tokens_per_frame(self, latent_size: tuple[int, int]) -> int:
        """Tokens of one latent frame of (height, width)."""
        return (latent_size[0] // self.patch_size[1]) * (latent_size[1] // self.patch_size[2])


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
        _require(self, 0, "dense_recent_frames")


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


Product = Literal["codec", "mla"]
"""What a conversion makes: a codec beside the dense model, or a model with MLA layers."""

DENSE_ITEMSIZE = 2
"""Bytes that a dense number counts as when sizes are compared."""

DENSE_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
"""Bits of a number in a quantised dense cache, by cache dtype."""


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
            _require(self, 1, "tile_mib")


@dataclass(frozen=True)
class MediaConfig:
    """Where Wan's text encoder and VAE come from, and how they run; the demo's need neither.

    Attributes:
        base: A folder or Hub id in diffusers' layout. None takes what lies beside the checkpoint,
            else what is known of the model.
        vae_tiling: Decode and encode frames in overlapping tiles, in less memory.
        cpu_offload: Keep both in host memory, and on the device only while they work.
    """

    base: str | None = None
    vae_tiling: bool = False
    cpu_offload: bool = False


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
        if self.shift <= 0:
            raise ConfigError(f"shift {self.shift:g} must be above 0")


@dataclass(frozen=True)
class RankPlan:
    """What each layer may cache; saved with a conversion, and replayable.

    Attributes:
        kv_lora_rank: R of each layer.
        rope_pairs: How many RoPE pairs each layer's rope key carries.
        key_ranks: Of split latents the part that keys read; empty for joint ones.
    """

    kv_lora_rank: tuple[int, ...]
    rope_pairs: tuple[int, ...]
    key_ranks: tuple[int, ...] = ()

    def check_fits(self, latent: Literal["joint", "split"]) -> None:
        """Refuse sizes that a layer with such a latent cannot have.

        Raises:
            ConfigError: A layer has no rope pair, or the split is bad.
        """
        hint = f"use the sizes of a conversion to a {latent} latent"
        if not all(self.rope_pairs):
            raise ConfigError("rope_pairs leave a layer without a rope key", hint)
        parts = list(zip(self.key_ranks, self.kv_lora_rank, strict=False))
        if len(self.key_ranks) != (len(self.kv_lora_rank) if latent == "split" else 0):
            raise ConfigError(f"key_ranks do not fit a {latent} latent", hint)
        if any(not 0 < key_rank < rank for key_rank, rank in parts):
            raise ConfigError("a part of a split latent is empty", "give it at least 2 numbers")


@dataclass(frozen=True)
class MLAConfig:
    """What a converted checkpoint stores per token, layer by layer.

    Attributes:
        kv_lora_rank: R of each layer.
        rope_pairs: For each layer the RoPE pairs (of the D/2 of a head, in Wan's order t, h, w)
            that the shared rope key carries. A pair may appear more than once.
        init: How the projections were initialised.
        latent: `joint` lets keys and values read all of the latent; `split` gives each its part.
        key_ranks: Of split latents the part of R that keys read; empty for joint ones.
        phases: For each layer and head, the angle and length of the constant that stands for each
            RoPE pair's rotation in the content key; empty when nothing is folded. They belong to
            the window, the sink and the grid that were measured.
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
        """How much of the latent keys read, and values."""
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
        rank: Channels per layer that its file holds: the largest size that it can serve.
        size: Size of the cache where none is asked for.
        calibrated: Whether it was fitted to activations; else white inputs were assumed.
    """

    rank: int
    size: CacheSize = field(default_factory=lambda: CacheSize(cut=0.95))
    calibrated: bool = True

    def __post_init__(self) -> None:
        _require(self, 1, "rank")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that `vmla_convert.load` needs to rebuild a model, dense or converted.

    Attributes:
        geometry: Sizes of its layers.
        latent_size: Height and width of a latent frame.
        chunk_frames: Latent frames that are generated together.
        cache: What of the past is kept.
        sampler: How a chunk is drawn from noise.
        media: Whose text encoder and VAE it goes with.
        family: The layout that its checkpoint was read from.
        licence: Of the weights, by its Hub identifier.
        base_model: Hub id of what it was trained from.
        frames_per_second: Of the pixels that its latents stand for.
        mla: What became of its self-attention; None where that is dense.
        codec: The cache codec beside its dense self-attention; None where there is none.
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
        _require(self, 1, "chunk_frames", "frames_per_second")
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
        if min(height, width) < 1 or height % rows or width % columns:
            raise ConfigError(
                f"latent_size {height} x {width} is not divided by patches of {rows} x {columns}"
            )
        if not self.licence:
            raise ConfigError("licence is empty", "say 'unknown' when it is not known")
        if self.cache.window_frames - self.cache.sink_frames < self.chunk_frames:
            raise ConfigError(
                f"a window of {self.cache.window_frames} frames with a sink of "
                f"{self.cache.sink_frames} has no room for a chunk of {self.chunk_frames}",
                "make the window larger, as with --set cache.window_frames=21, or the sink smaller",
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
                "set cache.dense_recent_frames=0",
            )
        if self.mla and not (
            len(self.mla.kv_lora_rank) == len(self.mla.rope_pairs) == self.geometry.num_layers
        ):
            raise ConfigError(
                f"mla must name ranks and pairs for {self.geometry.num_layers} layers"
            )

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.geometry.tokens_per_frame(self.latent_size)

    @property
    def is_dense(self) -> bool:
        """Whether its cache keeps dense keys and values: neither MLA nor a codec."""
        return self.mla is None and self.codec is None

    def cache_bytes_per_token(self, runtime: RuntimeConfig | None = None) -> float:
        """Bytes cached per token and layer, averaged over layers, two for a number that is whole.

        Args:
            runtime: Size and dtype of the cache.
        """
        runtime, geometry = runtime or RuntimeConfig(), self.geometry
        if self.codec is not None:
            return (runtime.size or self.codec.size).token_bytes(geometry)
        if self.mla is not None:
            layers = range(geometry.num_layers)
            return DENSE_ITEMSIZE * sum(map(self.mla.cache_scalars, layers)) / len(layers)
        bits = DENSE_BITS.get(runtime.cache_dtype)
        if bits is None:
            return float(DENSE_ITEMSIZE * geometry.dense_cache_scalars)
        # A least value and a step, both float16: for each key channel of a chunk, and for each head
        # of a token's value.
        grids = 4 * geometry.dim / (self.chunk_frames * self.tokens_per_frame)
        codes = 2 * -(-geometry.dim * bits // 8)
        return codes + grids + 4 * geometry.num_heads

    def cache_cut(self, runtime: RuntimeConfig | None = None) -> float:
        """Share of the dense cache that is gone: 1 − converted / dense."""
        dense = DENSE_ITEMSIZE * self.geometry.dense_cache_scalars
        return 1.0 - self.cache_bytes_per_token(runtime) / dense

    def cache_bytes(self, frames: int, batch: int = 1, runtime: RuntimeConfig | None = None) -> int:
        """Bytes of the whole cache when it holds `frames` frames, two for a number that is whole.

        Args:
            frames: The window's, or fewer.
            batch: B.
            runtime: Size and dtype of the cache.
        """
        tokens = batch * self.tokens_per_frame * self.geometry.num_layers
        held = frames * self.cache_bytes_per_token(runtime)
        if self.codec is not None:
            recent = min(self.cache.dense_recent_frames, frames)
            held += recent * DENSE_ITEMSIZE * self.geometry.dense_cache_scalars
        return round(tokens * held)


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from.

    Attributes:
        source: `demo` for the moving-digits world; a safetensors file, or a folder of them, with
            `latents` (N, F, C, height, width) and `context` (N, text_len, text_dim); for recovery
            also `self`, the dense model's own samples, or a video file or a folder of them.
        frames: Latent frames of a clip.
        sink_gap: Largest number of frames skipped after the sink in half of the training clips, so
            that the model meets the jump which a window with a sink makes; 0 for none.
        seed: Of the clips.
        prompts: Of `self`, one clip after the other; or the one of videos that have none beside
            them.
        clips: How many are sampled for `self`.
        base: Where the text encoder and VAE come from, as of `MediaConfig`; only for clips that
            are made.
    """

    source: str = "demo"
    frames: int = 10
    sink_gap: int = 0
    seed: int = 0
    prompts: tuple[str, ...] = ()
    clips: int = 128
    base: str | None = None

    def __post_init__(self) -> None:
        _require(self, 1, "frames")
        _require(self, 0, "sink_gap")
        # One to train on, and one held out.
        _require(self, 2, "clips")


@dataclass(frozen=True)
class SourceConfig:
    """A dense checkpoint, and what its tensors do not say.

    Attributes:
        checkpoint: A path, `demo`, or a Hub id `owner/name[@revision]`.
        file: Which file or folder of a Hub repository, or of the folder.
        key: Which state dict of a pickle that holds several.
        model: A known model, of `vmla_convert.checkpoint.known.KNOWN`: it brings chunk, window,
            sampler and licence.
        overrides: `key=value` for any of these, such as `cache.window_frames=12`.
        loras: LoRA files, `FILE` or `FILE:SCALE`, merged before anything else is done.
        base_model: The base model of a codec, a path or a Hub id; None for where it was, beside the
            codec, or on the Hub.
    """

    checkpoint: str = "demo"
    file: str | None = None
    key: str | None = None
    model: str | None = None
    overrides: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    base_model: str | None = None


@dataclass(frozen=True)
class ConvertConfig:
    """The convert stage.

    A codec stores `channels` per layer and serves every size up to these; `cut` and
    `bytes_per_token` set the size that it has where none is asked for. An MLA layer has the size
    that it is made for: one budget (`cache_scalars` or `cut`), which the init `calibrated` divides
    among layers by the errors that it predicts; explicit ranks for every layer; or the plan of an
    earlier conversion. By default a token costs an eighth of the width plus a
    quarter of a head, the paper's 192 + 32 numbers for Wan 1.3B.

    Attributes:
        product: `codec` beside the dense model, or a model with `mla` layers.
        channels: Channels per layer that a codec stores; None for a sixth of the width, at least
            256 and at most the width.
        bytes_per_token: Default size of a codec's cache, per token and layer.
        cut: Share of the dense cache to save.
        init: MLA: one of `vmla_convert.maths.factor.INITS`.
        latent: MLA: as of `MLAConfig`.
        cache_scalars: MLA: numbers a token may cost per layer, averaged over layers, the key's norm
            among them.
        kv_lora_rank: MLA: R of every layer.
        qk_rope_head_dim: MLA: width of the shared rope key of every layer, even.
        plan: MLA: sizes layer by layer.
        dtype: Dtype of the weights that are written. None writes a codec as bfloat16; of an MLA
            model it leaves kept weights as they are and makes new ones float32.
        calibrate: Measure activations; False assumes white inputs.
        calibration_clips: Clips that activations are measured on.
        data: Where clips come from.
        seed: Seed of random projections and of the calibration noise.
    """

    product: Product = "codec"
    channels: int | None = None
    bytes_per_token: float | None = None
    cut: float | None = None
    init: str = "calibrated"
    latent: Literal["joint", "split"] = "joint"
    cache_scalars: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    plan: RankPlan | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    calibrate: bool = True
    calibration_clips: int = 48
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self, 1, "calibration_clips")


@dataclass(frozen=True)
class TrainingConfig:
    """The one training loop (pretraining and recovery).

    Attributes:
        steps: Optimiser steps.
        batch_size: Clips per step over all processes.
        accumulate: Parts, one after the other, into which each process divides its clips of a step;
            more take less memory and give the same gradient.
        opening_clips: Further clips per step of one chunk only; a model meets few first chunks in
            long clips, they have no past to lean on, and short clips are cheap.
        optimizer: `muon` (Jordan et al. 2024) trains the matrices by it and the rest by AdamW; it
            needs fewer steps from scratch.
        lr: Peak learning rate; warmed up over `warmup_steps`, then decayed to zero. None for the
            one that a probe finds, in recovery.
        ema: Decay of the averaged weights; 0 keeps none.
        context_noise: Largest noise level put on the clean past in half of the clips.
        eval_every: Steps between held-out evaluations.
        patience: Evaluations without a new best after which training ends early; 0 for never.
        checkpoint_every: Steps between resumable checkpoints.
        mixed_precision: As accelerate names it; the weights that train are float32 all the same.
        gradient_checkpointing: Keep the inputs of blocks only, and compute the rest again.
        tracker: Where curves go besides the rows, as accelerate names it.
        seed: Of noise, data order and dropped context.
    """

    steps: int = 100
    batch_size: int = 4
    accumulate: int = 1
    opening_clips: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float | None = None
    warmup_steps: int = 10
    weight_decay: float = 0.0
    ema: float = 0.0
    context_noise: float = 0.0
    eval_every: int = 25
    patience: int = 0
    checkpoint_every: int = 25
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self, 0, "steps", "opening_clips", "warmup_steps", "patience")
        _require(self, 1, "batch_size", "accumulate", "eval_every", "checkpoint_every")
        _require_number(self, "weight_decay", "context_noise")
        if self.lr is not None and self.lr <= 0:
            raise ConfigError(f"lr {self.lr:g} must be above 0", "leave it out to have it found")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema {self.ema:g} is not between 0 and 1", "0.99 averages 100 steps")


@dataclass(frozen=True)
class DMDConfig:
    """Distribution matching, the heavy stage for clusters (DMD2, Self-Forcing).

    Attributes:
        steps: Steps of the student; 0 leaves the stage out.
        critic_steps: Steps of the critic for each of them.
        critic_lr: Its learning rate.
    """

    steps: int = 0
    critic_steps: int = 5
    critic_lr: float = 1e-4

    def __post_init__(self) -> None:
        _require(self, 0, "steps")
        _require(self, 1, "critic_steps")
        _require_number(self, "critic_lr")


@dataclass(frozen=True)
class RecoverConfig:
    """The recover stage (METHOD 9): layer by layer, velocity distillation, on its own rollouts.

    Attributes:
        layerwise_steps: Steps for each layer on the dense model's own inputs; 0 leaves it out.
        layerwise_lr: Peak learning rate of the layer-wise steps; None for 5e-5 for a codec, whose
            start is nearly the best of its size, and 1e-3 for MLA layers.
        on_policy_steps: Steps, after `training.steps` of distillation, on what the student itself
            rolled out.
        levels: Noise levels to distil at: the sampler's own few, those of pretraining, or half of
            the chunks at each.
        flow_weight: Of the flow-matching loss on the clips, beside the teacher's.
        train: `new` trains what the conversion made, of a codec its encoder and decoder;
            `attention` also queries and output of the self-attention; `all` everything.
        nested: Sizes of a codec, as shares of the dense cache to save. Each step draws one, so that
            one file serves all of them; empty trains the codec's default size.
        rest_lr: Learning rate of what is not new, over that of what is.
        lora_rank: Of adapters on queries, outputs, cross-attention and feed-forward where those
            stay frozen, merged at the end; 0 for none.
        offload: Read the source block by block in the layer-wise stage; where no other follows,
            nothing then measures the model as a whole.
        shard: Divide student and source over the processes, block by block, and what trains with
            its gradients and moments; the layer-wise stage then reads as with `offload`. Narrow
            passes keep their casts of all blocks unless there is gradient_checkpointing.
        training: The loop of the later stages.
        dmd: The last stage, off by default.
        data: Clips.
    """

    layerwise_steps: int = 40
    layerwise_lr: float | None = None
    on_policy_steps: int = 0
    levels: Literal["both", "sampler", "training"] = "both"
    flow_weight: float = 0.0
    train: Literal["new", "attention", "all"] = "new"
    nested: tuple[float, ...] = ()
    rest_lr: float = 0.1
    lora_rank: int = 0
    offload: bool = False
    shard: bool = False
    training: TrainingConfig = field(default_factory=TrainingConfig)
    dmd: DMDConfig = field(default_factory=DMDConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _require(self, 0, "layerwise_steps", "on_policy_steps", "lora_rank")
        _require_number(self, "flow_weight", "rest_lr")
        if self.layerwise_lr is not None:
            _require_number(self, "layerwise_lr")
        if self.lora_rank and self.train == "all":
            raise ConfigError("train 'all' leaves nothing for lora_rank", "use one of them")
        if self.dmd.steps and self.training.mixed_precision == "fp16":
            raise ConfigError(
                "the critic of dmd does not train in fp16", "use mixed_precision 'bf16'"
            )
        whole = {
            "lora_rank": self.lora_rank,
            "dmd.steps": self.dmd.steps,
            "mixed_precision 'fp16'": self.training.mixed_precision == "fp16",
        }
        for name in (name for name, asked in whole.items() if asked and self.shard):
            raise ConfigError(f"shard does not go with {name}", "leave one of them out")


NESTED_CUTS = (0.985, 0.975, 0.96, 0.95, 0.92)
"""Sizes that `--nested` trains at, as shares of the dense cache to save."""


@dataclass(frozen=True)
class TeacherConfig:
    """The pretraining stage that made the demo checkpoint."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out measurement of a converted checkpoint against its dense source."""

    clips: int = 24
    data: DataConfig = field(default_factory=lambda: DataConfig(seed=1))

    def __post_init__(self) -> None:
        _require(self, 2, "clips")


@dataclass(frozen=True)
class GenerateConfig:
    """The generate stage: one rollout per prompt, dense beside converted.

    Attributes:
        prompts: All are scored.
        shown: How many of them go into the video and the contact sheet.
        frames: Latent frames of each rollout.
        seed: Of all noise.
        base: Where text encoder and VAE come from, as of `MediaConfig`.
    """

    prompts: tuple[str, ...] = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    shown: int = 3
    frames: int = 20
    seed: int = 0
    base: str | None = None

    def __post_init__(self) -> None:
        _require(self, 1, "shown", "frames")
        if not self.prompts:
            raise ConfigError("prompts is empty", 'name at least one: prompts = ["7"]')


@dataclass(frozen=True)
class SweepConfig:
    """A grid: codecs and MLA layers of several sizes, measured at step 0 and after recovery.

    A codec is fitted and recovered once for each seed, and measured at every size.

    Attributes:
        products: What the dense model is converted to.
        cuts: Cache sizes as shares of the dense cache to save.
        bytes_per_token: Further sizes of codecs, in bytes per token and layer.
        unquantised: Whether codecs are measured at every size with unquantised channels too.
        dense_dtypes: Dtypes in which the dense model's own cache is measured beside them.
        inits: MLA: names of `vmla_convert.maths.factor.INITS`.
        latents: MLA: kinds of latent, as of `MLAConfig`.
        kv_lora_ranks: MLA: cache sizes as explicit ranks, in place of `cuts`.
        qk_rope_head_dims: MLA: widths of the rope key beside explicit ranks.
        seeds: Seeds of conversion and recovery.
        recover: Whether points are recovered, or only measured at step 0.
        recovery_steps: Lengths of the distillation, each a point of its own; where there are none,
            that of the recover stage.
        timed: Measure how long a denoising step takes at a full window, beside the dense model.
        rollout_frames: Length of a rollout of each point, scored segment by segment beside the
            dense model's; 0 for none.
        rollout_prompts: Its prompts, one clip each.
        alone: A recipe's [convert] and [recover] only say what the points share, and do not run.
    """

    products: tuple[Product, ...] = ("codec",)
    cuts: tuple[float, ...] = ()
    bytes_per_token: tuple[float, ...] = ()
    unquantised: bool = False
    dense_dtypes: tuple[Literal["int8", "int4", "int3", "int2"], ...] = ()
    inits: tuple[str, ...] = ("spectral", "calibrated")
    latents: tuple[Literal["joint", "split"], ...] = ("joint",)
    kv_lora_ranks: tuple[int, ...] = ()
    qk_rope_head_dims: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    recover: bool = True
    recovery_steps: tuple[int, ...] = ()
    timed: bool = False
    rollout_frames: int = 0
    rollout_prompts: tuple[str, ...] = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    alone: bool = False

    def __post_init__(self) -> None:
        _require(self, 0, "rollout_frames")
        axes = ("products", "cuts", "bytes_per_token", "dense_dtypes", "inits", "latents")
        for name in (*axes, "kv_lora_ranks", "qk_rope_head_dims", "seeds", "recovery_steps"):
            values: tuple[Any, ...] = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} names a value twice", "name each once")
        only = {"bytes_per_token": "codec", "unquantised": "codec", "kv_lora_ranks": "mla"}
        for name, product in only.items():
            if getattr(self, name) and product not in self.products:
                raise ConfigError(
                    f"{name} is of {product}, which products does not name",
                    f'add "{product}" to products, or leave {name} out',
                )
        if self.qk_rope_head_dims and not self.kv_lora_ranks:
            raise ConfigError(
                "qk_rope_head_dims go with explicit ranks, and there are none",
                "add kv_lora_ranks = [192], or leave them out",
            )
        if self.recovery_steps and not self.recover:
            raise ConfigError(
                "recovery_steps are given, but recover is false", "leave one of them out"
            )


@dataclass(frozen=True)
class ReportConfig:
    """The report stage.

    Attributes:
        title: Heading of the report.
        loss_bound: Flow loss that the recommended size may have above the dense model's, as a
            share of it.
    """

    title: str = "Conversion report"
    loss_bound: float = 0.15

    def __post_init__(self) -> None:
        _require_number(self, "loss_bound")


def _require_number(config: Any, *names: str) -> None:
    for name in names:
        value: float = getattr(config, name)
        if value < 0:
            raise ConfigError(f"{name} {value:g} must be at least 0")


def _require(config: Any, least: int, *names: str) -> None:
    for name in names:
        value: int = getattr(config, name)
        if value < least:
            raise ConfigError(f"{name} {value} must be at least {least}")
