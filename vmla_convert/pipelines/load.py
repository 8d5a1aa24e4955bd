"""Open any checkpoint, dense or converted, as a running model."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint, open_checkpoint
from vmla_convert.errors import CheckpointError
from vmla_convert.layers.dit import Block, CausalWanModel

DEMO = "demo"


def checkpoint_path(name: str | Path) -> Path:
    """The path that a user's word for a checkpoint means; `demo` is the one that ships."""
    if str(name) == DEMO:
        return Path(str(files("vmla_convert") / "demo" / "checkpoint"))
    return Path(name)


def compute_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CausalWanModel:
    """Load a dense checkpoint of the Wan family or a converted folder, ready to run.

    Args:
        path: A file or folder, or `demo`.
        device: Where the weights go.
        dtype: Of all weights.

    Raises:
        CheckpointError: The path is no checkpoint of a known layout.
    """
    return build(open_checkpoint(checkpoint_path(path)), device, dtype)


def build(
    checkpoint: OpenCheckpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CausalWanModel:
    """The model of an open checkpoint, in evaluation mode and frozen."""
    with torch.device("meta"):
        model = CausalWanModel(checkpoint.config)
    expected = model.state_dict()
    _check_tensors(checkpoint, {name: tuple(t.shape) for name, t in expected.items()})
    state = {name: checkpoint.read(name).to(device, dtype) for name in expected}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def build_shell(checkpoint: OpenCheckpoint, device: torch.device | str = "cpu") -> CausalWanModel:
    """All of a dense model but its blocks, which `read_block` gives one by one."""
    outside = {name for name in checkpoint.names if not name.startswith("blocks.")}
    config = checkpoint.config
    empty = replace(config, geometry=replace(config.geometry, num_layers=0))
    with torch.device("meta"):
        shell = CausalWanModel(empty)
    state = {name: checkpoint.read(name).to(device, torch.float32) for name in outside}
    shell.load_state_dict(state, assign=True)
    shell.config = config
    return shell.eval().requires_grad_(False)


def read_block(checkpoint: OpenCheckpoint, layer: int, device: torch.device | str = "cpu") -> Block:
    """One block of a dense checkpoint, in evaluation mode and frozen."""
    with torch.device("meta"):
        block = Block(checkpoint.config, layer)
    state = {
        name: checkpoint.read(f"blocks.{layer}.{name}").to(device, torch.float32)
        for name in block.state_dict()
    }
    block.load_state_dict(state, assign=True)
    return block.eval().requires_grad_(False)


def _check_tensors(checkpoint: OpenCheckpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """A damaged or edited folder is refused by the name of its first wrong tensor."""
    found = {name: spec.shape for name, spec in checkpoint.specs().items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)
    )
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"tensor '{name}' of {checkpoint.source.path} has shape {found.get(name)}, "
            f"its config asks for {expected.get(name)}",
            "convert the source checkpoint again",
        )
