"""Open any checkpoint, dense or converted, as a running model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from vmla_convert.checkpoint.base import check_base, find_base, find_loras, join
from vmla_convert.checkpoint.choose_file import CODEC_NAME
from vmla_convert.checkpoint.families import (
    OpenCheckpoint,
    is_converted,
    open_checkpoint,
    recognise,
    recognise_source,
)
from vmla_convert.checkpoint.hub import fetch, fetch_headers, has_parts, is_repo
from vmla_convert.checkpoint.known import known_by_repo, known_model
from vmla_convert.checkpoint.layouts import DIFFUSERS, NATIVE
from vmla_convert.checkpoint.settings import is_ours, read_config
from vmla_convert.checkpoint.source import fingerprint, located
from vmla_convert.config import CacheSize, RuntimeConfig, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.layers.dit import Block, CausalWanModel, check_runtime
from vmla_convert.progress import Progress, Silent
from vmla_convert.tables import from_dict

DEMO = "demo"
CONVERSION_NAME = "conversion.json"
"""What made a converted folder, beside its weights."""

Source = str | Path | SourceConfig
"""A user's word for a checkpoint: a path, `demo`, a Hub id, or one of them with settings."""


def open_named(source: Source, progress: Progress | None = None) -> OpenCheckpoint:
    """Open the checkpoint that a user's word means; a codec together with its base model.

    Args:
        source: A path, `demo`, or a Hub id; with settings if need be.
        progress: Where to draw the check of a codec's base model.

    Raises:
        CheckpointError: It cannot be found, read or recognised, or the base model of a codec is not
            there, or is another one.
        ConfigError: A setting is unknown or does not fit.
    """
    path, how = locate(source)
    if not is_codec(path):
        _refuse_base(how)
        return open_checkpoint(path, how)
    codec = open_checkpoint(path, replace(how, loras=(), base_model=None))
    check_whole(codec)
    return _with_base(codec, how, progress or Silent())


def is_codec(path: Path) -> bool:
    """Whether a checkpoint's path is a cache codec, which needs a base model."""
    return located(path).name == CODEC_NAME


def base_of(codec: Path, how: SourceConfig) -> SourceConfig:
    """The base model of a codec, as it was read when the codec was made.

    Args:
        codec: The codec's file or folder.
        how: A base model and LoRAs that take the place of the recorded ones.

    Raises:
        CheckpointError: It is not where it was, nor anywhere else that is looked at.
    """
    folder, record = located(codec).parent, read_provenance(codec)
    asked = from_dict(SourceConfig, record.get("source", {}).get("asked", {}))
    told = record.get("base", {})
    if how.base_model is None:
        base, file = find_base(folder, told)
    else:
        base, file = how.base_model, asked.file or told.get("file")
        if file and Path(base).exists() and not (Path(base) / file).exists():
            file = None
    loras = how.loras or find_loras(folder, told)
    return replace(asked, checkpoint=base, file=file, loras=loras)


def _refuse_base(how: SourceConfig) -> None:
    if how.base_model is not None:
        raise ConfigError(
            f"{how.checkpoint} is no codec and has no base model", "leave --base-model out"
        )


def _with_base(codec: OpenCheckpoint, how: SourceConfig, progress: Progress) -> OpenCheckpoint:
    folder = located(codec.source.path).parent
    base = open_checkpoint(*locate(base_of(codec.source.path, how)))
    hashes = read_provenance(codec.source.path).get("base", {}).get("tensors", {})
    if not hashes:
        raise CheckpointError(
            f"{folder} does not say which base model its codec was made for",
            "convert the base model again",
        )
    joined = join(base, codec)
    check_base(base, hashes, folder, progress)
    return joined


def recognise_named(source: Source, progress: Progress | None = None) -> OpenCheckpoint:
    """Know the checkpoint that a user's word means, whole or not; of the Hub's by headers alone.

    Tensors of a checkpoint on the Hub that is not in its cache cannot be read from the result.

    Raises:
        CheckpointError: It cannot be found or recognised.
        ConfigError: A setting is unknown or does not fit.
    """
    how = _settled(source)
    if not is_remote(how.checkpoint):
        return recognise(*locate(how))
    found = fetch_headers(how.checkpoint, _file_of(how), progress)
    if isinstance(found, Path):
        return recognise(found, how if is_converted(found) else _known(how))
    config = read_config(found.config) if found.config else {}
    return recognise_source(found.source, config, how if is_ours(config) else _known(how))


