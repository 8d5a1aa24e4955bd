"""Checkpoints by Hub id: which file of a repository is meant, and where it lies once fetched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn
from uuid import uuid4

from vmla_convert.checkpoint.choose_file import INDEX_SUFFIX, PICKLE_SUFFIXES
from vmla_convert.checkpoint.known import KNOWN, known_by_repo
from vmla_convert.checkpoint.source import TensorSource, open_headers
from vmla_convert.errors import CheckpointError, did_you_mean
from vmla_convert.progress import Progress

# huggingface_hub takes half a second to import, and most checkpoints are local: hence the imports
# inside functions.

BESIDE = ("config.json", "conversion.json")
"""What is fetched too where it lies beside the weights."""

_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REPO = re.compile(rf"({_NAME}/{_NAME})(?:@(\w[\w./-]*))?", re.ASCII)
_LONGEST_REPO = 96

# The first kind that a folder holds is the one to open, as `open_source` has it.
_KINDS = ((INDEX_SUFFIX,), (".safetensors",), PICKLE_SUFFIXES)
_ENDINGS = tuple(suffix for kind in _KINDS for suffix in kind)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
# The rest of a video pipeline, by the names that Wan, its successors and diffusers give it.
_NO_TRANSFORMER = re.compile(
    r"(^|/)(vae|(text|image)_encoder(_\d+)?|tokenizer(_\d+)?|scheduler)/"
    r"|(^|[/_.-])(vae|u?mt5|t5|clip|lora|optimizer)([_.-])",
    re.IGNORECASE,
)
_EXPERTS = ({"high_noise_model", "low_noise_model"}, {"transformer", "transformer_2"})

# Of a LoRA by PEFT: without its alpha the scale would be another.
_ADAPTER_SETTINGS = "adapter_config.json"

_TIMEOUT = 10.0


def is_repo(name: str) -> bool:
    """Whether a name can be a Hub id, "owner/name" or "owner/name@revision".

    A relative path may look the same: ask whether it exists first.
    """
    match = _REPO.fullmatch(name)
    if match is None or len(match[1]) > _LONGEST_REPO or ".." in name or "--" in match[1]:
        return False
    return not match[1].endswith((".git", ".json", *_ENDINGS))


def fetch(repo: str, file: str | None = None) -> Path:
    """Fetch a checkpoint from the Hub, or find it in the Hub's cache when it cannot be reached.

    Fetched are the file, the shards of an index, and what of `BESIDE` lies there, all of the one
    commit that the revision means when the fetch begins.

    Args:
        repo: "owner/name" or "owner/name@revision".
        file: Which file of the repository, or a folder that holds one checkpoint. None takes the
            one that `KNOWN` names, else the repository's only one.

    Returns:
        The local file, for `open_source`.

    Raises:
        CheckpointError: The repository cannot be read, holds no such checkpoint or several, or is
            not whole in the cache while the Hub cannot be reached.
    """
    listing = _list(repo)
    return _fetch(listing, _choose(listing, file))


@dataclass(frozen=True)
class Headers:
    """What can be known of a checkpoint on the Hub before its weights are here.

    Attributes:
        source: Its tensors, of which none can be read.
        config: The config.json beside it, where there is one, in the Hub's cache.
    """

    source: TensorSource
    config: Path | None


def fetch_headers(
    repo: str, file: str | None = None, progress: Progress | None = None
) -> Headers | Path:
    """Fetch no more of a checkpoint than its headers, where that is less than all that is not here.

    Args:
        repo: As for `fetch`.
        file: As for `fetch`.
        progress: Told of a download that headers cannot spare.

    Returns:
        The local file, as `fetch`, where its weights are in the Hub's cache, where the Hub cannot
        be reached, or where it is a pickle: those have no header.

    Raises:
        CheckpointError: As `fetch`.
    """
    listing = _list(repo)
    chosen = _choose(listing, file)
    if listing.away:
        return _fetch(listing, chosen)
    index = _download(listing, chosen) if chosen.endswith(INDEX_SUFFIX) else None
    weights = [chosen] if index is None else _shards(listing, chosen, index)
    lacking = sum(_missing_bytes(listing, name) for name in weights)
    if not lacking or chosen.endswith(PICKLE_SUFFIXES):
        if lacking and progress:
            progress.note(
                f"{chosen} of {listing.repo} is a torch pickle, which has no header: "
                f"downloading {lacking / 1e9:.2f} GB"
            )
        return _fetch(listing, chosen)
    folder = PurePosixPath(chosen).parent
    config = str(folder / BESIDE[0])
    headers = {
        str(PurePosixPath(name).relative_to(folder)): _header(listing, name) for name in weights
    }
    weight_map = None if index is None else _weight_map(listing, chosen, index)
    return Headers(
        open_headers(Path(listing.repo), headers, weight_map),
        _download(listing, config) if config in listing.files else None,
    )


def _fetch(listing: _Listing, chosen: str) -> Path:
    """A file with what belongs to it."""
    folder = PurePosixPath(chosen).parent
    for beside in (*BESIDE, _ADAPTER_SETTINGS):
        if (file_beside := str(folder / beside)) in listing.files:
            _download(listing, file_beside)
    path = _download(listing, chosen)
    if chosen.endswith(INDEX_SUFFIX):
        for shard in _shards(listing, chosen, path):
            _download(listing, shard)
    _remember(listing)
    return path


def fetch_parts(repo: str, *parts: str) -> Path:
    """Fetch files of a repository that is no checkpoint alone, or find them in the Hub's cache.

    They are of one commit, as with `fetch`.

    Args:
        repo: "owner/name" or "owner/name@revision".
        parts: Files, and folders with a final slash.

    Returns:
        The local folder that stands for the repository.

    Raises:
        CheckpointError: As `fetch`.
    """
    listing, root = _list(repo), Path()
    for part in parts:
        files = sorted(f for f in listing.files if _is_in(f, part))
        if not files:
            _refuse_part(listing, part)
        for file in files:
            root = _download(listing, file).parents[file.count("/")]
    _remember(listing)
    return root


def has_parts(repo: str, *parts: str) -> bool:
    """Whether a repository holds these files and folders, as for `fetch_parts`.

    Where the Hub cannot be reached, what is in its cache decides.

    Raises:
        CheckpointError: The repository cannot be read.
    """
    files = _list(repo).files
    return all(any(_is_in(file, part) for file in files) for part in parts)


def is_main(file: str) -> bool:
    """Whether a file of a repository is of the weights that its id alone may mean.

    Those are a pipeline's transformer and what is at the root, of every kind and shards included:
    which of them `fetch` takes depends on what else is there.
    """
    weights = file.endswith(_ENDINGS) and not _NO_TRANSFORMER.search(file)
    return weights and ("/" not in file or _is_in_pipeline(file))


def cached_repo(path: Path) -> str | None:
    """The Hub id, "owner/name@commit", of a file in the Hub's cache; None of any other file."""
    for index, part in enumerate(path.parts):
        folder, _, name = path.parts[index - 1].partition("--")
        if part == "snapshots" and folder == "models" and len(path.parts) > index + 1:
            return f"{name.replace('--', '/')}@{path.parts[index + 1]}"
    return None


