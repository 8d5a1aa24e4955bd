"""Where the text encoder, tokenizer and VAE of a video model lie: folders in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vmla_convert.checkpoint.hub import cached_repo, fetch_parts, has_parts, is_repo
from vmla_convert.checkpoint.source import located
from vmla_convert.config import ModelConfig
from vmla_convert.errors import CheckpointError, ConfigError

Part = Literal["vae", "text_encoder", "tokenizer"]
PARTS: tuple[Part, ...] = ("vae", "text_encoder", "tokenizer")
_SETTINGS: dict[Part, str] = {
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
}

# Repositories that hold all parts, by the channels of the latents and the width of the contexts.
# Wan 2.1, 2.2 A14B and what was trained from them share one VAE, 2.2 5B has its own, and all one
# text encoder (Wan22 wan/configs; SKY's model cards), so that the smallest repository does for
# models whose own base holds none, as Self-Forcing's. See `known.py` for the abbreviations.
REPOSITORIES: dict[tuple[int, int], tuple[str, ...]] = {
    (16, 4096): (
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
    ),
    (48, 4096): ("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
}

_HINT = (
    "name a folder or Hub id that holds vae/, text_encoder/ and tokenizer/: "
    "--base Wan-AI/Wan2.1-T2V-1.3B-Diffusers, in a recipe generate.base"
)


@dataclass(frozen=True)
class Components:
    """A pipeline's folders, here or on the Hub; what is on the Hub is fetched when it is needed.

    Attributes:
        base: A folder, or a Hub id `owner/name[@revision]`.
        own: Folders of parts that are taken in place of the base's.
    """

    base: str
    own: Mapping[Part, Path] = field(default_factory=dict)

    def __str__(self) -> str:
        """Where all of it comes from."""
        return ", ".join([self.base, *(f"{part}/ of {self.place(part)}" for part in self.own)])

    def place(self, part: Part) -> str:
        """The folder or Hub id that holds one part."""
        return str(self.own[part].parent) if part in self.own else self.base

    def folder(self, part: Part) -> Path:
        """The local folder of one part, whole.

        Raises:
            CheckpointError: It cannot be had.
        """
        return self._root(part, f"{part}/") / part

    def settings(self, part: Part) -> dict[str, Any]:
        """The config.json of one part, without its weights.

        Raises:
            CheckpointError: It cannot be had, or is no JSON table.
        """
        name = f"{part}/config.json"
        file = self._root(part, name) / name
        try:
            table = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read as JSON", _HINT) from error
        if not isinstance(table, dict):
            raise CheckpointError(f"{file} is not a JSON table", _HINT)
        return table

    def _root(self, part: Part, needed: str) -> Path:
        """The local folder that holds a part, with what is needed of it."""
        path = Path(self.place(part))
        return path if path.exists() or not is_repo(str(path)) else fetch_parts(str(path), needed)


def find_components(
    config: ModelConfig, base: str | None = None, checkpoint: Path | None = None
) -> Components:
    """The components that go with a model.

    In this order: those that the user names, those beside the checkpoint, here or in its repository
    on the Hub, those of the base model if its repository holds them, those of a repository with the
    same latents and contexts. Of what lies beside a checkpoint here each part counts for itself.

    Args:
        config: Of the model.
        base: A folder or Hub id that the user names.
        checkpoint: File or folder that the model was read from.

    Raises:
        CheckpointError: What the user names lacks a part.
        ConfigError: Nothing is named, and nothing known.
    """
    if base is None and checkpoint is not None:
        own = parts_beside(checkpoint)
        if len(own) == len(PARTS):
            return Components(str(own["vae"].parent))
        if own:
            return Components(known_components(config), own)
        base = repository_with_parts(checkpoint)
    components = Components(base if base is not None else known_components(config))
    _check_whole(components)
    return components


def known_components(config: ModelConfig) -> str:
    """The repository whose components a model takes.

    Raises:
        ConfigError: None is known.
    """
    geometry = config.geometry
    known = REPOSITORIES.get((geometry.in_dim, geometry.text_dim), ())
    if not known:
        raise ConfigError(
            f"no text encoder and VAE are known for latents of {geometry.in_dim} channels and "
            f"contexts of {geometry.text_dim}",
            _HINT,
        )
    return config.base_model if config.base_model in known else known[0]


def parts_beside(checkpoint: Path) -> dict[Part, Path]:
    """The components in the folder of a checkpoint or, as in a pipeline's, in the one above.

    Of a checkpoint in the Hub's cache there are none, as what else is there of its repository need
    not be whole: see `repository_with_parts`.

    Raises:
        CheckpointError: There is no checkpoint.
    """
    folder = located(checkpoint).parent
    if cached_repo(folder) is not None:
        return {}
    for place in (folder, folder.parent):
        found: dict[Part, Path] = {
            part: place / part for part in PARTS if (place / part / _SETTINGS[part]).is_file()
        }
        if found:
            return found
    return {}


def repository_with_parts(checkpoint: Path) -> str | None:
    """The Hub id that a checkpoint in the Hub's cache is of, if that holds all parts too.

    Raises:
        CheckpointError: There is no checkpoint, or its repository cannot be read.
    """
    repo = cached_repo(located(checkpoint))
    return repo if repo is not None and has_all_parts(repo) else None


def has_all_parts(repo: str) -> bool:
    """Whether a repository of the Hub holds text encoder, tokenizer and VAE.

    Raises:
        CheckpointError: It cannot be read.
    """
    return has_parts(repo, *(f"{part}/" for part in PARTS))


def _check_whole(components: Components) -> None:
    base = Path(components.base)
    if is_repo(components.base) and not base.exists():
        return  # The Hub is asked when a part is needed.
    if not base.is_dir():
        raise CheckpointError(f"there is no folder {base}", _HINT)
    if lacking := [part for part in PARTS if not (base / part).is_dir()]:
        raise CheckpointError(f"{base} holds no {lacking[0]}/", _HINT)
