"""Which family a checkpoint is of, its geometry, and its tensors under native Wan names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vmla_convert.checkpoint.geometry import blocks, native_shapes, read_geometry, strict
from vmla_convert.checkpoint.keymap import (
    CONVERTED_DIFFUSERS_RULES,
    DIFFUSERS_RULES,
    FPS,
    IMAGE_TO_VIDEO,
    NATIVE_FPS,
    NATIVE_RULES,
    Rule,
    fill,
    listed,
    match_native,
    strip_wrappers,
)
from vmla_convert.checkpoint.known import known_model
from vmla_convert.checkpoint.licences import strictest
from vmla_convert.checkpoint.lora import Lora, open_lora, parse_lora
from vmla_convert.checkpoint.source import TensorSource, TensorSpec, located, open_source
from vmla_convert.checkpoint.views import unfuse
from vmla_convert.config import (
    CONFIG_VERSION,
    CachePolicy,
    Geometry,
    ModelConfig,
    SamplerConfig,
    SourceConfig,
)
from vmla_convert.errors import CheckpointError, ConfigError, did_you_mean
from vmla_convert.tables import from_dict, override, to_dict

FORMAT = "vmla-convert"

# What a checkpoint's tensors cannot tell. `--model`, a table "vmla" in config.json and `--set`
# override any of it, the later the stronger.
DEFAULTS: dict[str, Any] = {
    "latent_size": (60, 104),
    "chunk_frames": 3,
    "cache": to_dict(CachePolicy(window_frames=21)),
    "sampler": to_dict(SamplerConfig()),
    "media": "wan",
    "licence": "unknown",
    "base_model": "unknown",
    "frames_per_second": ModelConfig.frames_per_second,
}
DEPLOYMENT = {"cache", "sampler"}
"""Those of `DEFAULTS` that can still be set of a converted folder."""
# Wan 2.2's other VAE has 48 channels, and 16 pixels to a latent; its model makes 24 frames a
# second.
_WIDE_VAE = {48: {"latent_size": (44, 80), "frames_per_second": 24}}

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_QUANTISED = re.compile(
    r"(^|[._])(quantized_weight_\w+|scales?|scale_inv|scale_weight|scale_input|scaled_fp8)$"
)
# SkyReels adds an embedding of the frame rate to all modulation: row 0 for 16 frames a second, row
# 1 for its own 24. Constant within a model's life, it goes into this bias.
_FPS_TARGET, _FPS_ROW = "time_projection.1.bias", 1


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints: how to know it, and its names.

    Attributes:
        name: As users meet it, and as `ModelConfig.family` records it.
        marks: Tensors, without wrappers, that it has.
        rules: Its names to native ones.
        wrapped: Whether a trainer's wrappers are around its names; None for either.
        frames_per_second: Of pixels, unless more is known of the model.
    """

    name: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    wrapped: bool | None = None
    frames_per_second: int = ModelConfig.frames_per_second

    def detect(self, names: Mapping[str, str], wrapped: bool) -> bool:
        """Whether a checkpoint with these names is of this family."""
        return self.wrapped in (None, wrapped) and all(mark in names for mark in self.marks)


# Every layer has a query, whatever a conversion made of its keys.
_DIFFUSERS_MARK = "blocks.0.attn1.to_q.weight"
_NATIVE, _DIFFUSERS = "blocks.0.self_attn.k.weight", "blocks.0.attn1.to_k.weight"
# The first that detects wins. Self-Forcing, Causal-Forcing, Rolling-Forcing, CausVid, LongLive,
# Reward-Forcing, Krea and others write one layout; `known.py` tells them apart.
FAMILIES = (
    Family(
        "skyreels",
        (_NATIVE, "fps_embedding.weight"),
        NATIVE_RULES + NATIVE_FPS,
        frames_per_second=24,
    ),
    Family(
        "skyreels_diffusers",
        (_DIFFUSERS, "fps_embedding.weight"),
        DIFFUSERS_RULES + FPS,
        frames_per_second=24,
    ),
    Family("diffusers", (_DIFFUSERS,), DIFFUSERS_RULES),
    Family("self_forcing", (_NATIVE,), NATIVE_RULES, wrapped=True),
    Family("wan", (_NATIVE,), NATIVE_RULES, wrapped=False),
)


