"""Licences of weights: which of two binds the more, and where the terms of special ones stand.

Judgement for a model card, not legal advice: what is not plainly the stricter is `unknown`.
"""

from __future__ import annotations

from collections.abc import Iterable

UNKNOWN, OTHER = "unknown", "other"

# Whoever keeps their notices may put their works under any of the rest. Names are the Hub's.
_PERMISSIVE = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "unlicense"}
)
# What is under the first may be passed on under the second.
_WITHIN = frozenset({("cc-by-nc-4.0", "cc-by-nc-sa-4.0"), ("cc-by-4.0", "cc-by-sa-4.0")})
_PLAIN = _PERMISSIVE | {name for pair in _WITHIN for name in pair}


def read_licence(text: str | None) -> str:
    """The Hub's name of a licence that somebody stated; `unknown` for one that has none here."""
    name = (text or "").strip().lower().replace(" ", "-")
    return name if name in _PLAIN else UNKNOWN


def strictest(licences: Iterable[str]) -> str:
    """The licence of a work made of several; `unknown` where none of them covers the others."""
    first, *others = licences
    for other in others:
        first = _stricter(first, other)
    return first


def _stricter(one: str, other: str) -> str:
    if one == other:
        # Two licences that are both `other` need not be the same.
        return UNKNOWN if one == OTHER else one
    for lax, strict in ((one, other), (other, one)):
        if lax in _PERMISSIVE or (lax, strict) in _WITHIN:
            return strict
    return UNKNOWN