def locate(source: Source) -> tuple[Path, SourceConfig]:
    """Where a checkpoint lies, fetched from the Hub if it must be, and what is known of it.

    Raises:
        CheckpointError: It cannot be found.
    """
    how = _settled(source)
    name = how.checkpoint
    if name == DEMO:
        return Path(str(files("vmla_convert") / "demo" / "checkpoint")) / (how.file or ""), how
    if not is_remote(name):
        return Path(name) / (how.file or ""), how
    path = fetch(name, _file_of(how))
    return path, how if is_converted(path) else _known(how)


def _settled(source: Source) -> SourceConfig:
    return source if isinstance(source, SourceConfig) else SourceConfig(str(source))


def is_remote(name: str) -> bool:
    """Whether a name means a repository of the Hub: no path that is there may look like one."""
    return name != DEMO and not Path(name).exists() and is_repo(name)


def is_conversion(name: str) -> bool:
    """Whether a name means a conversion, by the record that lies in it; nothing is fetched.

    Raises:
        CheckpointError: The repository cannot be read.
    """
    if is_remote(name):
        places = (layout.place(CONVERSION_NAME) for layout in (NATIVE, DIFFUSERS))
        return any(has_parts(name, place) for place in places)
    try:
        return bool(read_provenance(name))
    except CheckpointError:  # such as several files: a conversion is one
        return False


def _file_of(how: SourceConfig) -> str | None:
    """The file of a repository that was asked for, by name or by the model that it is."""
    known = known_model(how.model) if how.model else None
    repo = how.checkpoint.partition("@")[0]
    return how.file or (known.file if known and repo in known.repos else None)


def _known(how: SourceConfig) -> SourceConfig:
    """With what a dense checkpoint's repository tells of it."""
    base = f"base_model={how.checkpoint.partition('@')[0]}"
    model = how.model or known_by_repo(how.checkpoint, how.file)
    return replace(how, model=model, overrides=(base, *how.overrides))


def compute_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def as_teacher(teacher: Source, converted: Source, file: str | None = None) -> SourceConfig:
    """A dense checkpoint, read as when it was converted: its file, key, settings and LoRAs.

    Args:
        teacher: A path, `demo` or a Hub id; what comes with settings of its own stays as it is.
        converted: What was made of it.
        file: Of the teacher, another than when it was converted.

    Raises:
        CheckpointError: One of them cannot be found, or the record is damaged.
    """
    if isinstance(teacher, SourceConfig):
        return teacher
    origin = read_provenance(converted).get("source", {})
    asked = from_dict(SourceConfig, origin.get("asked", {}))
    known = replace(asked, checkpoint=str(teacher), model=origin.get("known_model"))
    if file is not None or Path(teacher).is_file():
        known = replace(known, file=file)
    path, _ = locate(known)
    if fingerprint(path) == origin.get("sha256"):
        return known
    # Other bytes: the same model in another form perhaps, with other keys, its LoRAs merged.
    return replace(known, key=None, loras=())


def teacher_of(
    converted: Source, teacher: Source | None = None, file: str | None = None
) -> SourceConfig:
    """The dense model that a converted one is measured against and learns from.

    Args:
        converted: A codec or an MLA checkpoint.
        teacher: A dense checkpoint. A codec needs none: its base model is meant.
        file: File of the teacher, another than when it was converted.

    Raises:
        CheckpointError: One of them cannot be found, or a teacher is needed and not named.
    """
    path, _ = locate(converted)
    if not is_codec(path):
        if teacher is None:
            raise CheckpointError(
                f"{_settled(converted).checkpoint} does not hold the dense model that it came from",
                "name it: --teacher CKPT",
            )
        return as_teacher(teacher, converted, file)
    if isinstance(teacher, SourceConfig):
        return teacher
    how = SourceConfig(base_model=None if teacher is None else str(teacher))
    base = base_of(path, how)
    return base if file is None else replace(base, file=file)


