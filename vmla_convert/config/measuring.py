"""Stages that measure and show: evaluate, generate, sweep, report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vmla_convert.config.checks import require_at_least, require_nonnegative
from vmla_convert.config.fitting import Product
from vmla_convert.config.source import DataConfig
from vmla_convert.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out measurement of a converted checkpoint against its dense source."""

    clips: int = 24
    data: DataConfig = field(default_factory=lambda: DataConfig(seed=1))

    def __post_init__(self) -> None:
        require_at_least(self, 2, "clips")


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
        require_at_least(self, 1, "shown", "frames")
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
        require_at_least(self, 0, "rollout_frames")
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
        require_nonnegative(self, "loss_bound")
