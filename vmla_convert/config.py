"""Every setting as a frozen dataclass; no torch, so that `vmla --help` stays quick.

Letters for shapes, here and everywhere: B batch, T query tokens, S cached tokens, L tokens of any
kind, H heads, D head dim (H·D = `dim`), R latent rank, F frames, C channels.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from vmla_convert.errors import ConfigError, did_you_mean

T = TypeVar("T")

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
    """

    window_frames: int
    sink_frames: int = 0
    positions: Literal["absolute", "relative"] = "absolute"

    def __post_init__(self) -> None:
        if not 0 <= self.sink_frames < self.window_frames:
            raise ConfigError(
                f"a sink of {self.sink_frames} frames does not fit a window of {self.window_frames}"
            )


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
class LayerConfig:
    """The choices of a latent layer (METHOD 1 and 3).

    Attributes:
        current_chunk: `dense` keeps the source's own keys and values for the chunk being denoised,
            which no cache holds yet, so that only the past is approximated; `latent` reads it from
            its latents too (the paper).
        positions: `reconstructed` rebuilds each key before RoPE and rotates it in full when it is
            read; `decoupled` caches a small shared rope key beside a position-free latent (the
            paper), which an absorbed kernel can read without rebuilding.
        latent: `joint` lets keys and values read all of the latent; `split` gives each its part.
        k_norm: Where the key norm comes from: `stored` caches it (one number, exact); `latent`
            predicts it from what is cached; `rebuilt` takes it from the rebuilt key.
    """

    current_chunk: Literal["dense", "latent"] = "dense"
    positions: Literal["decoupled", "reconstructed"] = "reconstructed"
    latent: Literal["joint", "split"] = "joint"
    k_norm: Literal["stored", "latent", "rebuilt"] = "stored"

    @property
    def reads_own_latents(self) -> bool:
        """Whether errors of the latents reach the chunk that they were made of."""
        return self.current_chunk == "latent"

    def __post_init__(self) -> None:
        if self.k_norm == "rebuilt" and self.positions == "decoupled":
            raise ConfigError(
                "k_norm 'rebuilt' needs whole keys, which decoupled positions never rebuild",
                "use k_norm 'latent' or 'stored', or positions 'reconstructed'",
            )


PAPER_LAYER = LayerConfig("latent", "decoupled", "joint", "stored")
"""VideoMLA's layer, but for the key norm, which the paper drops."""


@dataclass(frozen=True)
class RankPlan:
    """What each layer may cache; saved with a conversion, and replayable.

    Attributes:
        kv_lora_rank: R of each layer.
        rope_pairs: How many RoPE pairs each layer's rope key carries; 0 when keys are rebuilt.
        key_ranks: Of split latents the part that keys read; empty for joint ones.
    """

    kv_lora_rank: tuple[int, ...]
    rope_pairs: tuple[int, ...]
    key_ranks: tuple[int, ...] = ()

    def check_fits(self, layer: LayerConfig) -> None:
        """Refuse sizes that a layer of this kind cannot have.

        Raises:
            ConfigError: Rope pairs without a rope key or the reverse, or a bad split.
        """
        hint = "use the sizes of a conversion to this very layer"
        if any(bool(pairs) != (layer.positions == "decoupled") for pairs in self.rope_pairs):
            raise ConfigError(f"rope_pairs do not fit positions '{layer.positions}'", hint)
        parts = list(zip(self.key_ranks, self.kv_lora_rank, strict=False))
        if len(self.key_ranks) != (len(self.kv_lora_rank) if layer.latent == "split" else 0):
            raise ConfigError(f"key_ranks do not fit a {layer.latent} latent", hint)
        if any(not 0 < key_rank < rank for key_rank, rank in parts):
            raise ConfigError("a part of a split latent is empty", "give it at least 2 numbers")


@dataclass(frozen=True)
class MLAConfig:
    """What a converted checkpoint stores per token, layer by layer.

    Attributes:
        kv_lora_rank: R of each layer.
        rope_pairs: For each layer the RoPE pairs (of the D/2 of a head, in Wan's order t, h, w)
            that the shared rope key carries, none when keys are rebuilt. A pair may appear more
            than once.
        init: How the projections were initialised.
        layer: Which latent layer it is.
        key_ranks: Of split latents the part of R that keys read; empty for joint ones.
        phases: For each layer and head, the angle and length of the constant that stands for each
            RoPE pair's rotation in the content key; empty when keys are rebuilt or nothing is
            folded. They belong to the window, the sink and the grid that were measured.
    """

    kv_lora_rank: tuple[int, ...]
    rope_pairs: tuple[tuple[int, ...], ...]
    init: str
    layer: LayerConfig = PAPER_LAYER
    key_ranks: tuple[int, ...] = ()
    phases: tuple[tuple[tuple[tuple[float, float], ...], ...], ...] = ()

    def __post_init__(self) -> None:
        ranks = RankPlan(self.kv_lora_rank, tuple(map(len, self.rope_pairs)), self.key_ranks)
        ranks.check_fits(self.layer)

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
        """Numbers cached per token: content latent, rope key, and the key's norm if stored."""
        norm = self.layer.k_norm == "stored"
        return self.kv_lora_rank[layer] + self.qk_rope_head_dim(layer) + norm


