"""Which token may see which: chunk-causal attention with a window and a sink, as boolean masks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import CachePolicy


class Visibility(NamedTuple):
    """Who sees whom in one masked pass, both (L, L) and boolean.

    Attributes:
        seen: A query (row) may see a key (column).
        exact: The key is of the query's own chunk, so that no cache holds it yet, or of a frame so
            recent that the cache keeps it dense.
    """

    seen: Tensor
    exact: Tensor

    def to(self, device: torch.device) -> Visibility:
        """The same on a device."""
        return Visibility(self.seen.to(device), self.exact.to(device))


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
    """Who sees whom among the L = frames · tokens_per_frame tokens of one clip in one pass."""
    seen = visible_frames(frames, chunk_frames, policy)
    exact = seen & recent_frames(frames, chunk_frames, policy)
    return _to_tokens(seen, exact, tokens_per_frame)


def teacher_forcing_mask(
    frames: int, chunk_frames: int, tokens_per_frame: int, policy: CachePolicy | None = None
) -> Visibility:
    """Who sees whom among the 2L tokens of [clean clip | noisy clip].

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
    return _to_tokens(seen, exact, tokens_per_frame)


def _to_tokens(seen: Tensor, exact: Tensor, tokens_per_frame: int) -> Visibility:
    def repeat(mask: Tensor) -> Tensor:
        mask = mask.repeat_interleave(tokens_per_frame, 0)
        return mask.repeat_interleave(tokens_per_frame, 1)

    return Visibility(repeat(seen), repeat(exact))
