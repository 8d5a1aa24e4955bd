"""Settings of the stages that measure and show: evaluate, generate, sweep, report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vmla_convert.config.checks import require_at_least, require_nonnegative
from vmla_convert.config.fitting import Product
from vmla_convert.config.sizes import Sizes
from vmla_convert.config.source import DataConfig
from vmla_convert.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out measurement of a converted checkpoint against its dense source.

    Attributes:
        clips: Number of clips.
        data: Where clips come from.
        rollout_frames: Latent frames of videos that both models generate from the same noise, to
            be compared; 0 for none.
        rollout_clips: Number of these videos; their prompts are held out.
        features: Models that compare frames of these videos, where the user has them: Hub ids or
            folders of CLIP or DINO models of transformers, or `lpips`.
    """

    clips: int = 24
    data: DataConfig = field(default_factory=lambda: DataConfig(seed=1))
    rollout_frames: int = 0
    rollout_clips: int = 4
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_at_least(self, 2, "clips")
        require_at_least(self, 0, "rollout_frames")
        require_at_least(self, 1, "rollout_clips")


@dataclass(frozen=True)
class GenerateConfig:
    """The generate stage: one rollout per prompt.

    Attributes:
        prompts: Prompts, one clip each.
        shown: Number of prompts in a recipe's video and contact sheet; all of them are scored.
        frames: Latent frames per rollout.
        seed: Seed of all noise.
        keep_sink: Keep the sink of the first prompt when the prompt changes.
    """

    prompts: tuple[str, ...] = tuple(map(str, range(10)))
    shown: int = 3
    frames: int = 20
    seed: int = 0
    keep_sink: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, 1, "shown", "frames")
        if not self.prompts:
            raise ConfigError("prompts is empty", 'name at least one: prompts = ["7"]')


@dataclass(frozen=True)
class SweepConfig:
    """The sweep stage: codecs and MLA layers of several sizes, before and after recovery.

    A codec is fitted and recovered once for each seed, and measured at every size.

    Attributes:
        products: What the dense model is converted to.
        sizes: Sizes of codecs, and of MLA layers unless `mla_sizes` has some.
        mla_sizes: Sizes of MLA layers.
        unquantised: Measure codecs at every size with unquantised channels too.
        dense_dtypes: Dtypes of quantised dense caches that are measured beside the conversions.
        inits: Inits of MLA layers, names in `vmla_convert.maths.factor.INITS`.
        latents: Latents of MLA layers, as in `MLAConfig`.
        seeds: Seeds of conversion and recovery.
        recover: Recover every point; False measures conversions only.
        recovery_steps: Steps of distillation; each length is a point. Empty takes the one length of
            the recover stage.
        timed: Time a denoising step at a full window, beside the dense model.
        rollout_frames: Latent frames of each point's rollout, which is scored segment by segment
            beside the dense model's; 0 for no rollout.
        rollout_prompts: Prompts of the rollout, one clip each.
        alone: Run no convert and recover stages: [convert] and [recover] hold only settings that
            the points share.
    """

    products: tuple[Product, ...] = ("codec",)
    sizes: tuple[Sizes, ...] = ()
    mla_sizes: tuple[Sizes, ...] = ()
    unquantised: bool = False
    dense_dtypes: tuple[Literal["int8", "int4", "int3", "int2"], ...] = ()
    inits: tuple[str, ...] = ("spectral", "calibrated")
    latents: tuple[Literal["joint", "split"], ...] = ("joint",)
    seeds: tuple[int, ...] = (0,)
    recover: bool = True
    recovery_steps: tuple[int, ...] = ()
    timed: bool = False
    rollout_frames: int = 0
    rollout_prompts: tuple[str, ...] = tuple(map(str, range(10)))
    alone: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, 0, "rollout_frames")
        lists = ("products", "sizes", "mla_sizes", "dense_dtypes", "inits", "latents", "seeds")
        for name in (*lists, "recovery_steps"):
            values: tuple[Any, ...] = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} names a value twice", "name each once")
        for name, product in (("unquantised", "codec"), ("mla_sizes", "mla")):
            if getattr(self, name) and product not in self.products:
                raise ConfigError(
                    f"{name} is a setting of {product}, and products does not name {product}",
                    f'add "{product}" to products, or leave {name} out',
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
            share of the dense model's loss.
    """

    title: str = "Conversion report"
    loss_bound: float = 0.15

    def __post_init__(self) -> None:
        require_nonnegative(self, "loss_bound")
