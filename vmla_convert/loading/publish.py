"""Push a conversion to the Hub, from where `load` takes it by its id."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.checkpoint.hub import BESIDE, is_repo
from vmla_convert.checkpoint.layouts import PIPELINE_NAME
from vmla_convert.checkpoint.settings import read_config
from vmla_convert.checkpoint.source import located, weight_files
from vmla_convert.config import ModelConfig
from vmla_convert.errors import CheckpointError, ConfigError, OutputError
from vmla_convert.loading.card import (
    CARD_NAME,
    STRIPS,
    is_untouched,
    model_card,
    without_folders,
)
from vmla_convert.loading.load import CONVERSION_NAME, check_whole, read_provenance
from vmla_convert.loading.metadata_files import read_index
from vmla_convert.loading.upload import Difference, compare, upload
from vmla_convert.media.components import PARTS
from vmla_convert.progress import Progress, Silent

_ORIGINS = ("_name_or_path", "name_or_path")
# What diffusers and transformers save of each part of a Wan pipeline, in older forms too.
_COMPONENTS: dict[str, tuple[str, ...]] = {
    "vae": (".json", ".safetensors", ".bin"),
    "text_encoder": (".json", ".safetensors", ".bin"),
    "tokenizer": (".json", ".model", ".txt"),
    "scheduler": (".json",),
}
_CONVERT = "make one first: vmla convert CKPT -o OUT"


@dataclass(frozen=True)
class Push:
    """What a push did, or would do.

    Attributes:
        repo: "owner/name".
        url: Its page.
        commit: That holds the files; of a dry run the newest there, None where there is none.
        private: Whether only its owner may see it.
        tag: Of the commit.
        uploaded: Bytes of the files that were not there, by name.
        kept: Those of files that were.
        removed: Weights of an earlier conversion, and what described them.
    """

    repo: str
    url: str
    commit: str | None
    private: bool
    tag: str | None
    uploaded: dict[str, int]
    kept: dict[str, int]
    removed: tuple[str, ...]


def push(
    folder: Path,
    repo: str,
    private: bool = False,
    tag: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Push:
    """Upload a conversion, its record and its card; what is there already is not sent again.

    Args:
        folder: From `convert` or `recover`.
        repo: "owner/name"; it is made if there is none.
        private: Whether only its owner may see it, if it is made now.
        tag: A name for this state of it.
        message: Of the commit.
        dry_run: Only look.
        progress: Where to draw; how far each upload is, huggingface-hub itself draws.

    Raises:
        CheckpointError: The folder is no whole conversion.
        ConfigError: `repo` is no name of a repository, or `tag` none of a tag.
        OutputError: The Hub refuses, or cannot be reached.
    """
    if not is_repo(repo) or "@" in repo:
        raise ConfigError(f"'{repo}' is no name of a repository", "give it as owner/name")
    if tag is not None and not re.fullmatch(r"\w[\w.-]*", tag):
        raise ConfigError(f"'{tag}' is no name of a tag", "try --tag v1")
    config, record = _conversion(folder)
    with TemporaryDirectory() as made:
        files = _files(folder)
        files |= _made_public(Path(made), files, repo, config, record)
        sizes = {name: file.stat().st_size for name, file in files.items()}
        progress = progress or Silent()
        found = compare(repo, files, progress)
        _check(found, private, tag)
        if found.changed and not dry_run:
            nbytes = sum(sizes[name] for name in found.changed)
            progress.note(f"uploading {nbytes:,} bytes; if it breaks off, the same command goes on")
        commit = found.commit if dry_run else upload(found, files, private, tag, message)
    return Push(
        repo,
        found.url,
        commit,
        private=private if found.private is None else found.private,
        tag=tag,
        uploaded={name: sizes[name] for name in found.changed},
        kept={name: sizes[name] for name in found.same},
        removed=found.stale,
    )


def _conversion(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """What a folder holds, checked as far as its headers tell."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}", _CONVERT)
    checkpoint = open_checkpoint(folder)
    if checkpoint.config.is_dense:
        raise CheckpointError(f"{folder} is not a converted checkpoint", _CONVERT)
    check_whole(checkpoint)
    if not (record := read_provenance(folder)):
        raise CheckpointError(
            f"{folder} has no conversion.json, which says what it was made of", _CONVERT
        )
    return checkpoint.config, record


