"""Fetch checkpoints by Hub id: the chosen file, its shards, and the settings beside it."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub as hf

from vmla_convert.checkpoint.choose_file import (
    ENDINGS,
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    candidates,
    choose_file,
)
from vmla_convert.checkpoint.hub_errors import refusal, why_away, without_token
from vmla_convert.checkpoint.known import KNOWN, known_by_repo
from vmla_convert.checkpoint.source import TensorSource, open_headers, read_weight_map
from vmla_convert.errors import CheckpointError, did_you_mean, first_line
from vmla_convert.progress import Progress

BESIDE = ("config.json", "conversion.json")
"""Files that are fetched together with the weights in the same folder."""
# PEFT's settings hold the alpha of a LoRA, and so its scale.
_ADAPTER_SETTINGS = "adapter_config.json"

_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REPO = re.compile(rf"({_NAME}/{_NAME})(?:@(\w[\w./-]*))?", re.ASCII)
_LONGEST_REPO = 96
_TIMEOUT = 10.0


def is_repo(name: str) -> bool:
    """Whether a name can be a Hub id, "owner/name" or "owner/name@revision".

    A relative path may look the same: check first whether the path exists.
    """
    match = _REPO.fullmatch(name)
    if match is None or len(match[1]) > _LONGEST_REPO or ".." in name or "--" in match[1]:
        return False
    return not match[1].endswith((".git", ".json", *ENDINGS))


def fetch(repo: str, file: str | None = None) -> Path:
    """Download a checkpoint from the Hub, or find it in the Hub's cache.

    All files are of the commit that the revision means when the download begins.

    Args:
        repo: "owner/name" or "owner/name@revision".
        file: A file of the repository, or a folder that holds one checkpoint. None takes the file
            that `KNOWN` names, or else the only checkpoint of the repository.

    Raises:
        CheckpointError: The repository cannot be read, holds no such checkpoint or several, or is
            not complete in the cache while the Hub cannot be reached.
    """
    listing = _list(repo)
    return _fetch(listing, _choose(listing, file))


@dataclass(frozen=True)
class Headers:
    """The facts in a checkpoint's safetensors headers, without the weights.

    Attributes:
        source: The tensors' names, shapes and dtypes; the tensors cannot be read.
        config: The config.json beside the weights, in the Hub's cache.
    """

    source: TensorSource
    config: Path | None


def fetch_headers(
    repo: str, file: str | None = None, progress: Progress | None = None
) -> Headers | Path:
    """Download only the safetensors headers of the checkpoint that `fetch` would download.

    Returns:
        The local file, as `fetch` returns it, when the weights are in the cache, when the Hub
        cannot be reached, and when the weights are a pickle, which has no header.
    """
    listing = _list(repo)
    chosen = _choose(listing, file)
    if listing.away:
        return _fetch(listing, chosen)
    weight_map, weights = None, [chosen]
    if chosen.endswith(INDEX_SUFFIX):
        weight_map = _weight_map(listing, chosen, _download(listing, [chosen]))
        weights = _shards(chosen, weight_map)
    lacking = _missing_bytes(listing, weights)
    if not lacking or chosen.endswith(PICKLE_SUFFIXES):
        if lacking and progress:
            progress.note(
                f"{chosen} of {listing.repo} is a torch pickle, which has no header: "
                f"downloading {lacking / 1e9:.2f} GB"
            )
        return _fetch(listing, chosen)
    folder = PurePosixPath(chosen).parent
    headers = {
        str(PurePosixPath(name).relative_to(folder)): _header(listing, name) for name in weights
    }
    config = str(folder / BESIDE[0])
    return Headers(
        open_headers(Path(listing.repo), headers, weight_map),
        _download(listing, [config]) / config if config in listing.files else None,
    )


def fetch_parts(repo: str, *parts: str) -> Path:
    """Download files, and folders named with a final slash, and return the repository's folder.

    Raises:
        CheckpointError: As for `fetch`.
    """
    listing = _list(repo)
    files: list[str] = []
    for part in parts:
        inside = [file for file in listing.files if _is_in(file, part)]
        if not inside:
            raise _without(listing, f"'{part}'", _page(listing))
        files += inside
    root = _download(listing, files)
    _remember(listing, root)
    return root


def has_parts(repo: str, *parts: str) -> bool:
    """Whether a repository, or its cache while the Hub is away, holds what `fetch_parts` takes."""
    files = _list(repo).files
    return all(any(_is_in(file, part) for file in files) for part in parts)


def cached_repo(path: Path) -> str | None:
    """The Hub id "owner/name@commit" of a file in the Hub's cache; None for other files."""
    for index, part in enumerate(path.parts):
        folder, _, name = path.parts[index - 1].partition("--")
        if part == "snapshots" and folder == "models" and len(path.parts) > index + 1:
            return f"{name.replace('--', '/')}@{path.parts[index + 1]}"
    return None


