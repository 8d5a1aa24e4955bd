"""Which family a checkpoint is of, its geometry, and its tensors under native Wan names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch

from vmla_convert.checkpoint.keymap import (
    DIFFUSERS_RULES,
    IMAGE_TO_VIDEO,
    NATIVE_RULES,
    Rule,
    fill,
    listed,
    strip_wrappers,
    to_native,
)
from vmla_convert.checkpoint.source import TensorSource, TensorSpec, open_source
from vmla_convert.config import (
    CONFIG_VERSION,
    CachePolicy,
    Geometry,
    ModelConfig,
    SamplerConfig,
    from_dict,
    to_dict,
)
from vmla_convert.errors import CheckpointError, ConfigError, did_you_mean

C = TypeVar("C")

FORMAT = "vmla-convert"

# What a checkpoint's tensors cannot tell; a table "vmla" in its config.json overrides any of it.
DEFAULTS: dict[str, Any] = {
    "latent_size": (60, 104),
    "chunk_frames": 3,
    "cache": to_dict(CachePolicy(window_frames=21)),
    "sampler": to_dict(SamplerConfig()),
    "codec": "wan",
    "licence": "unknown",
    "base_model": "unknown",
}

# Geometry's fields under the names that config.json gives them, native first, diffusers after.
_CONFIG_NAMES = {
    "dim": ("dim",),
    "ffn_dim": ("ffn_dim",),
    "num_heads": ("num_heads", "num_attention_heads"),
    "num_layers": ("num_layers",),
    "in_dim": ("in_dim", "in_channels"),
    "out_dim": ("out_dim", "out_channels"),
    "freq_dim": ("freq_dim",),
    "text_dim": ("text_dim",),
    "text_len": ("text_len",),
    "patch_size": ("patch_size",),
    "eps": ("eps",),
}
_WAN_HEAD_DIM = 128

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_QUANTISED = re.compile(
    r"(^|[._])(quantized_weight_\w+|scales?|scale_inv|scale_weight|scale_input|scaled_fp8)$"
)


@dataclass(frozen=True)
class Clues:
    """What detection looks at.

    Attributes:
        names: Tensor names without wrappers.
        wrapped: The names were nested in a trainer's file or carried its wrappers.
        config: The config.json beside the weights; empty when there is none.
    """

    names: frozenset[str]
    wrapped: bool
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints: how to know it, and its names.

    Attributes:
        name: As users meet it, and as `ModelConfig.family` records it.
        detect: Whether a checkpoint is of this family.
        rules: Its names to native ones; empty when its names are native and may be more than Wan's.
    """

    name: str
    detect: Callable[[Clues], bool]
    rules: tuple[Rule, ...]


def _is_vmla(clues: Clues) -> bool:
    return clues.config.get("format") == FORMAT


def _is_diffusers(clues: Clues) -> bool:
    return "blocks.0.attn1.to_k.weight" in clues.names


def _is_self_forcing(clues: Clues) -> bool:
    return clues.wrapped and "blocks.0.self_attn.k.weight" in clues.names


def _is_wan(clues: Clues) -> bool:
    return not clues.wrapped and "blocks.0.self_attn.k.weight" in clues.names


# The first that detects wins: a converted folder may look like Wan in all but its config.json.
FAMILIES = (
    Family("vmla", _is_vmla, ()),
    Family("diffusers", _is_diffusers, DIFFUSERS_RULES),
    Family("self_forcing", _is_self_forcing, NATIVE_RULES),
    Family("wan", _is_wan, NATIVE_RULES),
)


