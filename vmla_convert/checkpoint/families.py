"""Recognise a checkpoint's family and geometry, and read its tensors under native Wan names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vmla_convert.checkpoint.geometry import blocks, native_shapes, read_geometry, strict
from vmla_convert.checkpoint.integrity import checked, refuse_not_finite
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
from vmla_convert.checkpoint.licences import strictest
from vmla_convert.checkpoint.lora import Lora, open_lora, parse_lora
from vmla_convert.checkpoint.settings import (
    DEPLOYMENT,
    dense_model,
    is_ours,
    read_config,
)
from vmla_convert.checkpoint.source import TensorSource, TensorSpec, located, open_source
from vmla_convert.checkpoint.views import unfuse
from vmla_convert.config import (
    CONFIG_VERSION,
    Geometry,
    ModelConfig,
    SourceConfig,
)
from vmla_convert.errors import CheckpointError, ConfigError, did_you_mean
from vmla_convert.tables import from_dict, merged, to_dict

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_QUANTISED = re.compile(
    r"(^|[._])(quantized_weight_\w+|scales?|scale_inv|scale_weight|scale_input|scaled_fp8)$"
)
# SkyReels adds an embedding of the frame rate to all modulation: row 0 for 16 frames per second,
# row 1 for its own 24. The rate never changes for one model, so it is added to this bias.
_FPS_TARGET, _FPS_ROW = "time_projection.1.bias", 1


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints, and how to recognise it.

    Attributes:
        name: The name for users and for `ModelConfig.family`.
        marks: Tensors that every checkpoint of the family has, without wrappers.
        rules: Rules from the family's tensor names to native ones.
        wrapped: Whether a trainer's wrappers surround the names; None accepts both.
        frames_per_second: Pixel frames per second, unless more is known of the model.
    """

    name: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    wrapped: bool | None = None
    frames_per_second: int = ModelConfig.frames_per_second


# A converted layer keeps its query projection, but not its key projection.
_DIFFUSERS_MARK = "blocks.0.attn1.to_q.weight"
_NATIVE, _DIFFUSERS = "blocks.0.self_attn.k.weight", "blocks.0.attn1.to_k.weight"
_FPS_MARK = "fps_embedding.weight"
# The first match wins. Self-Forcing, Causal-Forcing, Rolling-Forcing, CausVid, LongLive,
# Reward-Forcing, Krea and others write one layout; `known.py` tells them apart.
FAMILIES = (
    Family("skyreels", (_NATIVE, _FPS_MARK), NATIVE_RULES + NATIVE_FPS, frames_per_second=24),
    Family(
        "skyreels_diffusers", (_DIFFUSERS, _FPS_MARK), DIFFUSERS_RULES + FPS, frames_per_second=24
    ),
    Family("diffusers", (_DIFFUSERS,), DIFFUSERS_RULES),
    Family("self_forcing", (_NATIVE,), NATIVE_RULES, wrapped=True),
    Family("wan", (_NATIVE,), NATIVE_RULES, wrapped=False),
)


@dataclass(frozen=True)
class OpenCheckpoint:
    """A recognised checkpoint, with its tensors under native Wan names.

    Attributes:
        source: The file or files that hold the tensors.
        family: A name of `FAMILIES`, or `vmla` for a converted folder.
        names: Native name to name in the source.
        config: The model that the tensors make.
        known: The known model (`--model`) that gave settings.
        loras: LoRAs that are merged when a tensor is read.
        conditioning: SkyReels' frame-rate tensors, native name to name in the source.
        unknown: Tensors that are not part of the model.
        missing: Tensors that the model lacks.
        base: Path of a codec's base model, when both are open.
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
        """Path of the dense or converted weights; text encoder and VAE may be beside them."""
        return self.base or self.source.path

    @property
    def is_codec(self) -> bool:
        """Whether this is a codec without its base model."""
        return self.config.codec is not None and all(".codec." in name for name in self.names)

    def read(self, native: str) -> torch.Tensor:
        """Read one tensor to the CPU, with LoRA weights merged.

        Raises:
            CheckpointError: There is no tensor of that name.
            NotFiniteError: A number of the tensor is not finite.
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
        refuse_not_finite(native, tensor, self.source.path)
        return tensor

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, by native name."""
        specs = self.source.specs()
        return {native: specs[name] for native, name in self.names.items()}

    def parameters(self) -> int:
        """The number of parameters in the checkpoint."""
        return sum(prod(spec.shape) for spec in self.specs().values())

    def _frame_rate(self) -> torch.Tensor:
        """The vector that SkyReels' frame rate adds to the modulation of all blocks, (6·dim,)."""
        part = {name: self.source.read(at).float() for name, at in self.conditioning.items()}
        x = part["fps_embedding.weight"][_FPS_ROW]
        x = F.silu(F.linear(x, part["fps_projection.0.weight"], part["fps_projection.0.bias"]))
        return F.linear(x, part["fps_projection.2.weight"], part["fps_projection.2.bias"])


def open_checkpoint(path: Path, how: SourceConfig | None = None) -> OpenCheckpoint:
    """Open a checkpoint of any supported family; all headers are checked, no tensor is read.

    Args:
        path: A file or folder, as for `open_source`; a config.json beside it is read too.
        how: State dict, known model, settings and LoRAs; `how.checkpoint` is ignored.

    Raises:
        CheckpointError: The file cannot be read, is of no known family, is quantised or
            image-to-video, has missing, extra or misshapen tensors, or contradicts its config.json.
        ConfigError: A setting is unknown or does not fit.
    """
    opened = recognise(path, how)
    require_whole(opened)
    return opened


