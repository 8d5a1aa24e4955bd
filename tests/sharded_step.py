"""Started by test_distributed in two processes: one step of a sharded student, its weights kept.

torchrun --nproc_per_node 2 sharded_step.py CONVERTED TEACHER OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from checkpoints import CLIPS, MODEL
from safetensors.torch import save_file

from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.media.clips import open_clips, seeded
from vmla_convert.recovery.trained import unfreeze
from vmla_convert.training.losses import Example, make_example, velocity_distillation
from vmla_convert.training.processes import processes
from vmla_convert.training.sharding import shard, whole_state

RATE = 1e-2


def one_step(student: CausalWanModel, teacher: CausalWanModel, rank: int, world: int) -> None:
    """Plain gradient descent, so that weights show gradients and not only their signs."""
    whole = make_example(open_clips(CLIPS).batch(0, 4), MODEL.chunk_frames, seeded(0, 0, "sharded"))
    share = Example(*(tensor[rank::world] for tensor in whole))
    trained = [p for p in student.parameters() if p.requires_grad]
    velocity_distillation(teacher)(student, share).backward()
    torch.optim.SGD(trained, lr=RATE).step()


def main(converted: Path, teacher: Path, out: Path) -> None:
    """Shard the student, step, gather."""
    state, student = processes(), load(converted)
    unfreeze(student, "all")
    shard(student)
    one_step(student, load(teacher), state.process_index, state.num_processes)
    weights = whole_state(student)
    if state.is_main_process:
        save_file(weights, out)
    state.wait_for_everyone()  # who leaves first takes the connection along


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
