"""The one training loop. It knows accelerate and examples; it knows nothing of latents or teachers.

Data and noise are pure functions of (seed, step), and the learning rate is one of the step, so the
whole state of a run is its weights, its optimiser, its average, its best and its step: a resumed
run goes on exactly as if it had not stopped, and processes share one batch that is the same for any
number of them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vmla_convert.config import TrainingConfig
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.media.clips import ClipSource, seeded
from vmla_convert.progress import Progress, Silent
from vmla_convert.training.averaging import Average, Best, Stateful, set_weights
from vmla_convert.training.losses import Example, Examples, Levels, Loss, make_example
from vmla_convert.training.optimisers import Scale, make_optimisers, set_rate, unscaled
from vmla_convert.training.processes import agreed, averaged, check_shares, parts, processes
from vmla_convert.training.sharding import ShardedOptimisers, gathered, is_sharded

STEP_FILE, TRAINED_FILE = "step.json", "trained.safetensors"

OnEvaluate = Callable[[nn.Module, int], float]
"""Measures a model after some steps; the figure it returns is shown beside the bar."""


class Outcome(NamedTuple):
    """How a training ended.

    Attributes:
        steps: Steps that were done; fewer than asked for when it ended early.
        best_step: The step whose weights the model has now; the last one unless the best is kept.
    """

    steps: int
    best_step: int


def train(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    config: TrainingConfig,
    on_evaluate: OnEvaluate,
    checkpoints: Path | None = None,
    progress: Progress | None = None,
    label: str = "training",
    keep_best: bool = False,
    lr_scale: Scale = unscaled,
    logs: Path | None = None,
    carried: Sequence[Stateful] = (),
) -> Outcome:
    """Train a model's parameters that require gradients, in place.

    Args:
        model: Trained in place; holds the averaged weights at the end when `config.ema` is set, the
            best ones where they are kept.
        loss: Of a model and an example.
        examples: What each step sees; their losses are added.
        config: Steps, learning rate and the like.
        on_evaluate: Called at step 0, every `eval_every` steps and at the end; by the first process
            alone, or by all where the model is sharded.
        checkpoints: Folder for resumable state; a run that finds one there goes on from it.
        progress: Where to draw.
        label: Of the bar.
        keep_best: End with the weights, those of step 0 among them, that measured lowest; so also
            where the loss is not finite any more.
        lr_scale: Parts of the learning rate.
        logs: Folder of the tracker's files.
        carried: What else changes from step to step, a critic for one; saved and resumed with the
            rest.

    Raises:
        ConfigError: The batch cannot be shared, or no learning rate is given.
        VmlaError: The loss is not finite any more, or the tracker is not installed.
    """
    loop = _Loop(model, loss, config, keep_best, lr_scale, (label, logs), carried)
    try:
        return loop.run(examples, on_evaluate, checkpoints, progress or Silent(), label)
    finally:
        loop.release()


def clip_examples(
    clips: ClipSource,
    chunk_frames: int,
    config: TrainingConfig,
    openings: ClipSource,
    levels: Levels | None = None,
) -> Examples:
    """Examples of training clips, and of `openings` where the config asks for them.

    Args:
        clips: Training clips.
        chunk_frames: Frames that share a noise level.
        config: Batch sizes, context noise and seed.
        openings: Training clips of `chunk_frames` frames.
        levels: Noise levels to mix in.
    """

    def examples(step: int) -> list[Example]:
        noise = seeded(config.seed, step, "noise")
        batch = clips.batch(step, config.batch_size)
        drawn = [make_example(batch, chunk_frames, noise, config.context_noise, levels)]
        if config.opening_clips:
            batch = openings.batch(step, config.opening_clips)
            drawn.append(make_example(batch, chunk_frames, noise, levels=levels))
        return drawn

    return examples


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then linear decay to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * (1 - step / config.steps)


def check_tracker(config: TrainingConfig) -> None:
    """Refuse a tracker that is not there.

    Raises:
        VmlaError: It is not installed.
    """
    if config.tracker != "none" and find_spec(config.tracker) is None:
        raise VmlaError(
            f"tracker '{config.tracker}' is not installed", f"pip install {config.tracker}"
        )


class _NotFiniteError(VmlaError):
    """The loss is not finite any more."""


class _Loop:
    """A training while it runs."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        config: TrainingConfig,
        keep_best: bool,
        lr_scale: Scale,
        tracked: tuple[str, Path | None],
        carried: Sequence[Stateful],
    ) -> None:
        check_shares(config, processes().num_processes)
        if config.lr is None:
            raise ConfigError("training has no learning rate", "give it one: lr = 1e-3")
        self.config, self.model, self.loss, self.rate = config, model, loss, config.lr
        self.accelerator = _accelerator(config, *tracked)
        optimisers = make_optimisers(model, config, lr_scale)
        self.sharded = is_sharded(model)
        if self.sharded:
            # It shares gradients by itself, after every pass.
            self.wrapped, self.optimisers = model, optimisers
            carried = [*carried, ShardedOptimisers(optimisers)]
        else:
            self.wrapped, *self.optimisers = self.accelerator.prepare(model, *optimisers)
            # `prepare` made the model's own forward narrow, and measurements shall not be.
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.average, self.best = Average(config.ema), Best(keep_best)
        self.accelerator.register_for_checkpointing(self.average, self.best, *carried)
        # What is frozen is where it came from, and may be many times larger.
        self.hooks = [
            self.accelerator.register_save_state_pre_hook(self._write_trained),
            self.accelerator.register_load_state_pre_hook(self._read_trained),
        ]
        self.seconds: list[float] = []

    def run(
        self,
        examples: Examples,
        on_evaluate: OnEvaluate,
        checkpoints: Path | None,
        progress: Progress,
        label: str,
    ) -> Outcome:
        """All steps that are left."""
        config, start = self.config, _resume(self.accelerator, checkpoints)
        if start is None:
            self._evaluate(0, on_evaluate, progress)
            # What came before this loop, a layer-wise stage for one, need not be done again.
            self._save(checkpoints, 0)
            start = 0
        done, steps = start, range(start, config.steps)
        for step in progress.track(steps if not self._stale else (), label, len(steps)):
            started = perf_counter()
            try:
                self._step(step, examples(step))
            except _NotFiniteError as error:
                if not self.best.kept:
                    raise
                progress.note(f"{error.message}; {error.hint}")
                break
            self.seconds.append(perf_counter() - started)
            done = step + 1
            last = done == config.steps
            if last or done % config.eval_every == 0:
                self._evaluate(done, on_evaluate, progress)
            if last or self._stale or done % config.checkpoint_every == 0:
                self._save(checkpoints, done)
            if self._stale:
                break
        self.average.apply(self.model)
        self.best.apply(self.model)
        return Outcome(done, self.best.step if self.best.kept else done)

    def release(self) -> None:
        """Let go of memory; another loop may follow."""
        # Not `end_training`, which would also part the processes.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        for hook in self.hooks:
            hook.remove()
        self.model.zero_grad()
        self.wrapped, self.optimisers = self.model, []
        self.accelerator.free_memory()

    @property
    def _stale(self) -> bool:
        return 0 < self.config.patience <= self.best.since

    def _step(self, step: int, drawn: Sequence[Example]) -> None:
        """One update of the weights.

        Raises:
            _NotFiniteError: The loss is not; the weights stay as they are.
        """
        set_rate(self.optimisers, self.rate * learning_rate_factor(step, self.config))
        self.wrapped.zero_grad()
        # The first example comes last: of all it reads most, and the last pass is the one after
        # which processes share gradients.
        passes = [part for example in reversed(drawn) for part in parts(example, self.config)]
        total = torch.zeros((), device=self.accelerator.device)
        for index, part in enumerate(passes):
            last = index == len(passes) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    value = self.loss(self.wrapped, part) / self.config.accumulate
                self.accelerator.backward(value)
            total += value.detach().float()
        figure = averaged(total).item()
        if not math.isfinite(figure):
            raise _NotFiniteError(
                f"training came to a loss that is not finite at step {step}",
                "lower the learning rate, or train in float32: mixed_precision 'no'",
            )
        self._log({"loss": figure}, step)
        self.accelerator.clip_grad_norm_(self.trained, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.average.update(self.model)

    def _evaluate(self, step: int, on_evaluate: OnEvaluate, progress: Progress) -> None:
        value = torch.zeros((), device=self.accelerator.device)
        with self.average.applied(self.model):
            if self.sharded or self.accelerator.is_main_process:
                value += on_evaluate(self.model, step)
            # All go on, or stop, by the figure of one.
            figure = agreed(value)
            self.best.offer(figure, step, self.model)
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

    def _save(self, checkpoints: Path | None, step: int) -> None:
        if checkpoints is not None:
            _save(self.accelerator, checkpoints, step)

    def _write_trained(
        self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str
    ) -> None:
        del models
        weights.clear()  # of the whole model
        parameters = self.model.named_parameters()
        trained = gathered({n: p.detach() for n, p in parameters if p.requires_grad})
        if self.accelerator.is_main_process:
            save_file({n: t.contiguous() for n, t in trained.items()}, Path(folder) / TRAINED_FILE)

    def _read_trained(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        set_weights(self.model, load_file(Path(folder) / TRAINED_FILE))


def _accelerator(config: TrainingConfig, label: str, logs: Path | None) -> Accelerator:
    """Devices, precision and tracker."""
    check_tracker(config)
    known = AcceleratorState._shared_state
    if known and known.get("_mixed_precision") != config.mixed_precision:
        # Another stage may have had another precision; the processes stay as they are.
        AcceleratorState._reset_state()
    name, tracker = label.replace(" ", "-"), config.tracker
    folder = ProjectConfiguration(logging_dir=str(logs or Path("logs")))
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=not torch.cuda.is_available(),
        log_with=None if tracker == "none" else tracker,
        project_config=folder,
    )
    if tracker != "none":
        accelerator.init_trackers(name)
    return accelerator


def _resume(accelerator: Accelerator, checkpoints: Path | None) -> int | None:
    """Load the newest complete state and return its step; None where there is none."""
    if checkpoints is None:
        return None
    saved = sorted(p for p in checkpoints.glob("step-*") if p.suffix != ".partial")
    if not saved:
        return None
    accelerator.load_state(str(saved[-1]))
    return json.loads((saved[-1] / STEP_FILE).read_text())["step"]


def _save(accelerator: Accelerator, checkpoints: Path, step: int) -> None:
    """Save beside, then rename: what has a final name is complete. Only the newest is kept."""
    final = checkpoints / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STEP_FILE).write_text(json.dumps({"step": step}))
        older = [p for p in checkpoints.glob("step-*") if p.suffix != ".partial"]
        partial.rename(final)
        for folder in older:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()
