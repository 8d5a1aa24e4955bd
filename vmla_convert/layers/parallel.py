"""Divide one stream over processes: tokens for most of a block, heads for self-attention.

Each process computes projections, norms, cross-attention and feed-forward of its own tokens. For
self-attention an all-to-all hands each process all tokens of its own heads (DeepSpeed-Ulysses,
arXiv 2309.14509). Keys are normed over all heads before the all-to-all. Every process holds all
weights, and the whole cache of latents, but only its own heads of dense keys and values.

Every frame's tokens are divided alike, so that each process has the same share of all frames and
modulation by frame needs no change. Shares may be uneven.

Shapes: B batch, F frames of a chunk, L tokens of the chunk, l own tokens, d width, e width of own
heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.maths.cost import even_shares


class OneProcess:
    """A stream that one process computes alone: nothing is exchanged.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank, size = 0, 1

    def own_heads(self, num_heads: int) -> slice:
        """The heads whose attention this process computes."""
        return slice(0, num_heads)

    def own_tokens(self, x: Tensor) -> Tensor:
        """Own tokens (B, l, width) of all tokens (B, L, width)."""
        return x

    def gather_tokens(self, x: Tensor) -> Tensor:
        """All tokens (B, L, width) from each process's own tokens (B, l, width)."""
        return x

    def to_heads(self, x: Tensor) -> Tensor:
        """Own heads (B, L, e) of all tokens, from all heads (B, l, d) of own tokens."""
        return x

    def to_tokens(self, x: Tensor) -> Tensor:
        """All heads (B, l, d) of own tokens, from own heads (B, L, e) of all tokens."""
        return x

    def gather_heads(self, x: Tensor) -> Tensor:
        """All heads (..., d) from each process's own heads (..., e)."""
        return x

    def part_of_heads(self, x: Tensor) -> Tensor:
        """Own heads (..., e) of all heads (..., d)."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return x


ALONE = OneProcess()


class SequenceParallel(OneProcess):
    """One of several processes that compute a stream together, in torch's default group."""

    def __init__(self, rank: int, size: int, num_heads: int, tokens_per_frame: int) -> None:
        """Divide heads and tokens.

        Args:
            rank: Number of this process.
            size: Number of processes.
            num_heads: Heads of the model.
            tokens_per_frame: Tokens of a latent frame.

        Raises:
            ConfigError: Some process would have no head or no token.
        """
        check_processes(size, num_heads, tokens_per_frame)
        self.rank, self.size = rank, size
        self._heads = even_shares(num_heads, size)
        self._tokens = even_shares(tokens_per_frame, size)

    def own_heads(self, num_heads: int) -> slice:
        """The heads whose attention this process computes."""
        assert num_heads == sum(self._heads)
        start = sum(self._heads[: self.rank])
        return slice(start, start + self._heads[self.rank])

    def own_tokens(self, x: Tensor) -> Tensor:
        """Own tokens (B, l, width) of all tokens (B, L, width)."""
        return self._by_frame(x).split(self._tokens, 2)[self.rank].flatten(1, 2)

    def gather_tokens(self, x: Tensor) -> Tensor:
        """All tokens (B, L, width) from each process's own tokens (B, l, width)."""
        batch, frames = x.shape[0], x.shape[1] // self._tokens[self.rank]
        shapes = [(batch, frames, tokens, x.shape[-1]) for tokens in self._tokens]
        return torch.cat(_exchange([x] * self.size, shapes), 2).flatten(1, 2)

    def to_heads(self, x: Tensor) -> Tensor:
        """Own heads (B, L, e) of all tokens, from all heads (B, l, d) of own tokens."""
        parts = x.split(self._widths(x.shape[-1]), -1)
        batch, frames = x.shape[0], x.shape[1] // self._tokens[self.rank]
        width = parts[self.rank].shape[-1]
        shapes = [(batch, frames, tokens, width) for tokens in self._tokens]
        return torch.cat(_exchange(parts, shapes), 2).flatten(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """All heads (B, l, d) of own tokens, from own heads (B, L, e) of all tokens."""
        parts = self._by_frame(x).split(self._tokens, 2)
        tokens = parts[self.rank].shape[1] * self._tokens[self.rank]
        shapes = [(x.shape[0], tokens, width) for width in self._widths_from_own(x)]
        return torch.cat(_exchange(parts, shapes), -1)

    def gather_heads(self, x: Tensor) -> Tensor:
        """All heads (..., d) from each process's own heads (..., e)."""
        shapes = [(*x.shape[:-1], width) for width in self._widths_from_own(x)]
        return torch.cat(_exchange([x] * self.size, shapes), -1)

    def part_of_heads(self, x: Tensor) -> Tensor:
        """Own heads (..., e) of all heads (..., d)."""
        return x.split(self._widths(x.shape[-1]), -1)[self.rank]

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def _by_frame(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, sum(self._tokens)))

    def _widths(self, whole: int) -> list[int]:
        """Numbers of each process's heads, where all heads together have `whole` numbers."""
        return [heads * (whole // sum(self._heads)) for heads in self._heads]

    def _widths_from_own(self, x: Tensor) -> list[int]:
        per_head = x.shape[-1] // self._heads[self.rank]
        return [heads * per_head for heads in self._heads]


def check_processes(size: int, num_heads: int, tokens_per_frame: int) -> None:
    """Refuse more processes than a stream can be divided over.

    Raises:
        ConfigError: Some process would have no head or no token.
    """
    for name, number in (("heads", num_heads), ("tokens in a frame", tokens_per_frame)):
        if size > number:
            raise ConfigError(
                f"{size} processes are more than the model's {number} {name}",
                f"use --processes {min(num_heads, tokens_per_frame)} or fewer",
            )


def _exchange(parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Send each process its part, and receive one part of a given shape from each."""
    sent = torch.cat([part.flatten() for part in parts])
    sizes = [math.prod(shape) for shape in shapes]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts])
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]
