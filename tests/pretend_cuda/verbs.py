"""Commands of the package, one after the other, on the demo model: in a process of the device.

Each scenario is a function of a folder. A scenario may use what an earlier one wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vmla_convert.__main__ import main
from vmla_convert.recovery import layerwise

layerwise.CLIPS, layerwise.HELD_CLIPS = 4, 2

LEARN = (
    "recover.training.batch_size=2",
    "recover.training.steps=1",
    "recover.training.lr=0.001",
    "recover.training.eval_every=1",
    "recover.layerwise_steps=1",
    "recover.data.frames=4",
    "evaluate.clips=2",
    "evaluate.data.frames=4",
    "recover.nested=[0.9,0.95]",
)
FEW = ("convert.calibration_clips=2", "convert.data.frames=4")
FILM = ("--prompt", "7", "--frames", 4)
SHOWN = ("generate.prompts=['7']", "generate.frames=4", "generate.shown=1")


def settings(*pairs: str) -> list[str]:
    """Settings as options."""
    return [word for pair in pairs for word in ("--set", pair)]


def vmla(*args: Any) -> None:
    """Run one command, which must succeed."""
    sys.argv = ["vmla", *map(str, args)]
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    assert not code, f"{' '.join(sys.argv)} ended with {code}"


def convert(out: Path) -> None:
    """A calibrated codec."""
    vmla("convert", "demo", "-o", out / "kv", *settings(*FEW))


def recover(out: Path) -> None:
    """Layer by layer, then distilled at nested sizes in mixed precision."""
    mixed = (
        "recover.training.mixed_precision='bf16'",
        "recover.training.gradient_checkpointing=true",
    )
    vmla("recover", out / "kv", "-o", out / "learned", *settings(*LEARN, *mixed))


def use(out: Path) -> None:
    """Measure and generate."""
    vmla("eval", out / "kv", "--clips", 2, *settings("evaluate.data.frames=4"))
    vmla("generate", out / "learned", *FILM, "-o", out / "kv.mp4")


def convert_mla(out: Path) -> None:
    """MLA layers."""
    vmla("convert", "demo", "-o", out / "mla", "--preset", "videomla", *settings(*FEW))


def recover_mla(out: Path) -> None:
    """All stages of MLA layers, some trained further than the layers."""
    more = (
        "recover.dmd.steps=1",
        "recover.dmd.critic_steps=1",
        "recover.on_policy_steps=1",
        "recover.train='attention'",
        "recover.training.ema=0.9",
        "recover.lora_rank=2",
    )
    teacher = ("--teacher", "demo", "--offload")
    learn = [setting for setting in LEARN if "nested" not in setting]
    vmla("recover", out / "mla", "-o", out / "mla-learned", *teacher, *settings(*learn, *more))


def use_more(out: Path) -> None:
    """Other caches, a longer video, a stream that is continued, and an export."""
    long = ("--prompt", "7", "--frames", 26)
    vmla("eval", out / "mla", "--teacher", "demo", "--clips", 2)
    vmla("generate", out / "mla", *long, "-o", out / "mla.mp4", "--compare", "demo")
    vmla("generate", "demo", *FILM, "-o", out / "int8.mp4", "--cache-dtype", "int8")
    offload = settings("runtime.offload=true")
    saved = ("--save-stream", out / "stream")
    vmla("generate", out / "kv", *FILM, "-o", out / "offload.mp4", *offload, *saved)
    on = ("--resume-stream", out / "stream", "--frames", 6)
    vmla("generate", out / "kv", *on, "-o", out / "more.mp4", *offload)
    for command in ("verify", "inspect", "doctor"):
        vmla(command, out / "kv")
    vmla("export", out / "kv", "-o", out / "whole", "--layout", "self_forcing")


def run_recipe(out: Path) -> None:
    """The recipe of a released model, at the sizes of the demo model."""
    recipe = ("run", "self_forcing_1_3b", "--demo", "-o", out / "recipe")
    vmla(*recipe, *settings(*LEARN, *FEW, *SHOWN))


def run_sweep(out: Path) -> None:
    """A sweep over sizes, recovered and timed."""
    points = (
        "sweep.sizes=[{cut=0.95}]",
        "sweep.mla_sizes=[{cut=0.9}]",
        "sweep.rollout_frames=4",
        "sweep.rollout_prompts=['7']",
        "sweep.timed=true",
    )
    sizes = ("sweep", "size_ablation", "--demo", "-o", out / "sizes")
    learn = [setting for setting in LEARN if "nested" not in setting]
    vmla(*sizes, *settings(*learn, *FEW, *points))
