"""The cache folder of clips that were made: one folder for each set, named by what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_ASSETS_CACHE
from safetensors import safe_open

from vmla_convert.config import MediaConfig
from vmla_convert.media.clips import latent_files
from vmla_convert.storage.output import IDENTITY_NAME

DEFAULT_FOLDER = Path(HF_ASSETS_CACHE) / "vmla-convert" / "clips"


@dataclass(frozen=True)
class ClipSet:
    """Clips that were made.

    Attributes:
        folder: Folder of the set.
        kind: `self` or `videos`.
        split: Split that samples of a model are for; None for videos, which serve both.
        model: Hub id of the model that samples come from, or the start of the hash of its weights.
        clips: Number of clips.
        frames: Latent frames of a clip.
        latent_size: Height and width of its latents.
        nbytes: Bytes on the disk.
    """

    folder: Path
    kind: str
    split: str | None
    model: str | None
    clips: int
    frames: int
    latent_size: tuple[int, int]
    nbytes: int


def clips_folder(media: MediaConfig) -> Path:
    """The folder of all sets."""
    return Path(media.clips_dir) if media.clips_dir else DEFAULT_FOLDER


def set_folder(root: Path, identity: Any) -> Path:
    """Folder of the set with an identity, everything that its clips depend on as JSON data."""
    text = json.dumps(identity, sort_keys=True)
    return root / hashlib.sha256(text.encode()).hexdigest()[:16]


def clip_sets(root: Path) -> Iterator[ClipSet]:
    """The sets in a folder, finished or begun."""
    for file in sorted(root.glob(f"*/{IDENTITY_NAME}")):
        try:
            identity = json.loads(file.read_text("utf-8"))
            clips = latent_files(file.parent)
            yield ClipSet(
                file.parent,
                identity["kind"],
                identity.get("split"),
                _model_of(identity),
                sum(map(_clips_in, clips)),
                identity["frames"],
                tuple(identity["latent_size"]),
                sum(clip.stat().st_size for clip in clips),
            )
        except (ValueError, LookupError, TypeError):
            continue  # somebody else's folder


def _clips_in(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_slice("context").get_shape()[0]


def _model_of(identity: dict[str, Any]) -> str | None:
    if identity["kind"] != "self":
        return None
    name, sha256 = identity["model"]["base_model"], identity["weights"]["sha256"]
    return f"weights {sha256[:12]}" if name == "unknown" else name
