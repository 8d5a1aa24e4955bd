"""Facts that a host tells, and calls that a host gets (documentation: Write a host).

A host is a program that runs a causal video model and keeps the model's keys and values itself.
`observe` and `attach` need the host's layers and a way to put a `TokenCache` in place of the
host's own cache of each layer; everything else stays the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from vmla_convert.interop.tokens import Slots, TokenCache

NewCache = Callable[[int, Slots], TokenCache | None]
"""Makes the cache of a layer, given the layer's number and shape; None leaves the layer dense."""

HOST_PAGE = 'the page "Write a host" of the documentation shows how to connect another program'


@runtime_checkable
class Host(Protocol):
    """A program that keeps keys and values."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Self-attention of every layer, first layer first.

        Each has linear layers `k`, `v` and `o`, norms `norm_q` and `norm_k`, and a number
        `num_heads`.
        """
        ...

    @property
    def rotated(self) -> bool:
        """Whether keys are cached after RoPE."""
        ...

    def connect(self, new_cache: NewCache) -> Callable[[], None]:
        """Put a cache from `new_cache` in place of the program's own cache of every layer.

        In each pass over a chunk the program then calls `start` of the layer's cache with the
        chunk's position, `write` with the new keys and values, `read` for what the chunk attends
        to, and `settle` when attention has run. `move` slides the window.

        Returns:
            A function that gives the program its own cache back.
        """
        ...


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile leaves alone when the host's code is compiled."""
    hook: Any = torch.compiler.disable(function)
    return hook


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Width of keys, and number of heads, of a self-attention layer."""
    heads: Any = layer.num_heads
    return len(linear_of(layer, "k").get_parameter("weight")), int(heads)


def linear_of(layer: nn.Module, name: str) -> nn.Module:
    """A part of a layer, without the adapter that may wrap the part."""
    part = layer.get_submodule(name)
    return getattr(part, "base_layer", part)


def model_of(program: object, host: Host) -> nn.Module | None:
    """The module of a program that has the host's layers under Wan's names."""
    for module in modules_of(program):
        if dict(module.named_modules()).get("blocks.0.self_attn") is host.layers[0]:
            return module
    return None


def modules_of(program: object) -> Iterator[nn.Module]:
    """All modules of a program: those of a module, or of the attributes of another object."""
    parts = [program] if isinstance(program, nn.Module) else vars(program).values()
    seen: set[nn.Module] = set()
    for part in parts:
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if module not in seen:
                seen.add(module)
                yield module
