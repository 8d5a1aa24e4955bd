"""Settings of the training loop, and of the stages pretraining and recovery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vmla_convert.config.checks import require_at_least, require_nonnegative
from vmla_convert.config.model import ModelConfig
from vmla_convert.config.source import DataConfig
from vmla_convert.errors import ConfigError


@dataclass(frozen=True)
class TrainingConfig:
    """The one training loop (pretraining and recovery).

    Attributes:
        steps: Optimiser steps.
        batch_size: Clips per step, over all processes.
        accumulate: Parts, one after the other, into which each process divides its clips of a step;
            more take less memory and give the same gradient.
        opening_clips: Additional clips per step, one chunk long. Long clips hold few first chunks,
            which have no past, and short clips are cheap.
        optimizer: `muon` (Jordan et al. 2024) trains matrices, and AdamW the rest; `muon` needs
            fewer steps from scratch.
        lr: Peak learning rate; warmed up over `warmup_steps`, then decayed to zero. None lets
            recovery find the rate with a probe.
        ema: Decay of the averaged weights; 0 keeps none.
        context_noise: Largest noise level put on the clean past in half of the clips.
        eval_every: Steps between held-out evaluations.
        patience: Evaluations without a new best after which training ends early; 0 for never.
        checkpoint_every: Steps between resumable checkpoints.
        mixed_precision: Dtype of matrix products, also of held-out measurements; trained weights
            stay float32.
        gradient_checkpointing: Keep only the inputs of blocks, and compute other activations again.
        offload_activations: Keep these inputs in host memory; needs gradient_checkpointing.
        tracker: Name of accelerate's tracker that also receives the curves.
        seed: Seed of noise, data order and dropped context.
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
    offload_activations: bool = False
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(self, 0, "steps", "opening_clips", "warmup_steps", "patience")
        require_at_least(self, 1, "batch_size", "accumulate", "eval_every", "checkpoint_every")
        require_nonnegative(self, "weight_decay", "context_noise")
        if self.lr is not None and self.lr <= 0:
            raise ConfigError(f"lr {self.lr:g} must be above 0", "leave it out to have it found")
        if self.offload_activations and not self.gradient_checkpointing:
            raise ConfigError(
                "offload_activations moves what gradient_checkpointing keeps, which is off",
                "set gradient_checkpointing = true too",
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema {self.ema:g} is not between 0 and 1", "0.99 averages 100 steps")


@dataclass(frozen=True)
class DMDConfig:
    """Distribution matching, the heavy stage for clusters (DMD2, Self-Forcing).

    Attributes:
        steps: Steps of the student; 0 leaves the stage out.
        critic_steps: Steps of the critic for each step of the student.
        critic_lr: Learning rate of the critic.
    """

    steps: int = 0
    critic_steps: int = 5
    critic_lr: float = 1e-4

    def __post_init__(self) -> None:
        require_at_least(self, 0, "steps")
        require_at_least(self, 1, "critic_steps")
        require_nonnegative(self, "critic_lr")


@dataclass(frozen=True)
class RecoverConfig:
    """The recover stage (Method: recovery): layer by layer, distillation, then own rollouts.

    Attributes:
        layerwise_steps: Steps for each layer on the dense model's own inputs; 0 leaves it out.
        layerwise_lr: Peak learning rate of the layer-wise steps; None for 5e-5 for a codec, whose
            start is nearly the best of its size, and 1e-3 for MLA layers.
        on_policy_steps: Steps, after `training.steps` of distillation, on rollouts of the
            student.
        levels: Noise levels to distil at: the sampler's own few, those of pretraining, or half of
            the chunks at each.
        flow_weight: Weight of the flow-matching loss on clips, beside the distillation loss.
        train: `new` trains the converted weights (a codec's encoder and decoder); `attention` also
            trains queries and output of the self-attention; `all` trains everything.
        nested: Sizes of a codec, as shares of the dense cache to save. Each step draws one, so that
            one file serves all of them; empty trains the codec's default size.
        rest_lr: Learning rate of the other weights, as a multiple of the rate of new weights.
        lora_rank: Rank of adapters on queries, outputs, cross-attention and feed-forward that
            stay frozen, merged at the end; 0 for none.
        offload: Read the source block by block in the layer-wise stage. Without a later stage, the
            whole model is then never measured.
        shard: Divide student, source, gradients and moments over the processes, block by block; the
            layer-wise stage then reads as with `offload`. Mixed precision keeps a narrow copy of
            all blocks unless gradient_checkpointing is on.
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
        require_at_least(self, 0, "layerwise_steps", "on_policy_steps", "lora_rank")
        require_nonnegative(self, "flow_weight", "rest_lr")
        if self.layerwise_lr is not None:
            require_nonnegative(self, "layerwise_lr")
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
