"""Streams that test_parallel computes in several processes and in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import TINY_GEOMETRY, TINY_MLA, clip_of, rollout, tiny_config, tiny_model
from torch import Tensor

from vmla_convert.config import CachePolicy, CodecConfig, ModelConfig, RuntimeConfig, Sizes
from vmla_convert.generating.launch import ONE, Group

# Neither heads nor tokens divide by three.
GEOMETRY = replace(TINY_GEOMETRY, dim=64, num_heads=4)
LATENT_SIZE, FRAMES, PASSES = (4, 10), 8, 3
POLICY = CachePolicy(6, sink_frames=2, frame_positions="relative")
CODEC = CodecConfig(32, Sizes(bytes_per_token=40))


def config(**changes: Any) -> ModelConfig:
    """A model whose window slides."""
    return tiny_config(GEOMETRY, latent_size=LATENT_SIZE, **{"cache": POLICY, **changes})


class Case(NamedTuple):
    """A model and how it runs."""

    model: ModelConfig
    runtime: RuntimeConfig = RuntimeConfig()


CASES = {
    "dense": Case(config()),
    "int4": Case(config(), RuntimeConfig(cache_dtype="int4")),
    "codec": Case(config(codec=CODEC)),
    "whole channels": Case(config(codec=CODEC), RuntimeConfig(cache_dtype="model")),
    "recent": Case(config(codec=CODEC, cache=replace(POLICY, dense_recent_frames=2))),
    "mla": Case(config(mla=TINY_MLA)),
    "absorbed": Case(config(mla=TINY_MLA), RuntimeConfig(backend="absorbed")),
}


class Streamed(NamedTuple):
    """The results of a stream.

    Attributes:
        velocity: Velocities of all frames.
        continued: Velocities of the last chunk, computed again from the saved cache.
        state: The saved cache.
        sent: Bytes that this process sent to others, in all layers and chunks.
    """

    velocity: Tensor
    continued: Tensor
    state: dict[str, Tensor]
    sent: float


def streams(group: Group = ONE) -> dict[str, Streamed]:
    """Compute all cases; bytes are those of all processes."""
    found = {name: stream(case, group) for name, case in CASES.items()}
    if group.size > 1:
        sent = torch.tensor([each.sent for each in found.values()], dtype=torch.float64)
        dist.all_reduce(sent)
        parts = zip(found.items(), sent.tolist(), strict=True)
        found = {name: each._replace(sent=total) for (name, each), total in parts}
    return found


@torch.no_grad()
def stream(case: Case, group: Group) -> Streamed:
    """Stream a clip, save the cache before the last chunk, and continue from what was saved."""
    model = tiny_model(case.model).double()
    model.parallel = group.parallel(case.model)
    latents, times, context = (part.double() for part in clip_of(case.model, FRAMES, batch=2))
    last = slice(FRAMES - case.model.chunk_frames, None)
    with counted_bytes(group.size) as sent:
        velocity = rollout(model, latents, times, context, case.runtime, between=PASSES - 1)
    cache = model.new_cache(2, case.runtime)
    rollout(model, latents[:, : last.start], times[:, : last.start], context, cache)
    again = model.new_cache(2, case.runtime)
    state = cache.state()
    again.restore(cache.window.state(), state)
    continued = rollout(model, latents[:, last], times[:, last], context, again)
    return Streamed(velocity, continued, {n: t.clone() for n, t in state.items()}, sum(sent))


@contextmanager
def counted_bytes(size: int) -> Iterator[list[float]]:
    """Count what this process sends to others, from torch's two collectives."""
    sent = list[float]()
    exchange: Any = dist.all_to_all_single
    add_up = dist.all_reduce
    rank = dist.get_rank() if size > 1 else 0

    def counting_exchange(received: Tensor, given: Tensor, into: list[int], out: list[int]) -> None:
        sent.append(given.itemsize * (given.numel() - out[rank]))
        exchange(received, given, into, out)

    def counting_sum(x: Tensor) -> None:
        sent.append(2 * x.nbytes * (size - 1) / size)  # a ring's share
        add_up(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting_exchange)
        patch.setattr(dist, "all_reduce", counting_sum)
        yield sent
