"""Sharded models (FSDP2): every process holds a part of each parameter.

All processes must make the same calls, because each call may gather shards.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.training.processes import own_device, processes
from vmla_convert.training.weights import place

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
"""State dicts of whole tensors on the CPU of the main process, whether sharded or not."""
TRAINED = replace(WHOLE, ignore_frozen_params=True)


def shard(model: CausalWanModel) -> CausalWanModel:
    """Shard a model over the processes, in place and block by block.

    A block is gathered only while it computes. Set `requires_grad` before.
    """
    mesh = _mesh()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "project_prompt")
    # By default the root's own parameters stay gathered after a pass without gradients.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for method in ("project_prompt", "stream"):
        register_fsdp_forward_method(model, method)
    return model


@torch.no_grad()
def fill(model: CausalWanModel, read: Callable[[str], Tensor]) -> None:
    """Give a sharded model without memory its weights, one after the other.

    No process holds more than one whole tensor.

    Args:
        model: A model on the meta device, after `shard`.
        read: Gives a whole tensor by name, on every process.
    """
    model.to_empty(device=own_device())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        tensor.copy_(place(read(name).to(tensor.dtype), tensor))


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied to the model."""
    return isinstance(model, FSDPModule)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model, on the CPU of the main process."""
    if not is_sharded(model):
        state = model.state_dict().items()
        return {name: tensor if tensor.is_meta else tensor.cpu() for name, tensor in state}
    return cast(dict[str, Tensor], get_model_state_dict(model, options=WHOLE))


@cache
def _mesh() -> DeviceMesh:
    """All processes in one dimension."""
    mesh = init_device_mesh(own_device().type, (processes().num_processes,))
    if mesh.device_type == "cpu":
        atexit.register(_end_gloo)
    return mesh


def _end_gloo() -> None:
    """End gloo's threads before Python ends, or a late free of a tensor aborts the process."""
    _mesh.cache_clear()
    distributed.destroy_process_group()
    gc.collect()
