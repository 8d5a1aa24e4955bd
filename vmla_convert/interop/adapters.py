"""Load LoRAs on a running model as adapters (peft), on the weights that a conversion kept."""

from __future__ import annotations

import re
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

# An MLA layer has no such weights. Its latents were factored from them.
_FACTORED = re.compile(r"blocks\.\d+\.self_attn\.(k|v|norm_k)\.")
_MERGE = "vmla convert CKPT -o OUT --lora FILE"


@dataclass(frozen=True)
class LoraReport:
    """Which weights of a LoRA were loaded, by their native names.

    Attributes:
        loaded: Weights that have an adapter now.
        factored: Weights that the conversion replaced by latents, so that no adapter fits.
        unlike: Weights whose change is not a product of two small matrices.
    """

    loaded: tuple[str, ...]
    factored: tuple[str, ...]
    unlike: tuple[str, ...]

    def __str__(self) -> str:
        parts = []
        if self.factored:
            parts.append(f"replaced by latents: {listed(self.factored)}")
        if self.unlike:
            parts.append(f"not a low-rank change of a matrix: {listed(self.unlike)}")
        left_out = len(self.factored) + len(self.unlike)
        return (
            f"{left_out} of {left_out + len(self.loaded)} weights of this LoRA were left out "
            f"({'; '.join(parts)}). To apply the whole LoRA, merge it when converting: {_MERGE}"
        )


def find_lora(name: str | Path, weight_name: str | None) -> Path:
    """Return the path of a LoRA: a file, or a file in a folder or Hub repository."""
    path = Path(name)
    if path.exists() or not is_repo(str(name)):
        return path / (weight_name or "")
    if weight_name is None:
        raise CheckpointError(
            f"{name} may hold several files", "name the LoRA's: weight_name='lora.safetensors'"
        )
    return fetch(str(name), weight_name)


def read_lora(model: CausalWanModel, path: Path) -> tuple[LoraReport, dict[str, Tensor]]:
    """Return which weights of a LoRA fit a model, and their adapters by PEFT's names.

    Raises:
        CheckpointError: The file is no LoRA of this model, or none of its weights can be loaded.
    """
    shapes = native_shapes(model.config.geometry)
    specs = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}
    lora = open_lora(path, 1.0, specs)
    factored = [name for name in lora.deltas if model.config.mla and _FACTORED.match(name)]
    rest = [name for name in lora.deltas if name not in factored]
    fitting = [name for name in rest if _takes_adapter(model, lora, name)]
    unlike = [name for name in rest if name not in fitting]
    if not fitting:
        raise CheckpointError(
            f"nothing of {path} can be loaded: {listed((*factored, *unlike))}",
            f"merge it when converting: {_MERGE}",
        )
    adapters: dict[str, Tensor] = {}
    for name in fitting:
        pair = lora.pair(name)
        assert pair is not None
        for side, matrix in zip("AB", pair, strict=True):
            adapter = f"{name.removesuffix('.weight')}.lora_{side}.weight"
            adapters[adapter] = matrix.flatten(1).contiguous()
    return LoraReport(tuple(fitting), tuple(factored), tuple(unlike)), adapters


def _takes_adapter(model: CausalWanModel, lora: Lora, native: str) -> bool:
    """Return whether a change is low-rank and belongs to the weight of a linear layer."""
    module, _, kind = native.rpartition(".")
    layer = model.get_submodule(module)
    layer = getattr(layer, "base_layer", layer)  # an earlier adapter wraps the layer
    low_rank = len(lora.deltas[native].names) == 2
    return kind == "weight" and low_rank and isinstance(layer, nn.Linear)
