"""A dictionary whose two sides are one cache: what a host does to one side, it does to both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import noise
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.interop.dictionary import DictionaryCache
from vmla_convert.interop.tokens import DenseStore, Slots, TokenCache

SLOTS = Slots(1, 8, 2, 4, torch.float32, torch.device("cpu"))


def sides() -> dict[str, Any]:
    """A cache of unrotated keys in which tokens 0 to 5 are in slots 0 to 5, three in each chunk."""
    entries: dict[str, Any] = {}
    pair = DictionaryCache(TokenCache(SLOTS, DenseStore(SLOTS), None), entries)
    for chunk in (0, 1):
        pair.start(3 * chunk, (1, 3))
        for index, name in enumerate("kv"):
            entries[name][:, 3 * chunk : 3 * chunk + 3] = tokens(chunk, index)
    return entries


def tokens(chunk: int, side: int) -> Tensor:
    return noise(1, 3, 2, 4, seed=10 * chunk + side)


def test_sides_look_like_tensors() -> None:
    key = sides()["k"]
    assert key.shape == key.size() == (1, 8, 2, 4) and key.size(1) == 8
    assert (key.dtype, key.device) == (torch.float32, torch.device("cpu"))
    assert key.zero_() is key


def test_slots_are_read_in_any_order() -> None:
    entries = sides()
    for name, side in (("v", 1), ("k", 0), ("k", 0), ("v", 1)):
        expected = torch.cat([tokens(0, side), tokens(1, side)], 1)
        assert torch.equal(entries[name][:, 0:6], expected)
        assert torch.equal(entries[name][:, :-5], expected[:, :3])


def test_a_move_of_both_sides_moves_tokens_once() -> None:
    entries = sides()
    pair = entries["k"].pair
    for step in (1, 2):
        pair.start(6, (1, 3))
        for name in "kv":
            entries[name][:, 0 : 6 - step] = entries[name][:, 1 : 7 - step].clone()
    pair.end()
    found = pair.cache.read(range(0, 4))
    for side in (0, 1):
        assert torch.equal(found[side], torch.cat([tokens(0, side), tokens(1, side)], 1)[:, 2:])


def test_slots_taken_before_the_chunk_is_written_can_be_used() -> None:
    entries = sides()
    entries["k"].pair.start(6, (1, 3))
    early, new = entries["k"][:, 0:6], tokens(2, 0)
    joined = torch.cat([early, new], 1)
    assert torch.equal(joined[:, :3], tokens(0, 0)) and joined.shape[1] == 9
    assert torch.equal(early.transpose(1, 2)[:, :, 3:], tokens(1, 0).transpose(1, 2))


def test_what_no_cache_can_do_is_refused() -> None:
    for index in (
        (slice(None), 3),
        slice(0, 1),
        (slice(0, 1), slice(0, 3)),
        (slice(None), slice(0, 8, 2)),
    ):
        with pytest.raises(ConfigError) as caught:
            sides()["k"][index]
        assert "Write a host" in caught.value.hint
    entries = sides()
    entries["k"].pair.start(6, (1, 3))
    entries["k"][:, 0:2] = entries["k"][:, 2:4].clone()
    with pytest.raises(ConfigError, match="moved"):
        entries["v"][:, 0:3] = entries["v"][:, 2:5].clone()
    entries = sides()
    entries["k"].pair.start(6, (1, 3))
    entries["k"][:, 3:6] = tokens(2, 0)
    with pytest.raises(ConfigError, match="slots 4 to 7"):
        entries["v"][:, 4:7] = tokens(2, 1)