@dataclass(frozen=True)
class OpenCheckpoint:
    """A recognised checkpoint, its tensors under native Wan names.

    Attributes:
        source: Where the bytes are.
        family: A name of `FAMILIES`, or `vmla` for a converted folder.
        names: Native name to source name.
        config: The model that the tensors make.
        known: The known model whose settings it took, if any.
        loras: Merged into what is read.
        conditioning: SkyReels' frame-rate tensors, native name to source name; read as a bias.
        unknown: Tensors that are no part of the model.
        missing: Tensors that the model lacks.
        base: Path of a codec's base model, where both are open.
    """

    source: TensorSource
    family: str
    names: dict[str, str]
    config: ModelConfig
    known: str | None = None
    loras: tuple[Lora, ...] = ()
    conditioning: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    base: Path | None = None

    @property
    def model_path(self) -> Path:
        """Where the model's own weights are, beside which text encoder and VAE may lie."""
        return self.base or self.source.path

    @property
    def is_codec(self) -> bool:
        """Whether it is a codec without its base model."""
        return self.config.codec is not None and all(".codec." in name for name in self.names)

    def read(self, native: str) -> torch.Tensor:
        """One tensor, on the CPU, LoRA weights merged.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        if native not in self.names:
            raise CheckpointError(
                f"{self.source.path} has no tensor '{native}'", did_you_mean(native, self.names)
            )
        tensor = self.source.read(self.names[native])
        if native == _FPS_TARGET and self.conditioning:
            tensor = (tensor.float() + self._frame_rate()).to(tensor.dtype)
        for lora in self.loras:
            tensor = lora.apply(native, tensor)
        return tensor

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, by native name."""
        specs = self.source.specs()
        return {native: specs[name] for native, name in self.names.items()}

    def parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(prod(spec.shape) for spec in self.specs().values())

    def _frame_rate(self) -> torch.Tensor:
        """What SkyReels' frame rate adds to the modulation of all blocks, (6·d,)."""
        part = {name: self.source.read(at).float() for name, at in self.conditioning.items()}
        x = part["fps_embedding.weight"][_FPS_ROW]
        x = F.silu(F.linear(x, part["fps_projection.0.weight"], part["fps_projection.0.bias"]))
        return F.linear(x, part["fps_projection.2.weight"], part["fps_projection.2.bias"])


def open_checkpoint(path: Path, how: SourceConfig | None = None) -> OpenCheckpoint:
    """Open a checkpoint of any supported family, checked whole before any tensor is read.

    Args:
        path: A file or folder, as for `open_source`; a config.json beside it is read too.
        how: State dict, known model, settings and LoRAs; its own `checkpoint` is not looked at.

    Raises:
        CheckpointError: The file cannot be read, is of no known family, is quantised or
            image-to-video, has missing, extra or misshapen tensors, or contradicts its config.json.
        ConfigError: A setting is unknown or does not fit.
    """
    opened = recognise(path, how)
    require_whole(opened)
    return opened


def require_whole(opened: OpenCheckpoint) -> None:
    """Refuse tensors that are no part of the model, and the lack of those that are.

    Raises:
        CheckpointError: Naming them.
    """
    path = opened.source.path
    if opened.unknown:
        raise CheckpointError(
            f"{path} has {len(opened.unknown)} tensors that its model has not: "
            f"{listed(opened.unknown)}",
            "merge LoRA weights with --lora, and drop tensors of other modules",
        )
    if opened.missing:
        raise CheckpointError(
            f"{path} lacks {len(opened.missing)} tensors: {listed(opened.missing)}",
            "download the checkpoint again",
        )


def recognise(path: Path, how: SourceConfig | None = None) -> OpenCheckpoint:
    """As `open_checkpoint`, but unknown and missing tensors are only listed."""
    how = how or SourceConfig()
    return recognise_source(open_source(path, how.key), _read_config(path), how)


