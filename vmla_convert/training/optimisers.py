"""Optimisers of the training loop, and the learning rate to start them with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from vmla_convert.config import TrainingConfig
from vmla_convert.progress import Progress, Silent
from vmla_convert.training.averaging import set_weights, trained_weights
from vmla_convert.training.losses import Example, Examples, Loss
from vmla_convert.training.processes import (
    agreed,
    average_gradients,
    averaged,
    own_device,
    parts,
    precision,
)

PROBED_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
PROBE_STEPS, UNSEEN_BATCHES = 8, 2
LONGER_RUN = 3

Scale = Callable[[str], float]
"""Learning rate of a parameter, by its name, over that of the config."""


def unscaled(_: str) -> float:
    """The same learning rate for all."""
    return 1.0


def make_optimisers(
    model: nn.Module, config: TrainingConfig, scale: Scale = unscaled
) -> list[torch.optim.Optimizer]:
    """AdamW, for all that trains or for what Muon, which turns matrices, cannot take."""
    muon: dict[float, list[nn.Parameter]] = {}
    rest: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = muon if config.optimizer == "muon" and parameter.ndim == 2 else rest
            kind.setdefault(scale(name), []).append(parameter)
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


def set_rate(optimisers: list[torch.optim.Optimizer], rate: float) -> None:
    """Give every group its part of a learning rate."""
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
    """A learning rate for where a model is: a multiple of the best one for a few steps.

    A near-perfect start allows only small steps and a poor one needs large ones; what a start
    allows is tried, on training clips, and forgotten. A longer run averages over more batches and
    ends with smaller steps, so it takes `LONGER_RUN` times as much.

    Args:
        model: Left as it was.
        loss: Of a model and an example.
        examples: What each step sees.
        config: Optimiser, batch and precision.
        scale: Parts of the learning rate.
        progress: Where to draw.
    """
    probe, tried = _Probe(model, loss, examples, config, scale), dict[float, float]()
    for rate in (progress or Silent()).track(_downhill(tried), "finding a learning rate"):
        tried[rate] = probe.left_after(rate)
    best = min(tried, key=lambda rate: (tried[rate], rate))
    # All look at the same figures, but may differ by their rounding.
    figure = torch.tensor(LONGER_RUN * best, device=own_device(), dtype=torch.float64)
    return agreed(figure)


class _Probe:
    """A few steps from one start, again and again."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        examples: Examples,
        config: TrainingConfig,
        scale: Scale,
    ) -> None:
        self.model, self.loss, self.examples = model, loss, examples
        self.config, self.scale = config, scale
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.start = trained_weights(model)

    def left_after(self, rate: float) -> float:
        """Loss of unseen batches after a few steps that decay from a rate; then all is undone."""
        optimisers = make_optimisers(self.model, self.config, self.scale)
        for step in range(PROBE_STEPS):
            set_rate(optimisers, rate * (1 - step / PROBE_STEPS))
            self.model.zero_grad()
            for part in self._parts(step):
                self._loss(part).backward()
            average_gradients(self.trained)
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            for optimiser in optimisers:
                optimiser.step()
        self.model.zero_grad()
        with torch.no_grad():
            unseen = range(PROBE_STEPS, PROBE_STEPS + UNSEEN_BATCHES)
            losses = [self._loss(part) for step in unseen for part in self._parts(step)]
            left = averaged(torch.stack(losses).sum()).item()
        set_weights(self.model, self.start)
        return left if math.isfinite(left) else math.inf

    def _loss(self, part: Example) -> torch.Tensor:
        with precision(self.config):
            return self.loss(self.model, part) / self.config.accumulate

    def _parts(self, step: int) -> Iterator[Example]:
        for example in self.examples(step):
            yield from parts(example, self.config)


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


def _groups(parameters: dict[float, list[nn.Parameter]]) -> list[dict[str, Any]]:
    """Parameter groups, each with its part of the learning rate."""
    return [{"params": group, "scale": scale} for scale, group in parameters.items()]
