"""The stages of a recovery, one after the other, on models in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vmla_convert.checkpoint.tensor_store import FolderStore, MemoryStore, TensorStore
from vmla_convert.config import RecoverConfig
from vmla_convert.fitting.calibrate import ReadBlock, model_blocks
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.flow import sampler_sigmas
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.measuring.rows import Errors
from vmla_convert.media.clips import open_clips, open_openings
from vmla_convert.progress import Progress, Silent
from vmla_convert.recovery.dmd import DistributionMatching
from vmla_convert.recovery.layerwise import apply_layers, recover_layers
from vmla_convert.recovery.nested import Sizes
from vmla_convert.recovery.on_policy import Share, rollout_examples
from vmla_convert.recovery.trained import (
    add_adapters,
    merge_adapters,
    new_names,
    new_state,
    unfreeze,
)
from vmla_convert.training.averaging import Stateful, set_weights
from vmla_convert.training.loop import clip_examples, train
from vmla_convert.training.losses import Examples, Levels, Loss, velocity_distillation
from vmla_convert.training.optimisers import find_learning_rate
from vmla_convert.training.processes import agreed, processes
from vmla_convert.training.sharding import is_sharded

OnStep = Callable[[int, Errors], None]
"""Told of every held-out measurement: steps taken so far, and the errors."""

LAYERWISE, DISTILLING = "layer by layer", "distilling"
ON_POLICY, MATCHING = "on policy", "matching distributions"
_SAMPLER_SHARES = {"both": 0.5, "sampler": 1.0, "training": 0.0}


class Folders(NamedTuple):
    """Where a recovery keeps what it needs when it is interrupted, and what trackers write.

    Attributes:
        state: Resumable state.
        logs: Of trackers.
    """

    state: Path
    logs: Path


class Recovered(NamedTuple):
    """How a recovery went.

    Attributes:
        kept: For each stage the step whose weights were kept; 0 where it brought nothing.
        learning_rate: Of the later stages, as given or found; None where there was none.
    """

    kept: dict[str, int]
    learning_rate: float | None


def recover_model(
    student: CausalWanModel,
    teacher: CausalWanModel,
    config: RecoverConfig,
    held_out: HeldOut,
    on_step: OnStep,
    folders: Folders | None = None,
    progress: Progress | None = None,
) -> Recovered:
    """Run all stages on a model in memory.

    Args:
        student: Converted; trained in place, and frozen again at the end. Where it is sharded, what
            trains is unfrozen already, and the layer-wise stage was done in `folders`.
        teacher: Its dense source.
        config: Steps, learning rates and data.
        held_out: What to measure on, and to choose weights by.
        on_step: Called at step 0, after the layer-wise stage and during the later ones, whose steps
            are counted on; a layer-wise step counts as one, because it updates every layer once.
        folders: For resumable state and trackers; none are kept by default.
        progress: Where to draw.
    """
    return _Recovery(student, teacher, config, held_out, on_step, folders, progress).run()


def stage_steps(config: RecoverConfig) -> dict[str, int]:
    """Steps of each stage, in order."""
    return {
        LAYERWISE: config.layerwise_steps,
        DISTILLING: config.training.steps,
        ON_POLICY: config.on_policy_steps,
        MATCHING: config.dmd.steps,
    }


def later_steps(config: RecoverConfig) -> int:
    """Steps of the stages that need both models whole: all but the layer-wise one."""
    return sum(stage_steps(config).values()) - config.layerwise_steps


def fit_layers(
    student: CausalWanModel,
    shell: CausalWanModel,
    read_block: ReadBlock,
    config: RecoverConfig,
    folders: Folders | None,
    progress: Progress,
) -> None:
    """The layer-wise stage; what is done already is taken from its shelf.

    Args:
        student: Converted; trained in place.
        shell: The dense model; only what is not in its blocks is used.
        read_block: Gives its blocks.
        config: Steps, learning rate and data.
        folders: Where layers are kept until all are done.
        progress: Where to draw.
    """
    state, layers = processes(), student.all_blocks()
    share = Share(state.process_index, state.num_processes)
    shelf: TensorStore = MemoryStore()
    if folders is not None:
        shelf = FolderStore(folders.state / f"layers-{share.rank}", {"world": share.world})
    clips = open_clips(config.data, shell.config.cache.sink_frames)
    sizes = Sizes(student, config.nested, config.training.seed)
    recover_layers(shell, read_block, layers, clips, config, shelf, share, progress, sizes)
    apply_layers(layers, shelf, share)


class _Recovery:
    """The stages while they run."""

    def __init__(
        self,
        student: CausalWanModel,
        teacher: CausalWanModel,
        config: RecoverConfig,
        held_out: HeldOut,
        on_step: OnStep,
        folders: Folders | None,
        progress: Progress | None,
    ) -> None:
        self.student, self.teacher, self.config = student, teacher, config
        self.held_out, self.on_step, self.folders = held_out, on_step, folders
        self.state, self.progress = processes(), progress or Silent()
        self.share = Share(self.state.process_index, self.state.num_processes)
        self.clips = open_clips(config.data, teacher.config.cache.sink_frames)
        self.kept: dict[str, int] = {}
        self.taken = 0
        self.sizes = Sizes(student, config.nested, config.training.seed)

    def run(self) -> Recovered:
        """All stages."""
        config, training = self.config, self.config.training
        before = self._measured()
        start = self.sizes.mean_error(lambda: self._measured().velocity_error)
        self._tell(0, before)
        if config.layerwise_steps:
            self._layerwise(before, start)
        adapted = self._unfreeze()
        rate = None
        if later_steps(config):
            rate = training.lr or self._learning_rate()
        if training.steps:
            loss = velocity_distillation(self.teacher, config.flow_weight)
            self._train(DISTILLING, loss, self._clip_examples(), training.steps, rate)
        if config.on_policy_steps:
            loss = velocity_distillation(self.teacher)
            examples = rollout_examples(self.student, self.clips, training, self.share)
            self._train(ON_POLICY, loss, examples, config.on_policy_steps, rate)
        if config.dmd.steps:
            dmd = DistributionMatching(self.student, self.teacher, self.clips, config, self.share)
            self._train(MATCHING, dmd.loss, dmd.examples, config.dmd.steps, rate, [dmd])
        if adapted is not None:
            merge_adapters(adapted)
        if training.gradient_checkpointing:
            self.student.keep_activations()
        self.student.requires_grad_(False)
        return Recovered(self.kept, rate)

    def _layerwise(self, before: Errors, error: float) -> None:
        """Fit the layers, and undo it should the model as a whole have lost.

        Args:
            before: Errors before, at the size that the model is measured at.
            error: Mean error before, over all sizes that it trains at.
        """
        steps, start = self.config.layerwise_steps, new_state(self.student)
        blocks = model_blocks(self.teacher)
        fit_layers(self.student, self.teacher, blocks, self.config, self.folders, self.progress)
        after = self._measured()
        self.taken, self.kept[LAYERWISE] = steps, steps
        if not self.sizes.mean_error(lambda: self._measured().velocity_error) < error:
            set_weights(self.student, start)
            after, self.kept[LAYERWISE] = before, 0
        self._tell(steps, after)

    def _unfreeze(self) -> Any:
        """Let train what should; returns adapters, if there are any."""
        config, adapted, seed = self.config, None, self.config.training.seed
        unfreeze(self.student, config.train)
        if config.lora_rank:
            adapted = add_adapters(self.student, config.lora_rank, config.train, seed)
        if config.training.gradient_checkpointing:
            self.student.checkpoint_blocks()
        return adapted

    def _train(
        self,
        stage: str,
        loss: Loss,
        examples: Examples,
        steps: int,
        rate: float | None,
        carried: Sequence[Stateful] = (),
    ) -> None:
        """One of the later stages, from where the one before it ended.

        What is told of its last step is what the weights that it kept measure.
        """
        config, offset = replace(self.config.training, steps=steps, lr=rate), self.taken
        nested = bool(self.config.nested)
        met: dict[int, Errors] = {}

        def measure(model: nn.Module, step: int) -> float:
            self.sizes.rest()
            met[step] = self.held_out.measure(model)
            # The start of a stage is the end of the one before.
            if 0 < step < steps:
                self._tell(offset + step, met[step])
            if not nested:
                return met[step].velocity_error
            return self.sizes.mean_error(lambda: self.held_out.measure(model).velocity_error)

        outcome = train(
            self.student,
            loss,
            self.sizes.examples(examples),
            config,
            measure,
            self._folder(stage),
            self.progress,
            stage,
            keep_best=True,
            lr_scale=self._lr_scale(),
            logs=self.folders.logs if self.folders else None,
            carried=carried,
        )
        self.sizes.rest()
        self.taken, self.kept[stage] = offset + steps, outcome.best_step
        if self.state.is_main_process or is_sharded(self.student):
            # Of a run that was interrupted after its best, that measurement is gone.
            kept = met.get(outcome.best_step) or self.held_out.measure(self.student)
            self._tell(offset + steps, kept)

    def _learning_rate(self) -> float:
        """What a probe finds for the distillation; found once, if there is a place to keep it."""
        file = self.folders.state / "learning_rate.json" if self.folders else None
        if file is not None and file.is_file():
            return json.loads(file.read_text())
        rate = find_learning_rate(
            self.student,
            velocity_distillation(self.teacher, self.config.flow_weight),
            self._clip_examples(),
            self.config.training,
            self._lr_scale(),
            self.progress,
        )
        if file is not None and self.state.is_main_process:
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(rate))
            partial.replace(file)
        return rate

    def _clip_examples(self) -> Examples:
        config, dense = self.config, self.teacher.config
        sigmas = sampler_sigmas(dense.sampler.denoising_step_list, dense.sampler.shift)[:-1]
        return clip_examples(
            self.clips,
            dense.chunk_frames,
            config.training,
            open_openings(config.data, dense.chunk_frames),
            Levels(sigmas, _SAMPLER_SHARES[config.levels]),
        )

    def _lr_scale(self) -> Callable[[str], float]:
        new, rest = new_names(self.student), self.config.rest_lr
        return lambda name: 1.0 if name in new else rest

    def _measured(self) -> Errors:
        """Held-out errors, the same for all processes."""
        errors = self.held_out.measure(self.student)
        figures = (torch.tensor(e, dtype=torch.float64, device=self.state.device) for e in errors)
        return Errors(*map(agreed, figures))

    def _tell(self, step: int, errors: Errors) -> None:
        if self.state.is_main_process:
            self.on_step(step, errors)

    def _folder(self, stage: str) -> Path | None:
        return self.folders.state / stage.replace(" ", "-") if self.folders else None
