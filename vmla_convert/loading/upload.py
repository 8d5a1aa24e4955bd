"""Compare a staged folder with a Hub repository, and upload the files that differ."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import huggingface_hub as hf

from vmla_convert.checkpoint.choose_file import ENDINGS, is_main
from vmla_convert.checkpoint.hub import BESIDE
from vmla_convert.checkpoint.hub_errors import without_token
from vmla_convert.checkpoint.layouts import PIPELINE_NAME
from vmla_convert.errors import OutputError, first_line
from vmla_convert.loading.remote_code import SHIMS

_RECORD = BESIDE[1]
_LOGIN = "log in with a token that may write: hf auth login"
_AGAIN = "run it again: what is there is kept"


@dataclass(frozen=True)
class Difference:
    """The difference between a repository and the files that it should hold.

    Attributes:
        repo: "owner/name".
        url: Page of the repository.
        commit: Newest commit; None where the repository does not exist or is hidden.
        private: Whether the repository is private; None where it does not exist.
        changed: Files that the repository lacks, or has with other content.
        same: Files that the repository has already.
        stale: Files of an earlier conversion that would be taken for this one, or for a part of it.
        tags: Tag name to commit.
    """

    repo: str
    url: str
    commit: str | None
    private: bool | None
    changed: tuple[str, ...]
    same: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


def compare(repo: str, folder: Path) -> Difference:
    """Compare a folder with a repository; nothing is changed on the Hub.

    Raises:
        OutputError: The Hub refuses, cannot be reached, or holds weights of no conversion.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    api = hf.HfApi()
    url = f"{api.endpoint}/{repo}"
    with _reported(repo):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            return Difference(repo, url, None, None, tuple(files))
        found = api.verify_repo_checksums(repo, revision=info.sha, local_dir=folder)
        refs = api.list_repo_refs(repo)
    changed = {*found.extra_paths, *(mismatch["path"] for mismatch in found.mismatches)}
    there = [*found.missing_paths, *(name for name in files if name not in found.extra_paths)]
    weights = [name for name in there if name.endswith(ENDINGS)]
    if weights and not any(name.endswith(_RECORD) for name in there):
        raise OutputError(
            f"{repo} holds weights that are no conversion: {weights[0]}",
            "push to another name, so as not to replace them",
        )
    return Difference(
        repo,
        url,
        info.sha,
        info.private,
        changed=tuple(name for name in files if name in changed),
        same=tuple(name for name in files if name not in changed),
        stale=_stale(there, files),
        tags={tag.name: tag.target_commit for tag in refs.tags},
    )


def upload(
    difference: Difference,
    folder: Path,
    private: bool = False,
    tag: str | None = None,
    message: str | None = None,
) -> str:
    """Upload the folder that was compared, tag the commit, and return the commit.

    Files that were uploaded before an interruption are not sent again. Nothing is changed when the
    repository has changed since the comparison. A new repository is made `private` if asked.

    Raises:
        OutputError: The Hub refuses, or cannot be reached.
    """
    repo, commit = difference.repo, difference.commit
    if hf.get_token() is None:
        raise OutputError("nobody is logged in to the Hub here", _LOGIN)
    api = hf.HfApi()
    with _reported(repo):
        if commit is None:
            api.create_repo(repo, private=private, exist_ok=True)
        if difference.changed or difference.stale:
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=message or "Upload a conversion by vmla-convert",
                parent_commit=commit,
                delete_patterns=[glob.escape(name) for name in difference.stale] or None,
            )
            commit = done.oid
        assert commit is not None
        if tag is not None and difference.tags.get(tag) != commit:
            api.create_tag(repo, tag=tag, revision=commit)
    return commit


def _stale(there: Collection[str], files: Collection[str]) -> tuple[str, ...]:
    """Files that `fetch`, or a program that reads pipelines, would take in place of `files`.

    These are weights that `fetch` may choose, the config and the record in their folder, and the
    index and the Python files of a pipeline. Text encoder, tokenizer, VAE and scheduler stay: the
    same model in another layout uses the same ones, and components that do not fit a model are
    refused when it runs.
    """
    weights = {name for name in there if is_main(name) and name not in files}
    folders = {PurePosixPath(name).parent for name in weights}
    beside = {str(folder / name) for folder in folders for name in BESIDE}
    others = {PIPELINE_NAME, *SHIMS, *beside} - {*files}
    return tuple(name for name in there if name in weights or name in others)


@contextmanager
def _reported(repo: str) -> Iterator[None]:
    """Turn every error of the Hub into one sentence."""
    try:
        yield
    except Exception as error:  # networks fail in many ways, under two HTTP libraries
        raise _refusal(error, repo) from error


def _refusal(error: BaseException, repo: str) -> OutputError:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # Errors of upload threads are wrapped.
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return OutputError("the Hub cannot be reached: HF_HUB_OFFLINE is set", "unset it")
    if not isinstance(error, HfHubHTTPError):
        reason = without_token(first_line(error))
        return OutputError(f"the connection to the Hub broke off: {reason}", _AGAIN)
    status = error.response.status_code
    if status == 401:
        return OutputError("the Hub does not accept your token", _LOGIN)
    if status == 403:
        owner = repo.partition("/")[0]
        return OutputError(
            f"your token may not write to {repo}",
            f"use one that may write as {owner}: hf auth login",
        )
    if status in (409, 412):
        return OutputError(f"{repo} was changed by somebody else meanwhile", _AGAIN)
    reason = without_token(error.server_message or first_line(error))
    return OutputError(f"the Hub answers with error {status}: {reason}", _AGAIN)