@dataclass(frozen=True)
class OpenCheckpoint:
    """A recognised checkpoint, its tensors under native Wan names.

    Attributes:
        source: Where the bytes are.
        family: A name of `FAMILIES`.
        names: Native name to source name.
        config: The model that the tensors make.
    """

    source: TensorSource
    family: str
    names: dict[str, str]
    config: ModelConfig

    def read(self, native: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        if native not in self.names:
            raise CheckpointError(
                f"{self.source.path} has no tensor '{native}'", did_you_mean(native, self.names)
            )
        return self.source.read(self.names[native])

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, by native name."""
        specs = self.source.specs()
        return {native: specs[name] for native, name in self.names.items()}

    def parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(prod(spec.shape) for spec in self.specs().values())


def open_checkpoint(path: Path, key: str | None = None) -> OpenCheckpoint:
    """Open a checkpoint of any supported family, checked whole before any tensor is read.

    Args:
        path: A file or folder, as for `open_source`; a config.json beside it is read too.
        key: The state dict wanted from a pickle that holds several.

    Raises:
        CheckpointError: The file cannot be read, is of no known family, is quantised or
            image-to-video, has missing, extra or misshapen tensors, or contradicts its config.json.
    """
    source = open_source(path, key)
    file_config = _read_config(path)
    clean = strip_wrappers(source.specs())
    wrapped = source.key is not None or any(name != raw for name, raw in clean.items())
    family = _detect(Clues(frozenset(clean), wrapped, file_config), path)
    if not family.rules:
        opened = OpenCheckpoint(source, family.name, clean, _converted_model(file_config, path))
        _check_tensors(opened)
        return opened
    _refuse_quantised({name: source.specs()[raw] for name, raw in clean.items()}, path)
    names = {native: clean[name] for native, name in to_native(clean, family.rules).items()}
    _refuse_image_to_video(names, path)
    specs = source.specs()
    geometry = _geometry({native: specs[raw] for native, raw in names.items()}, file_config, path)
    config = _model_config(geometry, family.name, file_config.get("vmla", {}), path)
    opened = OpenCheckpoint(source, family.name, names, config)
    _check_tensors(opened)
    return opened


def converted_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of our own folders, the one that `open_checkpoint` reads back."""
    return {"format": FORMAT, "version": CONFIG_VERSION, "model": to_dict(config)}


def native_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Every tensor of a dense text-to-video Wan model, 27 to a block, and its shape.

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


def _read_config(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}", "mend or remove it") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON table", "mend or remove it")
    return config


def _detect(clues: Clues, path: Path) -> Family:
    for family in FAMILIES:
        if family.detect(clues):
            return family
    raise CheckpointError(
        f"{path} is of no known family; it holds {listed(clues.names)}",
        f"known: {', '.join(family.name for family in FAMILIES)}",
    )


def _refuse_quantised(specs: Mapping[str, TensorSpec], path: Path) -> None:
    odd = [
        name for name, spec in specs.items() if spec.dtype not in _FLOATS or _QUANTISED.search(name)
    ]
    if odd:
        raise CheckpointError(
            f"{path} is quantised: {listed(odd)}",
            "use a bf16, fp16 or fp32 version of this checkpoint",
        )


def _refuse_image_to_video(names: Mapping[str, str], path: Path) -> None:
    extras = {rule.native for rule in IMAGE_TO_VIDEO}
    blocks = _blocks(names)
    if found := [n for t in extras for n in {fill(t, b) for b in blocks} if n in names]:
        raise CheckpointError(
            f"image-to-video checkpoints are not supported yet: {path} has {listed(found)}",
            "use the text-to-video checkpoint",
        )


def _blocks(names: Mapping[str, Any]) -> set[str]:
    return {match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}


def _geometry(
    specs: Mapping[str, TensorSpec], file_config: Mapping[str, Any], path: Path
) -> Geometry:
    """Geometry from shapes; what shapes cannot tell from config.json, which must agree."""
    read = _geometry_of_shapes(specs, path)
    told = {
        field: file_config[name]
        for field, names in _CONFIG_NAMES.items()
        for name in names
        if file_config.get(name) is not None
    }
    _check_agreement(read, told, path)
    if "num_heads" not in told:
        told["num_heads"] = _heads_of_width(read["dim"], path)
    _check_heads(read["dim"], told["num_heads"], file_config.get("attention_head_dim"), path)
    return _strict(Geometry, {**told, **read}, path)


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
        "num_layers": len(_blocks(specs)),
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


