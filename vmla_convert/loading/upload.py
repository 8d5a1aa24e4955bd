"""A checkpoint to the Hub: what of it is there already, and what goes up to make the rest so."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from vmla_convert.checkpoint.choose_file import INDEX_SUFFIX, PICKLE_SUFFIXES, is_main
from vmla_convert.checkpoint.hub import BESIDE
from vmla_convert.checkpoint.hub_errors import without_token
from vmla_convert.checkpoint.layouts import PIPELINE_NAME
from vmla_convert.errors import OutputError, first_line
from vmla_convert.progress import Progress, Silent

# By this file a repository is known for one that holds a conversion.
_RECORD = BESIDE[1]
_WEIGHTS = (".safetensors", INDEX_SUFFIX)
_LOGIN = "log in with a token that may write: hf auth login"
_AGAIN = "run it again: what is there is kept"


@dataclass(frozen=True)
class Difference:
    """How a repository differs from what is to be there.

    Attributes:
        repo: "owner/name".
        url: Its page.
        commit: The newest; None where there is no such repository, or none to see.
        private: Whether only some may see it; None where there is none.
        changed: Files that it lacks or has otherwise.
        same: Files that it has already.
        stale: What of an earlier conversion would be taken for this one, or for a part of it.
        tags: Name to commit.
    """

    repo: str
    url: str
    commit: str | None
    private: bool | None
    changed: tuple[str, ...]
    same: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


def compare(repo: str, files: Mapping[str, Path], progress: Progress | None = None) -> Difference:
    """Ask the Hub what it has; nothing is changed there.

    Args:
        repo: "owner/name".
        files: Name in the repository to the file here.
        progress: Where to draw; large files are hashed.

    Raises:
        OutputError: The Hub refuses, cannot be reached, or holds weights that are no conversion.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    url = f"{api.endpoint}/{repo}"
    with _told(repo):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            return Difference(repo, url, None, None, tuple(files))
        there = {
            entry.path: entry
            for entry in api.list_repo_tree(repo, recursive=True, revision=info.sha)
            if isinstance(entry, RepoFile)
        }
        refs = api.list_repo_refs(repo)
    both = [name for name in files if name in there]
    compared = (progress or Silent()).track(both, "comparing") if both else ()
    same = tuple(name for name in compared if _same(files[name], there[name]))
    foreign = [name for name in there if name.endswith((*_WEIGHTS, *PICKLE_SUFFIXES))]
    if foreign and not any(name.endswith(_RECORD) for name in there):
        raise OutputError(
            f"{repo} holds weights that are no conversion: {foreign[0]}",
            "push to another name, so as not to replace them",
        )
    return Difference(
        repo,
        url,
        info.sha,
        info.private,
        changed=tuple(name for name in files if name not in same),
        same=same,
        stale=_stale(there, files),
        tags={tag.name: tag.target_commit for tag in refs.tags},
    )


def upload(
    difference: Difference,
    files: Mapping[str, Path],
    private: bool = False,
    tag: str | None = None,
    message: str | None = None,
) -> str:
    """Make the repository hold these files, and tag that.

    What went up before an interruption is not sent again.

    Args:
        difference: As `compare` found it; if the repository has changed since, nothing is done.
        files: The same.
        private: Whether only its owner may see a repository that is made now.
        tag: Of what is then there.
        message: Of the commit.

    Returns:
        The commit that holds them.

    Raises:
        OutputError: The Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    repo, commit = difference.repo, difference.commit
    if get_token() is None:
        raise OutputError("nobody is logged in to the Hub here", _LOGIN)
    api = HfApi()
    with _told(repo):
        if commit is None:
            api.create_repo(repo, private=private, exist_ok=True)
        if difference.changed or difference.stale:
            # Links to exactly what goes up: whatever else lies in the folder stays here.
            with TemporaryDirectory() as staged:
                for name, file in files.items():
                    link = Path(staged) / name
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file.resolve())
                done = api.upload_folder(
                    repo_id=repo,
                    folder_path=staged,
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
    """What the repository's id, or a program that reads pipelines, would take in place of `files`.

    Weights that `fetch` may choose, with the config and the record of their folder, and the index
    of a pipeline. Text encoder, tokenizer, VAE and scheduler stay, and go on to be the repository's
    components, which `find_components` knows by their folders alone: who pushes the same model in
    another layout wants the same ones, and any that do not fit a model are refused when it runs.
    """
    weights = {name for name in there if is_main(name) and name not in files}
    folders = {PurePosixPath(name).parent for name in weights}
    told = {PIPELINE_NAME, *(str(folder / name) for folder in folders for name in BESIDE)}
    return tuple(name for name in there if name in weights or name in told - {*files})


def _same(file: Path, there: object) -> bool:
    """Whether a file of the repository has the content of one here."""
    from huggingface_hub.hf_api import RepoFile

    assert isinstance(there, RepoFile)
    if there.size != file.stat().st_size:
        return False
    if there.lfs is None:
        content = file.read_bytes()
        # As git names it.
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == there.lfs.sha256


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Whatever goes wrong with the Hub, in one sentence."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:  # networks fail in many ways, under two HTTP libraries
        raise _refusal(error, repo) from error


def _refusal(error: BaseException, repo: str) -> OutputError:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # What goes up in threads comes back wrapped.
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return OutputError("the Hub cannot be reached: HF_HUB_OFFLINE is set", "unset it")
    if not isinstance(error, HfHubHTTPError):
        return OutputError(
            f"talking to the Hub broke off: {without_token(first_line(error))}", _AGAIN
        )
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
