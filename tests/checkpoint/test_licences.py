"""Which licence a work made of several has."""

from __future__ import annotations

import pytest

from vmla_convert.checkpoint.licences import read_licence, strictest

NC, NC_SA, SA = "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0"


@pytest.mark.parametrize(
    ("licences", "whole"),
    [
        (["mit"], "mit"),
        (["unknown"], "unknown"),
        (["other"], "other"),
        (["apache-2.0", "apache-2.0"], "apache-2.0"),
        (["apache-2.0", NC_SA], NC_SA),
        (["apache-2.0", "other"], "other"),
        (["apache-2.0", "unknown"], "unknown"),
        ([NC, NC_SA], NC_SA),
        ([NC, "unknown"], "unknown"),
        (["other", "unknown"], "unknown"),
        # Neither may be passed on under the other.
        ([SA, NC_SA], "unknown"),
        (["other", NC], "unknown"),
        # Two sets of terms of their own are not the same for being called alike.
        (["other", "other"], "unknown"),
        (["mit", NC, "apache-2.0", NC_SA], NC_SA),
    ],
)
def test_the_strictest_holds_and_what_is_none_is_unknown(licences: list[str], whole: str) -> None:
    assert strictest(licences) == strictest(licences[::-1]) == whole


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("Apache-2.0", "apache-2.0"),
        (" cc by nc sa 4.0", NC_SA),
        ("unknown", "unknown"),
        ("other", "unknown"),
        ("free for all", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_only_names_of_the_hub_count(text: str | None, licence: str) -> None:
    assert read_licence(text) == licence
