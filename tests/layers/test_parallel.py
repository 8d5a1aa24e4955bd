"""Several processes compute one stream as one process does, and send what a formula says."""

from __future__ import annotations

from functools import cache
from math import prod

import pytest
import torch
from conftest import tiny_model
from parallel_streams import CASES, FRAMES, GEOMETRY, PASSES, Streamed, streams

from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.generating.launch import ONE, Group, run_together
from vmla_convert.generating.shares import exchange_of
from vmla_convert.layers.parallel import SequenceParallel
from vmla_convert.maths.cost import Exchange, even_shares, exchanged_bytes

FLOAT64 = 8
SIZES = [2, pytest.param(3, marks=pytest.mark.slow)]
CHUNK, TOKENS = 2, 10
CHUNKS = FRAMES // CHUNK


@cache
def results(size: int) -> dict[str, Streamed]:
    """The streams of one process, or of several."""
    return streams(ONE) if size == 1 else run_together(size, streams)


@pytest.mark.parametrize("size", SIZES)
def test_processes_compute_what_one_computes(size: int) -> None:
    for name, alone in results(1).items():
        together = results(size)[name]
        torch.testing.assert_close(together.velocity, alone.velocity, rtol=0, atol=1e-9, msg=name)
        torch.testing.assert_close(together.continued, alone.continued, rtol=0, atol=1e-9)
        assert together.state.keys() == alone.state.keys()
        for tensor, expected in zip(together.state.values(), alone.state.values(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_sent_bytes_equal_the_formula(size: int) -> None:
    # The velocities of all patches are gathered once in a pass.
    patches = FLOAT64 * prod(GEOMETRY.patch_size) * GEOMETRY.out_dim * (size - 1) * CHUNK * TOKENS
    for name in CASES:
        sent = sum(
            exchanged_bytes(each, CHUNK, TOKENS, GEOMETRY.num_heads, size, PASSES)
            for each in layer_exchanges(name)
        )
        assert round(results(size)[name].sent) == 2 * CHUNKS * (sent + PASSES * patches), name


def layer_exchanges(name: str) -> list[Exchange]:
    """The bytes of a token that each layer of a case exchanges."""
    model, runtime = CASES[name]
    if model.codec is not None:
        rates = tiny_model(model)._rates(runtime)
        counts = [len(rate.widths) for rate in rates if rate is not None]
        return [exchange_of(model, FLOAT64, count) for count in counts]
    if model.mla is None:
        return [exchange_of(model, FLOAT64)] * GEOMETRY.num_layers
    ranks = zip(model.mla.kv_lora_rank, model.mla.rope_pairs, strict=True)
    return [
        Exchange(2 * FLOAT64 * GEOMETRY.dim, whole=FLOAT64 * (rank + 2 * len(pairs) + 1))
        for rank, pairs in ranks
    ]


@pytest.mark.parametrize("processes", [2, 3, 4, 6, 8, 12])
def test_sent_bytes_are_near_the_ideal_at_true_width(processes: int) -> None:
    """Ideal: evenly divided queries, keys, values and outputs, and each latent once to each."""
    dim, heads, frames, tokens, passes, channels = 1536, 12, 3, 1560, 5, 64
    exchange = Exchange(4 * 2 * dim, summed=4 * channels)
    sent = exchanged_bytes(exchange, frames, tokens, heads, processes, passes)
    divided = passes * 4 * 2 * dim * frames * tokens * (processes - 1) // processes
    latents = 4 * channels * frames * tokens * (processes - 1)
    assert divided + latents <= sent <= 1.1 * (divided + latents)


def test_shares_differ_by_at_most_one() -> None:
    assert even_shares(12, 8) == [2, 2, 2, 2, 1, 1, 1, 1]
    assert even_shares(40, 8) == [5] * 8


@pytest.mark.parametrize(("heads", "tokens"), [(3, 10), (10, 3)])
def test_more_processes_than_heads_or_tokens_are_refused(heads: int, tokens: int) -> None:
    with pytest.raises(ConfigError, match="3"):
        SequenceParallel(0, 4, heads, tokens)


def fail(group: Group) -> None:
    """Fail in one process, while the other waits for it."""
    if group.rank == 1:
        raise VmlaError("no luck", "try again")
    group.from_first(lambda: None)
    torch.distributed.barrier()


def test_an_error_of_one_process_ends_all_with_its_message() -> None:
    with pytest.raises(VmlaError) as caught:
        run_together(2, fail)
    assert (caught.value.message, caught.value.hint) == ("no luck", "try again")
