"""The two backends of MLA attention: the same numbers, tile by tile or at once, and their cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from conftest import (
    EITHER_LATENT,
    TINY_GEOMETRY,
    noise,
    randomise,
    tiny_config,
    tiny_mla,
    tiny_model,
)
from reference.attention import one_softmax
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vmla_convert.config import MLAConfig, RuntimeConfig
from vmla_convert.errors import ConfigError
from vmla_convert.layers import backends
from vmla_convert.layers.attention import AttendedTokens, AttentionMetadata, split_heads
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.maths.cost import absorbed_flops, materialised_flops
from vmla_convert.maths.masks import QueryGroup
from vmla_convert.maths.rope3d import rotary_table, token_positions

DIM, HEADS, HEAD_DIM = TINY_GEOMETRY.dim, TINY_GEOMETRY.num_heads, TINY_GEOMETRY.head_dim
PLACES = torch.tensor([0, 1, 700, 41, 42])  # of frames of two tokens, as in a cache's slots
EVERY_SIZE = [
    *map(tiny_mla, EITHER_LATENT),
    # Values that use more of the latent than keys, and nearly none of it.
    *(MLAConfig((20, 20), ((1,), (1,)), "random", "split", ranks) for ranks in ((1, 1), (18, 18))),
]


def size_id(mla: MLAConfig) -> str:
    return f"{mla.latent}-{mla.key_ranks[:1]}-of-{mla.kv_lora_rank[0]}"


def random_layer(mla: MLAConfig, index: int = 1) -> LatentSelfAttention:
    attention = LatentSelfAttention(TINY_GEOMETRY, mla, index)
    randomise(attention, seed=4)
    return attention


def arguments(
    layer: LatentSelfAttention,
    x: Tensor,
    places: Tensor,
    past: int,
    backend: Any = "materialised",
    tile_mib: int = 64,
) -> tuple[AttendedTokens, AttentionMetadata]:
    """Arguments for attention from all but the first `past` tokens of x (B, L, d) to all tokens.

    Frames have two tokens and the time positions `places`.
    """
    rotary = rotary_table(token_positions(places, 1, 2), HEAD_DIM)
    tokens = torch.arange(x.shape[1])
    runtime = RuntimeConfig(backend=backend, tile_mib=tile_mib)
    attended = AttendedTokens(layer.project(x))
    return attended, AttentionMetadata(rotary.at(tokens[past:]), rotary, runtime=runtime)


@pytest.mark.parametrize("mla", EVERY_SIZE, ids=size_id)
@pytest.mark.parametrize("past", [0, 6])
@torch.no_grad()
def test_both_backends_are_one_softmax_of_the_formula(mla: MLAConfig, past: int) -> None:
    layer, x = random_layer(mla), noise(3, past + 4, DIM)
    places = PLACES[-x.shape[1] // 2 :]
    rotary = rotary_table(token_positions(places, 1, 2), HEAD_DIM)
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    expected = [one_softmax(layer, mla, 1, clip, rotary, seen)[past:] for clip in x[:2]]
    for backend in ("materialised", "absorbed"):
        y = layer(x[:, past:], *arguments(layer, x, places, past, backend=backend))
        torch.testing.assert_close(y[:2], torch.stack(expected), atol=1e-5, rtol=0)
        alone = layer(x[2:, past:], *arguments(layer, x[2:], places, past, backend=backend))
        torch.testing.assert_close(y[2:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mla", EVERY_SIZE, ids=size_id)
def test_under_gradients_auto_materialises(mla: MLAConfig) -> None:
    layer, x = random_layer(mla), noise(2, 10, DIM)
    y = layer(x[:, 4:], *arguments(layer, x, PLACES, 4, backend="auto"))
    y.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    assert layer.kv_b_proj_v.weight.grad is not None
    with pytest.raises(ValueError, match="absorbed"):
        layer(x[:, 4:], *arguments(layer, x, PLACES, 4, backend="absorbed"))
    with torch.no_grad():
        for backend in ("auto", "materialised"):
            again = layer(x[:, 4:], *arguments(layer, x, PLACES, 4, backend=backend))
            torch.testing.assert_close(again, y, atol=1e-5, rtol=0)


# Tiles


class Spy(TorchDispatchMode):
    """The largest tensor that any operator makes, in bytes, and the heads of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.tiles = 0, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        sizes = [part.nbytes for part in made if isinstance(part, Tensor)]
        self.largest = max([self.largest, *sizes])
        if "scaled_dot_product" in str(func) and args[1].shape[2] > 1_000:
            self.tiles.append(args[1].shape[1])
        return result


@torch.no_grad()
def test_tiles_of_any_number_of_heads_give_the_same_and_stay_small() -> None:
    """Keys or values of all heads of 6,000 tokens take more than 1 MiB."""
    mla = tiny_mla()
    layer, x = random_layer(mla), noise(1, 6_004, DIM)
    reads = partial(arguments, layer, x, torch.arange(3_002), 6_000)
    q = split_heads(layer.norm_q(layer.q(x[:, 6_000:])), HEADS)
    whole = layer.attend_materialised(q, *reads(tile_mib=64))
    key_width = layer.head_dim + 2 * len(mla.rope_pairs[1])
    head_mib = 4 * 6_000 * (key_width + HEAD_DIM) / 2**20
    sizes: list[int] = []
    for tile_mib in (1, 2, 3, 6):
        attended, metadata = reads(tile_mib=tile_mib)
        with Spy() as spy:
            tiled = layer.attend_materialised(q, attended, metadata)
        torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)
        sizes.append(max(spy.tiles))
        assert sum(spy.tiles) == HEADS
        assert sizes[-1] * head_mib <= max(tile_mib, head_mib)
        assert spy.largest <= tile_mib * 2**20
    assert {*sizes} == {1, 2, 3}
    assert sizes == sorted(sizes)


