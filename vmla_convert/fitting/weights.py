"""Weights are read from dense layers, cast for a file, and put into a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vmla_convert.config import ModelConfig
from vmla_convert.errors import ConfigError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.projections import KVWeights

Read = Callable[[str], Tensor]
"""Reads a tensor of the dense model by native name."""


def layer_weights(read: Read, layer: int, num_heads: int) -> KVWeights:
    """Read the attention weights of one dense layer as float64, the query gain folded in."""

    def tensor(name: str) -> Tensor:
        # Factoring is float64 on the CPU, wherever the model lives.
        return read(f"blocks.{layer}.self_attn.{name}").cpu().double()

    query_gain = tensor("norm_q.weight")
    return KVWeights(
        query=query_gain[:, None] * tensor("q.weight"),
        query_bias=query_gain * tensor("q.bias"),
        raw_key=tensor("k.weight"),
        raw_key_bias=tensor("k.bias"),
        key_gain=tensor("norm_k.weight"),
        value=tensor("v.weight"),
        value_bias=tensor("v.bias"),
        output=tensor("o.weight"),
        num_heads=num_heads,
    )


def cast_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a fitted tensor to the dtype of a file.

    Raises:
        ConfigError: A number is not finite, or is out of the dtype's range.
    """
    cast = tensor.to(dtype)
    if cast.isfinite().all():
        return cast
    if dtype == torch.float16:
        raise ConfigError(f"'{name}' has numbers that float16 cannot hold", "use bfloat16")
    raise ConfigError(
        f"'{name}' came out with NaN or infinite numbers", "calibrate on other clips: --data"
    )


def with_tensors(
    dense: CausalWanModel, config: ModelConfig, tensors: dict[str, Tensor]
) -> CausalWanModel:
    """Build a converted model in memory.

    Args:
        dense: The dense model. Weights that the converted model keeps are copied.
        config: Config of the converted model.
        tensors: New parameters of the converted model, by full name.
    """
    with torch.device("meta"):
        model = CausalWanModel(config)
    expected, device = model.state_dict(), dense.patch_embedding.weight.device
    kept = {name: t.clone() for name, t in dense.state_dict().items() if name in expected}
    new = {name: tensor.to(device) for name, tensor in tensors.items()}
    model.load_state_dict(kept | new, assign=True)
    return model.eval().requires_grad_(False)
