"""The stages of a recovery, one after the other, on models in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from vmla_convert.config import RecoverConfig
from vmla_convert.fitting.calibrate import model_blocks
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.flow import sampler_sigmas
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.measuring.rows import Errors
from vmla_convert.media.clips import open_clips, open_openings
from vmla_convert.progress import Progress, Silent
from vmla_convert.recovery.dmd import DistributionMatching
from vmla_convert.recovery.layerwise import LAYERWISE, fit_layers
from vmla_convert.recovery.nested import NestedSizes
from vmla_convert.recovery.on_policy import rollout_examples
from vmla_convert.recovery.trained import add_adapters, new_names, unfreeze
from vmla_convert.training.loop import Stateful, clip_examples, train
from vmla_convert.training.losses import Examples, Levels, Loss, velocity_distillation
from vmla_convert.training.optimisers import find_learning_rate
from vmla_convert.training.processes import agreed, own_device, own_share, processes
from vmla_convert.training.weights import set_weights

OnStep = Callable[[int, Errors], None]
"""Receives every held-out measurement: the steps so far, and the errors."""

DISTILLING, ON_POLICY, MATCHING = "distilling", "on policy", "matching distributions"
_SAMPLER_SHARES = {"both": 0.5, "sampler": 1.0, "training": 0.0}


class Folders(NamedTuple):
    """Folders beside an output: resumable state, and files of trackers."""

    state: Path
    logs: Path

    @classmethod
    def beside(cls, out: Path) -> Folders:
        """The folders OUT.state and OUT.logs."""
        return cls(*(out.with_name(f"{out.name}.{kind}") for kind in cls._fields))


class Recovered(NamedTuple):
    """How a recovery went.

    Attributes:
        best_steps: Step of each stage's best weights, 0 for a stage that did not help.
        skipped_steps: Steps of each stage that were not finite and were skipped.
        learning_rate: Peak learning rate of the later stages; None without them.
    """

    best_steps: dict[str, int]
    skipped_steps: dict[str, int]
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
        student: Converted model, trained in place and frozen at the end. If it is sharded, its
            parameters are unfrozen already, and `folders` holds the finished layer-wise stage.
        teacher: The dense model that it was converted from.
        config: Steps, learning rates and data.
        held_out: Clips that every stage chooses its best weights by.
        on_step: Called at step 0, after the layer-wise stage and during the later ones. Steps are
            counted over all stages; a layer-wise step counts once, because it updates every layer.
        folders: Folders of resumable state and trackers; None keeps nothing.
        progress: Receives the progress bars.
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
    """Steps of the stages after the layer-wise one, which need both models whole."""
    return sum(stage_steps(config).values()) - config.layerwise_steps


class _Recovery:
    """A running recovery."""

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
        self.progress, self.is_main = progress or Silent(), processes().is_main_process
        self.clips = open_clips(config.data, teacher.config.cache.sink_frames)
        self.sizes = NestedSizes(student, config.nested, config.training.seed)
        self.new = new_names(student)
        self.steps_done = 0
        self.best_steps: dict[str, int] = {}
        self.skipped_steps: dict[str, int] = {}

    def run(self) -> Recovered:
        """Run all stages."""
        config, training = self.config, self.config.training
        self._layerwise()
        unfreeze(self.student, config.train)
        adapted = None
        if config.lora_rank:
            adapted = add_adapters(self.student, config.lora_rank, config.train, training.seed)
            self.new = new_names(self.student)
        if training.gradient_checkpointing:
            self.student.checkpoint_blocks(training.offload_activations)
        rate = None
        if later_steps(config):
            rate = training.lr or self._learning_rate()
        if training.steps:
            loss = velocity_distillation(self.teacher, config.flow_weight)
            self._train(DISTILLING, loss, self._clip_examples(), rate)
        if config.on_policy_steps:
            examples = rollout_examples(self.student, self.clips, training, own_share())
            self._train(ON_POLICY, velocity_distillation(self.teacher), examples, rate)
        if config.dmd.steps:
            dmd = DistributionMatching(self.student, self.teacher, self.clips, config, own_share())
            self._train(MATCHING, dmd.loss, dmd.examples, rate, [dmd])
        if adapted is not None:
            adapted.merge_and_unload()
        if training.gradient_checkpointing:
            self.student.keep_activations()
        self.student.requires_grad_(False)
        return Recovered(self.best_steps, self.skipped_steps, rate)

    def _layerwise(self) -> None:
        """Measure the start and fit the layers; undo the fit if the whole model got worse."""
        before, steps = self._measured(), self.config.layerwise_steps
        self._report(0, before)
        if not steps:
            return
        error = self._mean_error()
        start = {n: p.detach().clone() for n, p in self.student.named_parameters() if n in self.new}
        folder, blocks = self.folders and self.folders.state, model_blocks(self.teacher)
        fit_layers(self.student, self.teacher, blocks, self.config, folder, self.progress)
        after, self.best_steps[LAYERWISE] = self._measured(), steps
        if not self._mean_error() < error:
            set_weights(self.student, start)
            after, self.best_steps[LAYERWISE] = before, 0
        self.steps_done = steps
        self._report(steps, after)

    def _train(
        self,
        stage: str,
        loss: Loss,
        examples: Examples,
        rate: float | None,
        extra_state: Sequence[Stateful] = (),
    ) -> None:
        """Run one of the later stages.

        The errors reported at its last step are those of the weights that are kept, the best ones.
        """
        steps, offset = stage_steps(self.config)[stage], self.steps_done
        config = replace(self.config.training, steps=steps, lr=rate)
        folders, measured = self.folders, dict[int, Errors]()

        def measure(model: nn.Module, step: int) -> float:
            self.sizes.restore()
            errors = measured[step] = self.held_out.measure(model)
            # The stage before reported the start.
            if 0 < step < steps:
                self._report(offset + step, errors)
            if not self.config.nested:
                return errors.velocity_error
            return self.sizes.mean_error(lambda: self.held_out.measure(model).velocity_error)

        trained = train(
            self.student,
            loss,
            self.sizes.examples(examples),
            config,
            measure,
            folders and folders.state / f"{stage.replace(' ', '-')}.pt",
            self.progress,
            stage,
            keep_best=True,
            lr_scale=self._lr_scale,
            logs=folders and folders.logs,
            extra_state=extra_state,
        )
        self.sizes.restore()
        self.steps_done, self.best_steps[stage] = offset + steps, trained.step
        self.skipped_steps[stage] = trained.skipped
        # A resumed run has not measured a best step from before the interruption.
        best = measured.get(trained.step) or self.held_out.measure(self.student)
        self._report(offset + steps, best)

    def _learning_rate(self) -> float:
        """Search for the learning rate of the distillation, once per state folder."""
        file = self.folders and self.folders.state / "learning_rate.json"
        if file and file.is_file():
            return json.loads(file.read_text())
        rate = find_learning_rate(
            self.student,
            velocity_distillation(self.teacher, self.config.flow_weight),
            self._clip_examples(),
            self.config.training,
            self._lr_scale,
            self.progress,
        )
        if file and self.is_main:
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(rate))
            os.replace(partial, file)
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

    def _lr_scale(self, name: str) -> float:
        return 1.0 if name in self.new else self.config.rest_lr

    def _measured(self) -> Errors:
        """Held-out errors; the main process's figures on all processes."""
        errors = self.held_out.measure(self.student)
        figures = (torch.tensor(e, dtype=torch.float64, device=own_device()) for e in errors)
        return Errors(*map(agreed, figures))

    def _mean_error(self) -> float:
        return self.sizes.mean_error(lambda: self._measured().velocity_error)

    def _report(self, step: int, errors: Errors) -> None:
        if self.is_main:
            self.on_step(step, errors)