def require_whole(opened: OpenCheckpoint) -> None:
    """Refuse missing tensors, and tensors that are not part of the model.

    Raises:
        CheckpointError: Naming them.
    """
    path = opened.source.path
    if opened.unknown:
        raise CheckpointError(
            f"{path} has {len(opened.unknown)} tensors that are not part of its model: "
            f"{listed(opened.unknown)}",
            "merge LoRA weights with --lora, and drop tensors of other modules",
        )
    if opened.missing:
        raise CheckpointError(
            f"{path} lacks {len(opened.missing)} tensors: {listed(opened.missing)}",
            "download the checkpoint again",
        )


def recognise(path: Path, how: SourceConfig | None = None) -> OpenCheckpoint:
    """Open a checkpoint like `open_checkpoint`, but only list unknown and missing tensors."""
    how = how or SourceConfig()
    source = open_source(path, how.key)
    return recognise_source(checked(source) if how.verify else source, _config_beside(path), how)


def recognise_source(
    source: TensorSource, file_config: Mapping[str, Any], how: SourceConfig
) -> OpenCheckpoint:
    """Recognise an open source, given the config.json beside it."""
    path, source = source.path, unfuse(source)
    stored_specs = source.specs()
    clean = strip_wrappers(stored_specs)
    specs = {name: stored_specs[stored] for name, stored in clean.items()}
    _refuse_quantised(specs, path)
    if is_ours(file_config):
        return _recognise_converted(source, clean, file_config, how)
    wrapped = source.key is not None or any(name != stored for name, stored in clean.items())
    family = _detect(clean, wrapped, path)
    found, unknown = match_native(clean, family.rules)
    names = {native: clean[name] for native, name in found.items()}
    _refuse_image_to_video(names, path)
    geometry = read_geometry({n: specs[name] for n, name in found.items()}, file_config, path)
    config = dense_model(geometry, family.name, family.frames_per_second, how, file_config, path)
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
    return opened if opened.missing else _with_loras(opened, how)


def is_converted(path: Path) -> bool:
    """Whether a checkpoint is one of our own folders.

    Raises:
        CheckpointError: Nothing loadable is at `path`, or its config.json is not JSON.
    """
    return is_ours(_config_beside(path))


def _config_beside(path: Path) -> dict[str, Any]:
    return read_config(located(path).parent / "config.json")


def _detect(names: Mapping[str, str], wrapped: bool, path: Path) -> Family:
    for family in FAMILIES:
        if family.wrapped in (None, wrapped) and all(mark in names for mark in family.marks):
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
    extras = {fill(rule.native, block) for rule in IMAGE_TO_VIDEO for block in blocks(names)}
    if found := extras & names.keys():
        raise CheckpointError(
            f"image-to-video checkpoints are not supported yet: {path} has {listed(found)}",
            "use the text-to-video checkpoint",
        )


def _recognise_converted(
    source: TensorSource,
    clean: Mapping[str, str],
    file_config: Mapping[str, Any],
    how: SourceConfig,
) -> OpenCheckpoint:
    """Open one of our own folders. Only cache and sampler settings can be changed."""
    if how.model or how.loras or not how.overrides.keys() <= DEPLOYMENT:
        raise ConfigError(
            f"{source.path} is converted already, only cache.* and sampler.* can still be set",
            "give other options when converting the dense checkpoint",
        )
    version = file_config.get("version")
    if version != CONFIG_VERSION:
        raise CheckpointError(
            f"{source.path} is of format version {version!r}, this program knows {CONFIG_VERSION}",
            "pip install -U vmla-convert",
        )
    model = strict(ModelConfig, file_config.get("model"), source.path)
    if how.overrides:
        model = from_dict(ModelConfig, merged(to_dict(model), how.overrides))
    found, odd = {name: name for name in clean}, []
    if _DIFFUSERS_MARK in clean:
        found, odd = match_native(clean, CONVERTED_DIFFUSERS_RULES)
    names = {native: clean[name] for native, name in found.items()}
    opened = OpenCheckpoint(source, "vmla", names, model, unknown=tuple(sorted(odd)))
    return _checked(opened, names, {})


def _with_loras(opened: OpenCheckpoint, how: SourceConfig) -> OpenCheckpoint:
    """The checkpoint with its LoRAs, under the strictest licence unless the user names one."""
    loras = tuple(open_lora(*parse_lora(option), opened.specs()) for option in how.loras)
    config = opened.config
    if loras and "licence" not in how.overrides:
        licence = strictest((config.licence, *(lora.licence for lora in loras)))
        config = replace(config, licence=licence)
    return replace(opened, config=config, loras=loras)


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
    """Check shapes, and list missing and unknown tensors.

    The self-attention of an MLA model and the tensors of a codec are checked later, when the model
    is built. A codec may lack its whole base model.

    Args:
        opened: The checkpoint.
        names: All native names that were found.
        more: Shapes of tensors that are not part of the native model.

    Raises:
        CheckpointError: A tensor has the wrong shape.
    """
    if opened.is_codec:
        return opened
    config, path, specs = opened.config, opened.source.path, opened.source.specs()
    expected = native_shapes(config.geometry) | dict(more)
    found = {name: specs[stored].shape for name, stored in names.items()}
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