@dataclass(frozen=True)
class _Listing:
    """The files of a repository; while the Hub is `away`, only those in the cache.

    Attributes:
        repo: "owner/name".
        revision: The branch, tag or commit that was asked for.
        commit: The commit that the revision means. All files are fetched by commit: a push between
            two downloads would otherwise mix files of two commits.
        files: Paths in the repository.
        away: Why the Hub cannot be reached; empty when it answers.
        root: The folder of this commit in the cache, when the Hub is away.
    """

    repo: str
    revision: str
    commit: str
    files: frozenset[str]
    away: str = ""
    root: Path = Path()


def _list(repo: str) -> _Listing:
    match = _REPO.fullmatch(repo)
    if match is None or not is_repo(repo):
        raise CheckpointError(
            f"'{repo}' is not a Hub id", "give it as owner/name or owner/name@revision"
        )
    name, revision = match[1], match[2] or "main"
    try:
        # list_repo_files tries for 23 seconds without a network; model_info fails at once.
        info = hf.HfApi().model_info(name, revision=revision, timeout=_TIMEOUT)
    except Exception as error:  # networks fail in many ways, under two HTTP libraries
        if refused := refusal(error, name, revision):
            raise refused from error
        listing = _list_cache(name, revision, why_away(error))
        if not listing.files:
            raise _lacking(listing, name, "neither a path here nor in the Hub's cache") from error
        return listing
    files = frozenset(file.rfilename for file in info.siblings or [])
    return _Listing(name, revision, info.sha or revision, files)


def _list_cache(repo: str, revision: str, away: str) -> _Listing:
    """The files in the Hub's cache, without links of interrupted downloads, which lead nowhere."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Without patterns, an incomplete snapshot would be refused.
        root = Path(
            hf.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
        )
    except LocalEntryNotFoundError:
        return _Listing(repo, revision, revision, frozenset(), away)
    files = frozenset(f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file())
    return _Listing(repo, revision, root.name, files, away, root)


def _choose(listing: _Listing, file: str | None) -> str:
    """The one file to open."""
    if file is None and (name := known_by_repo(listing.repo)):
        file = KNOWN[name].file
    folder = PurePosixPath(file or "")
    if file is None or any(folder in PurePosixPath(other).parents for other in listing.files):
        return _choose_in(listing, folder)
    if str(folder) not in listing.files:
        known = candidates(listing.files)
        hint = did_you_mean(str(folder), known) if known else _page(listing)
        raise _without(listing, f"'{folder}'", hint)
    if not file.endswith(ENDINGS):
        raise CheckpointError(
            f"'{file}' of {listing.repo} is not a checkpoint",
            f"known endings: {', '.join(ENDINGS)}",
        )
    return str(folder)


def _choose_in(listing: _Listing, folder: PurePosixPath) -> str:
    where = listing.repo if folder == PurePosixPath() else f"{folder}/ of {listing.repo}"
    paths = (PurePosixPath(file) for file in listing.files)
    inside = [str(path.relative_to(folder)) for path in paths if path.is_relative_to(folder)]
    found = choose_file(
        inside, where, lambda name: f"add --file {folder / name}", "; in a recipe: source.file"
    )
    if found is None:
        if listing.away:
            raise _lacking(listing, f"a checkpoint of {where}")
        raise CheckpointError(
            f"{where} holds nothing that can be loaded",
            f"name a repository with a file that ends in {', '.join(ENDINGS)}",
        )
    return str(folder / found)


def _fetch(listing: _Listing, chosen: str) -> Path:
    """Download a file with its shards and the settings beside it."""
    folder = PurePosixPath(chosen).parent
    beside = {str(folder / name) for name in (*BESIDE, _ADAPTER_SETTINGS)}
    root = _download(listing, [chosen, *(beside & listing.files)])
    if chosen.endswith(INDEX_SUFFIX):
        _download(listing, _shards(chosen, _weight_map(listing, chosen, root)))
    _remember(listing, root)
    return root / chosen


def _weight_map(listing: _Listing, index: str, root: Path) -> dict[str, str]:
    """The index's map of tensors to shards; every shard must be in the repository."""
    weight_map = read_weight_map(root / index, f"'{index}' of {listing.repo}")
    for shard in _shards(index, weight_map):
        if shard not in listing.files:
            raise _without(listing, f"'{shard}' (see '{index}')", "tell its authors, or add --file")
    return weight_map


