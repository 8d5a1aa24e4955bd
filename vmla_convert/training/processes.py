"""Processes started together: the clips that each takes, and the figures that they share."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vmla_convert.config import TrainingConfig
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.training.losses import Example

# The others wait while the main process samples clips; torch waits ten minutes by default.
TIMEOUT = timedelta(days=1)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of mixed precision."""


class Share(NamedTuple):
    """The part of some work that one process does: every `world`-th item from `rank` on."""

    rank: int = 0
    world: int = 1

    def of(self, example: Example) -> Example:
        """The clips of a batch that this process takes."""
        return Example(*(tensor[self.rank :: self.world] for tensor in example))


ALONE = Share()


def processes() -> PartialState:
    """The state of this process among the others.

    Raises:
        VmlaError: A launcher started several processes that do not find each other.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise VmlaError(
            f"{started} processes were started, and {state.num_processes} found each other",
            "start them by: torchrun --nproc_per_node N -m vmla_convert …",
        )
    return state


def own_share() -> Share:
    """The share of this process."""
    state = processes()
    return Share(state.process_index, state.num_processes)


def own_device() -> torch.device:
    """The device that this process computes on."""
    device = processes().device
    assert device is not None
    return device


def agreed(figure: Tensor) -> float:
    """The main process's value of a scalar tensor, on all processes."""
    shared = broadcast(figure)
    assert isinstance(shared, Tensor)
    return shared.item()


def averaged(figure: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    mean = reduce(figure, "mean")
    assert isinstance(mean, Tensor)
    return mean


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over all processes; FSDP has averaged those of shards already."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            parameter.grad.copy_(averaged(parameter.grad))


def precision(config: TrainingConfig) -> torch.autocast:
    """Autocast to the dtype of a config. Use a new context for each pass: it caches its casts."""
    return narrowed(config.mixed_precision, own_device())


def narrowed(mixed_precision: str, device: torch.device) -> torch.autocast:
    """Autocast to a mixed precision, `no`, `bf16` or `fp16`; use a new context for each pass."""
    dtype = DTYPES.get(mixed_precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def check_shares(config: TrainingConfig, world: int) -> None:
    """Check that the batch divides evenly into processes and parts.

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
