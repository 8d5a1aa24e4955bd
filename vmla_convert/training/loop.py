"""The one training loop. It knows examples and losses; it knows nothing of latents or teachers.

Data, noise and the learning rate are functions of the seed and the step. The state of a run is
therefore its weights, optimisers, average, best weights and step: a resumed run goes on exactly as
if it had not stopped, and any number of processes trains on the same batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vmla_convert.config import TrainingConfig
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.media.clips import ClipSource, seeded
from vmla_convert.progress import Progress, Silent
from vmla_convert.storage.output import reported
from vmla_convert.storage.tensor_store import save_pickle
from vmla_convert.training.losses import Example, Examples, Levels, Loss, make_example
from vmla_convert.training.optimisers import Scale, make_optimisers, set_rate, unscaled
from vmla_convert.training.processes import (
    agreed,
    averaged,
    check_shares,
    own_share,
    precision,
    processes,
)
from vmla_convert.training.sharding import TRAINED, WHOLE, is_sharded
from vmla_convert.training.weights import (
    Average,
    Best,
    gathered,
    placed,
    set_weights,
)

SKIPPED_IN_A_ROW = 5
"""Steps in a row that are not finite before training ends. Fewer are skipped and counted."""

OnEvaluate = Callable[[nn.Module, int], float]
"""Measures a model after some steps; returns the figure to show and to compare weights by."""


class Trained(NamedTuple):
    """The step of a model's weights, and the number of steps that were not finite."""

    step: int
    skipped: int


def train(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    config: TrainingConfig,
    on_evaluate: OnEvaluate,
    state_file: Path | None = None,
    progress: Progress | None = None,
    label: str = "training",
    keep_best: bool = False,
    lr_scale: Scale = unscaled,
    logs: Path | None = None,
    extra_state: Sequence[Stateful] = (),
) -> Trained:
    """Train the parameters of a model that require gradients, in place.

    Args:
        model: Ends with the averaged weights if `config.ema` is set, and with the best ones if
            `keep_best` is.
        loss: Loss of a model on an example.
        examples: Examples of each step; their losses are added.
        config: Steps, learning rate and other settings.
        on_evaluate: Called at step 0, every `eval_every` steps and at the end, by all processes.
        state_file: Resumable state. A run that finds the file resumes from it.
        progress: Receives the progress bar.
        label: Name of the bar and of the tracked run.
        keep_best: End with the weights of the lowest held-out figure, step 0 included. Training
            that does not stay finite then ends without an error.
        lr_scale: Factor of the learning rate, by parameter name.
        logs: Folder of the tracker's files.
        extra_state: Further state of the run, such as a critic; equal on all processes.

    Returns:
        The step of the weights that the model has now, and how many steps were skipped.

    Raises:
        ConfigError: The batch cannot be divided, or no learning rate is given.
        VmlaError: Loss or gradient were not finite in `SKIPPED_IN_A_ROW` steps in a row, or the
            tracker is not installed.
    """
    loop = _Loop(model, loss, config, keep_best, lr_scale, (label, logs), state_file, extra_state)
    try:
        return loop.run(examples, on_evaluate, progress or Silent(), label)
    finally:
        loop.release()


def clip_examples(
    clips: ClipSource,
    chunk_frames: int,
    config: TrainingConfig,
    openings: ClipSource,
    levels: Levels | None = None,
) -> Examples:
    """Examples from training clips, and from openings if `config.opening_clips` is set.

    Openings are clips of one chunk. `levels` are noise levels to mix in.
    """

    def examples(step: int) -> list[Example]:
        # All processes draw the whole batch, so that its noise does not depend on their number.
        noise, share = seeded(config.seed, step, "noise"), own_share()
        batch = clips.batch(step * config.batch_size, config.batch_size)
        made = [make_example(batch, chunk_frames, noise, config.context_noise, levels)]
        if config.opening_clips:
            batch = openings.batch(step * config.opening_clips, config.opening_clips)
            made.append(make_example(batch, chunk_frames, noise, levels=levels))
        return [share.of(example) for example in made]

    return examples


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * (1 - step / steps)