# The faster backend


def wide_layer() -> LatentSelfAttention:
    """Shared keys twice as wide as rebuilt ones: the number of queries decides what is faster."""
    mla = MLAConfig((60,), ((0, 4),), "random")
    layer = LatentSelfAttention(dataclasses.replace(TINY_GEOMETRY, num_layers=1), mla, 0)
    randomise(layer, seed=1)
    return layer


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backend of every call."""
    used: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("attend_materialised", "attend_absorbed"):
            read = getattr(LatentSelfAttention, name)

            def note(*arguments: Any, read: Any = read, name: str = name) -> Tensor:
                used.append(name.removeprefix("attend_"))
                return read(*arguments)

            patch.setattr(LatentSelfAttention, name, note)
        yield used


@pytest.fixture
def nothing_timed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(backends, "_FASTER", {})
    return monkeypatch


@pytest.mark.parametrize("small", [0, 10**10], ids=["clear", "small"])
@pytest.mark.parametrize("queries", [2, 100])
@torch.no_grad()
def test_auto_takes_the_backend_with_clearly_fewer_operations_untimed(
    nothing_timed: pytest.MonkeyPatch, queries: int, small: int
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("timed")

    nothing_timed.setattr(backends, "_seconds", never)
    nothing_timed.setattr(backends, "SMALL_FLOPS", small)
    layer, x = wide_layer(), noise(2, 120, DIM)
    attended, metadata = arguments(layer, x, torch.arange(60), 120 - queries, backend="auto")
    shape = layer.attention_shape(torch.zeros(2, queries, HEADS, HEAD_DIM), attended)
    ratio = materialised_flops(shape) / absorbed_flops(shape)
    assert max(ratio, 1 / ratio) > backends.CLEAR_RATIO
    assert (ratio > 1) == (queries == 2)
    with counted(nothing_timed) as used:
        layer(x[:, -queries:], attended, metadata)
    assert used == (["absorbed"] if queries == 2 else ["materialised"])


@pytest.mark.parametrize("fast", ["materialised", "absorbed"])
@torch.no_grad()
def test_auto_times_each_backend_once_for_each_shape_where_the_count_is_unclear(
    nothing_timed: pytest.MonkeyPatch, fast: str
) -> None:
    timed: list[str] = []

    def seconds(
        one: Callable[[], Tensor], other: Callable[[], Tensor], _: torch.device
    ) -> tuple[float, ...]:
        names: list[str] = []
        for read in (one, other):
            assert isinstance(read, partial)
            names.append(read.func.__name__.removeprefix("attend_"))
        timed.extend(names)
        return tuple(1.0 if name == fast else 2.0 for name in names)

    nothing_timed.setattr(backends, "_seconds", seconds)
    nothing_timed.setattr(backends, "SMALL_FLOPS", 0)
    nothing_timed.setattr(backends, "CLEAR_RATIO", 1e6)
    layers = [random_layer(tiny_mla(), 0), random_layer(tiny_mla(), 0)]
    for past in (4, 4, 6, 4, 6):
        for layer in layers:
            x = noise(2, 10, DIM)
            attended, metadata = arguments(layer, x, PLACES, past, backend="auto")
            q = split_heads(layer.norm_q(layer.q(x[:, past:])), HEADS)
            assert layer.faster_backend(q, attended, metadata) == fast
            y = layer(x[:, past:], attended, metadata)
            other = metadata._replace(runtime=RuntimeConfig(backend="materialised"))
            torch.testing.assert_close(y, layer(x[:, past:], attended, other), atol=1e-5, rtol=0)
    assert sorted(timed) == sorted(2 * ["materialised", "absorbed"])


@torch.no_grad()
def test_masked_attention_is_materialised() -> None:
    layer, x = random_layer(tiny_mla()), noise(1, 10, DIM)
    attended, metadata = arguments(layer, x, PLACES, 0, backend="absorbed")
    masked = metadata._replace(groups=(QueryGroup(10, (slice(10),)),))
    with pytest.raises(ValueError, match="absorbed"):
        layer(x, attended, masked)
    y = layer(x, attended, masked._replace(runtime=RuntimeConfig()))
    torch.testing.assert_close(y, layer(x, attended, metadata), atol=1e-5, rtol=0)


# Refused settings


def test_a_dense_model_is_not_absorbed() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_model(tiny_config()).new_cache(1, RuntimeConfig(backend="absorbed"))
    assert "absorbed" in caught.value.message
    assert caught.value.hint


# What it costs


def fused(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


@pytest.mark.parametrize(
    ("mla", "backend"),
    [
        pytest.param(mla, backend, id=f"{size_id(mla)}-{backend}")
        for backend in ("materialised", "absorbed")
        for mla in EVERY_SIZE
    ],
)
@torch.no_grad()
def test_operations_are_those_that_torch_counts(mla: MLAConfig, backend: str) -> None:
    """Without what both backends do alike: the queries' own maps."""
    layer, x = random_layer(mla), noise(2, 300, DIM)
    attended, metadata = arguments(layer, x, torch.arange(150), 200)
    q = split_heads(layer.norm_q(layer.q(x[:, 200:])), HEADS)
    kernel = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused}
    with FlopCounterMode(display=False, custom_mapping=kernel) as counter:
        getattr(layer, f"attend_{backend}")(q, attended, metadata)
    rope = 2 * len(mla.rope_pairs[1])
    alike = 2 * 2 * 100 * HEADS * HEAD_DIM * rope
    expected = {"materialised": materialised_flops, "absorbed": absorbed_flops}[backend]
    shape = layer.attention_shape(q, attended)
    assert counter.get_total_flops() == expected(shape) + alike
