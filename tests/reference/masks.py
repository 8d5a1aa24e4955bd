"""Masked passes as one matrix over all pairs of tokens has them."""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.config import CachePolicy
from vmla_convert.maths.masks import AttentionMask, QueryGroup, dense_frames, visible_frames


def block_causal_mask(
    frames: int, chunk_frames: int, tokens_per_frame: int, policy: CachePolicy | None = None
) -> AttentionMask:
    """The mask of one clean clip: each chunk attends to what a stream's cache would hold."""
    visible = visible_frames(frames, chunk_frames, policy)
    dense = visible & dense_frames(frames, chunk_frames, policy)
    return AttentionMask(visible, dense, tokens_per_frame)


def token_masks(mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Token-level `visible` and `dense`, both (L, L)."""
    size = mask.tokens_per_frame
    visible, dense = (
        frames.repeat_interleave(size, 0).repeat_interleave(size, 1)
        for frames in (mask.visible, mask.dense)
    )
    return visible, dense


class PairwiseAttend:
    """`attend` in `masked_attention`'s place for it, heedless of groups: one softmax of all pairs.

    Keys are those of all L tokens, or first those that some query reads as its past, then all.
    """

    def __init__(self, mask: AttentionMask) -> None:
        self.visible, dense = token_masks(mask)
        past = self.visible & ~dense
        self.split = torch.cat([past[:, past.any(0)], dense], 1)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _groups: tuple[QueryGroup, ...] | None = None,
        scale: float | None = None,
        kernel: str = "auto",
    ) -> Tensor:
        """Gather from (B, S, H, D) for queries (B, L, H, D)."""
        assert kernel == "auto"
        pairs = self.visible if k.shape[1] == len(self.visible) else self.split
        logits = torch.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
        weights = logits.masked_fill(~pairs, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v)