def recognise_source(
    source: TensorSource, file_config: Mapping[str, Any], how: SourceConfig
) -> OpenCheckpoint:
    """As `recognise`, of a source that is open already and the config.json that lies beside it."""
    path, source = source.path, unfuse(source)
    stored_specs = source.specs()
    clean = strip_wrappers(stored_specs)
    specs = {name: stored_specs[stored] for name, stored in clean.items()}
    _refuse_quantised(specs, path)
    if is_ours(file_config):
        changes = _deployment(how, path)
        model = _converted_model(file_config, path)
        if changes:
            model = from_dict(ModelConfig, _merged(to_dict(model), changes))
        # Under diffusers' names where the folder is of that layout.
        rules = CONVERTED_DIFFUSERS_RULES if _DIFFUSERS_MARK in clean else None
        ours, odd = match_native(clean, rules) if rules else ({name: name for name in clean}, [])
        named = {native: clean[name] for native, name in ours.items()}
        converted = OpenCheckpoint(source, "vmla", named, model, unknown=tuple(sorted(odd)))
        return _checked(converted, named, {})
    wrapped = source.key is not None or any(name != stored for name, stored in clean.items())
    family = _detect(clean, wrapped, path)
    found, unknown = match_native(clean, family.rules)
    names = {native: clean[name] for native, name in found.items()}
    _refuse_image_to_video(names, path)
    geometry = read_geometry({n: specs[name] for n, name in found.items()}, file_config, path)
    settings = _settings(geometry, family, how, file_config, path)
    config = _dense_model({**settings, **_own(geometry, family)}, path)
    conditioning = {rule.native: names.pop(rule.native) for rule in FPS if rule.native in names}
    opened = OpenCheckpoint(
        source,
        family.name,
        names,
        config,
        known=how.model,
        conditioning=conditioning,
        unknown=tuple(sorted(unknown)),
    )
    opened = _checked(opened, names | conditioning, _conditioning_shapes(geometry, family))
    if not how.loras or opened.missing:
        return opened
    loras = tuple(open_lora(*parse_lora(option), opened.specs()) for option in how.loras)
    if not any(option.startswith("licence=") for option in how.overrides):
        licence = strictest((config.licence, *(lora.licence for lora in loras)))
        opened = replace(opened, config=replace(config, licence=licence))
    return replace(opened, loras=loras)


def is_converted(path: Path) -> bool:
    """Whether a folder of our own is there, which says itself what it is.

    Raises:
        CheckpointError: Nothing loadable is at `path`, or its config.json is not JSON.
    """
    return is_ours(_read_config(path))


