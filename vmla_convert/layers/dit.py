"""The causal video DiT in Wan's layout and parameter names, dense or converted.

Latents are (B, F, C, height, width) at every public door. A block is Wan 2.1's: modulated
self-attention, cross-attention to the prompt, modulated feed-forward; the six modulation vectors
come per frame, because a causal model holds frames of different noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmla_convert.config import ModelConfig
from vmla_convert.layers.attention import CrossAttention, DenseSelfAttention, Sight
from vmla_convert.layers.cache import KVCache
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.maths.masks import Visibility
from vmla_convert.maths.rope3d import Rotary, rotary_table, token_positions

SelfAttention = DenseSelfAttention | LatentSelfAttention
Attend = Callable[[SelfAttention, Tensor], Tensor]
"""How a block's self-attention sees the clip: masked in one pass, or through a cache."""


class Embedded(NamedTuple):
    """Inputs of the blocks.

    Attributes:
        tokens: (B, L, d).
        time: Time embedding (B, F, d).
        modulation: Projected time embedding (B, F, 6, d).
        text: Embedded prompt (B, S, d).
    """

    tokens: Tensor
    time: Tensor
    modulation: Tensor
    text: Tensor


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
        self.norm3 = nn.LayerNorm(dim, eps=geometry.eps)
        self.cross_attn = CrossAttention(geometry)
        self.ffn = nn.Sequential(
            nn.Linear(dim, geometry.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(geometry.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def attention_input(self, x: Tensor, time: Tensor) -> Tensor:
        """What the self-attention reads: x (B, L, d) normed and modulated by time (B, F, 6, d)."""
        shift, scale, *_ = (self.modulation + time).unbind(2)
        return modulate(x, shift, scale, self.eps)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, attend: Attend) -> Tensor:
        """Advance tokens x (B, L, d).

        Args:
            x: Tokens of F frames.
            time: Projected time embedding (B, F, 6, d).
            context: Embedded prompt (B, S, d).
            attend: Calls the self-attention on its input.
        """
        _, _, gate, shift, scale, ffn_gate = (self.modulation + time).unbind(2)
        y = attend(self.self_attn, self.attention_input(x, time))
        x = x + gated(y, gate)
        x = x + self.cross_attn(self.norm3(x), context)
        return x + gated(self.ffn(modulate(x, shift, scale, self.eps)), ffn_gate)


class Head(nn.Module):
    """Final norm, modulation and projection to patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        geometry = config.geometry
        self.eps = geometry.eps
        self.head = nn.Linear(geometry.dim, math.prod(geometry.patch_size) * geometry.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, geometry.dim) / geometry.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Patches (B, L, p·p·C) of tokens x (B, L, d), time embedding (B, F, d)."""
        shift, scale = (self.modulation + time[:, :, None]).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps))


