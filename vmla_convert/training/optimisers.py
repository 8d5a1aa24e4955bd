"""Optimisers of the training loop, and the search for a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vmla_convert.config import TrainingConfig
from vmla_convert.progress import Progress, Silent
from vmla_convert.training.losses import Examples, Loss
from vmla_convert.training.processes import (
    agreed,
    average_gradients,
    averaged,
    own_device,
    precision,
)
from vmla_convert.training.weights import set_weights, trained_weights

PROBED_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
PROBE_STEPS, UNSEEN_BATCHES = 8, 2
# A full run averages over more batches and decays to smaller steps than a probe.
LONGER_RUN = 3

Scale = Callable[[str], float]
"""Learning rate of a parameter, by name, relative to the learning rate of the config."""


def unscaled(_: str) -> float:
    """The same learning rate for every parameter."""
    return 1.0


def make_optimisers(
    model: nn.Module, config: TrainingConfig, scale: Scale = unscaled
) -> list[Optimizer]:
    """AdamW for all trained parameters, or Muon for matrices and AdamW for the others."""
    muon: dict[float, list[nn.Parameter]] = {}
    adamw: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = muon if config.optimizer == "muon" and parameter.ndim == 2 else adamw
            kind.setdefault(scale(name), []).append(parameter)
    decay, made = config.weight_decay, list[Optimizer]()
    if adamw:
        made.append(torch.optim.AdamW(_groups(adamw), betas=(0.9, 0.95), weight_decay=decay))
    if muon:
        # Steps as large as AdamW's, so that one learning rate serves both.
        made.append(
            torch.optim.Muon(_groups(muon), weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    return made


def set_rate(optimisers: list[Optimizer], rate: float) -> None:
    """Set the learning rate of every parameter group, scaled by the group's own factor."""
    for group in chain.from_iterable(optimiser.param_groups for optimiser in optimisers):
        group["lr"] = rate * group["scale"]


def find_learning_rate(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    config: TrainingConfig,
    scale: Scale = unscaled,
    progress: Progress | None = None,
) -> float:
    """Search for a learning rate by short trial runs on training clips.

    A start near the optimum allows only small steps; a poor start needs large ones. Every trial
    starts from the same weights, and the model keeps them.
    """
    losses: dict[float, float] = {}
    for rate in (progress or Silent()).track(_downhill(losses), "finding a learning rate"):
        losses[rate] = _loss_after(rate, model, loss, examples, config, scale)
    best = min(losses, key=lambda rate: (losses[rate], rate))
    # Rounding may differ between processes, so the main process decides.
    return agreed(torch.tensor(LONGER_RUN * best, device=own_device(), dtype=torch.float64))


def _loss_after(
    rate: float,
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    config: TrainingConfig,
    scale: Scale,
) -> float:
    """Loss on unseen batches after a few steps; the weights are restored."""
    start, optimisers = trained_weights(model), make_optimisers(model, config, scale)
    trained = [p for p in model.parameters() if p.requires_grad]

    def losses(step: int) -> Iterator[Tensor]:
        passes = (each.to(own_device()).split(config.accumulate) for each in examples(step))
        for part in chain.from_iterable(passes):
            with precision(config):
                value = loss(model, part) / config.accumulate
            yield value

    for step in range(PROBE_STEPS):
        set_rate(optimisers, rate * (1 - step / PROBE_STEPS))
        model.zero_grad()
        for value in losses(step):
            value.backward()
        average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimiser in optimisers:
            optimiser.step()
    model.zero_grad()
    with torch.no_grad():
        unseen = range(PROBE_STEPS, PROBE_STEPS + UNSEEN_BATCHES)
        left = averaged(torch.stack([value for step in unseen for value in losses(step)]).sum())
    set_weights(model, start)
    return left.item() if left.isfinite() else math.inf


def _downhill(losses: dict[float, float]) -> Iterator[float]:
    """Rates to try: from the middle down, else up, for as long as the loss falls.

    Args:
        losses: Loss by rate; the caller adds each rate before the next is asked for.
    """
    at = middle = len(PROBED_RATES) // 2
    yield PROBED_RATES[at]
    for step in (-1, 1):
        while 0 <= at + step < len(PROBED_RATES):
            yield PROBED_RATES[at + step]
            if losses[PROBED_RATES[at + step]] > losses[PROBED_RATES[at]]:
                break
            at += step
        if at != middle:
            return


def _groups(parameters: dict[float, list[nn.Parameter]]) -> list[dict[str, Any]]:
    """Parameter groups by their factor of the learning rate."""
    return [{"params": group, "scale": scale} for scale, group in parameters.items()]
