"""Processes that were started together: what each takes of a batch, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vmla_convert.config import TrainingConfig
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.training.losses import Example

# The others wait for what one does alone, such as sampling clips; by default ten minutes at most.
PATIENCE = timedelta(days=1)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def processes() -> PartialState:
    """What this process is among those that were started together.

    Raises:
        VmlaError: A launcher started several, which do not know of each other.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise VmlaError(
            f"{started} processes were started, and {state.num_processes} found each other",
            "start them by: torchrun --nproc_per_node N -m vmla_convert …",
        )
    return state


def own_device() -> torch.device:
    """Where this process computes."""
    device = processes().device
    assert device is not None
    return device


def agreed(figure: Tensor) -> float:
    """What the first process has for a figure (), for all of them."""
    shared = broadcast(figure)
    assert isinstance(shared, Tensor)
    return shared.item()


def averaged(figure: Tensor) -> Tensor:
    """The mean over all processes, of one shape in each of them."""
    mean = reduce(figure, "mean")
    assert isinstance(mean, Tensor)
    return mean


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Give all processes the mean of their gradients; those of shards are means already."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            parameter.grad.copy_(averaged(parameter.grad))


def parts(example: Example, config: TrainingConfig) -> Iterator[Example]:
    """This process's clips of a batch, on its device, part after part."""
    state = processes()
    count = state.num_processes * config.accumulate
    for first in range(state.process_index, count, state.num_processes):
        yield Example(*(tensor[first::count] for tensor in example)).to(own_device())


def precision(config: TrainingConfig) -> torch.autocast:
    """Autocast as a config asks for it; one context for each pass, as it remembers its casts."""
    dtype = _DTYPES.get(config.mixed_precision)
    return torch.autocast(own_device().type, dtype, enabled=dtype is not None)


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
