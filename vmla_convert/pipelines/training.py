"""The one training loop. It knows accelerate and examples; it knows nothing of latents or teachers.

Data and noise are pure functions of (seed, step), and the learning rate is one of the step, so the
whole state of a run is its weights, its optimiser, its average, its best and its step: a resumed
run goes on exactly as if it had not stopped, and processes share one batch that is the same for any
number of them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vmla_convert.config import TrainingConfig
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.pipelines.data import ClipSource, seeded
from vmla_convert.pipelines.losses import Example, Levels, Loss, make_example
from vmla_convert.progress import Progress, Silent

STEP_FILE, TRAINED_FILE = "step.json", "trained.safetensors"
PROBED_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
PROBE_STEPS, UNSEEN_BATCHES = 8, 2
LONGER_RUN = 3


Examples = Callable[[int], Sequence[Example]]
"""What a step trains on: a function of its number, and of nothing but the weights besides."""

OnEvaluate = Callable[[nn.Module, int], float]
"""Measures a model after some steps; the figure it returns is shown beside the bar."""


class Stateful(Protocol):
    """What accelerate can save and load."""

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """What `state_dict` gave."""
        ...


class Outcome(NamedTuple):
    """How a training ended.

    Attributes:
        steps: Steps that were done; fewer than asked for when it ended early.
        best_step: The step whose weights the model has now; the last one unless the best is kept.
    """

    steps: int
    best_step: int


def processes() -> PartialState:
    """What this process is among those that were started together.

    Raises:
        VmlaError: A launcher started several, which do not know of each other.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise VmlaError(
            f"{started} processes were started, and {state.num_processes} found each other",
            "start them by: torchrun --nproc_per_node N -m vmla_convert …",
        )
    return state