@dataclass(frozen=True)
class ModelConfig:
    """Everything that `vmla_convert.load` needs to rebuild a model, dense or converted."""

    geometry: Geometry
    latent_size: tuple[int, int]
    chunk_frames: int
    cache: CachePolicy
    sampler: SamplerConfig
    codec: Literal["demo", "wan"] = "wan"
    family: str = "wan"
    licence: str = "unknown"
    base_model: str = "unknown"
    mla: MLAConfig | None = None

    def __post_init__(self) -> None:
        _require(self, 1, "chunk_frames")
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
                f"{self.cache.sink_frames} has no room for a chunk of {self.chunk_frames}"
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

    def cache_scalars_per_token(self) -> float:
        """Numbers cached per token and layer, averaged over layers."""
        if self.mla is None:
            return float(self.geometry.dense_cache_scalars)
        layers = range(self.geometry.num_layers)
        return sum(self.mla.cache_scalars(layer) for layer in layers) / len(layers)

    def cache_cut(self) -> float:
        """Share of the dense cache that is gone: 1 − converted / dense."""
        return 1.0 - self.cache_scalars_per_token() / self.geometry.dense_cache_scalars

    def cache_bytes(self, frames: int, batch: int = 1, bytes_per_scalar: int = 2) -> int:
        """Bytes of the whole cache when it holds `frames` frames."""
        tokens = frames * self.tokens_per_frame * batch
        scalars = self.cache_scalars_per_token() * self.geometry.num_layers
        return round(scalars * tokens * bytes_per_scalar)


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from.

    Attributes:
        source: `demo` for the moving-digits world, or a safetensors file with `latents`
            (N, F, C, height, width) and `context` (N, text_len, text_dim).
        frames: Latent frames of a clip.
        sink_gap: Largest number of frames skipped after the sink in half of the training clips, so
            that the model meets the jump which a window with a sink makes; 0 for none.
        seed: Of the clips.
    """

    source: str = "demo"
    frames: int = 10
    sink_gap: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self, 1, "frames")
        _require(self, 0, "sink_gap")


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
    """

    checkpoint: str = "demo"
    file: str | None = None
    key: str | None = None
    model: str | None = None
    overrides: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvertConfig:
    """The convert stage.

    Sizes are given as one budget (`cache_scalars` or `cut`), as explicit ranks for every layer, or
    as the plan of an earlier conversion; by default a token costs an eighth of the width plus a
    quarter of a head, the paper's 192 + 32 numbers for Wan 1.3B.

    Attributes:
        init: One of `vmla_convert.maths.factor.INITS`.
        layer: Which latent layer to make.
        cache_scalars: Numbers a token may cost per layer, averaged over layers, the stored norm
            among them.
        cut: The same as a share of the dense cache to save.
        ranks: How one budget is divided, a rule of `vmla_convert.maths.ranks.RULES`; None for
            `budget` where the init predicts its errors, else `uniform`.
        kv_lora_rank: R of every layer.
        qk_rope_head_dim: Width of the shared rope key of every layer, even.
        plan: Sizes layer by layer.
        dtype: Of the weights that are written; None leaves kept ones as they are and makes new ones
            float32: they are small, and recovery trains them.
        calibrate: Measure activations; False lets `calibrated` assume white inputs.
        calibration_clips: Clips that activations are measured on.
        data: Where they come from.
        seed: Of random projections and of the calibration noise.
    """

    init: str = "calibrated"
    layer: LayerConfig = field(default_factory=LayerConfig)
    cache_scalars: int | None = None
    cut: float | None = None
    ranks: Literal["uniform", "energy", "budget"] | None = None
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
        opening_clips: Further clips per step of one chunk only; a model meets few first chunks in
            long clips, they have no past to lean on, and short clips are cheap.
        optimizer: `muon` (Jordan et al. 2024) trains the matrices by it and the rest by AdamW; it
            needs fewer steps from scratch.
        lr: Peak learning rate; warmed up over `warmup_steps`, then decayed to zero.
        ema: Decay of the averaged weights; 0 keeps none.
        context_noise: Largest noise level put on the clean past in half of the clips.
        eval_every: Steps between held-out evaluations.
        checkpoint_every: Steps between resumable checkpoints.
        mixed_precision: As accelerate names it.
        seed: Of noise, data order and dropped context.
    """

    steps: int = 100
    batch_size: int = 4
    opening_clips: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    warmup_steps: int = 10
    weight_decay: float = 0.0
    ema: float = 0.0
    context_noise: float = 0.0
    eval_every: int = 25
    checkpoint_every: int = 25
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self, 0, "steps", "opening_clips", "warmup_steps")
        _require(self, 1, "batch_size", "eval_every", "checkpoint_every")


@dataclass(frozen=True)
class RecoverConfig:
    """The recover stage: layer-wise regression, then velocity distillation (METHOD 9)."""

    layerwise_steps: int = 40
    layerwise_lr: float = 1e-3
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _require(self, 0, "layerwise_steps")


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
    """

    prompts: tuple[str, ...] = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    shown: int = 3
    frames: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self, 1, "shown", "frames")
        if not self.prompts:
            raise ConfigError("prompts is empty", 'name at least one: prompts = ["7"]')