def check_tracker(config: TrainingConfig) -> None:
    """Check that the tracker of a config is installed.

    Raises:
        VmlaError: The tracker is not installed.
    """
    if config.tracker != "none" and find_spec(config.tracker) is None:
        raise VmlaError(
            f"tracker '{config.tracker}' is not installed", f"pip install {config.tracker}"
        )


class _Loop:
    """A running training."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        config: TrainingConfig,
        keep_best: bool,
        lr_scale: Scale,
        tracked: tuple[str, Path | None],
        state_file: Path | None,
        extra_state: Sequence[Stateful],
    ) -> None:
        check_shares(config, processes().num_processes)
        if config.lr is None:
            raise ConfigError("training has no learning rate", "give it one: lr = 1e-3")
        self.config, self.model, self.loss, self.rate = config, model, loss, config.lr
        self.state_file, self.extra_state = state_file, extra_state
        self.accelerator = _accelerator(config, *tracked)
        # Not `accelerator.prepare`: freeing its references takes a full garbage collection, 0.6 s.
        self.wrapped = model.to(self.accelerator.device)
        if self.accelerator.num_processes > 1 and not is_sharded(model):
            self.wrapped = DistributedDataParallel(model)
        self.optimisers = make_optimisers(model, config, lr_scale)
        self.scaler = torch.amp.GradScaler(
            self.accelerator.device.type, enabled=config.mixed_precision == "fp16"
        )
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.average, self.best = Average(config.ema), Best(keep_best)
        self.seconds: list[float] = []
        self.skipped = self.skipped_in_a_row = 0

    def run(
        self, examples: Examples, on_evaluate: OnEvaluate, progress: Progress, label: str
    ) -> Trained:
        """Do all steps that are left; return the step of the final weights."""
        config, done = self.config, self._resume()
        if done is None:
            self._evaluate(0, on_evaluate, progress)
            # A resumed run skips the work before this loop, such as the layer-wise stage.
            self._save(done := 0)
        left = range(done, 0 if self._stale else config.steps)
        for step in progress.track(left, label, config.steps - done):
            started = perf_counter()
            taken = self._step(step, examples(step))
            self.seconds.append(perf_counter() - started)
            done = step + 1
            if not taken and self._skip(step, progress):
                break
            last = done == config.steps
            if last or done % config.eval_every == 0:
                self._evaluate(done, on_evaluate, progress)
            if last or self._stale or done % config.checkpoint_every == 0:
                self._save(done)
            if self._stale:
                break
        set_weights(self.model, self.average.weights)
        set_weights(self.model, self.best.weights)
        return Trained(self.best.step if self.best.keep else done, self.skipped)

    def release(self) -> None:
        """Close trackers and free gradients."""
        # Not `end_training`, which also ends the process group.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.model.zero_grad()

    @property
    def _stale(self) -> bool:
        """Whether `config.patience` measurements brought no new best."""
        return 0 < self.config.patience <= self.best.since

    def _skip(self, step: int, progress: Progress) -> bool:
        """Count a step that left the weights as they are; return whether training ends here.

        Raises:
            VmlaError: `SKIPPED_IN_A_ROW` steps were skipped, and no best weights are kept.
        """
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._log({"skipped": self.skipped}, step)
        progress.note(f"step {step} is not finite and is skipped: {self.skipped} so far")
        if self.skipped_in_a_row < min(SKIPPED_IN_A_ROW, self.config.steps):
            return False
        error = VmlaError(
            f"training came to a loss that is not finite at step {step}, "
            f"{self.skipped_in_a_row} times in a row",
            "lower the learning rate, or train in float32: mixed_precision 'no'",
        )
        if not self.best.keep:
            raise error
        progress.note(f"{error.message}; {error.hint}")
        return True

    def _step(self, step: int, examples: Sequence[Example]) -> bool:
        """Update the weights once; return False where the loss or the gradient is not finite."""
        factor = learning_rate_factor(step, self.config.steps, self.config.warmup_steps)
        set_rate(self.optimisers, self.rate * factor)
        self.model.zero_grad()
        # The first example uses the most parameters. It comes last, because processes average
        # gradients after the last pass.
        device, accumulate = self.accelerator.device, self.config.accumulate
        passes = [part for each in reversed(examples) for part in each.to(device).split(accumulate)]
        total = torch.zeros((), device=device)
        for index, part in enumerate(passes):
            last = index == len(passes) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with precision(self.config):
                    value = self.loss(self.wrapped, part) / accumulate
                self.scaler.scale(value).backward()
            total += value.detach().float()
        for optimiser in self.optimisers:
            self.scaler.unscale_(optimiser)
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # One transfer from the device for both. A scaler skips infinite gradients by itself.
        figure, length = torch.stack([averaged(total), norm.to(total)]).tolist()
        finite = math.isfinite(figure) and (self.scaler.is_enabled() or math.isfinite(length))
        if finite:
            self._log({"loss": figure}, step)
            self.skipped_in_a_row = 0
            for optimiser in self.optimisers:
                self.scaler.step(optimiser)
        self.scaler.update()
        if finite:
            self.average.update(self.model)
        return finite

    def _evaluate(self, step: int, on_evaluate: OnEvaluate, progress: Progress) -> None:
        value = torch.zeros((), device=self.accelerator.device)
        with self.average.applied(self.model):
            value += on_evaluate(self.model, step)
            # One process's figure decides for all whether they stop.
            figure = agreed(value)
            self.best.update(figure, step, self.model)
        self._log({"held_out": figure}, step)
        progress.note(f"held-out {figure:.4g}{self._cost()}")

    def _cost(self) -> str:
        """Seconds of the last steps, and memory in use."""
        if not self.seconds:
            return ""
        recent = self.seconds[-self.config.eval_every :]
        nbytes = psutil.Process().memory_info().rss
        if torch.cuda.is_available():
            nbytes = torch.cuda.max_memory_allocated()
        return f" · {sum(recent) / len(recent):.2g} s a step · {nbytes / 1e9:.1f} GB"

    def _log(self, values: dict[str, Any], step: int) -> None:
        if self.config.tracker != "none":
            self.accelerator.log(values, step)

    def _save(self, step: int) -> None:
        """Replace the state file by the state after some steps."""
        if self.state_file is None:
            return
        best = self.best
        state = {
            "step": step,
            "trained": get_model_state_dict(self.model, options=TRAINED),
            # Optimisers have no state before the first step.
            "optimisers": get_optimizer_state_dict(self.model, self.optimisers, options=WHOLE)
            if step
            else {},
            "scaler": self.scaler.state_dict(),
            "skipped": (self.skipped, self.skipped_in_a_row),
            "average": gathered(self.average.weights),
            "best": (best.step, best.value, best.since),
            "best_weights": gathered(best.weights),
            "extra": [part.state_dict() for part in self.extra_state],
        }
        if self.accelerator.is_main_process:
            with reported(
                self.state_file, "make room there, then start again: what is done is kept"
            ):
                self.state_file.parent.mkdir(parents=True, exist_ok=True)
                partial = self.state_file.with_suffix(".partial")
                save_pickle(state, partial)
                os.replace(partial, self.state_file)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int | None:
        """Load the state file and return its step; None if there is no file."""
        if self.state_file is None or not self.state_file.is_file():
            return None
        state = torch.load(self.state_file, map_location="cpu", mmap=True, weights_only=True)
        set_model_state_dict(self.model, state["trained"], options=TRAINED)
        if state["optimisers"]:
            set_optimizer_state_dict(
                self.model, self.optimisers, state["optimisers"], options=WHOLE
            )
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self.average.weights = placed(state["average"], self.model)
        self.best.step, self.best.value, self.best.since = state["best"]
        self.best.weights = placed(state["best_weights"], self.model)
        for part, saved in zip(self.extra_state, state["extra"], strict=True):
            part.load_state_dict(saved)
        return state["step"]


def _accelerator(config: TrainingConfig, label: str, logs: Path | None) -> Accelerator:
    """Devices, distributed wrappers and the tracker; `precision` casts."""
    check_tracker(config)
    has_tracker = config.tracker != "none"
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not torch.cuda.is_available(),
        log_with=config.tracker if has_tracker else None,
        project_config=ProjectConfiguration(logging_dir=str(logs or Path("logs"))),
    )
    if has_tracker:
        accelerator.init_trackers(label.replace(" ", "-"))
    return accelerator