@dataclass(frozen=True)
class _Listing:
    """The files of a repository: all of them, or those in the cache while the Hub is `away`.

    Attributes:
        repo: "owner/name".
        revision: A branch, tag or commit, as it was asked for.
        commit: What the revision meant when it was listed. Everything is read of it: by the name
            of a branch, a push in between would give files of two commits.
        files: Paths in the repository.
        away: Why the Hub cannot be asked; empty when it can.
    """

    repo: str
    revision: str
    commit: str
    files: frozenset[str]
    away: str = ""


def _list(repo: str) -> _Listing:
    from huggingface_hub import HfApi

    match = _REPO.fullmatch(repo)
    if match is None or not is_repo(repo):
        raise CheckpointError(
            f"'{repo}' is no Hub id", "give it as owner/name or owner/name@revision"
        )
    name, revision = match[1], match[2] or "main"
    try:
        # list_repo_files tries for 23 seconds where there is no network; this fails at once.
        told = HfApi().model_info(name, revision=revision, timeout=_TIMEOUT)
        files = frozenset(file.rfilename for file in told.siblings or [])
        return _Listing(name, revision, told.sha or revision, files)
    except Exception as error:  # networks fail in many ways, under two HTTP libraries
        if refusal := _refusal(error, name, revision):
            raise refusal from error
        commit = _cached_commit(name, revision)
        cached = frozenset(_cached_files(name, commit))
        listing = _Listing(name, revision, commit, cached, _why_away(error))
        if not cached:
            raise _lacking(listing, name, "neither a path here nor in the Hub's cache") from error
        return listing


def _cache_folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _cached_commit(repo: str, revision: str) -> str:
    """What a revision meant when the Hub was last asked for it; itself, where it is a commit."""
    reference = _cache_folder(repo) / "refs" / revision
    return reference.read_text("utf-8").strip() if reference.is_file() else revision


def _cached_files(repo: str, commit: str) -> list[str]:
    """What the Hub's cache holds of a commit; interrupted downloads are links to nothing."""
    snapshot = _cache_folder(repo) / "snapshots" / commit
    return [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]


def _remember(listing: _Listing) -> None:
    """Note in the Hub's cache which commit the revision means; offline it is looked up there.

    huggingface_hub does so itself where it downloads by the name of a branch or tag, and before it
    does; here it is done once all files are here, so that until then an older commit that is whole
    stays the one that is found.
    """
    if listing.away or listing.commit == listing.revision:
        return
    if _cached_commit(listing.repo, listing.revision) == listing.commit:
        return
    reference = _cache_folder(listing.repo) / "refs" / listing.revision
    draft = reference.with_name(f"{reference.name}.{uuid4().hex[:8]}.tmp")
    # A cache that cannot be written to serves all the same, as long as there is a network.
    with suppress(OSError):
        reference.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(listing.commit, "utf-8")
        os.replace(draft, reference)


def _choose(listing: _Listing, file: str | None) -> str:
    """The one file to open."""
    if file is None and (name := known_by_repo(listing.repo)):
        file = KNOWN[name].file
    if file is None:
        return _only(_preferred(listing.files), listing, listing.repo)
    file = str(PurePosixPath(file))
    if inside := [other for other in listing.files if PurePosixPath(file) in _parents(other)]:
        return _only(_openable(inside), listing, f"{file}/ of {listing.repo}")
    _require(listing, file)
    if not file.endswith(_ENDINGS):
        raise CheckpointError(
            f"'{file}' of {listing.repo} is not a checkpoint",
            f"known endings: {', '.join(_ENDINGS)}",
        )
    return file


def _parents(file: str) -> tuple[PurePosixPath, ...]:
    return tuple(PurePosixPath(file).parents)


def _preferred(files: Iterable[str]) -> list[str]:
    """The transformer of a diffusers pipeline, else what is at the root, else anything."""
    found = _openable(files)
    pipeline = [file for file in found if _is_in_pipeline(file)]
    root = [file for file in found if "/" not in file]
    return pipeline or root or found


def _is_in_pipeline(file: str) -> bool:
    return PurePosixPath(file).parts[0] in _EXPERTS[1]


def _openable(files: Iterable[str]) -> list[str]:
    """Checkpoints of a video transformer, of each folder those of its first kind."""
    folders: dict[PurePosixPath, list[str]] = {}
    for file in sorted(files):
        if not (_NO_TRANSFORMER.search(file) or _SHARD.search(file)):
            folders.setdefault(PurePosixPath(file).parent, []).append(file)
    found = []
    for inside in folders.values():
        kinds = ([file for file in inside if file.endswith(kind)] for kind in _KINDS)
        found += next(filter(None, kinds), [])
    return found


