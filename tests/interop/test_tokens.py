"""Caches of tokens in slots: a dense array for every trace of writes, moves and reads."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY_GEOMETRY, noise, randomise, tiny_fit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.interop.tokens import (
    DenseStore,
    EncodedStore,
    RotaryTables,
    Slots,
    Store,
    TokenCache,
    TokenRuns,
)
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.maths.rates import Rate
from vmla_convert.maths.rope3d import rotary_table, token_positions

GRID, CHUNK, WINDOW = (2, 3), 6, 5
HEADS, HEAD_DIM, WIDTH = 3, 16, TINY_GEOMETRY.dense_cache_scalars
SLOTS = Slots(2, CHUNK * WINDOW, HEADS, HEAD_DIM, torch.float64, torch.device("cpu"))


@pytest.fixture(scope="module")
def codec() -> LayerCodec:
    attention = DenseSelfAttention(TINY_GEOMETRY)
    randomise(attention, seed=3)
    layer = LayerCodec(TINY_GEOMETRY.dim, HEADS, WIDTH)
    layer.load_state_dict(tiny_fit(attention, WIDTH)._asdict())
    return layer.requires_grad_(False).double()


def whole(codec: LayerCodec) -> EncodedStore:
    return EncodedStore(codec, Rate((16,) * WIDTH, quantised=False), SLOTS)


def token_cache(store: Store) -> TokenCache:
    tables = RotaryTables(HEAD_DIM, SLOTS.device)
    tables.grid = GRID
    return TokenCache(SLOTS, store, tables)


def chunk(seed: int) -> tuple[Tensor, Tensor]:
    shape = (SLOTS.batch, CHUNK, HEADS, HEAD_DIM)
    return noise(*shape, seed=seed).double(), noise(*shape, seed=seed + 1).double()


def ranges() -> st.SearchStrategy[range]:
    edges = st.tuples(st.integers(0, 12), st.integers(0, 12))
    return edges.map(lambda pair: range(min(pair), max(pair)))


@given(st.lists(st.tuples(ranges(), st.integers(0, 99), st.integers(0, 12)), max_size=12))
@settings(max_examples=200, deadline=None)
def test_runs_are_a_list_of_tokens_by_slot(steps: list[tuple[range, int, int]]) -> None:
    runs, plain = TokenRuns(), list[int | None]([None] * 24)
    for slots, first, target in steps:
        runs.put(slots, first)
        plain[slots.start : slots.stop] = range(first, first + len(slots))
        runs.move(range(target, target + len(slots)), slots)
        plain[target : target + len(slots)] = plain[slots.start : slots.stop]
        tokens = [t for start, count in runs.at(slots) for t in range(start, start + count)]
        assert tokens == plain[slots.start : slots.stop]


def test_a_slot_that_was_never_written_has_no_token() -> None:
    runs = TokenRuns()
    runs.put(range(2, 4), 0)
    with pytest.raises(ConfigError):
        runs.at(range(1, 4))


@pytest.mark.parametrize("sink", [0, 1])
def test_a_sliding_window_gives_what_was_written(codec: LayerCodec, sink: int) -> None:
    dense, encoded = token_cache(DenseStore(SLOTS)), token_cache(whole(codec))
    held = 0
    for index in range(9):
        for caches in (dense, encoded):
            if held == WINDOW:
                start, size = sink * CHUNK, (WINDOW - 1 - sink) * CHUNK
                caches.move(range(start, start + size), range(start + CHUNK, start + CHUNK + size))
        held = min(held + 1, WINDOW)
        slots = range((held - 1) * CHUNK, held * CHUNK)
        for step in range(2):  # the second pass overwrites the first
            new = chunk(10 * index + 2 * step)
            for caches in (dense, encoded):
                caches.write(slots, *new, first=index * CHUNK)
            expected, found = (c.read(range(held * CHUNK)) for c in (dense, encoded))
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
            for one, other in zip(found, new, strict=True):
                assert torch.equal(one[:, -CHUNK:], other)


def test_moves_copy_stored_bytes(codec: LayerCodec) -> None:
    store = EncodedStore(codec, Rate((8,) * WIDTH), SLOTS)
    cache = token_cache(store)
    cache.write(range(CHUNK), *chunk(1), first=0)
    cache.settle()
    before = cache.read(range(CHUNK))
    for shift in range(1, 20):
        cache.move(range(shift, shift + CHUNK), range(shift - 1, shift - 1 + CHUNK))
    for one, other in zip(before, cache.read(range(19, 19 + CHUNK)), strict=True):
        assert torch.equal(one, other)


def test_bytes_are_those_of_the_rate(codec: LayerCodec) -> None:
    rate = Rate((16, 8, 8, 3, 1))
    cache = token_cache(EncodedStore(codec, rate, SLOTS))
    cache.write(range(CHUNK), *chunk(1), first=0)
    cache.settle()
    assert cache.nbytes == SLOTS.batch * SLOTS.count * rate.token_bytes(8) == 60 * 5


def test_positions_follow_the_grid() -> None:
    tables = RotaryTables(HEAD_DIM, SLOTS.device)
    tables.grid = GRID
    found = tables.of(((0, 6), (18, 6)))
    expected = rotary_table(token_positions(torch.tensor([0, 3]), *GRID), HEAD_DIM)
    assert torch.equal(found.table, expected.table)
