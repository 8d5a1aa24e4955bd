"""Combine the licences of a model and its LoRAs for the model card. This is not legal advice.

The result is `unknown` unless one licence is clearly the stricter one.
"""

from __future__ import annotations

from collections.abc import Iterable

UNKNOWN, OTHER = "unknown", "other"

# Works under these may be passed on under any other licence. Names are those of the Hub.
_PERMISSIVE = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "unlicense"}
)
# Works under the first licence of a pair may be passed on under the second.
_WITHIN = frozenset({("cc-by-nc-4.0", "cc-by-nc-sa-4.0"), ("cc-by-4.0", "cc-by-sa-4.0")})
_PLAIN = _PERMISSIVE | {name for pair in _WITHIN for name in pair}


def read_licence(text: str | None) -> str:
    """The Hub's name of a stated licence; `unknown` for a text that is not such a name."""
    name = (text or "").strip().lower().replace(" ", "-")
    return name if name in _PLAIN else UNKNOWN


def strictest(licences: Iterable[str]) -> str:
    """The licence of a work made from several; `unknown` where none covers all others."""
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
