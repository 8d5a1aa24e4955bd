"""Copies of the trained weights: whole for a file, a running average, and the best of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vmla_convert.training.processes import processes

Weights = dict[str, Tensor]


def trained_weights(model: nn.Module) -> Weights:
    """A copy of the parameters that train, by name; a sharded model gives shards."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_weights(model: nn.Module, weights: Weights) -> None:
    """Copy weights into the parameters of the same names."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


def gathered(weights: Weights) -> Weights:
    """Shards as whole tensors, on the CPU of the main process; others get empty ones."""
    return {n: _whole(t) if isinstance(t, DTensor) else t for n, t in weights.items()}


def _whole(shard: DTensor) -> Tensor:
    whole = shard.full_tensor()
    return whole.cpu() if processes().is_main_process else torch.empty(0)


def placed(weights: Weights, model: nn.Module) -> Weights:
    """Whole weights on the devices of a model's parameters, and sharded as these are."""
    parameters = dict(model.named_parameters())
    return {name: place(tensor, parameters[name]) for name, tensor in weights.items()}


def place(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, on the device and in the shards of another one."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    device, mesh = like.device, like.device_mesh
    return distribute_tensor(tensor.to(device), mesh, like.placements, src_data_rank=None)


class Average:
    """A running average of the trained weights.

    Args:
        decay: Weight of the previous average; 0 keeps no average.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weights: Weights = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average in the weights after a step; the first weights start the average."""
        if self.decay and not self.weights:
            self.weights = trained_weights(model)
        elif self.decay:
            for name, parameter in model.named_parameters():
                if name in self.weights:
                    self.weights[name].lerp_(parameter, 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model its average for the duration of a `with` block."""
        latest = trained_weights(model) if self.weights else {}
        set_weights(model, self.weights)
        yield
        set_weights(model, latest)


class Best:
    """The weights with the lowest held-out figure.

    Attributes:
        keep: Whether the weights are stored; else only the figures are.
        step: Step of the lowest figure.
        value: The lowest figure.
        since: Measurements after the lowest one.
        weights: Weights at `step`, if stored.
    """

    def __init__(self, keep: bool) -> None:
        self.keep, self.step, self.value, self.since = keep, 0, math.inf, 0
        self.weights: Weights = {}

    def update(self, value: float, step: int, model: nn.Module) -> None:
        """Compare one measurement of a model with the best so far."""
        if not value < self.value:
            self.since += 1
            return
        self.value, self.step, self.since = value, step, 0
        if self.keep:
            self.weights = trained_weights(model)
