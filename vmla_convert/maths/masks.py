"""Which frame may see which: chunk-causal attention with a window and a sink.

All tokens of a frame see the same frames, and all of each. So masks are of frames, and attention
under them goes over groups of queries that see the same keys: no matrix of tokens is ever made,
which for a real clip takes gigabytes and keeps fused kernels from their fastest paths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.config import CachePolicy


class QueryGroup(NamedTuple):
    """Consecutive queries that see the same keys.

    Attributes:
        queries: How many; the first group's come first, and so on.
        keys: Where the keys are, in runs of tokens.
    """

    queries: int
    keys: tuple[slice, ...]


class Visibility(NamedTuple):
    """Who sees whom in one masked pass over F frames; the masks are (F, F) and boolean.

    Attributes:
        seen: Queries of a frame (row) see the keys of another (column).
        exact: It sees them, and the key's frame is of the query's own chunk, so that no cache holds
            it yet, or so recent that the cache keeps it dense.
        tokens_per_frame: Of every frame.
    """

    seen: Tensor
    exact: Tensor
    tokens_per_frame: int

    def tokens_of(self, frames: Tensor) -> Tensor:
        """Indices of the tokens of some frames, which a mask (F,) tells."""
        return frames.repeat_interleave(self.tokens_per_frame).nonzero().flatten()

    def seen_by(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens a few queries (n,) see, and which of those are exact, both (n, L)."""
        frames = queries.cpu() // self.tokens_per_frame
        seen, exact = (
            mask[frames].repeat_interleave(self.tokens_per_frame, 1).to(queries.device)
            for mask in (self.seen, self.exact)
        )
        return seen, exact


def visible_frames(frames: int, chunk_frames: int, policy: CachePolicy | None = None) -> Tensor:
    """Frame-level mask (F, F): may a query of frame i see the clean frame j?

    Causal between chunks, full within one. With a policy, a chunk that ends before frame e sees
    the sink and the frames from e − (window − sink) on, which is what the cache holds by then.
    """
    query = torch.arange(frames)[:, None]
    key = torch.arange(frames)[None, :]
    end = (query // chunk_frames + 1) * chunk_frames
    visible = key < end
    if policy is not None:
        recent = key >= end - (policy.window_frames - policy.sink_frames)
        visible &= recent | (key < policy.sink_frames)
    return visible


def recent_frames(frames: int, chunk_frames: int, policy: CachePolicy | None = None) -> Tensor:
    """Frame-level mask (F, F): is frame j of frame i's chunk, or of the newest that stay dense?"""
    start = torch.arange(frames)[:, None] // chunk_frames * chunk_frames
    key = torch.arange(frames)[None, :]
    dense = policy.dense_recent_frames if policy is not None else 0
    return (key >= start - dense) & (key < start + chunk_frames)


def block_causal_mask(
    frames: int, chunk_frames: int, tokens_per_frame: int, policy: CachePolicy | None = None
) -> Visibility:
    """Who sees whom among the frames of one clip in one pass."""
    seen = visible_frames(frames, chunk_frames, policy)
    exact = seen & recent_frames(frames, chunk_frames, policy)
    return Visibility(seen, exact, tokens_per_frame)


def teacher_forcing_mask(
    frames: int, chunk_frames: int, tokens_per_frame: int, policy: CachePolicy | None = None
) -> Visibility:
    """Who sees whom among the 2F frames of [clean clip | noisy clip].

    A clean chunk sees the clean past and itself; a noisy chunk sees the clean past and, of its own
    frames, only the noisy ones. One pass thus trains every chunk as it is met in a rollout.
    """
    clean = visible_frames(frames, chunk_frames, policy)
    same = recent_frames(frames, chunk_frames)
    recent = clean & recent_frames(frames, chunk_frames, policy)

    def both_halves(own: Tensor, past: Tensor) -> Tensor:
        top = torch.cat([own | past, torch.zeros_like(own)], dim=1)
        return torch.cat([top, torch.cat([past, own], dim=1)])

    seen, exact = both_halves(same, clean & ~same), both_halves(same, recent & ~same)
    return Visibility(seen, exact, tokens_per_frame)


def query_groups(seen: Tensor, tokens_per_frame: int) -> tuple[QueryGroup, ...]:
    """The queries of frames (rows) by the keys that they see.

    Args:
        seen: Mask (F, K); the keys of K frames, in any order and repeats allowed, are the columns.
        tokens_per_frame: Of queries and of keys.
    """
    # What wraps a model may have moved its arguments to a device.
    rows, counts = torch.unique_consecutive(seen.cpu(), dim=0, return_counts=True)
    return tuple(
        QueryGroup(frames * tokens_per_frame, _runs(row, tokens_per_frame))
        for row, frames in zip(rows, counts.tolist(), strict=True)
    )


def _runs(row: Tensor, tokens_per_frame: int) -> tuple[slice, ...]:
    """Runs of the tokens of the frames that a mask (K,) tells."""
    edges = torch.diff(F.pad(row.int(), (1, 1))).nonzero().flatten() * tokens_per_frame
    return tuple(slice(start, end) for start, end in edges.view(-1, 2).tolist())
