"""Which token may see which: chunk-causal attention with a window and a sink, as boolean masks."""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.config import CachePolicy


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


def block_causal_mask(
    frames: int, chunk_frames: int, tokens_per_frame: int, policy: CachePolicy | None = None
) -> Tensor:
    """Token-level mask (L, L), L = frames · tokens_per_frame, for one clip in one pass."""
    return _to_tokens(visible_frames(frames, chunk_frames, policy), tokens_per_frame)


def teacher_forcing_mask(
    frames: int, chunk_frames: int, tokens_per_frame: int, policy: CachePolicy | None = None
) -> Tensor:
    """Token-level mask (2L, 2L) over [clean clip | noisy clip].

    A clean chunk sees the clean past and itself; a noisy chunk sees the clean past and, of its own
    frames, only the noisy ones. One pass thus trains every chunk as it is met in a rollout.
    """
    clean = visible_frames(frames, chunk_frames, policy)
    chunk = torch.arange(frames) // chunk_frames
    same = chunk[:, None] == chunk[None, :]
    nothing = torch.zeros_like(same)
    top = torch.cat([clean, nothing], dim=1)
    bottom = torch.cat([clean & ~same, same], dim=1)
    return _to_tokens(torch.cat([top, bottom]), tokens_per_frame)


def _to_tokens(mask: Tensor, tokens_per_frame: int) -> Tensor:
    mask = mask.repeat_interleave(tokens_per_frame, 0)
    return mask.repeat_interleave(tokens_per_frame, 1)
