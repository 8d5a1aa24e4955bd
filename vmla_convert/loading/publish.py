"""Push a conversion to the Hub, from where `load` takes it by its id."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.checkpoint.hub import BESIDE, is_repo
from vmla_convert.checkpoint.integrity import file_hash, recorded_files, refuse_changed
from vmla_convert.checkpoint.layouts import PIPELINE_NAME
from vmla_convert.checkpoint.settings import read_config
from vmla_convert.checkpoint.source import located, weight_files
from vmla_convert.config import ModelConfig
from vmla_convert.errors import CheckpointError, ConfigError, OutputError
from vmla_convert.loading.card import CARD_NAME, STRIPS, is_untouched, model_card
from vmla_convert.loading.load import check_whole, read_provenance
from vmla_convert.loading.metadata_files import read_index
from vmla_convert.loading.public_record import without_folders
from vmla_convert.loading.remote_code import SHIMS, TABLES
from vmla_convert.loading.upload import Difference, compare, upload
from vmla_convert.media.components import PARTS
from vmla_convert.progress import Progress, Silent

_ORIGINS = ("_name_or_path", "name_or_path")
# File endings that diffusers and transformers use for each part of a Wan pipeline, old and new.
_COMPONENTS: dict[str, tuple[str, ...]] = {
    "vae": (".json", ".safetensors", ".bin"),
    "text_encoder": (".json", ".safetensors", ".bin"),
    "tokenizer": (".json", ".model", ".txt"),
    "scheduler": (".json",),
}
_CONVERT = "make one first: vmla convert CKPT -o OUT"


@dataclass(frozen=True)
class Push:
    """The result of a push, or of its dry run.

    Attributes:
        repo: "owner/name".
        url: Page of the repository.
        commit: Commit with the files; after a dry run the newest commit, or None.
        private: Whether the repository is private.
        tag: Tag of the commit.
        uploaded: Bytes of the uploaded files, by name.
        kept: Bytes of the files that the repository had already, by name.
        removed: Files of an earlier conversion that were removed.
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
    """Upload a conversion with its record and card; files that are there already are kept.

    Args:
        folder: Folder made by `convert` or `recover`.
        repo: "owner/name"; a missing repository is created.
        private: Whether a new repository is private.
        tag: Tag for the new commit.
        message: Commit message.
        dry_run: Only compare.
        progress: Gets a note before the upload; huggingface-hub draws the upload's own bars.

    Raises:
        CheckpointError: The folder is not a whole conversion.
        ConfigError: `repo` is not a repository name, or `tag` not a tag name.
        OutputError: The Hub refuses, or cannot be reached.
    """
    if not is_repo(repo) or "@" in repo:
        raise ConfigError(f"'{repo}' is not a repository name", "give it as owner/name")
    if tag is not None and not re.fullmatch(r"\w[\w.-]*", tag):
        raise ConfigError(f"'{tag}' is not a tag name", "try --tag v1")
    config, record = _conversion(folder)
    with TemporaryDirectory() as staged:
        files = _stage(Path(staged), folder, repo, config, record)
        sizes = {name: (Path(staged) / name).stat().st_size for name in files}
        found = compare(repo, Path(staged))
        _check(found, private, tag)
        if found.changed and not dry_run:
            nbytes = sum(sizes[name] for name in found.changed)
            (progress or Silent()).note(
                f"uploading {nbytes:,} bytes; if it breaks off, the same command continues"
            )
        commit = found.commit
        if not dry_run:
            commit = upload(found, Path(staged), private, tag, message)
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
    """The config and record of a folder, checked as far as headers allow."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}", _CONVERT)
    checkpoint = open_checkpoint(folder)
    if checkpoint.config.is_dense:
        raise CheckpointError(f"{folder} is not a converted checkpoint", _CONVERT)
    check_whole(checkpoint)
    if not (record := read_provenance(folder)):
        raise CheckpointError(
            f"{folder} has no conversion.json, which says how it was made", _CONVERT
        )
    hashes = recorded_files(folder, record)
    refuse_changed([file for file, text in hashes.items() if file_hash(file) != text])
    return checkpoint.config, record


def _stage(
    staged: Path, folder: Path, repo: str, config: ModelConfig, record: dict[str, Any]
) -> list[str]:
    """Put the files to upload into `staged`: links to weights, and tables for the public."""
    files = list(dict.fromkeys(file for file in _own_files(folder) if file.is_file()))
    names = [file.relative_to(folder).as_posix() for file in files]
    is_pipeline = PIPELINE_NAME in names
    for file, name in zip(files, names, strict=True):
        copy = staged / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        changes = _table_changes(name, is_pipeline)
        table = public = read_config(file) if changes else {}
        for change in changes:
            public = change(public)
        if public != table:
            copy.write_text(f"{json.dumps(public, indent=2, ensure_ascii=False)}\n", "utf-8")
        else:
            copy.symlink_to(file.resolve())
    shims = SHIMS if is_pipeline else {}
    for name, text in shims.items():
        (staged / name).write_text(text, "utf-8")
    card = staged / CARD_NAME
    if not card.exists() or is_untouched(_read_page(folder / CARD_NAME)):
        strip = next((name for name in STRIPS if name in names), None)
        parts = [part for part in PARTS if any(name.startswith(f"{part}/") for name in names)]
        text = model_card(config, record, repo, strip, parts if is_pipeline else None)
        card.unlink(missing_ok=True)
        card.write_text(text, "utf-8")
    return [*names, *shims, *({CARD_NAME} - {*names})]


def _own_files(folder: Path) -> Iterator[Path]:
    """The files of a conversion; other files in the folder are not uploaded."""
    main = located(folder)
    yield from weight_files(folder)
    yield main
    yield from (main.parent / name for name in BESIDE)
    yield from (folder / name for name in (CARD_NAME, *STRIPS))
    if main.parent == folder:
        return
    yield folder / PIPELINE_NAME
    index = read_index(folder)
    for part, endings in _COMPONENTS.items():
        for file in sorted((folder / part).glob("*")) if part in index else ():
            if file.name.endswith(endings) and not file.name.startswith("."):
                yield file


def _without_origin(table: dict[str, Any]) -> dict[str, Any]:
    """A component's settings without the folder that diffusers or transformers read it from."""
    return table | without_folders({key: table[key] for key in _ORIGINS if key in table})


def _table_changes(
    name: str, is_pipeline: bool
) -> list[Callable[[dict[str, Any]], dict[str, Any]]]:
    """The changes of a JSON table before its upload: no local folders; classes for diffusers."""
    path, changes = PurePosixPath(name), []
    if path.parts[0] in PARTS:  # leave vocabularies alone: a token may look like a path
        return [_without_origin] if path.name in ("config.json", "tokenizer_config.json") else []
    if path.name in BESIDE:
        changes.append(without_folders)
    if is_pipeline and name in TABLES:
        changes.append(TABLES[name])
    return changes


def _read_page(page: Path) -> str:
    try:
        return page.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{page} is not in UTF-8", "save it in UTF-8, or remove it to get a new card"
        ) from error


def _check(found: Difference, private: bool, tag: str | None) -> None:
    """Refuse a public repository for a private push, and a tag of another state."""
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