@dataclass(frozen=True)
class SweepConfig:
    """A grid: every init, layer and cache size, measured at step 0 and after recovery.

    Attributes:
        inits: Names of `vmla_convert.maths.factor.INITS`.
        current_chunks, positions, latents, k_norms: Values of `LayerConfig`'s fields; a layer that
            cannot be (rebuilt norm, decoupled positions) is left out.
        cuts: Cache sizes as shares of the dense cache to save.
        kv_lora_ranks: Cache sizes as explicit ranks, with `qk_rope_head_dims` where positions are
            decoupled.
        qk_rope_head_dims: See there.
        seeds: Of conversion and recovery.
        recover: Whether points are recovered, or only measured at step 0.
    """

    inits: tuple[str, ...] = ("random", "spectral", "calibrated")
    current_chunks: tuple[Literal["dense", "latent"], ...] = ("dense",)
    positions: tuple[Literal["decoupled", "reconstructed"], ...] = ("reconstructed",)
    latents: tuple[Literal["joint", "split"], ...] = ("joint",)
    k_norms: tuple[Literal["stored", "latent", "rebuilt"], ...] = ("stored",)
    cuts: tuple[float, ...] = ()
    kv_lora_ranks: tuple[int, ...] = ()
    qk_rope_head_dims: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    recover: bool = True

    def layers(self) -> list[LayerConfig]:
        """Every layer of the grid that can be."""
        axes = itertools.product(self.current_chunks, self.positions, self.latents, self.k_norms)
        return [
            LayerConfig(chunk, positions, latent, norm)
            for chunk, positions, latent, norm in axes
            if not (norm == "rebuilt" and positions == "decoupled")
        ]


def _require(config: Any, least: int, *names: str) -> None:
    for name in names:
        value: int = getattr(config, name)
        if value < least:
            raise ConfigError(f"{name} {value} must be at least {least}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts and lists, ready for JSON or TOML; None fields are left out."""
    return {
        f.name: _plain(value)
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) is not None
    }


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build a config from parsed JSON or TOML, strictly.

    Args:
        cls: One of the dataclasses of this module.
        data: A mapping; nested tables for nested configs.
        where: Dotted path for messages.

    Raises:
        ConfigError: An unknown key (with the nearest known one), a missing key, or a value of the
            wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"'{where or cls.__name__}' must be a table, not {data!r}")
    table = typing.cast(dict[str, Any], data)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
    for key in table:
        if key not in names:
            raise ConfigError(f"unknown key '{_join(where, key)}'", did_you_mean(key, names))
    values = {k: _coerce(hints[k], v, _join(where, k)) for k, v in table.items()}
    missing = [
        f.name
        for f in dataclasses.fields(typing.cast(Any, cls))
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing key '{_join(where, missing[0])}'")
    return cls(**values)


def override(table: dict[str, Any], text: str) -> None:
    """Set a dotted key of a table of tables by `a.b=value`; values are TOML, bare words strings.

    Raises:
        ConfigError: The text is no such thing, or goes through a value.
    """
    key, found, typed = text.partition("=")
    if not found or not re.fullmatch(r"[\w.]+", key):
        raise ConfigError(f"'{text}' is not key=value", "write it as --set key=value")
    try:
        value = tomllib.loads(f"value = {typed}")["value"]
    except tomllib.TOMLDecodeError:
        value = typed
    *parts, name = key.split(".")
    for part in parts:
        inner: Any = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"'{key}' cannot be set", f"'{part}' is a value, not a table")
        table = typing.cast(dict[str, Any], inner)
    table[name] = value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in typing.cast(tuple[Any, ...], value)]
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """One value to the type that the dataclass declares."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _coerce(args[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"'{where}' is {value!r}", did_you_mean(str(value), map(str, args)))
        return value
    if origin is tuple:
        return _coerce_tuple(args, value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"'{where}' must be {hint.__name__}, not {value!r}")
    return value


def _coerce_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"'{where}' must be a list, not {value!r}")
    items = list(typing.cast(list[Any], value))
    kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(items):
        raise ConfigError(f"'{where}' must have {len(kinds)} items, not {len(items)}")
    return tuple(
        _coerce(kind, item, f"{where}[{i}]")
        for i, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )
