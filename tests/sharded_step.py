"""Started by test_distributed in two processes: one step of a sharded student, its weights kept.

torchrun --nproc_per_node 2 sharded_step.py CONVERTED TEACHER OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from checkpoints import CLIPS, MODEL
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.pipelines.data import open_clips, seeded
from vmla_convert.pipelines.load import load
from vmla_convert.pipelines.losses import Example, make_example, velocity_distillation
from vmla_convert.pipelines.recovery.trained import unfreeze

RATE = 1e-2


def one_step(student: CausalWanModel, teacher: CausalWanModel, rank: int, world: int) -> None:
    """Plain gradient descent, so that weights show gradients and not only their signs."""
    whole = make_example(open_clips(CLIPS).batch(0, 4), MODEL.chunk_frames, seeded(0, 0, "sharded"))
    share = Example(*(tensor[rank::world] for tensor in whole))
    trained = [p for p in student.parameters() if p.requires_grad]
    velocity_distillation(teacher)(student, share).backward()
    torch.optim.SGD(trained, lr=RATE).step()


def main(converted: Path, teacher: Path, out: Path) -> None:
    """Shard the student's blocks, step, gather."""
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    student = load(converted)
    unfreeze(student, "all")
    mesh = init_device_mesh("cpu", (world,))
    for block in student.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    one_step(student, load(teacher), rank, world)
    state = get_model_state_dict(
        student, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:
        tensors = {name: t.contiguous() for name, t in state.items() if isinstance(t, Tensor)}
        save_file(tensors, out)
    distributed.barrier()  # who leaves first takes the connection along
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
