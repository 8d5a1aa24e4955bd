"""What recovery trains: what the conversion made, and as much of the rest as is asked for."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from vmla_convert.errors import MissingExtraError
from vmla_convert.layers.dit import Block, CausalWanModel
from vmla_convert.layers.mla import LatentSelfAttention

if TYPE_CHECKING:
    from peft import LoraModel

Scope = Literal["new", "attention", "all"]

# What adapters are put on: the source's matrices that a converted model reads everything by.
_ADAPTED = r"blocks\.\d+\.(self_attn\.[qo]|cross_attn\.[qkvo]|ffn\.[02])"
_ATTENTION = ("q.", "o.", "norm_q.")
_ADAPTER = "lora_"


def new_parameters(block: Block) -> list[nn.Parameter]:
    """What a conversion made of a block, and recovery trains first."""
    if block.codec is not None:
        return [block.codec.encode, block.codec.decode]
    layer = block.self_attn
    assert isinstance(layer, LatentSelfAttention)
    parts = [layer.kv_a_proj, layer.kv_b_proj_k, layer.kv_b_proj_v, layer.k_rope_proj]
    return [*(p for part in parts for p in part.parameters()), layer.q_rope_map]


def unfreeze(student: CausalWanModel, scope: Scope) -> None:
    """Let parameters train.

    Args:
        student: All of whose parameters are frozen.
        scope: `new`; `attention` for queries, their norm and the output as well; `all`.
    """
    if scope == "all":
        student.requires_grad_(True)
        return
    for block in student.all_blocks():
        for parameter in new_parameters(block):
            parameter.requires_grad_(True)
        if scope == "attention":
            for name, parameter in block.self_attn.named_parameters():
                if name.startswith(_ATTENTION):
                    parameter.requires_grad_(True)


def new_state(student: CausalWanModel) -> dict[str, Tensor]:
    """A copy of what the conversion made, by name."""
    new = new_names(student)
    return {n: p.detach().clone() for n, p in student.named_parameters() if n in new}


def new_names(student: CausalWanModel) -> frozenset[str]:
    """Names of what the conversion made and of adapters: what takes the full learning rate."""
    made = {id(p) for block in student.all_blocks() for p in new_parameters(block)}
    return frozenset(
        name for name, p in student.named_parameters() if id(p) in made or _ADAPTER in name
    )


def check_adapters(rank: int) -> None:
    """Refuse adapters of a rank above 0 where nothing can make them.

    Raises:
        MissingExtraError: peft is not installed.
    """
    if rank and find_spec("peft") is None:
        raise MissingExtraError("adapters", "lora")


def add_adapters(student: CausalWanModel, rank: int, scope: Scope, seed: int = 0) -> LoraModel:
    """Put low-rank adapters on the frozen matrices of a model, in place; they start at zero.

    Args:
        student: The model.
        rank: Of the adapters.
        scope: What trains by itself.
        seed: Of the half of each adapter that does not start at zero.

    Returns:
        What `merge_adapters` takes.

    Raises:
        MissingExtraError: peft is not installed.
    """
    check_adapters(rank)
    from peft import LoraConfig, LoraModel

    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    names = [
        name
        for name, _ in student.named_modules()
        if re.fullmatch(_ADAPTED, name) and f"{name}.weight" not in trained
    ]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = LoraModel(student, {"default": config}, "default")
    # Whatever peft froze of what trains by itself.
    unfreeze(student, scope)
    return adapted


def merge_adapters(adapted: LoraModel) -> None:
    """Add adapters to the matrices that they are on, and remove them; in place."""
    adapted.merge_and_unload()