def agreed(figure: Tensor) -> float:
    """What the first process has for a figure (), for all of them."""
    shared = broadcast(figure)
    assert isinstance(shared, Tensor)
    return shared.item()


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
    lr_scale: Callable[[str], float] = lambda _: 1.0,
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
        on_evaluate: Called at step 0, every `eval_every` steps and at the end.
        checkpoints: Folder for resumable state; a run that finds one there goes on from it.
        progress: Where to draw.
        label: Of the bar.
        keep_best: End with the weights, those of step 0 among them, that measured lowest.
        lr_scale: Learning rate of a parameter, by its name, over that of the config.
        logs: Folder of the tracker's files.
        carried: What else changes from step to step, a critic for one; saved and resumed with the
            rest.

    Raises:
        ConfigError: The batch cannot be shared, or no learning rate is given.
        VmlaError: The loss is not finite any more.
    """
    loop = _Loop(model, loss, config, keep_best, lr_scale, (label, logs), carried)
    return loop.run(examples, on_evaluate, checkpoints, progress or Silent(), label)


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
        drawn: list[Example] = []
        batch = clips.batch(step, config.batch_size)
        drawn.append(make_example(batch, chunk_frames, noise, config.context_noise, levels))
        if config.opening_clips:
            batch = openings.batch(step, config.opening_clips)
            drawn.append(make_example(batch, chunk_frames, noise, levels=levels))
        return drawn

    return examples


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then linear decay to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * (1 - step / config.steps)


class _Loop:
    """A training while it runs."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        config: TrainingConfig,
        keep_best: bool,
        lr_scale: Callable[[str], float],
        tracked: tuple[str, Path | None],
        carried: Sequence[Stateful],
    ) -> None:
        processes()
        self.config, self.model, self.loss = config, model, loss
        self.accelerator = _accelerator(config, tracked)
        check_shares(config, self.accelerator.num_processes)
        if config.lr is None:
            raise ConfigError("training has no learning rate", "give it one: lr = 1e-3")
        self.rate = config.lr
        optimisers = _optimisers(model, config, lr_scale)
        self.wrapped, *self.optimisers = self.accelerator.prepare(model, *optimisers)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.average, self.best = _average(model, config), _Best(keep_best)
        for part in (self.average, self.best, *carried):
            if part is not None:
                self.accelerator.register_for_checkpointing(part)
        # What is frozen is where it came from, and may be many times larger.
        self.accelerator.register_save_state_pre_hook(self._write_trained)
        self.accelerator.register_load_state_pre_hook(self._read_trained)
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
            with self.accelerator.autocast():
                drawn = examples(step)  # which a model may have made
            self._step(step, drawn)
            self.seconds.append(perf_counter() - started)
            done = step + 1
            last = done == config.steps
            if last or done % config.eval_every == 0:
                self._evaluate(done, on_evaluate, progress)
            if last or self._stale or done % config.checkpoint_every == 0:
                self._save(checkpoints, done)
            if self._stale:
                break
        # Not `end_training`, which would also part the processes; other stages follow.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self._finish()
        return Outcome(done, self.best.step if self.best.kept else done)

    @property
    def _stale(self) -> bool:
        return 0 < self.config.patience <= self.best.since

    def _step(self, step: int, drawn: Sequence[Example]) -> None:
        """One update of the weights."""
        factor = learning_rate_factor(step, self.config)
        for group in chain.from_iterable(o.param_groups for o in self.optimisers):
            group["lr"] = self.rate * group["scale"] * factor
        self.wrapped.zero_grad()
        # The first example comes last: of all it reads most, and the last pass is the one after
        # which processes share gradients.
        parts = [part for example in reversed(drawn) for part in self._parts(example)]
        total = torch.zeros((), device=self.accelerator.device)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    value = self.loss(self.wrapped, part) / self.config.accumulate
                self.accelerator.backward(value)
            total += value.detach().float()
        self._log({"loss": float(total)}, step)
        self.accelerator.clip_grad_norm_(self.trained, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _parts(self, example: Example) -> Iterator[Example]:
        """This process's clips of a batch, on its device, part after part."""
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        count *= self.config.accumulate
        for first in range(rank, count, self.accelerator.num_processes):
            part = Example(*(tensor[first::count] for tensor in example))
            yield part.to(self.accelerator.device)

    def _evaluate(self, step: int, on_evaluate: OnEvaluate, progress: Progress) -> None:
        evaluated = self.model if self.average is None else self.average.module
        value = torch.zeros((), device=self.accelerator.device)
        if self.accelerator.is_main_process:
            value += on_evaluate(evaluated, step)
        # All go on, or stop, by the figure of one.
        figure = agreed(value)
        self.best.offer(figure, step, evaluated)
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
        if not all(map(math.isfinite, values.values())):
            raise VmlaError(
                f"training came to a loss that is not finite at step {step}",
                "lower the learning rate, or train in float32: mixed_precision 'no'",
            )
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
        if self.accelerator.is_main_process:
            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(
                {n: p.detach().contiguous() for n, p in trained.items()},
                Path(folder) / TRAINED_FILE,
            )

    def _read_trained(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        trained = load_file(Path(folder) / TRAINED_FILE)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(trained[name])

    def _finish(self) -> None:
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.best.restore(self.model)


class _Best:
    """The weights that measured lowest, if they are to be kept; a part of a run's state.

    Attributes:
        kept: Whether they are.
        step: Where they were met.
        value: What they measured.
        since: Measurements after it.
    """

    def __init__(self, kept: bool) -> None:
        self.kept, self.step, self.value, self.since = kept, 0, math.inf, 0
        self._weights: dict[str, Tensor] = {}

    def offer(self, value: float, step: int, model: nn.Module) -> None:
        """A measurement, and the weights it is of."""
        if value >= self.value:
            self.since += 1
            return
        self.value, self.step, self.since = value, step, 0
        if self.kept:
            self._weights = {
                name: parameter.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }

    def restore(self, model: nn.Module) -> None:
        """Give a model the best weights, if they are kept."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self._weights:
                    parameter.copy_(self._weights[name])

    def state_dict(self) -> dict[str, Any]:
        """As accelerate saves it."""
        figures = torch.tensor([self.step, self.value, self.since], dtype=torch.float64)
        return {"figures": figures, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        step, self.value, since = state["figures"].tolist()
        self.step, self.since, self._weights = int(step), int(since), state["weights"]


def find_learning_rate(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    config: TrainingConfig,
    lr_scale: Callable[[str], float] = lambda _: 1.0,
    progress: Progress | None = None,
) -> float:
    """A learning rate for where a model is: a multiple of the best one for a few steps.

    A near-perfect start allows only small steps and a poor one needs large ones; what a start
    allows is tried, on training clips, and forgotten. A longer run averages over more batches and
    ends with smaller steps, so it takes `LONGER_RUN` times as much.

    Args:
        model: Left as it was.
        loss: Of a model and an example.
        examples: What each step sees.
        config: Optimiser and batch.
        lr_scale: See `train`.
        progress: Where to draw.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    batches = [[e.to(device) for e in examples(i)] for i in range(PROBE_STEPS + UNSEEN_BATCHES)]

    def after_steps(rate: float) -> float:
        optimisers = _optimisers(model, config, lr_scale)
        for step, batch in enumerate(batches[:PROBE_STEPS]):
            for group in chain.from_iterable(o.param_groups for o in optimisers):
                group["lr"] = rate * group["scale"] * (1 - step / PROBE_STEPS)
            model.zero_grad()
            torch.stack([loss(model, example) for example in batch]).sum().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            for optimiser in optimisers:
                optimiser.step()
        with torch.no_grad():
            unseen = chain.from_iterable(batches[PROBE_STEPS:])
            left = float(torch.stack([loss(model, example) for example in unseen]).sum())
            for parameter, before in zip(trained, start, strict=True):
                parameter.copy_(before)
        model.zero_grad()
        return left if math.isfinite(left) else math.inf

    tried: dict[float, float] = {}
    for rate in (progress or Silent()).track(_downhill(tried), "finding a learning rate"):
        tried[rate] = after_steps(rate)
    best = min(tried, key=lambda rate: (tried[rate], rate))
    # All look at the same figures, but may differ by their rounding.
    return agreed(torch.tensor(LONGER_RUN * best, device=device, dtype=torch.float64))


def _downhill(tried: dict[float, float]) -> Iterator[float]:
    """Rates to try, from the middle on, down or else up as long as it gets better.

    Args:
        tried: What each rate left of the loss, filled in by who asks for the next.
    """
    at = middle = len(PROBED_RATES) // 2
    yield PROBED_RATES[at]
    for step in (-1, 1):
        while 0 <= at + step < len(PROBED_RATES):
            yield PROBED_RATES[at + step]
            if tried[PROBED_RATES[at + step]] > tried[PROBED_RATES[at]]:
                break
            at += step
        if at != middle:
            return


def _accelerator(config: TrainingConfig, tracked: tuple[str, Path | None]) -> Accelerator:
    """Devices, precision and tracker.

    Raises:
        VmlaError: The tracker is not installed.
    """
    name, logs = tracked
    tracker = None if config.tracker == "none" else config.tracker
    folder = ProjectConfiguration(logging_dir=str(logs or Path("logs")))
    if tracker and find_spec(tracker) is None:
        raise VmlaError(f"tracker '{tracker}' is not installed", f"pip install {tracker}")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=not torch.cuda.is_available(),
        log_with=tracker,
        project_config=folder,
    )
    if tracker:
        accelerator.init_trackers(name.replace(" ", "-"))
    return accelerator


def check_shares(config: TrainingConfig, world: int) -> None:
    """Every process gets as many clips as every other, in every part.

    Raises:
        ConfigError: The batch does not divide.
    """
    for name in ("batch_size", "opening_clips"):
        clips: int = getattr(config, name)
        if clips % (world * config.accumulate):
            raise ConfigError(
                f"{name} {clips} does not divide into {world} processes of {config.accumulate} "
                "parts each",
                f"make it a multiple of {world * config.accumulate}",
            )


def _optimisers(
    model: nn.Module, config: TrainingConfig, lr_scale: Callable[[str], float]
) -> list[torch.optim.Optimizer]:
    """AdamW, for all parameters or for those that Muon, which turns matrices, cannot take."""
    muon: dict[float, list[nn.Parameter]] = {}
    rest: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = muon if config.optimizer == "muon" and parameter.ndim == 2 else rest
            kind.setdefault(lr_scale(name), []).append(parameter)
    optimisers: list[torch.optim.Optimizer] = []
    if rest:
        optimisers.append(
            torch.optim.AdamW(_groups(rest), betas=(0.9, 0.95), weight_decay=config.weight_decay)
        )
    if muon:
        # Its steps are as large as AdamW's, so that one learning rate serves both.
        optimisers.append(
            torch.optim.Muon(
                _groups(muon),
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimisers


def _groups(parameters: dict[float, list[nn.Parameter]]) -> list[dict[str, Any]]:
    """Parameter groups, each with its part of the learning rate."""
    return [{"params": group, "scale": scale} for scale, group in parameters.items()]


def _average(model: nn.Module, config: TrainingConfig) -> AveragedModel | None:
    """The running average that was asked for, saved and resumed with everything else."""
    if not config.ema:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))


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
