"""A transformer block in Wan's layout and parameter names, and its masked self-attention.

A block is Wan 2.1's: modulated self-attention, cross-attention to the prompt and modulated
feed-forward. The six modulation vectors come per frame, because a causal model holds frames of
different noise levels.

Shapes: B batch, F frames, L tokens of the F frames, S prompt tokens, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmla_convert.config import ModelConfig
from vmla_convert.layers.attention import (
    AttendedTokens,
    AttentionMetadata,
    CrossAttention,
    DenseSelfAttention,
    Entries,
)
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.maths.masks import AttentionMask, query_groups
from vmla_convert.maths.rope3d import Rotary

SelfAttention = DenseSelfAttention | LatentSelfAttention


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        geometry = config.geometry
        dim = geometry.dim
        self.eps = geometry.eps
        self.self_attn: SelfAttention = (
            DenseSelfAttention(geometry)
            if config.mla is None
            else LatentSelfAttention(geometry, config.mla, layer)
        )
        self.codec: LayerCodec | None = (
            LayerCodec(dim, geometry.num_heads, config.codec.rank) if config.codec else None
        )
        self.norm3 = nn.LayerNorm(dim, eps=geometry.eps)
        self.cross_attn = CrossAttention(geometry)
        self.ffn = nn.Sequential(
            nn.Linear(dim, geometry.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(geometry.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def project_prompt(self, text: Tensor) -> Entries:
        """Key and value of an embedded prompt (B, S, d) for the cross-attention."""
        return self.cross_attn.project_prompt(text)

    def attention_input(self, x: Tensor, time: Tensor) -> Tensor:
        """Input of the self-attention: tokens x (B, L, d) modulated by time (B, F, 6, d)."""
        shift, scale, *_ = (self.modulation + time).unbind(2)
        return modulate(x, shift, scale, self.eps)

    def attention_gate(self, time: Tensor) -> Tensor:
        """Gate (B, F, d) on the self-attention's output, from time (B, F, 6, d)."""
        return (self.modulation + time)[:, :, 2]

    def after_attention(
        self, x: Tensor, y: Tensor, time: Tensor, prompt: Tensor | Entries
    ) -> Tensor:
        """Add the self-attention's output y to tokens x, then cross-attention and feed-forward."""
        _, _, gate, shift, scale, ffn_gate = (self.modulation + time).unbind(2)
        x = x + gated(y, gate)
        x = x + self.cross_attn(self.norm3(x), prompt)
        return x + gated(self.ffn(modulate(x, shift, scale, self.eps)), ffn_gate)

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor | Entries, attend: Attend) -> Tensor:
        """Advance tokens x (B, L, d).

        Args:
            x: Tokens of F frames.
            time: Projected time embedding (B, F, 6, d).
            prompt: Embedded prompt (B, S, d), or its key and value from `project_prompt`.
            attend: Calls this block's self-attention on its input.
        """
        y = attend(self, self.attention_input(x, time))
        return self.after_attention(x, y, time, prompt)


Attend = Callable[[Block, Tensor], Tensor]
"""Calls a block's self-attention on its input, masked in one pass or with a cache."""


class Head(nn.Module):
    """Final norm, modulation and projection to patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        geometry = config.geometry
        self.eps = geometry.eps
        self.head = nn.Linear(geometry.dim, math.prod(geometry.patch_size) * geometry.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, geometry.dim) / geometry.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Patches (B, L, p·p·C) of tokens x (B, L, d), with the time embedding (B, F, d)."""
        shift, scale = (self.modulation + time[:, :, None]).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps))


def masked_attention(rotary: Rotary, mask: AttentionMask | None) -> Attend:
    """Self-attention over a whole clip in one pass.

    With a codec, queries attend to the decoded past and to the dense tokens of their own chunk.

    Args:
        rotary: Rotation of every token.
        mask: Attention mask; None where every token attends to every token.
    """
    if mask is None:
        full = AttentionMetadata(rotary, rotary)
        return lambda block, x: block.self_attn(x, AttendedTokens(block.self_attn.project(x)), full)
    past = mask.visible & ~mask.dense
    # Decode only frames that some query sees compressed. In a teacher-forced pass [clean | noisy]
    # these are clean frames: no query has a noisy frame in its past.
    frames = past.any(0)
    tokens = mask.tokens_of(frames).to(rotary.table.device)
    both = torch.cat([past[:, frames], mask.dense], dim=1)
    groups, split = (query_groups(m, mask.tokens_per_frame) for m in (mask.visible, both))
    whole = AttentionMetadata(rotary, rotary, groups=groups)
    with_past = AttentionMetadata(rotary, rotary, rotary.at(tokens), split)

    def attend(block: Block, x: Tensor) -> Tensor:
        entries = block.self_attn.project(x)
        if block.codec is None:
            return block.self_attn(x, AttendedTokens(entries), whole)
        decoded = block.codec.past(*(entry[:, tokens] for entry in entries))
        return block.self_attn(x, AttendedTokens(entries, decoded), with_past)

    return attend


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of x (B, L, d), then scale and shift (B, F, d) per frame."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Tokens x (B, L, d) times a gate (B, F, d) per frame."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)
