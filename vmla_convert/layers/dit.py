"""The causal video DiT in Wan's layout and parameter names, dense or converted.

Latents are (B, F, C, height, width) at every public door. A block is Wan 2.1's: modulated
self-attention, cross-attention to the prompt, modulated feed-forward; the six modulation vectors
come per frame, because a causal model holds frames of different noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmla_convert.config import CachePolicy, ModelConfig, RuntimeConfig
from vmla_convert.errors import ConfigError
from vmla_convert.layers.attention import (
    CrossAttention,
    DenseSelfAttention,
    Entries,
    Reading,
    Sight,
)
from vmla_convert.layers.cache import DenseCache, KVCache, LatentCache, LayerCache, Storage
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.maths.masks import Visibility, query_groups
from vmla_convert.maths.rope3d import Rotary, grid_table

SelfAttention = DenseSelfAttention | LatentSelfAttention
Attend = Callable[[SelfAttention, Tensor], Tensor]
"""How a block's self-attention sees the clip: masked in one pass, or through a cache."""


Prompt = tuple[Entries, ...]
"""What the cross-attention of every block reads: key and value, both (B, S, d)."""


class Embedded(NamedTuple):
    """Inputs of the blocks.

    Attributes:
        tokens: (B, L, d).
        time: Time embedding (B, F, d).
        modulation: Projected time embedding (B, F, 6, d).
    """

    tokens: Tensor
    time: Tensor
    modulation: Tensor


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

    def read_prompt(self, text: Tensor) -> Entries:
        """What the cross-attention reads of an embedded prompt (B, S, d)."""
        return self.cross_attn.read_prompt(text)

    def attention_input(self, x: Tensor, time: Tensor) -> Tensor:
        """What the self-attention reads: x (B, L, d) normed and modulated by time (B, F, 6, d)."""
        shift, scale, *_ = (self.modulation + time).unbind(2)
        return modulate(x, shift, scale, self.eps)

    def attention_gate(self, time: Tensor) -> Tensor:
        """What the self-attention's output is multiplied by, (B, F, d); time as `forward`."""
        return (self.modulation + time)[:, :, 2]

    def after_attention(
        self, x: Tensor, y: Tensor, time: Tensor, prompt: Tensor | Entries
    ) -> Tensor:
        """Tokens x (B, L, d) after the self-attention's output y, cross-attention and feed-forward.

        Arguments as `forward`.
        """
        _, _, gate, shift, scale, ffn_gate = (self.modulation + time).unbind(2)
        x = x + gated(y, gate)
        x = x + self.cross_attn(self.norm3(x), prompt)
        return x + gated(self.ffn(modulate(x, shift, scale, self.eps)), ffn_gate)

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor | Entries, attend: Attend) -> Tensor:
        """Advance tokens x (B, L, d).

        Args:
            x: Tokens of F frames.
            time: Projected time embedding (B, F, 6, d).
            prompt: Embedded prompt (B, S, d), or what `read_prompt` made of it.
            attend: Calls the self-attention on its input.
        """
        y = attend(self.self_attn, self.attention_input(x, time))
        return self.after_attention(x, y, time, prompt)


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
        x, time, modulation = self.embed(latents, timestep)
        attend = masked_attention(self.rotary(frames, latents), mask)
        text = self.text_embedding(context)
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
        x, _, modulation = self.embed(latents, timestep)
        attend = masked_attention(self.rotary(frames, latents), mask)
        text = self.text_embedding(context)
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block, block.attention_input(x, modulation), attend
            x = block(x, modulation, text, attend)

    def read_prompt(self, context: Tensor) -> Prompt:
        """What the blocks read of prompts (B, text_len, text_dim), once for all chunks."""
        text = self.text_embedding(context)
        return tuple(block.read_prompt(text) for block in self._blocks())

    def stream(
        self, latents: Tensor, timestep: Tensor, prompt: Prompt, cache: KVCache, keep: bool = True
    ) -> Tensor:
        """Velocity of the cache's open chunk, which sees the window.

        Args:
            latents: (B, F, C, height, width); the frames are those of `cache.open_chunk`.
            timestep: (B, F), 0 to 1000.
            prompt: From `read_prompt`.
            cache: From `new_cache`.
            keep: Leave the chunk's entries to later chunks; a pass that is not the chunk's last may
                spare the work.

        Returns:
            As `latents`.
        """
        x, time, modulation = self.embed(latents, timestep)
        sight = cache.sight = cache.sight or self._streaming_sight(cache, latents)
        for layer, (block, read) in enumerate(zip(self._blocks(), prompt, strict=True)):

            def attend(attention: SelfAttention, x: Tensor, layer: int = layer) -> Tensor:
                return attention(x, cache.update(layer, attention.project(x, keep)), sight)

            x = block(x, modulation, read, attend)
        return self.unpatchify(self.head(x, time), latents)

    def new_cache(self, batch: int, runtime: RuntimeConfig | None = None) -> KVCache:
        """An empty cache for B clips, under the model's own policy.

        Args:
            batch: B.
            runtime: Place of the cache, and how it is read.

        Raises:
            ConfigError: A dense model was asked to be absorbed.
        """
        runtime = runtime or RuntimeConfig()
        check_runtime(self.config, runtime)
        weight = self.patch_embedding.weight
        tokens = self.config.tokens_per_frame
        storage = Storage(batch, tokens, weight.dtype, weight.device, runtime.offload)
        layers = [
            _layer_cache(attention, self.config.cache, storage)
            for attention in self.self_attentions()
        ]
        return KVCache(self.config.cache, layers, runtime)

    def cache_bytes(self, batch: int) -> int:
        """Bytes of what `new_cache` allocates for B clips, by formula."""
        itemsize = self.patch_embedding.weight.dtype.itemsize
        window = self.config.cache.window_frames
        return self.config.cache_bytes(window, batch, itemsize)

    def compile_blocks(self) -> None:
        """Compile what is the same in every block: all but the self-attention, whose sizes differ.

        Norms and modulation fuse, and one compilation serves all blocks.
        """
        for block in self._blocks():
            for name in ("attention_input", "after_attention"):
                setattr(block, name, torch.compile(getattr(block, name)))

    def _streaming_sight(self, cache: KVCache, latents: Tensor) -> Sight:
        """Where the open chunk and what it reads are, as the caches of its kind order them."""
        window = cache.window
        chunk = window.chunk_slots
        read = range(window.held) if self.config.mla is None else [*window.latent_slots, *chunk]

        def table(frames: list[int]) -> Rotary:
            return self.rotary(torch.tensor(frames, dtype=torch.long), latents)

        return Sight(
            query=table(window.positions(chunk)),
            keys=table(window.positions(list(read))),
            runtime=cache.runtime,
        )

    def _blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]  # or what wraps one

    def self_attentions(self) -> list[SelfAttention]:
        """The self-attention of every block."""
        return [block.self_attn for block in self._blocks()]

    def embed(self, latents: Tensor, timestep: Tensor) -> Embedded:
        """What the blocks start from; arguments as `forward`."""
        x = self.patch_embedding(latents.transpose(1, 2)).flatten(2).transpose(1, 2)
        wave = sinusoids(timestep, self.config.geometry.freq_dim)
        time = self.time_embedding(wave.to(self.patch_embedding.weight.dtype))
        modulation = self.time_projection(time).unflatten(-1, (6, -1))
        return Embedded(x, time, modulation)

    def rotary(self, frames: Tensor, latents: Tensor) -> Rotary:
        """Rotation of all tokens of frames at the given time positions."""
        _, rows, columns = self.config.geometry.patch_size
        height, width = latents.shape[-2] // rows, latents.shape[-1] // columns
        return grid_table(frames, height, width, self.config.geometry.head_dim, latents.device)

    def checkpoint_blocks(self) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again."""
        for block in self._blocks():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def keep_activations(self) -> None:
        """Undo `checkpoint_blocks`."""
        for block in self._blocks():
            del block.forward

    def unpatchify(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Patches (B, L, pt·ph·pw·C) to latents of the same shape as `latents`."""
        pt, ph, pw = self.config.geometry.patch_size
        batch, frames, _, height, width = latents.shape
        grid = patches.view(batch, frames // pt, height // ph, width // pw, pt, ph, pw, -1)
        # (B, F, h, w, pt, ph, pw, C) -> (B, F, pt, C, h, ph, w, pw)
        grid = grid.permute(0, 1, 4, 7, 2, 5, 3, 6)
        return grid.reshape(batch, frames, -1, height, width)


def check_runtime(config: ModelConfig, runtime: RuntimeConfig) -> None:
    """Refuse to run a model in a way that it cannot run.

    Raises:
        ConfigError: See `CausalWanModel.new_cache`.
    """
    if runtime.backend == "absorbed" and config.mla is None:
        raise ConfigError(
            "only latent layers can be absorbed, and this model's are dense",
            "use --backend materialised, or convert it first: vmla convert CKPT -o OUT",
        )


def _layer_cache(attention: SelfAttention, policy: CachePolicy, storage: Storage) -> LayerCache:
    kind = DenseCache if isinstance(attention, DenseSelfAttention) else LatentCache
    return kind(attention.entry_widths, policy, storage)


def masked_attention(rotary: Rotary, mask: Visibility | None) -> Attend:
    """Self-attention in one pass, every token at its own place in one table."""
    length = rotary.table.shape[-3]
    if mask is None:
        read = torch.zeros(0, dtype=torch.long, device=rotary.table.device)
        whole, split = Sight(rotary, rotary), Sight(rotary, rotary.at(read), rotary)
    else:
        past = mask.seen & ~mask.exact
        # Of a teacher-forced pass the noisy half is nobody's past.
        frames = past.any(0)
        read = mask.tokens_of(frames).to(rotary.table.device)
        both = torch.cat([past[:, frames], mask.exact], dim=1)
        groups, split_groups = (query_groups(m, mask.tokens_per_frame) for m in (mask.seen, both))
        whole = Sight(rotary, rotary, groups=groups)
        split = Sight(rotary, rotary.at(read), rotary, split_groups)

    def attend(attention: SelfAttention, x: Tensor) -> Tensor:
        cached, own, _ = attention.project(x)
        if own is None:
            return attention(x, Reading(cached), whole)
        past = cached if len(read) == length else tuple(entry[:, read] for entry in cached)
        return attention(x, Reading(past, own), split)

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
