"""Find the folders of text encoder, tokenizer and VAE, in diffusers' layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vmla_convert.checkpoint.hub import cached_repo, fetch_parts, has_parts, is_repo
from vmla_convert.checkpoint.source import located
from vmla_convert.config import ModelConfig
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.tables import read_json

Part = Literal["vae", "text_encoder", "tokenizer"]
PARTS: tuple[Part, ...] = ("vae", "text_encoder", "tokenizer")
_SETTINGS: dict[Part, str] = {
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
}

# Hub repositories that hold all parts, by channels of the latents and width of the contexts.
# Wan 2.1, Wan 2.2 A14B and descendants share one VAE; Wan 2.2 5B has its own. All share an encoder.
# The first repository serves models whose own repository lacks the parts, such as Self-Forcing.
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
    "--set media.base=Wan-AI/Wan2.1-T2V-1.3B-Diffusers (recover: recover.data.base)"
)


@dataclass(frozen=True)
class Components:
    """The folders of a model's parts, local or on the Hub. Hub folders are fetched at first use.

    Attributes:
        base: A folder, or a Hub id `owner/name[@revision]`.
        own: Local folders of parts that replace the base's.
    """

    base: str
    own: Mapping[Part, Path] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join([self.base, *(f"{part}/ of {self.place(part)}" for part in self.own)])

    def place(self, part: Part) -> str:
        """Return the folder or Hub id that holds a part."""
        return str(self.own[part].parent) if part in self.own else self.base

    def folder(self, part: Part) -> Path:
        """Return the local folder of a part, downloaded if needed."""
        return self._root(part, f"{part}/") / part

    def settings(self, part: Part) -> dict[str, Any]:
        """Return the config.json of a part, without downloading the weights."""
        name = f"{part}/config.json"
        file = self._root(part, name) / name
        try:
            table = read_json(file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read as JSON", _HINT) from error
        if not isinstance(table, dict):
            raise CheckpointError(f"{file} is not a JSON table", _HINT)
        return table

    def _root(self, part: Part, needed: str) -> Path:
        path = Path(self.place(part))
        return path if path.exists() or not is_repo(str(path)) else fetch_parts(str(path), needed)


def find_components(
    config: ModelConfig, base: str | None = None, checkpoint: Path | None = None
) -> Components:
    """Find the components that go with a model.

    The first of these that exists: `base`; the parts beside the checkpoint, local or in its Hub
    repository; the model's base model; a known repository with the same latents and contexts. Local
    parts beside a checkpoint count one by one.

    Args:
        config: Configuration of the model.
        base: A folder or Hub id that the user names.
        checkpoint: File or folder of the model.

    Raises:
        CheckpointError: A part is missing in `base`.
        ConfigError: No components are known for this model.
    """
    if base is None and checkpoint is not None:
        own = parts_beside(checkpoint)
        if len(own) == len(PARTS):
            return Components(str(own["vae"].parent))
        if own:
            return Components(_known_repository(config), own)
        base = repository_with_parts(checkpoint)
    components = Components(base if base is not None else _known_repository(config))
    _check_whole(components)
    return components


def parts_beside(checkpoint: Path) -> dict[Part, Path]:
    """Return the local parts in a checkpoint's folder or, as in a pipeline, the folder above.

    A checkpoint in the Hub's cache has none, because folders in the cache may be incomplete; see
    `repository_with_parts`.
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
    """Return the Hub id of a checkpoint in the Hub's cache, if the repository holds all parts."""
    repo = cached_repo(located(checkpoint))
    return repo if repo is not None and has_all_parts(repo) else None


def has_all_parts(repo: str) -> bool:
    """Return whether a Hub repository holds text encoder, tokenizer and VAE."""
    return has_parts(repo, *(f"{part}/" for part in PARTS))


def _known_repository(config: ModelConfig) -> str:
    channels, width = config.geometry.in_dim, config.geometry.text_dim
    known = REPOSITORIES.get((channels, width), ())
    if not known:
        raise ConfigError(
            f"no text encoder and VAE are known for latents of {channels} channels and contexts of "
            f"{width}",
            _HINT,
        )
    return config.base_model if config.base_model in known else known[0]


def _check_whole(components: Components) -> None:
    base = Path(components.base)
    if is_repo(components.base) and not base.exists():
        return  # The Hub is asked when a part is needed.
    if not base.is_dir():
        raise CheckpointError(f"there is no folder {base}", _HINT)
    if lacking := [part for part in PARTS if not (base / part).is_dir()]:
        raise CheckpointError(f"{base} holds no {lacking[0]}/", _HINT)
