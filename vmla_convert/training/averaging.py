"""What a training keeps of its weights besides the latest: a running average, and the best."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vmla_convert.training.sharding import gathered, scattered

Weights = dict[str, Tensor]


class Stateful(Protocol):
    """What accelerate can save and load."""

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """What `state_dict` gave."""
        ...


def trained_weights(model: nn.Module) -> Weights:
    """A copy of what trains, by name; what is frozen may be many times larger."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_weights(model: nn.Module, weights: Weights) -> None:
    """Give a model some of its weights."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(scattered(weights[name], parameter))


class Average:
    """A running average of what trains; a part of a run's state.

    Args:
        decay: Of what was averaged before; 0 for the latest weights alone.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._weights: Weights = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average in the weights after another step; the first are taken as they are."""
        if self.decay and not self._weights:
            self._weights = trained_weights(model)
        elif self.decay:
            for name, parameter in model.named_parameters():
                if name in self._weights:
                    average = scattered(self._weights[name], parameter)
                    self._weights[name] = average.lerp_(parameter, 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with its average, for as long as it lasts."""
        latest = trained_weights(model) if self._weights else {}
        set_weights(model, self._weights)
        yield
        set_weights(model, latest)

    def apply(self, model: nn.Module) -> None:
        """Give a model its average for good."""
        set_weights(model, self._weights)

    def state_dict(self) -> dict[str, Any]:
        """As accelerate saves it."""
        return gathered(self._weights)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self._weights = state


class Best:
    """The weights that measured lowest, if they are to be kept; a part of a run's state.

    Attributes:
        kept: Whether they are.
        step: Where they were met.
        value: What they measured.
        since: Measurements after it.
    """

    def __init__(self, kept: bool) -> None:
        self.kept, self.step, self.value, self.since = kept, 0, math.inf, 0
        self._weights: Weights = {}

    def offer(self, value: float, step: int, model: nn.Module) -> None:
        """A measurement, and the weights it is of."""
        if not value < self.value:
            self.since += 1
            return
        self.value, self.step, self.since = value, step, 0
        if self.kept:
            self._weights = trained_weights(model)

    def apply(self, model: nn.Module) -> None:
        """Give a model the best weights, if they are kept."""
        set_weights(model, self._weights)

    def state_dict(self) -> dict[str, Any]:
        """As accelerate saves it."""
        figures = torch.tensor([self.step, self.value, self.since], dtype=torch.float64)
        return {"figures": figures, "weights": gathered(self._weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        step, self.value, since = state["figures"].tolist()
        self.step, self.since, self._weights = int(step), int(since), state["weights"]
