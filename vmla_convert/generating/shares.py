"""The share of one stream that each of several processes computes, keeps and sends."""

from __future__ import annotations

from typing import NamedTuple

from vmla_convert.config import DENSE_BITS, DENSE_ITEMSIZE, ModelConfig, RuntimeConfig
from vmla_convert.layers.parallel import check_processes
from vmla_convert.maths.cost import Exchange, even_shares, exchanged_bytes

FLOAT32 = 4
"""Bytes of a float32 number."""


class Shares(NamedTuple):
    """How a stream is divided, largest shares first.

    Attributes:
        processes: Number of processes.
        heads: Heads of each process in self-attention.
        tokens: Tokens of a chunk that each process computes in all other layers.
        cache_bytes: Bytes of the largest cache of a process, for one clip.
        sent_bytes: Bytes that all processes together send for a chunk in one layer, for one clip.
    """

    processes: int
    heads: list[int]
    tokens: list[int]
    cache_bytes: int
    sent_bytes: int


def plan_shares(
    config: ModelConfig, runtime: RuntimeConfig, itemsize: int, processes: int
) -> Shares:
    """Divide a model's streams over processes.

    Args:
        config: The model, dense or converted.
        runtime: Size and precision of the cache.
        itemsize: Bytes of a number of the model's dtype.
        processes: Number of processes.

    Raises:
        ConfigError: Some process would have no head or no token.
    """
    geometry, frames = config.geometry, config.chunk_frames
    check_processes(processes, geometry.num_heads, config.tokens_per_frame)
    heads = even_shares(geometry.num_heads, processes)
    tokens = [frames * own for own in even_shares(config.tokens_per_frame, processes)]
    held = config.cache_bytes(config.cache.window_frames, 1, runtime)
    if config.codec is None and runtime.cache_dtype not in DENSE_BITS:
        held = held * itemsize // DENSE_ITEMSIZE
    if config.is_dense:
        held = held * heads[0] // geometry.num_heads
    passes = len(config.sampler.denoising_step_list) + 1
    sent = exchanged_bytes(
        exchange_of(config, itemsize),
        frames,
        config.tokens_per_frame,
        geometry.num_heads,
        processes,
        passes,
    )
    return Shares(processes, heads, tokens, held, sent)


def exchange_of(config: ModelConfig, itemsize: int, channels: int | None = None) -> Exchange:
    """Numbers that processes exchange of a token in a layer.

    Args:
        config: The model, dense or converted.
        itemsize: Bytes of a number of the model's dtype.
        channels: Channels that the layer's codec stores; None for all that it has.
    """
    dim = itemsize * config.geometry.dim
    if config.mla is not None:
        widest = max(range(config.geometry.num_layers), key=config.mla.kv_lora_rank.__getitem__)
        latent = config.mla.kv_lora_rank[widest] + config.mla.qk_rope_head_dim(widest)
        return Exchange(2 * dim, whole=itemsize * latent + max(FLOAT32, itemsize))
    if config.codec is None:
        return Exchange(4 * dim)
    summed = config.codec.rank if channels is None else channels
    return Exchange(4 * dim, summed=max(FLOAT32, itemsize) * summed)
