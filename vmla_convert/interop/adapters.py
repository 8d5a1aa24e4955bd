"""LoRAs on a running model: adapters (peft) on what a conversion left as it was."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vmla_convert.checkpoint.geometry import native_shapes
from vmla_convert.checkpoint.hub import fetch, is_repo
from vmla_convert.checkpoint.keymap import listed
from vmla_convert.checkpoint.lora import Lora, open_lora
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.errors import CheckpointError
from vmla_convert.layers.dit import CausalWanModel

# The past is read from latents that were made of these; changed where they are left, for the chunk
# itself, they would no longer be those that its past was made of.
_FACTORED = re.compile(r"blocks\.\d+\.self_attn\.(k|v|norm_k)\.")


@dataclass(frozen=True)
class LoraReport:
    """What became of a LoRA.

    Attributes:
        loaded: Native names of the weights that have an adapter now.
        factored: Those that the conversion made latents of; no adapter reaches them.
        unlike: Those whose change is no product of two small matrices.
    """

    loaded: tuple[str, ...]
    factored: tuple[str, ...]
    unlike: tuple[str, ...]

    def __str__(self) -> str:
        """What was left out, and how to have it."""
        parts = []
        if self.factored:
            parts.append(f"of what was factored into latents: {listed(self.factored)}")
        if self.unlike:
            parts.append(f"no low-rank change of a matrix: {listed(self.unlike)}")
        count = len(self.factored) + len(self.unlike)
        return (
            f"{count} of {count + len(self.loaded)} weights of this LoRA were left out, "
            f"{'; '.join(parts)}; to have all of it: vmla convert CKPT -o OUT --lora FILE"
        )


def find_lora(name: str | Path, weight_name: str | None) -> Path:
    """Where a LoRA lies, fetched from the Hub if it must be.

    Args:
        name: A file or folder, or a Hub id.
        weight_name: A file in it.

    Raises:
        CheckpointError: It cannot be had, or a repository was named without a file.
    """
    path = Path(name)
    if path.exists() or not is_repo(str(name)):
        return path / (weight_name or "")
    if weight_name is None:
        raise CheckpointError(
            f"{name} may hold several files", "name the LoRA's: weight_name='lora.safetensors'"
        )
    return fetch(str(name), weight_name)


def read_lora(model: CausalWanModel, path: Path) -> tuple[LoraReport, dict[str, Tensor]]:
    """Match a LoRA with a model.

    Args:
        model: Dense or converted.
        path: Of the LoRA.

    Returns:
        The report, and adapters by PEFT's names within the model.

    Raises:
        CheckpointError: It is no LoRA of this model's dense source, or nothing of it can be loaded.
    """
    shapes = native_shapes(model.config.geometry)
    specs = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}
    lora = open_lora(path, 1.0, specs)
    converted = model.config.mla is not None
    factored = [name for name in lora.deltas if converted and _FACTORED.match(name)]
    rest = [name for name in lora.deltas if name not in factored]
    fitting = [name for name in rest if _adapts(model, lora, name)]
    unlike = [name for name in rest if name not in fitting]
    report = LoraReport(tuple(fitting), tuple(factored), tuple(unlike))
    if not fitting:
        raise CheckpointError(
            f"nothing of {path} can be loaded: {listed((*factored, *unlike))}",
            "merge it when converting: vmla convert CKPT -o OUT --lora FILE",
        )
    return report, _adapters(lora, fitting)


def _adapts(model: CausalWanModel, lora: Lora, native: str) -> bool:
    """Whether peft has an adapter for this change: of a linear layer's weight, and low in rank."""
    module, _, kind = native.rpartition(".")
    linear = kind == "weight" and isinstance(_base(model.get_submodule(module)), nn.Linear)
    return linear and len(lora.deltas[native].names) == 2


def _base(module: nn.Module) -> nn.Module:
    """The layer under the adapters that it has already."""
    base = getattr(module, "base_layer", module)
    assert isinstance(base, nn.Module)
    return base


def _adapters(lora: Lora, names: Iterable[str]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in names:
        pair = lora.pair(name)
        assert pair is not None
        module = name.removesuffix(".weight")
        for side, matrix in zip("AB", pair, strict=True):
            state[f"{module}.lora_{side}.weight"] = matrix.flatten(1).contiguous()
    return state
