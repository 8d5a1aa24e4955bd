"""Run a pass of a program's model again with gradients, to weigh errors at the model's output.

A program runs its model under `torch.no_grad`. The second run reads the same cache and changes
nothing: its keys and values are not kept, and it works on copies of the arguments' tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vmla_convert.errors import ConfigError
from vmla_convert.interop.host import uncompiled


class Rehearsal:
    """Finds the gradient of a random direction of a model's output at each layer's output.

    Attributes:
        active: A second run is in progress.
        wanted: The pass attended to past tokens, so that a second run follows.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        seed: int,
        take: Callable[[int, Tensor], None],
    ) -> None:
        """Watch a model; `take` gets the number of a layer and a gradient (B, L, d)."""
        self.active = self.wanted = False
        self._take, self._random = take, torch.Generator().manual_seed(seed)
        self._shifts: dict[int, Tensor] = {}
        again = uncompiled(self._run_again)
        self._hooks = [model.register_forward_hook(again, with_kwargs=True)]
        for index, layer in enumerate(layers):
            shift = uncompiled(partial(self._shift, index))
            self._hooks.append(layer.register_forward_hook(shift))

    def close(self) -> None:
        """Stop running passes again."""
        for hook in self._hooks:
            hook.remove()

    def _shift(self, index: int, *call: Any) -> Tensor | None:
        """Add a zero whose gradient is that of the layer's output."""
        if not self.active:
            return None
        self._shifts[index] = torch.zeros_like(call[-1], requires_grad=True)
        return call[-1] + self._shifts[index]

    def _run_again(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG002
        if self.active or not self.wanted:
            return
        self.active, self.wanted = True, False
        try:
            with torch.inference_mode(False), torch.enable_grad():
                args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
                results = [r for r in tree_leaves(model(*args, **kwargs)) if isinstance(r, Tensor)]
                if not results[0].requires_grad:
                    raise ConfigError(
                        f"{type(model).__name__} computes without gradients",
                        "observe without gradients=True",
                    )
                direction = torch.randn(results[0].shape, generator=self._random)
                total = (results[0] * direction.to(results[0])).sum()
                found = torch.autograd.grad(total, list(self._shifts.values()))
        finally:
            shifts, self._shifts, self.active = list(self._shifts), {}, False
        for index, gradient in zip(shifts, found, strict=True):
            self._take(index, gradient)
