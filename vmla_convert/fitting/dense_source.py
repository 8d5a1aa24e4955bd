"""The dense checkpoint of a conversion: opened, and recorded by hash."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vmla_convert.checkpoint.base import PRECISION, base_tensors, tensor_hash
from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.hub import cached_repo
from vmla_convert.checkpoint.known import known_model
from vmla_convert.checkpoint.source import fingerprint
from vmla_convert.config import SourceConfig
from vmla_convert.errors import CheckpointError
from vmla_convert.loading.load import DEMO, Source, is_remote, open_named
from vmla_convert.progress import Progress
from vmla_convert.tables import to_dict


def open_dense(source: Source, progress: Progress) -> OpenCheckpoint:
    """Open the dense checkpoint of a conversion and show what is known about the model.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is converted already.
        ConfigError: A setting of the source does not fit.
    """
    checkpoint = open_named(source)
    if checkpoint.known and (note := known_model(checkpoint.known).note):
        progress.note(f"{checkpoint.known}: {note}")
    return checkpoint


def refuse_converted(checkpoint: OpenCheckpoint) -> None:
    """Refuse a source that is not dense.

    Raises:
        CheckpointError: The source is converted already.
    """
    if not checkpoint.config.is_dense:
        raise CheckpointError(
            f"{checkpoint.source.path} is converted already",
            "convert the dense checkpoint that it came from",
        )


def source_record(source: Source, checkpoint: OpenCheckpoint) -> dict[str, Any]:
    """Describe the source of a conversion, for people and for later commands."""
    how = _settings(source)
    loras = [
        {
            "name": lora.path.name,
            "sha256": fingerprint(lora.path),
            "scale": lora.scale,
            "licence": lora.licence,
        }
        for lora in checkpoint.loras
    ]
    # Keep the name of a Hub repository, which `file` belongs to; drop the path of a local folder.
    asked = to_dict(how)
    del asked["verify"]
    if not is_remote(how.checkpoint):
        del asked["checkpoint"]
    return {
        "name": Path(how.checkpoint).resolve().name,
        "state_key": checkpoint.source.key,
        "family": checkpoint.family,
        "known_model": checkpoint.known,
        "asked": asked,
        "loras": loras,
    }


def base_record(source: Source, checkpoint: OpenCheckpoint, progress: Progress) -> dict[str, Any]:
    """Describe a codec's base model: where it lies, and hashes of its key and value tensors."""
    # Hashes are those of the stored tensors, before any LoRA is merged.
    stored, hashes = replace(checkpoint, loras=()), dict[str, str]()
    names = base_tensors(checkpoint.config.geometry.num_layers)
    for name in progress.track(names, "hashing keys and values"):
        hashes[name] = tensor_hash(stored.read(name))
    path = checkpoint.source.path
    record: dict[str, Any] = {"name": path.name, "path": str(path.absolute())}
    if _settings(source).checkpoint == DEMO:
        record = {"name": DEMO, "repo": DEMO}
    elif repo := cached_repo(path):
        name, _, revision = repo.partition("@")
        record = {"name": name.rpartition("/")[2], "repo": name, "revision": revision}
        inside = path.parts[path.parts.index(revision) + 1 :]
        record |= {"file": "/".join(inside)} if inside else {}
    if checkpoint.loras:
        record["loras"] = [f"{lora.path.absolute()}:{lora.scale!r}" for lora in checkpoint.loras]
    return record | {"precision": PRECISION, "tensors": hashes}


def _settings(source: Source) -> SourceConfig:
    return source if isinstance(source, SourceConfig) else SourceConfig(str(source))