def _check_agreement(read: Mapping[str, Any], told: Mapping[str, Any], path: Path) -> None:
    for field in read.keys() & told.keys():
        value = tuple(told[field]) if isinstance(told[field], list) else told[field]
        if value != read[field]:
            raise CheckpointError(
                f"config.json says {field} {value}, the tensors of {path} say {read[field]}",
                "put the config.json of this very checkpoint beside it, or remove it",
            )


def _check_heads(dim: int, heads: Any, head_dim: Any, path: Path) -> None:
    split = type(heads) is int and heads > 0 and dim % heads == 0
    if not split or head_dim not in (None, dim // heads):
        width = "" if head_dim is None else f" of width {head_dim}"
        raise CheckpointError(
            f"config.json says {heads!r} heads{width}, which do not make the width {dim} of {path}",
            "put the config.json of this very checkpoint beside it",
        )


def _heads_of_width(dim: int, path: Path) -> int:
    if dim % _WAN_HEAD_DIM:
        raise CheckpointError(
            f"{path} does not say how many heads its width of {dim} has",
            "put a config.json with num_heads beside it",
        )
    return dim // _WAN_HEAD_DIM


def _model_config(geometry: Geometry, family: str, table: Any, path: Path) -> ModelConfig:
    if not isinstance(table, dict):
        raise CheckpointError(
            f"'vmla' in the config.json of {path} is not a table", "make it a table or remove it"
        )
    for name in table:
        if name not in DEFAULTS:
            raise CheckpointError(
                f"unknown key 'vmla.{name}' in the config.json of {path}",
                did_you_mean(name, DEFAULTS),
            )
    own = {"geometry": to_dict(geometry), "family": family}
    return _strict(ModelConfig, {**DEFAULTS, **table, **own}, path)


def _converted_model(file_config: Mapping[str, Any], path: Path) -> ModelConfig:
    version = file_config.get("version")
    if version != CONFIG_VERSION:
        raise CheckpointError(
            f"{path} is of format version {version!r}, this program knows {CONFIG_VERSION}",
            "pip install -U vmla-convert",
        )
    return _strict(ModelConfig, file_config.get("model"), path)


def _strict(kind: type[C], table: Any, path: Path) -> C:
    try:
        return from_dict(kind, table)
    except ConfigError as error:
        raise CheckpointError(
            f"the config.json of {path} does not fit: {error.message}",
            error.hint or "correct this value in config.json",
        ) from error


def _check_tensors(opened: OpenCheckpoint) -> None:
    """No tensor is missing, left over or of another shape.

    A converted model's self-attention is its layer's affair, so its tensors pass.
    """
    config, path = opened.config, opened.source.path
    expected = native_shapes(config.geometry)
    found = {name: spec.shape for name, spec in opened.specs().items()}
    if config.mla is not None:
        ours = re.compile(rf"blocks\.({'|'.join(_blocks(expected))})\.self_attn\.")
        expected = {name: shape for name, shape in expected.items() if not ours.match(name)}
        found = {name: shape for name, shape in found.items() if not ours.match(name)}
    if missing := expected.keys() - found.keys():
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors: {listed(missing)}",
            "download the checkpoint again",
        )
    if extra := found.keys() - expected.keys():
        raise CheckpointError(
            f"{path} has {len(extra)} tensors that its model has not: {listed(extra)}",
            "drop them from the checkpoint",
        )
    if odd := [name for name in expected if found[name] != expected[name]]:
        raise CheckpointError(
            f"{path} has {odd[0]} of shape {found[odd[0]]}, expected {expected[odd[0]]}",
            "check that all its tensors and its config.json are of one model",
        )
