"""Our cache for SGLang by itself: bytes, precision, and heads in several processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from conftest import TINY_GEOMETRY, noise, randomise, tiny_fit
from torch import Tensor

from vmla_convert.interop.sglang_cache import CodecKVCache, HeadCodecs
from vmla_convert.interop.tokens import RotaryTables, Slots
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.maths.rates import Rate

HEADS, HEAD_DIM, CHANNELS, GRID = 3, 16, 20, (1, 2)
CPU = torch.device("cpu")
LOSSY = Rate((16,) * CHANNELS, quantised=False)


@pytest.fixture(scope="module")
def codec() -> LayerCodec:
    attention = DenseSelfAttention(TINY_GEOMETRY)
    randomise(attention, seed=3)
    layer = LayerCodec(TINY_GEOMETRY.dim, HEADS, CHANNELS)
    layer.load_state_dict(tiny_fit(attention, CHANNELS)._asdict())
    return layer


def new_cache(codecs: HeadCodecs, dtype: torch.dtype = torch.float32, **how: Any) -> CodecKVCache:
    slots = Slots(2, 6, HEADS, HEAD_DIM, dtype, CPU)
    cache = CodecKVCache(codecs, slots, RotaryTables(HEAD_DIM, CPU), **how)
    cache.start(GRID)
    return cache


def film(cache: CodecKVCache, heads: range, chunks: int = 5) -> list[Tensor]:
    """Keys and values that each chunk of 2 tokens attends to, for some of the heads."""
    found: list[Tensor] = []
    for index in range(chunks):
        key, value = (noise(2, 2, HEADS, HEAD_DIM, seed=2 * index + i) for i in range(2))
        view = cache.update_and_get_attention_kv(
            key=key[:, :, heads.start : heads.stop],
            value=value[:, :, heads.start : heads.stop],
            current_chunk_start=2 * index,
            cache_head_start=heads.start,
        )
        found.append(torch.stack([view.k, view.v]))
    return found


def test_processes_with_some_heads_each_decode_what_one_process_decodes(codec: LayerCodec) -> None:
    """Their channels are added up, as tensor parallelism does."""
    whole = film(new_cache(HeadCodecs(codec, LOSSY), sink_tokens=2), range(HEADS))
    parts, barrier = [range(0, 1), range(1, 3)], Barrier(2)
    shared: dict[int, Tensor] = {}

    def process(index: int) -> list[Tensor]:
        def add_up(channels: Tensor) -> Tensor:
            shared[index] = channels
            barrier.wait()
            total = shared[0] + shared[1]
            barrier.wait()
            return total

        return film(new_cache(HeadCodecs(codec, LOSSY, add_up), sink_tokens=2), parts[index])

    with ThreadPoolExecutor(2) as pool:
        split = list(pool.map(process, range(2)))
    for expected, *found in zip(whole, *split, strict=True):
        torch.testing.assert_close(torch.cat(found, -2), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_rate(codec: LayerCodec, dtype: torch.dtype) -> None:
    rate = Rate((8, 8, 4, 4, 2))
    cache = new_cache(HeadCodecs(codec, rate), dtype)
    views = film(cache, range(HEADS))
    assert cache.nbytes == 2 * 6 * rate.token_bytes(8) == 2 * 6 * 4
    assert all(view.dtype == dtype and view.isfinite().all() for view in views)


def test_caches_of_a_layer_share_the_weights_of_its_codec(codec: LayerCodec) -> None:
    codecs = HeadCodecs(codec, LOSSY)
    slots = Slots(1, 4, HEADS, HEAD_DIM, torch.float32, CPU)
    one, other = (codecs.store(0, slots)._codec for _ in range(2))
    assert one is other


def test_a_pass_that_was_not_started_has_no_positions(codec: LayerCodec) -> None:
    slots = Slots(2, 6, HEADS, HEAD_DIM, torch.float32, CPU)
    cache = CodecKVCache(HeadCodecs(codec, LOSSY), slots, RotaryTables(HEAD_DIM, CPU))
    with pytest.raises(RuntimeError, match="positions"):
        film(cache, range(HEADS))


def test_a_compiled_attention_calls_the_cache(codec: LayerCodec) -> None:
    def attend(cache: CodecKVCache, key: Tensor, start: int) -> Tensor:
        view = cache.update_and_get_attention_kv(
            key=2 * key, value=3 * key, current_chunk_start=start
        )
        return view.k.sum(1) + view.v.sum(1)

    caches = [new_cache(HeadCodecs(codec, LOSSY)) for _ in range(2)]
    compiled = torch.compile(attend, backend="eager")
    for index in range(3):
        key = noise(2, 2, HEADS, HEAD_DIM, seed=index)
        expected = attend(caches[0], key, 2 * index)
        torch.testing.assert_close(compiled(caches[1], key, 2 * index), expected)
