"""Masked passes as one matrix over all pairs of tokens has them."""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.maths.masks import QueryGroup, Visibility


def token_masks(mask: Visibility) -> tuple[Tensor, Tensor]:
    """Which token sees which, and which keys are exact to which query, both (L, L)."""
    size = mask.tokens_per_frame
    seen, exact = (
        frames.repeat_interleave(size, 0).repeat_interleave(size, 1)
        for frames in (mask.seen, mask.exact)
    )
    return seen, exact


class PairwiseAttend:
    """`attend` in `masked_attention`'s place for it, heedless of groups: one softmax of all pairs.

    Keys are those of all L tokens, or first those that some query reads as its past, then all.
    """

    def __init__(self, mask: Visibility) -> None:
        self.seen, exact = token_masks(mask)
        past = self.seen & ~exact
        self.split = torch.cat([past[:, past.any(0)], exact], 1)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _groups: tuple[QueryGroup, ...] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Gather from (B, S, H, D) for queries (B, L, H, D)."""
        pairs = self.seen if k.shape[1] == len(self.seen) else self.split
        logits = torch.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
        weights = logits.masked_fill(~pairs, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v)
