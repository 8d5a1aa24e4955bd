"""Our cache for SGLang against SGLang's own two cache classes, on random traces.

At full rank a codec decodes what it encoded, so both must return equal views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.interop.sglang_cache import CodecKVCache, HeadCodecs
from vmla_convert.interop.tokens import RotaryTables, Slots
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.maths.rates import Rate

pytest_plugins = ["sglang_files"]

HEADS, HEAD_DIM, BATCH, GRID = 4, 12, 2, (1, 2)
WIDTH = 2 * HEADS * HEAD_DIM
WHOLE = Rate((16,) * WIDTH, quantised=False)
DTYPE, CPU = torch.float64, torch.device("cpu")
FIELDS = ("local_start_index", "local_end_index", "visible_local_end", "visible_global_end")
# Keys are rotated with tables in float32, so views differ by rounding.
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0}


@dataclass(frozen=True)
class Policy:
    """A cache as SGLang makes it."""

    cache_size: int
    sink_tokens: int = 0
    global_sink_tokens: int = 0
    attention_window_size: int = 0
    allow_growth: bool = False


@dataclass(frozen=True)
class Step:
    """One call of the cache.

    Attributes:
        kind: `chunk`, `pin` or `reset`.
        shift: First token of a chunk, relative to the number of tokens so far.
        count: Tokens of the chunk, or tokens to pin.
        recent: `recent_window_tokens`.
        heads: Heads that are handed over.
    """

    kind: str
    shift: int = 0
    count: int = 0
    recent: int | None = None
    heads: range = range(HEADS)


POLICIES = st.builds(
    Policy,
    st.integers(4, 14),
    st.integers(0, 3),
    st.sampled_from([0, 0, 1, 2]),
    st.sampled_from([0, 0, 5, 9]),
    st.sampled_from([False, False, True]),
)
RECENT = st.none() | st.integers(0, 6)


def steps(slices: Sequence[range]) -> st.SearchStrategy[list[Step]]:
    """Traces: mostly chunks that follow each other or are written again."""
    heads = st.sampled_from(slices)
    next_chunk = st.builds(Step, st.just("chunk"), st.just(0), st.integers(1, 4), RECENT, heads)
    any_chunk = st.builds(
        Step, st.just("chunk"), st.integers(-9, 3), st.integers(1, 5), RECENT, heads
    )
    pin = st.builds(Step, st.just("pin"), st.just(0), st.integers(0, 4))
    reset = st.builds(Step, st.just("reset"))
    one = st.one_of(next_chunk, next_chunk, next_chunk, any_chunk, any_chunk, pin, reset)
    return st.lists(one, min_size=1, max_size=14)


@pytest.fixture(scope="module")
def codec() -> LayerCodec:
    """A codec that loses nothing."""
    layer = LayerCodec(HEADS * HEAD_DIM, HEADS, WIDTH)
    encode = torch.linalg.qr(noise(WIDTH, WIDTH, seed=1).double())[0] * 2
    layer.encode.data, layer.decode.data = encode, encode.inverse()
    layer.mean = noise(WIDTH, seed=2)
    return layer


def ours(codec: LayerCodec, policy: Policy, rotated: bool = True) -> CodecKVCache:
    slots = Slots(BATCH, policy.cache_size, HEADS, HEAD_DIM, DTYPE, CPU)
    rotary = RotaryTables(HEAD_DIM, CPU) if rotated else None
    how = {name: value for name, value in vars(policy).items() if name != "cache_size"}
    cache = CodecKVCache(HeadCodecs(codec, WHOLE), slots, rotary, **how)
    cache.start(GRID)
    return cache


def theirs(module: Any, policy: Policy) -> Any:
    """SGLang's dense cache."""
    shape = (BATCH, policy.cache_size, HEADS, HEAD_DIM)
    entries = {name: torch.zeros(shape, dtype=DTYPE) for name in "kv"}
    ends = {f"{name}_end_index": torch.zeros(1, dtype=torch.long) for name in ("global", "local")}
    return module.CausalSelfAttentionKVCache(**entries, **ends, **vars(policy))


def chunk(count: int, heads: range, seed: int) -> dict[str, Tensor]:
    shape = (BATCH, count, len(heads), HEAD_DIM)
    return {name: noise(*shape, seed=seed + i).double() for i, name in enumerate(("key", "value"))}