def read_provenance(converted: Source) -> dict[str, Any]:
    """The record beside a converted checkpoint's weights; empty when there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    path, _ = locate(converted)
    file = located(path).parent / CONVERSION_NAME
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text("utf-8"))
        from_dict(SourceConfig, record.get("source", {}).get("asked", {}))
    except (ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{file} is not a record of a conversion", "convert again, or remove it"
        ) from error
    return record


def load(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    bytes_per_token: float | None = None,
    cut: float | None = None,
    base_model: str | Path | None = None,
) -> CausalWanModel:
    """Load a dense checkpoint of the Wan family, a codec with its base model, or an MLA folder.

    Args:
        source: A file or folder, `demo`, or a Hub id.
        device: Where the weights go.
        dtype: Dtype of all weights; a codec's means and tables stay float32.
        bytes_per_token: Size of a codec's cache, per token and layer.
        cut: The same as a share of the dense cache to save.
        base_model: Base model of a codec; by default the one that the codec names.

    Raises:
        CheckpointError: It is no checkpoint of a known layout, or a codec without its base model.
        ConfigError: A size was asked for that the model cannot have.
    """
    how = _settled(source)
    if base_model is not None:
        how = replace(how, base_model=str(base_model))
    model = build(open_named(how), device, dtype)
    if bytes_per_token is not None or cut is not None:
        size = CacheSize(bytes_per_token, cut)
        check_runtime(model.config, RuntimeConfig(size=size))
        model.resize(size)
    return model


def build(
    checkpoint: OpenCheckpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CausalWanModel:
    """The model of an open checkpoint, in evaluation mode and frozen."""
    model = empty_model(checkpoint)
    precise = {name for name, _ in model.named_buffers()}
    state = {
        name: checkpoint.read(name).to(device, torch.float32 if name in precise else dtype)
        for name in model.state_dict()
    }
    model.load_state_dict(state, assign=True)
    if model.config.codec is not None:
        model.resize(model.config.codec.size)
    return model.eval().requires_grad_(False)


def empty_model(checkpoint: OpenCheckpoint) -> CausalWanModel:
    """The model of an open checkpoint, without weights: all that its headers can tell is checked.

    Raises:
        CheckpointError: A tensor is not the one that the config asks for.
    """
    with torch.device("meta"):
        model = CausalWanModel(checkpoint.config)
    _check_tensors(checkpoint, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    return model


def check_whole(checkpoint: OpenCheckpoint) -> None:
    """Check all that headers tell of a conversion; of a codec without its base model too.

    Raises:
        CheckpointError: A tensor is not the one that the config asks for.
    """
    with torch.device("meta"):
        state = CausalWanModel(checkpoint.config).state_dict()
    expected = {name: tuple(t.shape) for name, t in state.items()}
    if checkpoint.is_codec:
        expected = {name: shape for name, shape in expected.items() if ".codec." in name}
    _check_tensors(checkpoint, expected)


def build_shell(checkpoint: OpenCheckpoint, device: torch.device | str = "cpu") -> CausalWanModel:
    """All of a dense model but its blocks, which `read_block` gives one by one."""
    outside = {name for name in checkpoint.names if not name.startswith("blocks.")}
    config = checkpoint.config
    empty = replace(config, geometry=replace(config.geometry, num_layers=0))
    with torch.device("meta"):
        shell = CausalWanModel(empty)
    state = {name: checkpoint.read(name).to(device, torch.float32) for name in outside}
    shell.load_state_dict(state, assign=True)
    shell.config = config
    return shell.eval().requires_grad_(False)


def read_block(checkpoint: OpenCheckpoint, layer: int, device: torch.device | str = "cpu") -> Block:
    """One block of a dense checkpoint, in evaluation mode and frozen."""
    with torch.device("meta"):
        block = Block(checkpoint.config, layer)
    state = {
        name: checkpoint.read(f"blocks.{layer}.{name}").to(device, torch.float32)
        for name in block.state_dict()
    }
    block.load_state_dict(state, assign=True)
    return block.eval().requires_grad_(False)


def _check_tensors(checkpoint: OpenCheckpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """A damaged or edited folder is refused by the name of its first wrong tensor."""
    found = {name: spec.shape for name, spec in checkpoint.specs().items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)
    )
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"tensor '{name}' of {checkpoint.source.path} has shape {found.get(name)}, "
            f"its config asks for {expected.get(name)}",
            "convert the source checkpoint again",
        )