def _files(folder: Path) -> dict[str, Path]:
    """All of a conversion, by name in the repository, and nothing else that may lie there."""
    main = located(folder)
    beside = [main.parent / name for name in BESIDE]
    pages = [folder / name for name in (CARD_NAME, *STRIPS)]
    parts = _pipeline_files(folder) if main.parent != folder else []
    found = [*weight_files(folder), main, *beside, *pages, *parts]
    return {file.relative_to(folder).as_posix(): file for file in found if file.is_file()}


def _pipeline_files(folder: Path) -> list[Path]:
    """Of a folder in diffusers' layout the index and the components beside the transformer.

    What else the index names, or lies in their folders, was put there by somebody else.
    """
    named = read_index(folder)
    files = [
        file
        for part, kinds in _COMPONENTS.items()
        if part in named
        for file in sorted((folder / part).glob("*"))
        if file.name.endswith(kinds) and not file.name.startswith(".")
    ]
    return [folder / PIPELINE_NAME, *files]


def _read_page(page: Path) -> str:
    try:
        return page.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{page} is not in UTF-8", "save it so, or remove it to have a card made"
        ) from error


def _made_public(
    place: Path, files: dict[str, Path], repo: str, config: ModelConfig, record: dict[str, Any]
) -> dict[str, Path]:
    """What goes up in place of a file of the folder, written to `place`: card, and tables."""
    made: dict[str, Path] = {}
    card = files.get(CARD_NAME)
    if card is None or is_untouched(_read_page(card)):
        strip = next((name for name in STRIPS if name in files), None)
        made[CARD_NAME] = place / CARD_NAME
        parts = [part for part in PARTS if any(name.startswith(f"{part}/") for name in files)]
        text = model_card(config, record, repo, strip, parts if PIPELINE_NAME in files else None)
        made[CARD_NAME].write_text(text, "utf-8")
    inside = PurePosixPath(next(name for name in files if name.endswith(CONVERSION_NAME))).parent
    tables = {str(inside / name): without_folders for name in BESIDE}
    # Of others' tables nothing else may change: a tokenizer's words may look like paths.
    tables |= {name: _without_origin for name in files if _is_of_component(PurePosixPath(name))}
    for name, stripped in tables.items():
        told = read_config(files[name])
        if (public := stripped(told)) != told:
            made[name] = place / name.replace("/", "--")
            text = json.dumps(public, indent=2, ensure_ascii=False)
            made[name].write_text(f"{text}\n", "utf-8")
    return made


def _is_of_component(name: PurePosixPath) -> bool:
    """Whether a table says how a text encoder, tokenizer or VAE was made, and so where it lay."""
    return name.parts[0] in PARTS and name.name in ("config.json", "tokenizer_config.json")


def _without_origin(table: dict[str, Any]) -> dict[str, Any]:
    """A component's settings without the folder that diffusers or transformers read it from."""
    origin = {name: table[name] for name in _ORIGINS if name in table}
    return table | without_folders(origin)


def _check(found: Difference, private: bool, tag: str | None) -> None:
    """Refuse, before anything goes up, what would fail or surprise after."""
    if private and found.private is False:
        raise OutputError(
            f"{found.repo} is there already, and public",
            f"make it private at {found.url}/settings, or push to another name",
        )
    moved = found.changed or found.stale
    if tag is not None and tag in found.tags and (moved or found.tags[tag] != found.commit):
        raise OutputError(
            f"{found.repo} has a tag {tag} already, of another state", "choose another --tag"
        )
