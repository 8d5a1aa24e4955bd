"""Models that are divided over the processes (FSDP2), and the whole tensors that are saved of them.

All processes have to do alike: what is sharded is gathered by all of them together.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.training.processes import own_device, processes


def shard(model: CausalWanModel) -> CausalWanModel:
    """Divide a model over the processes, in place and onto their devices, block by block.

    A block is whole only while it computes. What trains is chosen before.
    """
    mesh = _mesh()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "project_prompt")
    # What is outside the blocks would stay whole after a pass without gradients.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for entrance in ("project_prompt", "stream"):
        register_fsdp_forward_method(model, entrance)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` divided it."""
    return isinstance(model, FSDPModule)


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, whole and on the CPU where they were sharded.

    Only the first process, which writes, gets those; the others get empty ones for them.
    """
    return {name: _whole(t) if isinstance(t, DTensor) else t for name, t in tensors.items()}


def scattered(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, divided as another one is."""
    if isinstance(whole, DTensor) or not isinstance(like, DTensor):
        return whole
    placed = whole.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


class ShardedOptimisers:
    """Optimisers of a sharded model, as a part of a run's state."""

    def __init__(self, optimisers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimisers = optimisers

    def state_dict(self) -> dict[str, Any]:
        """Whole, as accelerate saves it."""
        states = [optimiser.state_dict() for optimiser in self.optimisers]
        for state in states:
            state["state"] = {index: gathered(of) for index, of in state["state"].items()}
        return {"optimisers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave to the first process."""
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            parts = {i: _divided(of, parameters[i]) for i, of in saved["state"].items()}
            optimiser.load_state_dict({**saved, "state": parts})


@cache
def _mesh() -> DeviceMesh:
    """All processes in a row."""
    mesh = init_device_mesh(own_device().type, (processes().num_processes,))
    if mesh.device_type == "cpu":
        atexit.register(_part, mesh)
    return mesh


def _part(mesh: DeviceMesh) -> None:
    """End gloo's threads: one that lets go of a tensor after Python has ended aborts the process.

    They end with the last reference to their group, and caches of torch keep the mesh.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
    getattr(mesh, "_pg_registry", {}).clear()
    gc.collect()


def _whole(tensor: DTensor) -> Tensor:
    whole = tensor.full_tensor().detach()
    return whole.cpu() if processes().is_main_process else torch.empty(0)


def _divided(state: dict[str, Tensor], parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an optimiser keeps of one parameter; a count of steps is nothing to divide."""
    return {
        name: scattered(t, parameter) if t.shape == parameter.shape else t
        for name, t in state.items()
    }