class Clip:
    """Feeds caches the same steps."""

    def __init__(self) -> None:
        self.tokens, self.seed = 0, 0

    def run(self, step: Step, *caches: Any) -> list[Any]:
        """Answer of each cache: a view, the type of an error, or None."""
        if step.kind == "reset":
            self.tokens = 0
            return [cache.reset_indices() for cache in caches]
        if step.kind == "pin":
            return [cache.pin_current_chunk(step.count) for cache in caches]
        first = max(0, self.tokens + step.shift)
        self.seed += 2
        given = {
            **chunk(step.count, step.heads, self.seed),
            "current_chunk_start": first,
            "cache_head_start": step.heads.start,
            "recent_window_tokens": step.recent,
        }
        found = [outcome(cache, given) for cache in caches]
        self.tokens = max(self.tokens, first + step.count)
        return found


def outcome(cache: Any, given: dict[str, Any]) -> Any:
    try:
        return cache.update_and_get_attention_kv(**given)
    except NotImplementedError:  # a RuntimeError too
        raise
    except RuntimeError:
        return RuntimeError


def assert_same(expected: Any, found: Any) -> None:
    for name in FIELDS:
        assert getattr(expected, name) == getattr(found, name), name
    torch.testing.assert_close(found.k, expected.k, **EXACT)
    torch.testing.assert_close(found.v, expected.v, **EXACT)


def compare(expected: Any, found: Any, trace: Sequence[Step]) -> Iterator[Any]:
    """Run a trace up to an error of both caches, and yield their views."""
    clip = Clip()
    for step in trace:
        one, other = clip.run(step, expected, found)
        if one is RuntimeError:
            assert other is RuntimeError
            return
        if one is not None:
            assert_same(one, other)
            yield one
        assert expected.cache_size == found.cache_size
        assert expected.can_direct_current_attention(4) == found.can_direct_current_attention(4)