class CausalWanModel(nn.Module):
    """A Wan DiT that runs masked over a whole clip, or streamed chunk by chunk with a cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        geometry = config.geometry
        dim = geometry.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(
            geometry.in_dim, dim, geometry.patch_size, stride=geometry.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(geometry.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(geometry.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(geometry.num_layers))
        self.head = Head(config)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        frames: Tensor,
        mask: Visibility | None = None,
    ) -> Tensor:
        """Velocity of all frames in one masked pass.

        Args:
            latents: (B, F, C, height, width).
            timestep: (B, F), 0 to 1000.
            context: Prompt (B, text_len, text_dim).
            frames: (F,), time position of each frame; a position may repeat (teacher forcing).
            mask: Who sees whom; None when the frames are one chunk that sees all of itself.

        Returns:
            (B, F, C, height, width).
        """
        x, time, modulation, text = self.embed(latents, timestep, context)
        attend = masked_attention(self.rotary(frames, latents), mask)
        for block in self.blocks:
            x = block(x, modulation, text, attend)
        return self.unpatchify(self.head(x, time), latents)

    def walk(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        frames: Tensor,
        mask: Visibility | None = None,
    ) -> Iterator[tuple[Block, Tensor, Attend]]:
        """Yield each block with the input of its self-attention, in order; as `forward` otherwise.

        The caller may measure or replace a block's attention before asking for the next one.
        """
        x, _, modulation, text = self.embed(latents, timestep, context)
        attend = masked_attention(self.rotary(frames, latents), mask)
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block, block.attention_input(x, modulation), attend
            x = block(x, modulation, text, attend)

    def stream(self, latents: Tensor, timestep: Tensor, context: Tensor, cache: KVCache) -> Tensor:
        """Velocity of the cache's open chunk, which sees the window and overwrites its own slots.

        Arguments and result as `forward`; the frames are those of `cache.open_chunk`.
        """
        x, time, modulation, text = self.embed(latents, timestep, context)
        query_rotary = self.rotary(cache.chunk_positions(), latents)
        sight = Sight(
            query_rotary,
            key_rotary=self.rotary(cache.positions(), latents),
            past=cache.past_tokens().to(latents.device),
        )
        for layer, block in enumerate(self.blocks):

            def attend(attention: SelfAttention, x: Tensor, layer: int = layer) -> Tensor:
                projection = attention.project(x)
                entries = cache.update(layer, projection.cached)
                return attention(x, entries, projection.own, sight)

            x = block(x, modulation, text, attend)
        return self.unpatchify(self.head(x, time), latents)

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for B clips, under the model's own policy."""
        weight = self.patch_embedding.weight
        return KVCache(
            self.config.cache,
            [attention.entry_widths for attention in self.self_attentions()],
            batch,
            self.config.tokens_per_frame,
            weight.dtype,
            weight.device,
        )

    def self_attentions(self) -> list[SelfAttention]:
        """The self-attention of every block."""
        return [block.self_attn for block in self.blocks if isinstance(block, Block)]

    def embed(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Embedded:
        """What the blocks start from; arguments as `forward`."""
        x = self.patch_embedding(latents.transpose(1, 2)).flatten(2).transpose(1, 2)
        wave = sinusoids(timestep, self.config.geometry.freq_dim)
        time = self.time_embedding(wave.to(self.patch_embedding.weight.dtype))
        modulation = self.time_projection(time).unflatten(-1, (6, -1))
        return Embedded(x, time, modulation, self.text_embedding(context))

    def rotary(self, frames: Tensor, latents: Tensor) -> Rotary:
        """Rotation of all tokens of frames at the given time positions."""
        _, rows, columns = self.config.geometry.patch_size
        height, width = latents.shape[-2] // rows, latents.shape[-1] // columns
        positions = token_positions(frames.to(latents.device), height, width)
        return rotary_table(positions, self.config.geometry.head_dim)

    def unpatchify(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Patches (B, L, pt·ph·pw·C) to latents of the same shape as `latents`."""
        pt, ph, pw = self.config.geometry.patch_size
        batch, frames, _, height, width = latents.shape
        grid = patches.view(batch, frames // pt, height // ph, width // pw, pt, ph, pw, -1)
        # (B, F, h, w, pt, ph, pw, C) -> (B, F, pt, C, h, ph, w, pw)
        grid = grid.permute(0, 1, 4, 7, 2, 5, 3, 6)
        return grid.reshape(batch, frames, -1, height, width)


def masked_attention(rotary: Rotary, mask: Visibility | None) -> Attend:
    """Self-attention in one pass, every token at its own place in one table."""
    if mask is None:
        nothing = torch.zeros(0, dtype=torch.long, device=rotary.cos.device)
        sight = Sight(rotary, rotary, past=nothing)
    else:
        past, own = mask.seen & ~mask.own, mask.seen & mask.own
        # Of a teacher-forced pass the noisy half is nobody's past.
        read = past.any(0).nonzero().flatten()
        split_mask = torch.cat([past[:, read], own], dim=1)
        sight = Sight(rotary, rotary, mask.seen, read, split_mask)

    def attend(attention: SelfAttention, x: Tensor) -> Tensor:
        projection = attention.project(x)
        return attention(x, projection.cached, projection.own, sight)

    return attend


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of x (B, L, d), then scale and shift (B, F, d) per frame."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x (B, L, d) times a gate (B, F, d) per frame."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (..., width) of timesteps, cosines first (Wan 2.1)."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[..., None] * 10_000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
