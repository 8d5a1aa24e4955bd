"""The licence of a work made from several works."""

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
        # Neither licence covers the other.
        ([SA, NC_SA], "unknown"),
        (["other", NC], "unknown"),
        # Two licences that are both `other` need not have the same terms.
        (["other", "other"], "unknown"),
        (["mit", NC, "apache-2.0", NC_SA], NC_SA),
    ],
)
def test_the_strictest_licence_holds(licences: list[str], whole: str) -> None:
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
def test_only_the_hubs_names_count(text: str | None, licence: str) -> None:
    assert read_licence(text) == licence