ALL, SOME, HALVES = [range(HEADS)], [range(1, 3)], [range(HEADS // 2), range(HEADS // 2, HEADS)]
HEAD_SLICES = pytest.mark.parametrize("heads", [ALL, SOME, HALVES], ids=["all", "some", "halves"])
CASE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@HEAD_SLICES
@settings(CASE, max_examples=25)
@given(data=st.data())
def test_views_are_those_of_the_dense_class(
    data: st.DataObject, heads: list[range], codec: LayerCodec, dense_module: Any
) -> None:
    check_trace(data, heads, codec, dense_module)


@pytest.mark.slow
@HEAD_SLICES
@settings(CASE, max_examples=200)
@given(data=st.data())
def test_views_of_many_traces_are_those_of_the_dense_class(
    data: st.DataObject, heads: list[range], codec: LayerCodec, dense_module: Any
) -> None:
    check_trace(data, heads, codec, dense_module)


def check_trace(data: st.DataObject, heads: list[range], codec: LayerCodec, module: Any) -> None:
    policy, trace = data.draw(POLICIES), data.draw(steps(heads))
    rotated = data.draw(st.booleans())
    for _ in compare(theirs(module, policy), ours(codec, policy, rotated), trace):
        pass


def chunks(*counts: int, recent: int | None = None, heads: range = range(HEADS)) -> list[Step]:
    return [Step("chunk", 0, count, recent, heads) for count in counts]


SINKS = Policy(12, sink_tokens=2, global_sink_tokens=1, attention_window_size=8)
FEATURES = {
    "appends": (Policy(12), chunks(3, 3, 4), 10),
    "overwrites": (Policy(12), [*chunks(3, 3), Step("chunk", -3, 3), Step("chunk", -3, 3)], 6),
    "overwrites of an older chunk": (Policy(12), [*chunks(3, 3), Step("chunk", -6, 3)], 6),
    "overwrites of another size": (Policy(12), [*chunks(3, 3), Step("chunk", -3, 2)], 6),
    "skipped tokens": (Policy(12), [*chunks(3), Step("chunk", 2, 3)], 8),
    "dropped tokens": (Policy(6), chunks(3, 3, 3, 3), 6),
    "sinks": (Policy(8, sink_tokens=2), chunks(3, 3, 3, 3), 8),
    "windows": (Policy(12, attention_window_size=5), chunks(3, 3, 3), 5),
    "recent windows": (Policy(12, sink_tokens=2), chunks(3, 3, 3, recent=2), 2 + 2 + 3),
    "no recent window": (Policy(12, sink_tokens=2), chunks(3, 3, 3, recent=0), 2 + 3),
    "global sinks": (Policy(12, 0, 2, 6), chunks(3, 3, 3, 3), 6),
    "pinned sinks": (SINKS, [*chunks(3, 3), Step("pin", 0, 3), *chunks(3, 3, 3)], 1 + 2 + 5),
    "pinned sinks and recent windows": (
        SINKS,
        [*chunks(3, 3), Step("pin", 0, 3), *chunks(3, 3, recent=1)],
        1 + 2 + 1 + 3,
    ),
    "pinned beside the global sink": (
        Policy(8, sink_tokens=2, global_sink_tokens=1),
        [*chunks(1, 3), Step("pin", 0, 3), *chunks(3, 3, 3)],
        8,
    ),
    "growth": (Policy(4, allow_growth=True), chunks(3, 3, 3, 3), 12),
    "head slices": (Policy(6, sink_tokens=1), chunks(3, 3, 3, heads=range(1, 3)), 6),
    "heads that come late": (
        Policy(6),
        [*chunks(3, 3, heads=range(1, 3)), *chunks(3, heads=range(1))],
        6,
    ),
    "resets": (Policy(6, sink_tokens=1), [*chunks(3, 3, 3), Step("reset"), *chunks(3)], 3),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_of_the_dense_class(
    feature: str, codec: LayerCodec, dense_module: Any
) -> None:
    policy, trace, tokens = FEATURES[feature]
    views = list(compare(theirs(dense_module, policy), ours(codec, policy), trace))
    assert views[-1].k.shape[1] == tokens


# The class for quantised caches


def packed(module: Any, policy: Policy) -> Any:
    """SGLang's cache for quantised segments, not quantised."""
    return module.QVGPackedCausalKVCache(
        batch_size=BATCH,
        cache_size=policy.cache_size,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        device=CPU,
        global_end_index=torch.zeros(1, dtype=torch.long),
        local_end_index=torch.zeros(1, dtype=torch.long),
        sink_tokens=policy.sink_tokens,
        attention_window_size=policy.attention_window_size or None,
        quant_args=SimpleNamespace(enabled=False),
    )


@pytest.mark.parametrize("recent", [None, 0, 3, 6])
@pytest.mark.parametrize("sink", [0, 3])
def test_views_are_those_of_the_class_for_quantised_caches(
    sink: int, recent: int | None, codec: LayerCodec, packed_module: Any
) -> None:
    policy, clip = Policy(12, sink_tokens=sink), Clip()
    caches = packed(packed_module, policy), ours(codec, policy)
    for step in chunks(3, 3, 3, 3, 3, 3, recent=recent):
        for again in (step, Step("chunk", -3, 3, recent)):
            one, other = clip.run(again, *caches)
            torch.testing.assert_close(other.k, one.k, **EXACT)
            torch.testing.assert_close(other.v, one.v, **EXACT)
            assert other.visible_global_end == one.visible_global_end


@pytest.mark.parametrize(
    "step",
    [Step("pin", 0, 3), Step("chunk", -3, 2), Step("chunk", -6, 3), Step("chunk", 2, 3)],
    ids=["pinned sink", "another size", "older chunk", "skipped tokens"],
)
def test_what_the_class_for_quantised_caches_refuses_is_as_in_the_dense_class(
    step: Step, codec: LayerCodec, packed_module: Any, dense_module: Any
) -> None:
    policy, clip, before = Policy(12, sink_tokens=2), Clip(), chunks(3, 3)
    refusing = packed(packed_module, policy)
    for one in before:
        clip.run(one, refusing)
    with pytest.raises(NotImplementedError):
        clip.run(step, refusing)
    trace = [*before, step, *chunks(3, 3, 3)]
    assert len(list(compare(theirs(dense_module, policy), ours(codec, policy), trace))) >= 5


# Refused calls


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"recent_window_tokens": -1}, ValueError),
        ({"cache_head_start": None}, ValueError),
        (chunk(7, range(1), 5), RuntimeError),
    ],
    ids=["negative window", "no head", "too many tokens"],
)
def test_a_call_that_both_classes_refuse_changes_nothing(
    change: dict[str, Any], error: type[Exception], codec: LayerCodec, dense_module: Any
) -> None:
    policy = Policy(6)
    given = {**chunk(3, range(1), 1), "current_chunk_start": 0, "cache_head_start": 0}
    for cache in (theirs(dense_module, policy), ours(codec, policy)):
        before = cache.update_and_get_attention_kv(**given)
        with pytest.raises(error):
            cache.update_and_get_attention_kv(**given | change)
        after = cache.update_and_get_attention_kv(**given)
        assert torch.equal(after.k, before.k)
        assert after.visible_global_end == before.visible_global_end == 3
