"""Merge LoRAs of any common file form into dense weights, one tensor at a time.

A linear weight W (d, c) becomes W + scale · alpha/r · up · down, with down (r, c) and up (d, r).
Sources: PEFT, `tuners/lora/layer.py`, for the factor; LightX2V, `tools/extract/lora_extractor.py`,
for `diff`, `diff_b`, `diff_m`; diffusers, `loaders/lora_conversion_utils.py`, for kohya's names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vmla_convert.checkpoint.geometry import blocks
from vmla_convert.checkpoint.keymap import DIFFUSERS_RULES, fill, listed, strip_wrappers
from vmla_convert.checkpoint.licences import UNKNOWN, read_licence
from vmla_convert.checkpoint.source import TensorSource, TensorSpec, open_source
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.storage.limits import opened_safetensors
from vmla_convert.tables import parse_json, read_json

# LongLive keeps the adapters of its generator and of its critic in one file.
_STATE_KEY = "generator_lora"
_ADAPTER_CONFIG = "adapter_config.json"
_DIFFUSERS_METADATA = "lora_adapter_metadata"
# Kohya's trainers write the first key into the file's metadata, others the second.
_LICENCES = ("modelspec.license", "license")

_PREFIXES = re.compile(r"^(?:(?:base_model|model|diffusion_model|transformer)\.)*")
_KOHYA_PREFIX = "lora_unet_"

# A tensor's name: the module that it changes, then its part; PEFT may add the adapter's name.
_NAME = re.compile(
    r"(?P<module>.+)\.(?:(?P<side>lora_(?:A|B|down|up))(?:\.[^.]+)?\.(?P<kind>weight|bias)"
    r"|(?P<part>alpha|diff|diff_b|diff_m))"
)
_PARTS = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_up.bias": "up_bias",
}
_LOW_RANK = ("down", "up", "up_bias", "alpha")
# The parameter of the module that each part changes.
_KINDS = {
    **dict.fromkeys(("down", "up", "alpha", "diff"), "weight"),
    **dict.fromkeys(("up_bias", "diff_b"), "bias"),
    "diff_m": "modulation",
}

_UNSUPPORTED = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoKr": re.compile(r"lokr_"),
    "LoHa": re.compile(r"hada_"),
}
_IMAGE_TO_VIDEO = re.compile(r"_img\b|img_emb|add_[kv]_proj|norm_added|image_embedder")
_SCALE = re.compile(
    r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf(?:inity)?)", re.ASCII | re.IGNORECASE
)

_OF_THIS_MODEL = "use a LoRA that was trained on this model"
_CORRECT_SETTINGS = f"put the LoRA's own {_ADAPTER_CONFIG} beside it, or remove that file"

# Module, as the file spells it, to part to tensor name.
_Modules = dict[str, dict[str, str]]


@dataclass(frozen=True)
class _Delta:
    """The change of one native tensor: factor · up · down, or factor · diff.

    Attributes:
        names: (down, up) or (diff,), as the file names them.
        factor: alpha/r or alpha/√r for low-rank parts, 1 for others.
    """

    names: tuple[str, ...]
    factor: float


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits one model.

    Attributes:
        scale: Strength of the merge; 1 merges the LoRA as it was trained.
        deltas: Native name to the change of that tensor.
        licence: The licence that the file states, or `unknown`.
    """

    path: Path
    scale: float
    source: TensorSource = field(repr=False)
    deltas: Mapping[str, _Delta] = field(repr=False)
    licence: str = UNKNOWN

    def apply(self, native: str, tensor: torch.Tensor) -> torch.Tensor:
        """Merge this LoRA into a tensor; a tensor that it does not change is returned as is.

        The sum is computed in float32 or wider and rounded once. NaN and infinity are refused.
        """
        if native not in self.deltas:
            return tensor
        delta = self.deltas[native]
        wide = torch.promote_types(tensor.dtype, torch.float32)
        first, *rest = [self._read(name).to(tensor.device, wide) for name in delta.names]
        change = rest[0].flatten(1) @ first.flatten(1) if rest else first
        change = change.reshape(tensor.shape)
        return tensor.to(wide).add(change, alpha=self.scale * delta.factor).to(tensor.dtype)

    def pair(self, native: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Down (r, …) and scaled up (d, r) in float32; None where the change is not low-rank."""
        delta = self.deltas[native]
        if len(delta.names) == 1:
            return None
        down, up = (self._read(name).float() for name in delta.names)
        return down, up * (self.scale * delta.factor)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self.source.read(name)
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"'{name}' in {self.path} holds NaN or infinity", "download the LoRA again"
            )
        return tensor


def open_lora(path: Path, scale: float, specs: Mapping[str, TensorSpec]) -> Lora:
    """Open a LoRA for one model; all headers are checked, no matrix is read.

    Args:
        path: A file or folder, as for `open_source`; PEFT's adapter_config.json beside it is read.
        scale: Strength of the merge; 1 merges the LoRA as it was trained.
        specs: The model's tensors by native name.

    Raises:
        CheckpointError: The file cannot be read, is not a LoRA of a supported kind, lacks half of a
            pair, or does not fit the model.
    """
    source = _open(path)
    found = source.specs()
    modules = _modules(found, path)
    names = _native_names(modules, specs, path)
    settings = _read_settings(path)
    deltas: dict[str, _Delta] = {}
    for module, parts in modules.items():
        factor = 1.0
        if "down" in parts:
            weight = names[f"{module}.weight"]
            pair = (parts["down"], parts["up"])
            rank = _check_pair(pair, found, weight, specs[weight], path)
            factor = settings.factor(rank, _read_alpha(source, parts, found, path), path)
        for part, name in parts.items():
            if part in ("up", "alpha"):
                continue
            native = names[f"{module}.{_KINDS[part]}"]
            own = (name, parts["up"]) if part == "down" else (name,)
            if part != "down" and found[name].shape != specs[native].shape:
                raise CheckpointError(
                    f"{path} has {name} of shape {found[name].shape}, but {native} has shape "
                    f"{specs[native].shape}",
                    _OF_THIS_MODEL,
                )
            if native in deltas:
                raise CheckpointError(
                    f"{path} changes {native} twice: {listed((*deltas[native].names, *own))}",
                    "keep one of the two",
                )
            deltas[native] = _Delta(own, factor if part in _LOW_RANK else 1.0)
    metadata = _read_metadata(path)
    licence = next((metadata[key] for key in _LICENCES if key in metadata), None)
    return Lora(path, scale, source, deltas, read_licence(licence))


def parse_lora(option: str) -> tuple[Path, float]:
    """Split FILE or FILE:SCALE; only a number after the last colon is a scale.

    Raises:
        ConfigError: The scale is not finite, or there is no file before it.
    """
    file, colon, number = option.rpartition(":")
    if not colon or not _SCALE.fullmatch(number):
        file, number = option, "1"
    if not file:
        raise ConfigError(f"'{option}' names no LoRA", "give it as FILE or FILE:0.8")
    scale = float(number)
    if not math.isfinite(scale):
        raise ConfigError(f"'{option}' has a scale that is not finite", "give it as FILE:0.8")
    return Path(file), scale


def _open(path: Path) -> TensorSource:
    try:
        return open_source(path, _STATE_KEY)
    except CheckpointError:  # a flat file, or a damaged one, which the next line reports
        return open_source(path)


def _modules(found: Mapping[str, TensorSpec], path: Path) -> _Modules:
    """Group the file's tensors by module and part; every tensor must belong to a LoRA."""
    for kind, pattern in _UNSUPPORTED.items():
        if odd := [name for name in found if pattern.search(name)]:
            raise CheckpointError(
                f"{path} is a {kind}, which is not supported: {listed(odd)}",
                "merge it with the program that trained it, or use a plain LoRA",
            )
    modules: _Modules = {}
    unknown: list[str] = []
    for name, raw in strip_wrappers(found).items():
        match = _NAME.fullmatch(_PREFIXES.sub("", name))
        part = match and (match["part"] or _PARTS.get(f"{match['side']}.{match['kind']}"))
        if not match or not part:
            unknown.append(raw)
            continue
        parts = modules.setdefault(match["module"], {})
        if part in parts:
            raise CheckpointError(
                f"'{parts[part]}' and '{raw}' in {path} are the same part of a LoRA",
                "save each adapter in a file of its own",
            )
        parts[part] = raw
    if not modules:
        raise CheckpointError(
            f"{path} holds no LoRA, but {listed(unknown)}", "give the file of a LoRA"
        )
    if unknown:
        raise CheckpointError(
            f"{path} has {len(unknown)} tensors that no LoRA has: {listed(unknown)}",
            "drop them from the file, or save the adapter alone",
        )
    _check_modules(modules, found, path)
    return modules


def _check_modules(modules: _Modules, found: Mapping[str, TensorSpec], path: Path) -> None:
    """Refuse quantised tensors, and a down or up matrix without the other."""
    for parts in modules.values():
        low_rank = [name for part, name in parts.items() if part in _LOW_RANK]
        if low_rank and (absent := [part for part in ("down", "up") if part not in parts]):
            raise CheckpointError(
                f"{path} has {listed(low_rank)} but no {' and no '.join(absent)} matrix",
                "download the LoRA again",
            )
        for part, name in parts.items():
            dtype = found[name].dtype
            if part != "alpha" and not (dtype.is_floating_point and dtype.itemsize > 1):
                raise CheckpointError(
                    f"{path} is quantised: {name} is stored as {dtype}",
                    "use a bf16, fp16 or fp32 version of this LoRA",
                )


def _native_names(modules: _Modules, specs: Mapping[str, TensorSpec], path: Path) -> dict[str, str]:
    """Native names of the parameters that the LoRA changes, by the file's spelling."""
    wanted = {
        f"{module}.{_KINDS[part]}": name
        for module, parts in modules.items()
        for part, name in parts.items()
    }
    spellings = (
        {name: name for name in specs},
        _diffusers_names(specs),
        _kohya_names(specs, wanted, path),
    )
    names = max(spellings, key=lambda known: len(wanted.keys() & known.keys()))
    if unplaced := [name for target, name in wanted.items() if target not in names]:
        image = any(_IMAGE_TO_VIDEO.search(name) for name in unplaced)
        raise CheckpointError(
            f"{path} changes {len(unplaced)} tensors that this model lacks: {listed(unplaced)}",
            "use the LoRA of the text-to-video model" if image else _OF_THIS_MODEL,
        )
    return {target: names[target] for target in wanted}


def _diffusers_names(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    filled = {
        fill(rule.foreign, block): fill(rule.native, block)
        for rule in DIFFUSERS_RULES
        for block in blocks(specs)
    }
    return {foreign: native for foreign, native in filled.items() if native in specs}


def _kohya_names(
    specs: Mapping[str, TensorSpec], wanted: Iterable[str], path: Path
) -> dict[str, str]:
    """Kohya's spelling, which writes both dots and underscores as underscores."""
    names: dict[str, str] = {}
    for native in specs:
        module, _, kind = native.rpartition(".")
        name = f"{_KOHYA_PREFIX}{module.replace('.', '_')}.{kind}"
        if name in names and name in wanted:
            raise CheckpointError(
                f"'{name}' in {path} may be {names[name]} or {native}",
                "save the LoRA under dotted names",
            )
        names[name] = native
    return names


def _check_pair(
    pair: tuple[str, str],
    found: Mapping[str, TensorSpec],
    native: str,
    spec: TensorSpec,
    path: Path,
) -> int:
    """Check a pair's shapes and return its rank; a convolution's matrices may be flattened."""
    shape, (down, up) = spec.shape, (found[name].shape for name in pair)
    rank, columns = (down[0] if down else 0), shape[1:]
    fits = down[1:] in (columns, (math.prod(columns),)) and up[:2] == (*shape[:1], rank)
    if not (columns and rank and fits and set(up[2:]) <= {1}):
        raise CheckpointError(
            f"{path} has {pair[0]} of shape {down} and {pair[1]} of shape {up}, which do not make "
            f"{native} of shape {shape}",
            _OF_THIS_MODEL,
        )
    return rank


def _read_alpha(
    source: TensorSource, parts: Mapping[str, str], found: Mapping[str, TensorSpec], path: Path
) -> float | None:
    if "alpha" not in parts:
        return None
    name = parts["alpha"]
    shape = found[name].shape
    alpha = float(source.read(name).item()) if math.prod(shape) == 1 else math.nan
    if not 0 < alpha < math.inf:
        raise CheckpointError(
            f"{path} has {name} of shape {shape} and value {alpha}, expected one positive number",
            "download the LoRA again",
        )
    return alpha


@dataclass(frozen=True)
class _Settings:
    """Settings of all modules that PEFT and diffusers store; `rooted` asks for alpha/√r."""

    alpha: float | None = None
    rank: int | None = None
    rooted: bool = False

    def factor(self, rank: int, alpha: float | None, path: Path) -> float:
        """Alpha over the rank, or 1 without alpha; the alpha of the tensor file comes first."""
        if self.rank not in (None, rank):
            raise CheckpointError(
                f"{path} is of rank {rank}, its settings say r {self.rank!r}", _CORRECT_SETTINGS
            )
        alpha = alpha or self.alpha or rank
        return alpha / (math.sqrt(rank) if self.rooted else rank)


def _read_settings(path: Path) -> _Settings:
    table = _read_table(path)
    alpha, rank = table.get("lora_alpha"), table.get("r")
    if alpha is not None and not (type(alpha) in (int, float) and 0 < alpha < math.inf):
        raise CheckpointError(
            f"the settings of {path} say lora_alpha {alpha!r}, expected a positive number",
            _CORRECT_SETTINGS,
        )
    if table.get("alpha_pattern"):
        raise CheckpointError(
            f"the settings of {path} have an alpha_pattern, which is not supported",
            "merge it with PEFT's merge_and_unload",
        )
    return _Settings(
        alpha, None if table.get("rank_pattern") else rank, bool(table.get("use_rslora"))
    )


def _read_table(path: Path) -> dict[str, Any]:
    """PEFT's adapter_config.json, or else the settings that diffusers puts into the metadata."""
    file = (path if path.is_dir() else path.parent) / _ADAPTER_CONFIG
    within = _read_metadata(path).get(_DIFFUSERS_METADATA, "{}")
    try:
        table = read_json(file) if file.is_file() else parse_json(within)
    except ValueError as error:
        raise CheckpointError(
            f"the settings of {path} are not JSON: {error}", _CORRECT_SETTINGS
        ) from error
    if not isinstance(table, dict):
        raise CheckpointError(f"the settings of {path} are not a JSON table", _CORRECT_SETTINGS)
    return {key.removeprefix("transformer."): value for key, value in table.items()}


def _read_metadata(path: Path) -> dict[str, str]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".safetensors":
        return {}
    with opened_safetensors(files[0], "np") as opened:
        return opened.metadata() or {}
