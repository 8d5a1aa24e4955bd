"""A small program of Self-Forcing's type: layers that are handed a dictionary as their cache.

The contract is that of Self-Forcing's code: keys are cached rotated by absolute positions, the
window slides by assigning slices in place, and denoising steps overwrite the chunk's slots. Tests
and `evals.host` run models of this package in this program, which shares no code of their caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.dit import CausalWanModel

STEPS = (0.9, 0.5)  # noise levels of the denoising steps
Entries = dict[str, Any]


class Attention(nn.Module):
    """Self-attention of one layer."""

    def __init__(self, dense: DenseSelfAttention, window: int, sink: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = dense.q, dense.k, dense.v, dense.o
        self.norm_q, self.norm_k = dense.norm_q, dense.norm_k
        self.num_heads, self.window, self.sink_size = dense.num_heads, window, sink

    def forward(
        self, x: Tensor, grid_sizes: Tensor, kv_cache: Entries, current_start: int = 0
    ) -> Tensor:
        frames, rows, columns = grid_sizes[0].tolist()
        places = turns(current_start // (rows * columns), frames, rows, columns, self.head_dim)
        q = turned(self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1)), places)
        key = turned(self.norm_k(self.k(x)).unflatten(-1, (self.num_heads, -1)), places)
        value = self.v(x).unflatten(-1, (self.num_heads, -1))
        end = self.put(
            kv_cache, key, value, current_start + x.shape[1], self.sink_size * rows * columns
        )
        start = max(0, end - self.window * rows * columns)
        k, v = kv_cache["k"][:, start:end], kv_cache["v"][:, start:end]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))

    @property
    def head_dim(self) -> int:
        return self.q.out_features // self.num_heads

    def put(self, cache: Entries, key: Tensor, value: Tensor, end: int, sink: int) -> int:
        """Write a chunk that ends at token `end`, and return the slot at which it ends."""
        held, last = cache["local_end_index"].item(), cache["global_end_index"].item()
        slots, new, evicted = cache["k"].shape[1], key.shape[1], 0
        if end > last and held + new > slots:
            evicted = held + new - slots
            rolled = held - evicted - sink
            for name in ("k", "v"):
                cache[name][:, sink : sink + rolled] = cache[name][
                    :, sink + evicted : sink + evicted + rolled
                ].clone()
        stop = held + end - last - evicted
        cache["k"][:, stop - new : stop] = key
        cache["v"][:, stop - new : stop] = value
        cache["global_end_index"].fill_(end)
        cache["local_end_index"].fill_(stop)
        return stop


def turns(start: int, frames: int, rows: int, columns: int, head_dim: int) -> Tensor:
    """Complex rotations (L, 1, D/2) of the tokens of some frames, in Wan's convention."""
    side = head_dim // 6
    parts: list[Tensor] = []
    for first, count, pairs, view in (
        (start, frames, head_dim // 2 - 2 * side, (frames, 1, 1, -1)),
        (0, rows, side, (1, rows, 1, -1)),
        (0, columns, side, (1, 1, columns, -1)),
    ):
        waves = 10_000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        angles = torch.outer(torch.arange(first, first + count, dtype=torch.float64), waves)
        parts.append(angles.view(*view).expand(frames, rows, columns, -1))
    angles = torch.cat(parts, -1).flatten(0, 2)[:, None]
    return torch.polar(torch.ones_like(angles), angles)


def turned(x: Tensor, places: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * places).flatten(-2).to(x.dtype)


class Generator(CausalWanModel):
    """The network, with the tensor names of Wan."""

    def __init__(self, dense: CausalWanModel) -> None:
        super().__init__(dense.config)
        self.load_state_dict(dense.state_dict())
        policy, self.text_len = dense.config.cache, dense.config.geometry.text_len
        for block in self.all_blocks():
            assert isinstance(block.self_attn, DenseSelfAttention)
            layer = Attention(block.self_attn, policy.window_frames, policy.sink_frames)
            block.self_attn = layer  # pyright: ignore[reportAttributeAccessIssue]
        self.to(dense.patch_embedding.weight).requires_grad_(False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, sigma: float, context: Tensor, caches: list[Entries], start: int
    ) -> Tensor:
        """Velocity of a chunk (B, F, C, height, width) of noise level sigma."""
        batch, frames, _, height, width = x.shape
        tokens, embedded, modulation = self.embed(x, torch.full((batch, frames), 1000 * sigma))
        _, rows, columns = self.config.geometry.patch_size
        grid = torch.tensor([[frames, height // rows, width // columns]] * batch)
        text = self.text_embedding(context)
        for block, cache in zip(self.all_blocks(), caches, strict=True):

            def attend(block: Any, y: Tensor, cache: Entries = cache) -> Tensor:
                return block.self_attn(y, grid, kv_cache=cache, current_start=start)

            tokens = block(tokens, modulation, text, attend)
        return self.unpatchify(self.head(tokens, embedded), x)


class Pipeline:
    """Generates clips chunk by chunk."""

    def __init__(self, dense: CausalWanModel, steps: Sequence[float] = STEPS) -> None:
        self.generator, self.steps = Generator(dense), steps
        self.kv_cache1: list[Entries] | None = None
        self.config = dense.config

    def _initialize_kv_cache(self, batch_size: int, dtype: torch.dtype, device: Any) -> None:
        geometry, policy = self.config.geometry, self.config.cache
        slots = policy.window_frames * self.config.tokens_per_frame
        shape = (batch_size, slots, geometry.num_heads, geometry.head_dim)
        self.kv_cache1 = [
            {
                "k": torch.zeros(shape, dtype=dtype, device=device),
                "v": torch.zeros(shape, dtype=dtype, device=device),
                "global_end_index": torch.tensor([0], device=device),
                "local_end_index": torch.tensor([0], device=device),
            }
            for _ in range(geometry.num_layers)
        ]

    @torch.no_grad()
    def inference(self, noise: Tensor, context: Tensor, switch_to: Tensor | None = None) -> Tensor:
        """Clean latents (B, F, C, height, width); half-way the context may change."""
        if self.kv_cache1 is None:
            self._initialize_kv_cache(len(noise), noise.dtype, noise.device)
        assert self.kv_cache1 is not None
        for entries in self.kv_cache1:
            entries["global_end_index"] = torch.tensor([0])
            entries["local_end_index"] = torch.tensor([0])
        outputs: list[Tensor] = []
        size = self.config.chunk_frames
        for first in range(0, noise.shape[1], size):
            if switch_to is not None and 2 * first >= noise.shape[1]:
                context = switch_to
            x = noise[:, first : first + size]
            start = first * self.config.tokens_per_frame
            for now, then in zip(self.steps, (*self.steps[1:], 0.0), strict=True):
                velocity = self.generator(x, now, context, self.kv_cache1, start)
                x = x - (now - then) * velocity
            self.generator(x, 0.0, context, self.kv_cache1, start)  # this pass stays
            outputs.append(x)
        return torch.cat(outputs, 1)

    def clip(
        self, frames: int, batch: int = 1, seed: int = 0, switch_to: Tensor | None = None
    ) -> Tensor:
        """A clip from seeded noise and a seeded context."""
        geometry, dtype = self.config.geometry, self.generator.patch_embedding.weight.dtype
        random = torch.Generator().manual_seed(seed)
        shape = (batch, frames, geometry.in_dim, *self.config.latent_size)
        noise = torch.randn(shape, generator=random)
        context = torch.randn(batch, geometry.text_len, geometry.text_dim, generator=random)
        return self.inference(noise.to(dtype), context.to(dtype), switch_to)
