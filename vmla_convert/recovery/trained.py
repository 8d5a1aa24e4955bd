"""The parameters that recovery trains: the conversion's own, and as many others as asked for."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from vmla_convert.errors import MissingExtraError
from vmla_convert.layers.block import Block
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.mla import LatentSelfAttention

if TYPE_CHECKING:
    from peft import LoraModel

Scope = Literal["new", "attention", "all"]

# Matrices of the base model that get adapters.
_ADAPTED = r"blocks\.\d+\.(self_attn\.[qo]|cross_attn\.[qkvo]|ffn\.[02])"
_ATTENTION = ("q.", "o.", "norm_q.")
_ADAPTER = "lora_"


def new_parameters(block: Block) -> list[nn.Parameter]:
    """Parameters of a block that a conversion made."""
    if block.codec is not None:
        return [block.codec.encode, block.codec.decode]
    layer = block.self_attn
    assert isinstance(layer, LatentSelfAttention)
    parts = [layer.kv_a_proj, layer.kv_b_proj_k, layer.kv_b_proj_v, layer.k_rope_proj]
    return [*(p for part in parts for p in part.parameters()), layer.q_rope_map]


def new_names(student: CausalWanModel) -> frozenset[str]:
    """Names of the conversion's parameters and of adapters; these get the full learning rate."""
    made = {id(p) for block in student.all_blocks() for p in new_parameters(block)}
    return frozenset(
        name for name, p in student.named_parameters() if id(p) in made or _ADAPTER in name
    )


def new_tensors(block: Block) -> dict[str, Tensor]:
    """Parameters of a block that a conversion made, by name."""
    new = {id(parameter) for parameter in new_parameters(block)}
    return {name: p for name, p in block.named_parameters() if id(p) in new}


def unfreeze(student: CausalWanModel, scope: Scope) -> None:
    """Let parameters of a frozen model require gradients.

    The scope `new` has the conversion's parameters, `attention` queries, query norm and output as
    well, `all` everything.
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


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen linear maps of a model in a dtype of mixed precision.

    Autocast would convert these weights before each product, so no result changes. Norms,
    modulation and everything that trains stay as they are.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not any(p.requires_grad for p in module.parameters()):
            module.to(dtype)


def check_adapters(rank: int) -> None:
    """Check that adapters of a rank above 0 can be made.

    Raises:
        MissingExtraError: peft is not installed.
    """
    if rank and find_spec("peft") is None:
        raise MissingExtraError("adapters", "lora")


def add_adapters(student: CausalWanModel, rank: int, scope: Scope, seed: int = 0) -> LoraModel:
    """Add low-rank adapters to the matrices that `unfreeze` left frozen, in place.

    Adapters change nothing at first: one half of each starts at zero, the other half is random.
    `merge_and_unload()` of the returned wrapper adds the adapters to their matrices.
    """
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
    # peft freezes everything but its adapters.
    unfreeze(student, scope)
    return adapted