def is_ours(file_config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of our own folders'."""
    return file_config.get("format") == FORMAT


def converted_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of our own folders, the one that `open_checkpoint` reads back."""
    return {"format": FORMAT, "version": CONFIG_VERSION, "model": to_dict(config)}


def _read_config(path: Path) -> dict[str, Any]:
    return read_config(located(path).parent / "config.json")


def read_config(file: Path) -> dict[str, Any]:
    """A config.json, or another table in JSON; empty where there is none.

    Raises:
        CheckpointError: It is damaged, or cannot be read.
    """
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}", "mend or remove it") from error
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}", "check the rights there"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON table", "mend or remove it")
    return config


def _detect(names: Mapping[str, str], wrapped: bool, path: Path) -> Family:
    for family in FAMILIES:
        if family.detect(names, wrapped):
            return family
    raise CheckpointError(
        f"{path} is of no known family; it holds {listed(names)}",
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
    if found := [n for t in extras for n in {fill(t, b) for b in blocks(names)} if n in names]:
        raise CheckpointError(
            f"image-to-video checkpoints are not supported yet: {path} has {listed(found)}",
            "use the text-to-video checkpoint",
        )


def _deployment(how: SourceConfig, path: Path) -> dict[str, Any]:
    """What may be set of a converted folder: how it is run, not what it is."""
    changes: dict[str, Any] = {}
    for text in how.overrides:
        override(changes, text)
    if how.model or how.loras or not changes.keys() <= DEPLOYMENT:
        raise ConfigError(
            f"{path} is converted already, only cache.* and sampler.* can still be set",
            "give other options when converting the dense checkpoint",
        )
    return changes


def _settings(
    geometry: Geometry,
    family: Family,
    how: SourceConfig,
    file_config: Mapping[str, Any],
    path: Path,
) -> dict[str, Any]:
    """`DEFAULTS`, and over them what is known of the model, what its folder says, what was set."""
    settings = {**DEFAULTS, "frames_per_second": family.frames_per_second}
    settings = _merged(settings, _WIDE_VAE.get(geometry.in_dim, {}))
    if how.model:
        known = known_model(how.model)
        if geometry.dim not in known.widths:
            raise ConfigError(
                f"{known.title} has a width of {' or '.join(map(str, known.widths))}, "
                f"{path} one of {geometry.dim}",
                "drop --model, or name the model that this is",
            )
        settings = _merged(settings, known.settings)
    told = file_config.get("vmla", {})
    if not isinstance(told, dict):
        raise CheckpointError(
            f"'vmla' in the config.json of {path} is not a table", "make it a table or remove it"
        )
    _check_names(told, f"'vmla.{{}}' in the config.json of {path}")
    settings = _merged(settings, told)
    typed: dict[str, Any] = {}
    for text in how.overrides:
        override(typed, text)
    _check_names(typed, "'{}' in --set")
    return _merged(settings, typed)


def _check_names(table: Mapping[str, Any], told: str) -> None:
    for name in table:
        if name not in DEFAULTS:
            raise ConfigError(f"unknown key {told.format(name)}", did_you_mean(name, DEFAULTS))


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Tables within tables are merged too."""
    merged = dict(base)
    for name, value in change.items():
        old = merged.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            value = _merged(old, value)
        merged[name] = value
    return merged


def _own(geometry: Geometry, family: Family) -> dict[str, Any]:
    return {"geometry": to_dict(geometry), "family": family.name}


def _dense_model(table: Mapping[str, Any], path: Path) -> ModelConfig:
    try:
        return from_dict(ModelConfig, table)
    except ConfigError as error:
        raise ConfigError(
            f"the settings of {path} do not fit: {error.message}",
            error.hint or "correct them with --set, or in the config.json beside it",
        ) from error


def _converted_model(file_config: Mapping[str, Any], path: Path) -> ModelConfig:
    version = file_config.get("version")
    if version != CONFIG_VERSION:
        raise CheckpointError(
            f"{path} is of format version {version!r}, this program knows {CONFIG_VERSION}",
            "pip install -U vmla-convert",
        )
    return strict(ModelConfig, file_config.get("model"), path)


def _conditioning_shapes(geometry: Geometry, family: Family) -> dict[str, tuple[int, ...]]:
    if not (set(FPS) | set(NATIVE_FPS)) & set(family.rules):
        return {}
    d = geometry.dim
    return {
        "fps_embedding.weight": (2, d),
        "fps_projection.0.weight": (d, d),
        "fps_projection.0.bias": (d,),
        "fps_projection.2.weight": (6 * d, d),
        "fps_projection.2.bias": (6 * d,),
    }


def _checked(
    opened: OpenCheckpoint, names: Mapping[str, str], more: Mapping[str, tuple[int, ...]]
) -> OpenCheckpoint:
    """With what is missing and left over.

    A converted model's self-attention and a codec are checked when the model is built, so that
    their tensors pass. A codec may lack all of its base model.

    Args:
        opened: The checkpoint.
        names: All native names that were found.
        more: Shapes of tensors that are no part of the native model.

    Raises:
        CheckpointError: A tensor is of another shape than its model's.
    """
    config, path, specs = opened.config, opened.source.path, opened.source.specs()
    expected = native_shapes(config.geometry) | dict(more)
    found = {name: specs[stored].shape for name, stored in names.items()}
    if opened.is_codec:
        return opened
    if not config.is_dense:
        part = "self_attn" if config.mla else "codec"
        ours = re.compile(rf"blocks\.({'|'.join(blocks(expected))})\.{part}\.")
        expected = {name: shape for name, shape in expected.items() if not ours.match(name)}
        found = {name: shape for name, shape in found.items() if not ours.match(name)}
    if odd := [name for name in expected if name in found and found[name] != expected[name]]:
        raise CheckpointError(
            f"{path} has {odd[0]} of shape {found[odd[0]]}, expected {expected[odd[0]]}",
            "check that all its tensors and its config.json are of one model",
        )
    extra = sorted(found.keys() - expected.keys())
    missing = sorted(expected.keys() - found.keys())
    return replace(opened, unknown=(*opened.unknown, *extra), missing=tuple(missing))
