"""The one training loop. It knows accelerate and examples; it knows nothing of latents or teachers.

Data and noise are pure functions of (seed, step), and the learning rate is one of the step, so the
whole state of a run is its weights, its optimiser, its average and its step: a resumed run goes on
exactly as if it had not stopped, and two processes share one batch that is the same for any number.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vmla_convert.config import TrainingConfig
from vmla_convert.pipelines.data import ClipSource, seeded
from vmla_convert.pipelines.losses import Example, Loss, make_example
from vmla_convert.progress import Progress, Silent

STEP_FILE = "step.json"


Examples = Callable[[int], Sequence[Example]]
"""What a step trains on: a pure function of its number."""

OnEvaluate = Callable[[nn.Module, int], float]
"""Measures a model after some steps; the figure it returns is shown beside the bar."""


def train(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    config: TrainingConfig,
    on_evaluate: OnEvaluate,
    checkpoints: Path | None = None,
    progress: Progress | None = None,
    label: str = "training",
) -> None:
    """Train a model's parameters that require gradients, in place.

    Args:
        model: Trained in place; holds the averaged weights at the end when `config.ema` is set.
        loss: Of a model and an example.
        examples: What each step sees; their losses are added.
        config: Steps, learning rate and the like.
        on_evaluate: Called at step 0, every `eval_every` steps and at the end.
        checkpoints: Folder for resumable state; a run that finds one there goes on from it.
        progress: Where to draw.
        label: Of the bar.
    """
    progress = progress or Silent()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available()
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped, *optimisers = accelerator.prepare(model, *_optimisers(trained, config))
    average = _average(model, config, accelerator)
    start = _resume(accelerator, checkpoints)

    def evaluate(step: int) -> None:
        if accelerator.is_main_process:
            evaluated = model if average is None else average.module
            progress.note(f"held-out {on_evaluate(evaluated, step):.4f}")

    if start is None:
        evaluate(0)
        # What came before this loop, a layer-wise stage for one, need not be done again.
        if checkpoints:
            _save(accelerator, checkpoints, 0)
        start = 0
    for step in progress.track(range(start, config.steps), label, config.steps - start):
        for group in chain.from_iterable(o.param_groups for o in optimisers):
            group["lr"] = config.lr * learning_rate_factor(step, config)
        shares = [_share(example, accelerator) for example in examples(step)]
        with accelerator.autocast():
            value = torch.stack([loss(wrapped, share) for share in shares]).sum()
        wrapped.zero_grad()
        accelerator.backward(value)
        accelerator.clip_grad_norm_(trained, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        if average is not None:
            average.update_parameters(model)
        done = step + 1
        last = done == config.steps
        if last or done % config.eval_every == 0:
            evaluate(done)
        if checkpoints and (last or done % config.checkpoint_every == 0):
            _save(accelerator, checkpoints, done)
    if average is not None:
        model.load_state_dict(average.module.state_dict())


def clip_examples(
    clips: ClipSource,
    chunk_frames: int,
    config: TrainingConfig,
    openings: ClipSource,
) -> Examples:
    """Examples of training clips, and of `openings` where the config asks for them.

    Args:
        clips: Training clips.
        chunk_frames: Frames that share a noise level.
        config: Batch sizes, context noise and seed.
        openings: Training clips of `chunk_frames` frames.
    """

    def examples(step: int) -> list[Example]:
        noise = seeded(config.seed, step, "noise")
        batch = clips.batch(step, config.batch_size)
        drawn = [make_example(batch, chunk_frames, noise, config.context_noise)]
        if config.opening_clips:
            batch = openings.batch(step, config.opening_clips)
            drawn.append(make_example(batch, chunk_frames, noise))
        return drawn

    return examples


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then linear decay to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * (1 - step / config.steps)


def _optimisers(
    parameters: list[nn.Parameter], config: TrainingConfig
) -> list[torch.optim.Optimizer]:
    """AdamW, for all parameters or for those that Muon, which turns matrices, cannot take."""
    muon = config.optimizer == "muon"
    matrices = [p for p in parameters if muon and p.ndim == 2]
    rest = [p for p in parameters if not (muon and p.ndim == 2)]
    optimisers: list[torch.optim.Optimizer] = []
    if rest:
        optimisers.append(
            torch.optim.AdamW(rest, config.lr, (0.9, 0.95), weight_decay=config.weight_decay)
        )
    if matrices:
        # Its steps are as large as AdamW's, so that one learning rate serves both.
        optimisers.append(
            torch.optim.Muon(
                matrices, config.lr, config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimisers


def _average(
    model: nn.Module, config: TrainingConfig, accelerator: Accelerator
) -> AveragedModel | None:
    """The running average that was asked for, saved and resumed with everything else."""
    if not config.ema:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    accelerator.register_for_checkpointing(average)
    return average


def _share(example: Example, accelerator: Accelerator) -> Example:
    """This process's part of a batch, on its device."""
    rank, world = accelerator.process_index, accelerator.num_processes

    def part(tensor: Tensor) -> Tensor:
        return tensor[rank::world]

    return Example(*(part(tensor) for tensor in example)).to(accelerator.device)


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
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        (partial / STEP_FILE).write_text(json.dumps({"step": step}))
        older = [p for p in checkpoints.glob("step-*") if p.suffix != ".partial"]
        partial.rename(final)
        for folder in older:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()
