"""Work that test_distributed starts in two processes: torchrun … workers.py FUNCTION ARGUMENTS."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from checkpoints import CLIPS, CONVERT, EVALUATE, MODEL, RECOVER, PowerCut
from conftest import randomise, tiny_model
from safetensors.torch import save_file
from torch import Tensor

from vmla_convert.config import DMDConfig
from vmla_convert.fitting.mla import convert_model
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.media.clips import open_clips, seeded
from vmla_convert.recovery.dmd import DistributionMatching
from vmla_convert.recovery.recover import recover
from vmla_convert.recovery.trained import unfreeze
from vmla_convert.results import put_rows
from vmla_convert.training.losses import make_example, velocity_distillation
from vmla_convert.training.processes import ALONE, Share, own_share, processes
from vmla_convert.training.sharding import shard, whole_state

SHARDED = replace(
    RECOVER,
    shard=True,
    train="attention",
    on_policy_steps=2,
    training=replace(RECOVER.training, ema=0.5, optimizer="muon"),
)
# Without momentum the first step of AdamW is the sign of the gradient, whatever its size.
CRITIC = replace(
    RECOVER,
    training=replace(RECOVER.training, steps=0, batch_size=4),
    dmd=DMDConfig(steps=1, critic_steps=1, critic_lr=1e-3),
)


def one_step(student: CausalWanModel, teacher: CausalWanModel, share: Share = ALONE) -> None:
    """Plain gradient descent, so that weights show gradients and not only their signs."""
    whole = make_example(open_clips(CLIPS).batch(0, 4), MODEL.chunk_frames, seeded(0, 0, "sharded"))
    trained = [p for p in student.parameters() if p.requires_grad]
    velocity_distillation(teacher)(student, share.of(whole)).backward()
    torch.optim.SGD(trained, lr=1e-2).step()


def critic_step(share: Share = ALONE) -> dict[str, Tensor]:
    """A random critic's weights and gradients after one step."""
    dense = tiny_model(MODEL).requires_grad_(False)
    student = convert_model(dense, replace(CONVERT, init="random"), None)
    dmd = DistributionMatching(student, dense, open_clips(CLIPS), CRITIC, share)
    randomise(dmd.critic, seed=7)
    dmd.examples(0)
    gradients = {f"{n} gradient": p.grad for n, p in dmd.critic.named_parameters()}
    return {**dmd.critic.state_dict(), **{n: g for n, g in gradients.items() if g is not None}}


def sharded_step(converted: str, teacher: str, out: str) -> None:
    """Shard a student, step once, write its whole weights."""
    student = load(converted)
    unfreeze(student, "all")
    shard(student)
    one_step(student, load(teacher), own_share())
    weights = whole_state(student)
    if processes().is_main_process:
        save_file(weights, out)


def shared_critic(folder: str) -> None:
    """Write one process's critic after a step."""
    share = own_share()
    save_file(critic_step(share), Path(folder) / f"critic-{share.rank}")


def cut_recovery(converted: str, teacher: str, out: str, label: str, before: str) -> None:
    """Recover a sharded student until the power is cut, or to the end."""
    cut = PowerCut(label, int(before))
    rows = recover(converted, teacher, Path(out), SHARDED, EVALUATE, cut)
    if processes().is_main_process:
        put_rows(Path(out) / "rows.jsonl", rows)


if __name__ == "__main__":
    {each.__name__: each for each in (sharded_step, shared_critic, cut_recovery)}[sys.argv[1]](
        *sys.argv[2:]
    )
    processes().wait_for_everyone()  # the first process to leave closes the connection