def _only(found: list[str], listing: _Listing, where: str) -> str:
    if not found:
        if listing.away:
            raise _lacking(listing, f"a checkpoint of {where}")
        raise CheckpointError(
            f"{where} holds nothing that can be loaded",
            "name a repository with an index of shards, a .safetensors file or a torch pickle",
        )
    if len(found) > 1:
        folders = {PurePosixPath(file).parts[0] for file in found}
        pair = "it is a pair of experts, converted one by one: " if folders in _EXPERTS else ""
        raise CheckpointError(
            f"{where} holds {len(found)} checkpoints: {_some(found)}",
            f"{pair}add --file {found[0]}{'' if pair else ', or another of them'}; "
            "in a recipe: source.file",
        )
    return found[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _is_in(file: str, part: str) -> bool:
    return file == part or (part.endswith("/") and file.startswith(part))


def _refuse_part(listing: _Listing, part: str) -> NoReturn:
    if listing.away:
        raise _lacking(listing, f"'{part}' of {listing.repo}")
    raise CheckpointError(
        f"{listing.repo} has no {part}",
        f"see https://huggingface.co/{listing.repo}/tree/{listing.revision}",
    )


def _require(listing: _Listing, file: str) -> None:
    if file in listing.files:
        return
    if listing.away:
        raise _lacking(listing, f"'{file}' of {listing.repo}")
    openable = _openable(listing.files)
    raise CheckpointError(
        f"{listing.repo} has no file '{file}'",
        did_you_mean(file, openable)
        if openable
        else f"see https://huggingface.co/{listing.repo}/tree/{listing.revision}",
    )


def _shards(listing: _Listing, file: str, index: Path) -> list[str]:
    """An index's shards, as paths in the repository."""
    folder = PurePosixPath(file).parent
    return [str(folder / name) for name in sorted(set(_weight_map(listing, file, index).values()))]


def _weight_map(listing: _Listing, file: str, index: Path) -> dict[str, str]:
    """Tensor to shard: each inside the index's folder, as `open_source` requires, and there."""
    title = f"'{file}' of {listing.repo}"
    hint = "tell its authors, or name another with --file"
    try:
        weight_map = dict(json.loads(index.read_text("utf-8"))["weight_map"])
        paths = [PurePosixPath(name) for name in sorted(set(weight_map.values()))]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{title} is not a safetensors index", hint) from error
    for path in paths:
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(
                f"{title} points outside its folder: {path}", "do not use this checkpoint"
            )
        if (shard := str(PurePosixPath(file).parent / path)) not in listing.files:
            if listing.away:
                raise _lacking(listing, f"'{shard}' of {listing.repo}")
            raise CheckpointError(f"{title} needs {path}, which is not there", hint)
    return weight_map


def _download(listing: _Listing, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _reported(listing, file):
        return Path(
            hf_hub_download(
                listing.repo, file, revision=listing.commit, local_files_only=bool(listing.away)
            )
        )


def _missing_bytes(listing: _Listing, file: str) -> int:
    """How much `_download` would have to fetch."""
    from huggingface_hub import hf_hub_download

    with _reported(listing, file):
        told = hf_hub_download(listing.repo, file, revision=listing.commit, dry_run=True)
    return told.file_size or 0 if told.will_download else 0


def _header(listing: _Listing, file: str) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of each tensor; nothing but that is fetched."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    title = f"'{file}' of {listing.repo}"
    with _reported(listing, file):
        try:
            told = HfApi().parse_safetensors_file_metadata(
                listing.repo, file, revision=listing.commit
            )
        except SafetensorsParsingError as error:
            raise CheckpointError(
                f"{title} is not a whole safetensors file", "tell its authors, or name another"
            ) from error
    return {name: vars(tensor) for name, tensor in told.tensors.items()}


@contextmanager
def _reported(listing: _Listing, file: str) -> Iterator[None]:
    """Whatever goes wrong with a file of the Hub, in one sentence."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # networks and disks fail in many ways, under two HTTP libraries
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        if cause and (refusal := _refusal(cause, listing.repo, listing.revision)):
            raise refusal from error
        if isinstance(error, LocalEntryNotFoundError):
            away = listing.away or _why_away(cause)
            cut_off = replace(listing, away=away)
            raise _lacking(cut_off, f"'{file}' of {listing.repo}") from error
        raise CheckpointError(
            f"'{file}' of {listing.repo} could not be downloaded: {first_line(error)}",
            "try again; whole files are kept",
        ) from error


def _refusal(error: BaseException, repo: str, revision: str) -> CheckpointError | None:
    """What the Hub said against it; None when it said nothing."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{repo} is only for those who accepted its terms",
            f"accept them at {page}, then: hf auth login",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"there is no repository {repo} on the Hub, or it is private",
            "check the name, also if it is meant as a path; if it is private: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{repo} has no revision '{revision}'",
            f"leave it out for the newest, or see {page}/commits/main",
        )
    if isinstance(error, errors.DisabledRepoError):
        return CheckpointError(f"the Hub has disabled {repo}", f"see {page}")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return CheckpointError(
            f"the Hub does not let you read {repo}",
            "log in with a token that may read it: hf auth login",
        )
    return None


def _why_away(error: BaseException | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub answers with error {error.response.status_code}"
    return "the Hub cannot be reached"


def _lacking(listing: _Listing, what: str, how: str = "not in the Hub's cache") -> CheckpointError:
    remedy = "unset it" if listing.away.startswith("HF_HUB_OFFLINE") else "connect and try again"
    return CheckpointError(
        f"{what} is {how}, and {listing.away}",
        f"{remedy}, or download it elsewhere and give its path",
    )


def first_line(error: BaseException) -> str:
    """What went wrong, with no token in it whatever a server sent back."""
    return without_token((str(error).strip() or type(error).__name__).splitlines()[0])


def without_token(text: str) -> str:
    """The text with this user's token struck out."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "(your token)") if token else text
