"""Open any checkpoint, dense or converted, as a running model."""

from __future__ import annotations

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
from vmla_convert.checkpoint.integrity import CONVERSION_NAME, read_record
from vmla_convert.checkpoint.known import known_by_repo, known_model
from vmla_convert.checkpoint.layouts import DIFFUSERS, NATIVE
from vmla_convert.checkpoint.lora import parse_lora
from vmla_convert.checkpoint.settings import is_ours, read_config
from vmla_convert.checkpoint.source import located
from vmla_convert.config import RuntimeConfig, Sizes, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.layers.block import Block
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.runtime import check_runtime
from vmla_convert.progress import Progress, Silent
from vmla_convert.tables import from_dict

DEMO = "demo"
Source = str | Path | SourceConfig
"""The name of a checkpoint: a path, `demo` or a Hub id, with settings in a `SourceConfig`."""


def open_named(source: Source, progress: Progress | None = None) -> OpenCheckpoint:
    """Open a checkpoint by name, a codec together with its base model.

    Raises:
        CheckpointError: The checkpoint cannot be found, read or recognised, or the base model of a
            codec is missing or has other weights.
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
    """Whether the checkpoint at a path is a cache codec, which needs a base model."""
    return located(path).name == CODEC_NAME


def base_of(codec: Path, how: SourceConfig) -> SourceConfig:
    """The base model of a codec, with the settings that were used when the codec was made.

    Args:
        codec: The codec's file or folder.
        how: A base model and LoRAs that replace the recorded ones.

    Raises:
        CheckpointError: The base model is neither where it was nor beside the codec.
    """
    folder, record = located(codec).parent, read_provenance(codec)
    asked = from_dict(SourceConfig, record.get("source", {}).get("asked", {}))
    recorded = record.get("base", {})
    if how.base_model is None:
        base, file = find_base(folder, recorded)
    else:
        base, file = how.base_model, asked.file or recorded.get("file")
        if file and Path(base).exists() and not (Path(base) / file).exists():
            file = None
    loras = how.loras or find_loras(folder, recorded)
    return replace(asked, checkpoint=base, file=file, loras=loras, verify=how.verify)


def _refuse_base(how: SourceConfig) -> None:
    if how.base_model is not None:
        raise ConfigError(
            f"{how.checkpoint} is not a codec and has no base model", "leave base_model out"
        )


def _with_base(codec: OpenCheckpoint, how: SourceConfig, progress: Progress) -> OpenCheckpoint:
    folder = located(codec.source.path).parent
    base = open_checkpoint(*locate(base_of(codec.source.path, how)))
    record = read_provenance(codec.source.path).get("base", {})
    if not record.get("tensors"):
        raise CheckpointError(
            f"{folder} does not say which base model its codec was made for",
            "convert the base model again",
        )
    joined = join(base, codec)
    check_base(base, record, folder, progress)
    return joined


def recognise_named(source: Source, progress: Progress | None = None) -> OpenCheckpoint:
    """Recognise a checkpoint by name, complete or not.

    Of a checkpoint on the Hub only the headers are downloaded, so its tensors cannot be read.

    Raises:
        CheckpointError: The checkpoint cannot be found or recognised.
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
    """Find a checkpoint, download it if necessary, and add settings that its repository implies.

    Raises:
        CheckpointError: The checkpoint cannot be found.
    """
    how = _settled(source)
    how, name = replace(how, loras=tuple(map(_local_lora, how.loras))), how.checkpoint
    if name == DEMO:
        return Path(str(files("vmla_convert") / "demo" / "checkpoint")) / (how.file or ""), how
    if not is_remote(name):
        return Path(name) / (how.file or ""), how
    path = fetch(name, _file_of(how))
    return path, how if is_converted(path) else _known(how)


def _local_lora(option: str) -> str:
    """Download a LoRA that is named by repository and file, `owner/name/FILE`."""
    path, scale = parse_lora(option)
    owner, *rest = path.parts
    if len(rest) < 2 or Path(owner).exists() or not is_repo(f"{owner}/{rest[0]}"):
        return option
    return f"{fetch(f'{owner}/{rest[0]}', '/'.join(rest[1:]))}:{scale!r}"


def locate_model(source: Source) -> Path:
    """Find the weights of a model, those of the base model for a codec; as `locate` and `base_of`.

    Text encoder and VAE may be beside these weights.
    """
    path, how = locate(source)
    return locate(base_of(path, how))[0] if is_codec(path) else path


def _settled(source: Source) -> SourceConfig:
    return source if isinstance(source, SourceConfig) else SourceConfig(str(source))