def _shards(index: str, weight_map: dict[str, str]) -> list[str]:
    """Paths of the shards in the repository."""
    return [str(PurePosixPath(index).parent / name) for name in sorted(set(weight_map.values()))]


def _is_in(file: str, part: str) -> bool:
    return file == part or (part.endswith("/") and file.startswith(part))


def _download(listing: _Listing, files: Iterable[str]) -> Path:
    """Download files that the listing names, and return the folder of their commit."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        """A bar that is drawn on terminals only, not in logs."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"disable": None, **kwargs})

    if listing.away:
        return listing.root
    with _reported(listing):
        folder = hf.snapshot_download(
            listing.repo,
            revision=listing.commit,
            allow_patterns=_patterns(files),
            tqdm_class=Bar,
        )
    # When the Hub fails meanwhile, snapshot_download returns what is in the cache.
    for file in files:
        if not Path(folder, file).is_file():
            raise _lacking(replace(listing, away=why_away(None)), f"'{file}' of {listing.repo}")
    return Path(folder)


def _remember(listing: _Listing, root: Path) -> None:
    """Note in the Hub's cache which commit the revision means, for lookups without the Hub.

    The note is written after the last file, so that an older, complete commit stays in use until
    then. snapshot_download writes no note when it is given a commit.
    """
    if listing.away or listing.commit == listing.revision:
        return
    reference = root.parents[1] / "refs" / listing.revision
    draft = reference.with_name(f"{reference.name}.{os.getpid()}.tmp")
    with suppress(OSError):  # a cache without write access still serves while the Hub answers
        reference.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(listing.commit, "utf-8")
        draft.replace(reference)


def _missing_bytes(listing: _Listing, files: Iterable[str]) -> int:
    """Bytes that `_download` would have to fetch."""
    with _reported(listing):
        planned = hf.snapshot_download(
            listing.repo, revision=listing.commit, allow_patterns=_patterns(files), dry_run=True
        )
    return sum(file.file_size or 0 for file in planned if file.will_download)


def _patterns(files: Iterable[str]) -> list[str]:
    return [glob.escape(file) for file in files]


def _header(listing: _Listing, file: str) -> dict[str, dict[str, Any]]:
    """The table of tensors in a safetensors file; only the header is downloaded."""
    with _reported(listing):
        header = hf.HfApi().parse_safetensors_file_metadata(
            listing.repo, file, revision=listing.commit
        )
    return {name: vars(tensor) for name, tensor in header.tensors.items()}


@contextmanager
def _reported(listing: _Listing) -> Iterator[None]:
    """Turn every error of a download into one sentence."""
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # networks and disks fail in many ways, under two HTTP libraries
        wrapped = isinstance(error, DryRunError | LocalEntryNotFoundError)
        cause = error.__cause__ if wrapped else error
        if cause and (refused := refusal(cause, listing.repo, listing.revision)):
            raise refused from error
        if wrapped:
            away = replace(listing, away=why_away(cause))
            raise _lacking(away, f"a file of {listing.repo}") from error
        raise CheckpointError(
            f"{listing.repo} could not be read: {without_token(first_line(error))}",
            "try again; whole files are kept",
        ) from error


def _page(listing: _Listing) -> str:
    return f"see https://huggingface.co/{listing.repo}/tree/{listing.revision}"


def _without(listing: _Listing, what: str, hint: str) -> CheckpointError:
    """A file that the repository does not have, or the cache while the Hub is away."""
    if listing.away:
        return _lacking(listing, f"{what} of {listing.repo}")
    return CheckpointError(f"{listing.repo} has no {what}", hint)


def _lacking(listing: _Listing, what: str, how: str = "not in the Hub's cache") -> CheckpointError:
    remedy = "unset it" if listing.away.startswith("HF_HUB_OFFLINE") else "connect and try again"
    return CheckpointError(
        f"{what} is {how}, and {listing.away}",
        f"{remedy}, or download it elsewhere and give its path",
    )
