"""Errors of the Hub and of the network, in one sentence each."""

from __future__ import annotations

import huggingface_hub as hf

from vmla_convert.errors import CheckpointError


def refusal(error: BaseException, repo: str, revision: str) -> CheckpointError | None:
    """The Hub's refusal in one sentence; None when the Hub did not answer."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    refusals: dict[type[Exception], tuple[str, str]] = {
        errors.GatedRepoError: (
            f"{repo} is only for users who accepted its terms",
            f"accept them at {page}, then: hf auth login",
        ),
        errors.RepositoryNotFoundError: (
            f"there is no repository {repo} on the Hub, or it is private",
            "check the name, also if it is meant as a path; if it is private: hf auth login",
        ),
        errors.RevisionNotFoundError: (
            f"{repo} has no revision '{revision}'",
            f"leave it out for the newest, or see {page}/commits/main",
        ),
        errors.DisabledRepoError: (f"the Hub has disabled {repo}", f"see {page}"),
    }
    found = next((text for kind, text in refusals.items() if isinstance(error, kind)), None)
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        found = found or (
            f"the Hub does not let you read {repo}",
            "log in with a token that may read it: hf auth login",
        )
    return CheckpointError(*found) if found else None


def why_away(error: BaseException | None) -> str:
    """Why the Hub cannot be asked."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub answers with error {error.response.status_code}"
    return "the Hub cannot be reached"


def without_token(text: str) -> str:
    """The text with this user's Hub token removed, as a server may repeat the token."""
    token = hf.get_token()
    return text.replace(token, "(your token)") if token else text