def is_remote(name: str) -> bool:
    """Whether a name means a repository of the Hub; an existing path comes first."""
    return name != DEMO and not Path(name).exists() and is_repo(name)


def is_conversion(name: str) -> bool:
    """Whether a name means a conversion, judged by its record; nothing is downloaded.

    Raises:
        CheckpointError: The repository cannot be read.
    """
    if is_remote(name):
        places = (layout.place(CONVERSION_NAME) for layout in (NATIVE, DIFFUSERS))
        return any(has_parts(name, place) for place in places)
    try:
        return bool(read_provenance(name))
    except CheckpointError:  # several checkpoints, for example
        return False


def _file_of(how: SourceConfig) -> str | None:
    """The file of a repository that the user named, directly or by `--model`."""
    known = known_model(how.model) if how.model else None
    repo = how.checkpoint.partition("@")[0]
    return how.file or (known.file if known and repo in known.repos else None)


def _known(how: SourceConfig) -> SourceConfig:
    """The settings of a Hub checkpoint, with `base_model` and `model` filled in from its id."""
    base = {"base_model": how.checkpoint.partition("@")[0]}
    model = how.model or known_by_repo(how.checkpoint, how.file)
    return replace(how, model=model, overrides=base | how.overrides)


def compute_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def read_provenance(converted: Source) -> dict[str, Any]:
    """Read the record beside a converted checkpoint's weights; empty when there is none.

    Raises:
        CheckpointError: The record is damaged.
    """
    return read_record(locate(converted)[0])


def load(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    bytes_per_token: float | None = None,
    cut: float | None = None,
    base_model: str | Path | None = None,
    verify: bool = True,
) -> CausalWanModel:
    """Load a dense checkpoint of the Wan family, a codec with its base model, or an MLA folder.

    Args:
        source: A file or folder, `demo`, or a Hub id.
        device: Device of the weights.
        dtype: Dtype of the weights; a codec's means and tables stay float32.
        bytes_per_token: Size of a codec's cache, in bytes per token and layer.
        cut: Size of a codec's cache, as the share of the dense cache to remove: 0.95 leaves 5 %.
        base_model: Base model of a codec; by default the one that the codec names.
        verify: Whether to compare tensors with the checksums in their record.

    Raises:
        CheckpointError: The source is not a known checkpoint, is damaged, or the base model of a
            codec is not found.
        ConfigError: The model cannot have the size.
    """
    how = _settled(source)
    how = replace(how, verify=how.verify and verify)
    if base_model is not None:
        how = replace(how, base_model=str(base_model))
    model = build(open_named(how), device, dtype)
    if bytes_per_token is not None or cut is not None:
        size = Sizes(bytes_per_token, cut)
        check_runtime(model.config, RuntimeConfig(size=size))
        model.resize(size)
    return model


def build(
    checkpoint: OpenCheckpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CausalWanModel:
    """Build the model of an open checkpoint, in evaluation mode and frozen.

    Raises:
        CheckpointError: A tensor does not fit the config, is not finite, or is not as it was
            written.
    """
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
    """Build the model of an open checkpoint on the meta device, and check all headers.

    Raises:
        CheckpointError: A tensor does not fit the config.
    """
    with torch.device("meta"):
        model = CausalWanModel(checkpoint.config)
    found = {name: spec.shape for name, spec in checkpoint.specs().items()}
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not checkpoint.is_codec or ".codec." in name
    }
    names = sorted(expected.keys() | found.keys())
    for name in names:
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"tensor '{name}' of {checkpoint.source.path} has shape {found.get(name)}, "
                f"its config asks for {expected.get(name)}",
                "convert the source checkpoint again",
            )
    return model


def check_whole(checkpoint: OpenCheckpoint) -> None:
    """Check the headers of a conversion; a codec needs no base model for this.

    Raises:
        CheckpointError: A tensor does not fit the config.
    """
    empty_model(checkpoint)


def build_shell(checkpoint: OpenCheckpoint, device: torch.device | str = "cpu") -> CausalWanModel:
    """Build a dense model without its blocks, which `read_block` reads one by one."""
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
    """Read one block of a dense checkpoint, in evaluation mode and frozen."""
    with torch.device("meta"):
        block = Block(checkpoint.config, layer)
    state = {
        name: checkpoint.read(f"blocks.{layer}.{name}").to(device, torch.float32)
        for name in block.state_dict()
    }
    block.load_state_dict(state, assign=True)
    return block.eval().requires_grad_(False)
