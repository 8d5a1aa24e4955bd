"""Sizes of a dense Wan model, found in tensors and config.json, and the tensors they need."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.config import Geometry
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.tables import from_dict

C = TypeVar("C")

# Names of Geometry's fields in the config.json of diffusers, where they are not the native ones.
_DIFFUSERS_NAMES = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
}
_WAN_HEAD_DIM = 128


def native_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a dense text-to-video Wan model, by native name, 27 to a block.

    Source: Self-Forcing, `wan/modules/causal_model.py`. Linear weights are (out, in).
    """
    g, d, f = geometry, geometry.dim, geometry.ffn_dim
    linears = {
        "text_embedding.0": (d, g.text_dim),
        "text_embedding.2": (d, d),
        "time_embedding.0": (d, g.freq_dim),
        "time_embedding.2": (d, d),
        "time_projection.1": (6 * d, d),
        "head.head": (prod(g.patch_size) * g.out_dim, d),
        "patch_embedding": (d, g.in_dim, *g.patch_size),
    }
    block_linears = {
        **{f"self_attn.{part}": (d, d) for part in "qkvo"},
        **{f"cross_attn.{part}": (d, d) for part in "qkvo"},
        "ffn.0": (f, d),
        "ffn.2": (d, f),
    }
    block_others = {
        "modulation": (1, 6, d),
        "norm3.weight": (d,),
        "norm3.bias": (d,),
        **{f"{kind}_attn.norm_{part}.weight": (d,) for kind in ("self", "cross") for part in "qk"},
    }
    shapes: dict[str, tuple[int, ...]] = {**_with_bias(linears), "head.modulation": (1, 2, d)}
    for block in range(g.num_layers):
        inside = {**_with_bias(block_linears), **block_others}
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in inside.items()}
    return shapes


def _with_bias(linears: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    weights = {f"{name}.weight": shape for name, shape in linears.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in linears.items()}


def read_geometry(
    specs: Mapping[str, TensorSpec], file_config: Mapping[str, Any], path: Path
) -> Geometry:
    """Find the sizes in shapes, and in config.json what shapes do not show.

    Args:
        specs: Specs of the tensors by native name.
        file_config: The config.json beside the weights; empty when there is none.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: A tensor that shows a size is missing or odd, config.json contradicts the
            shapes, or the checkpoint is image-to-video.
    """
    found = _geometry_of_shapes(specs, path)
    stated = {
        field.name: value
        for field in fields(Geometry)
        for name in (field.name, _DIFFUSERS_NAMES.get(field.name, field.name))
        if (value := file_config.get(name)) is not None
    }
    for field in found.keys() & stated.keys():
        value = tuple(stated[field]) if isinstance(stated[field], list) else stated[field]
        if value != found[field]:
            raise CheckpointError(
                f"config.json says {field} {value}, the tensors of {path} say {found[field]}",
                "put the config.json of this checkpoint beside it, or remove config.json",
            )
    heads = _heads(found["dim"], stated, file_config.get("attention_head_dim"), path)
    return strict(Geometry, {**stated, **found, "num_heads": heads}, path)


def _geometry_of_shapes(specs: Mapping[str, TensorSpec], path: Path) -> dict[str, Any]:
    dim, in_dim, *patch = _shape(specs, "patch_embedding.weight", 5, path)
    head_rows, _ = _shape(specs, "head.head.weight", 2, path)
    out_dim, rest = divmod(head_rows, prod(patch))
    if rest:
        raise CheckpointError(
            f"{path} has a head.head.weight of {head_rows} rows, not a multiple of its patch of "
            f"{'x'.join(map(str, patch))}",
            "check that all its tensors are of one model",
        )
    if in_dim != out_dim:
        raise CheckpointError(
            f"image-to-video checkpoints are not supported yet: {path} takes {in_dim} channels "
            f"and gives {out_dim}",
            "use the text-to-video checkpoint",
        )
    return {
        "dim": dim,
        "in_dim": in_dim,
        "out_dim": out_dim,
        "patch_size": tuple(patch),
        "ffn_dim": _shape(specs, "blocks.0.ffn.0.weight", 2, path)[0],
        "freq_dim": _shape(specs, "time_embedding.0.weight", 2, path)[1],
        "text_dim": _shape(specs, "text_embedding.0.weight", 2, path)[1],
        "num_layers": len(blocks(specs)),
    }


def _shape(specs: Mapping[str, TensorSpec], name: str, rank: int, path: Path) -> tuple[int, ...]:
    if name not in specs:
        raise CheckpointError(f"{path} lacks 1 tensor: {name}", "download the checkpoint again")
    shape = specs[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(
            f"{path} has {name} of shape {shape}, not one of {rank} sides",
            "check that it is a Wan video model",
        )
    return shape


def _heads(dim: int, stated: Mapping[str, Any], head_dim: Any, path: Path) -> int:
    if "num_heads" not in stated and dim % _WAN_HEAD_DIM:
        raise CheckpointError(
            f"{path} does not say how many heads its width of {dim} has",
            "put a config.json with num_heads beside it",
        )
    heads = stated.get("num_heads", dim // _WAN_HEAD_DIM)
    divides = type(heads) is int and heads > 0 and dim % heads == 0
    if not divides or head_dim not in (None, dim // heads):
        width = "" if head_dim is None else f" of width {head_dim}"
        raise CheckpointError(
            f"config.json says {heads!r} heads{width}, which do not make the width {dim} of {path}",
            "put the config.json of this checkpoint beside it",
        )
    return heads


def strict(kind: type[C], table: Any, path: Path) -> C:
    """Make a config from a table of config.json; errors name the file."""
    try:
        return from_dict(kind, table)
    except ConfigError as error:
        raise CheckpointError(
            f"the config.json of {path} does not fit: {error.message}",
            error.hint or "correct this value in config.json",
        ) from error


def block_of(name: str) -> int:
    """Number of the block that a native tensor name belongs to; -1 outside of blocks."""
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


def blocks(names: Iterable[str]) -> set[str]:
    """Numbers of the blocks that native tensor names belong to."""
    return {str(block) for block in map(block_of, names) if block >= 0}
