"""The causal video DiT in Wan's layout and parameter names, dense or converted.

Latents are (B, F, C, height, width) at every public door. A block is Wan 2.1's: modulated
self-attention, cross-attention to the prompt, modulated feed-forward; the six modulation vectors
come per frame, because a causal model holds frames of different noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmla_convert.config import (
    DENSE_BITS,
    DENSE_ITEMSIZE,
    CachePolicy,
    ModelConfig,
    RuntimeConfig,
    Sizes,
)
from vmla_convert.errors import ConfigError
from vmla_convert.layers.attention import (
    AttendedTokens,
    AttentionMetadata,
    CrossAttention,
    DenseSelfAttention,
    Entries,
)
from vmla_convert.layers.cache import (
    CodecStore,
    CompressedCache,
    DenseCache,
    KVCache,
    LatentCache,
    LayerCache,
    Storage,
)
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.layers.quantised import QuantisedStore
from vmla_convert.maths import rates
from vmla_convert.maths.masks import AttentionMask, query_groups
from vmla_convert.maths.rates import Rate
from vmla_convert.maths.rope3d import Rotary, grid_table

SelfAttention = DenseSelfAttention | LatentSelfAttention

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
        """What the cross-attention reads of an embedded prompt (B, S, d)."""
        return self.cross_attn.project_prompt(text)

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
            prompt: Embedded prompt (B, S, d), or what `project_prompt` made of it.
            attend: Calls this block's self-attention on its input.
        """
        y = attend(self, self.attention_input(x, time))
        return self.after_attention(x, y, time, prompt)


Attend = Callable[[Block, Tensor], Tensor]
"""How a block's self-attention sees the clip: masked in one pass, or through a cache."""


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
        mask: AttentionMask | None = None,
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
        mask: AttentionMask | None = None,
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

    def project_prompt(self, context: Tensor) -> Prompt:
        """What the blocks read of prompts (B, text_len, text_dim), once for all chunks."""
        text = self.text_embedding(context)
        return tuple(block.project_prompt(text) for block in self.all_blocks())

    def stream(
        self, latents: Tensor, timestep: Tensor, prompt: Prompt, cache: KVCache, keep: bool = True
    ) -> Tensor:
        """Velocity of the cache's open chunk, which sees the window.

        Args:
            latents: (B, F, C, height, width); the frames are those of `cache.open_chunk`.
            timestep: (B, F), 0 to 1000.
            prompt: From `project_prompt`.
            cache: From `new_cache`.
            keep: Leave the chunk's entries to later chunks; a pass that is not the chunk's last may
                spare the work.

        Returns:
            As `latents`.
        """
        x, time, modulation = self.embed(latents, timestep)
        metadata = cache.metadata = cache.metadata or self._streaming_metadata(cache, latents)
        for layer, (block, read) in enumerate(zip(self.all_blocks(), prompt, strict=True)):

            def attend(block: Block, x: Tensor, layer: int = layer) -> Tensor:
                entries = block.self_attn.project(x)
                return block.self_attn(x, cache.update(layer, entries, keep), metadata)

            x = block(x, modulation, read, attend)
        return self.unpatchify(self.head(x, time), latents)

    def new_cache(self, batch: int, runtime: RuntimeConfig | None = None) -> KVCache:
        """An empty cache for B clips, under the model's own policy.

        Args:
            batch: B.
            runtime: Size, precision and place of the cache, and how it is attended to.

        Raises:
            ConfigError: As `check_runtime` and `rates`.
        """
        runtime = runtime or RuntimeConfig()
        check_runtime(self.config, runtime)
        weight = self.patch_embedding.weight
        tokens = self.config.tokens_per_frame
        storage = Storage(batch, tokens, weight.dtype, weight.device, runtime.offload)
        blocks, policy = self.all_blocks(), self.config.cache
        layers: list[LayerCache] = []
        for block, rate in zip(blocks, self._rates(runtime), strict=True):
            layers.append(_layer_cache(block, rate, policy, storage, runtime))
        return KVCache(policy, layers, runtime)

    def cache_bytes(self, batch: int, runtime: RuntimeConfig | None = None) -> int:
        """Bytes of what `new_cache` allocates, by formula; arguments as there.

        Numbers that are not quantised count the bytes of the model's dtype.
        """
        config, itemsize = self.config, self.patch_embedding.weight.dtype.itemsize
        frames = config.cache.window_frames
        if config.codec is None:
            nbytes = config.cache_bytes(frames, batch, runtime)
            whole = runtime is None or runtime.cache_dtype not in DENSE_BITS
            return nbytes * itemsize // DENSE_ITEMSIZE if whole else nbytes
        told = [rate for rate in self._rates(runtime or RuntimeConfig()) if rate]
        recent = config.cache.dense_recent_frames * config.geometry.dense_cache_scalars * itemsize
        held = sum(frames * rate.token_bytes(itemsize) + recent for rate in told)
        return batch * config.tokens_per_frame * held

    def rates(self, size: Sizes, quantised: bool = True) -> list[Rate]:
        """What each layer's codec stores at a size.

        Args:
            size: Of the cache.
            quantised: Whether channels get bits; else as many as the size pays for stay whole.

        Raises:
            ConfigError: As `check_size`.
        """
        total = check_size(self.config, size, quantised)
        codecs = [block.codec for block in self.all_blocks() if block.codec is not None]
        if not quantised:
            energies = [codec.energies.cpu() for codec in codecs]
            return rates.truncate(energies, total // DENSE_ITEMSIZE)
        return rates.allocate([codec.purchases() for codec in codecs], total)

    def resize(self, size: Sizes, quantised: bool = True) -> None:
        """Set the size of the codec's cache, and of passes over whole clips; as `rates`."""
        for block, rate in zip(self.all_blocks(), self.rates(size, quantised), strict=True):
            assert block.codec is not None
            block.codec.rate = rate

    def _rates(self, runtime: RuntimeConfig) -> Sequence[Rate | None]:
        """What each layer's codec stores, None where there is no codec."""
        codec = self.config.codec
        if codec is None:
            return [None] * self.config.geometry.num_layers
        if runtime.size is None and runtime.cache_dtype == "auto":
            return [block.codec.rate for block in self.all_blocks() if block.codec is not None]
        return self.rates(runtime.size or codec.size, runtime.cache_dtype == "auto")

    def compile_blocks(self) -> None:
        """Compile what is the same in every block: all but the self-attention, whose sizes differ.

        Norms and modulation fuse, and one compilation serves all blocks.
        """
        for block in self.all_blocks():
            for name in ("attention_input", "after_attention"):
                setattr(block, name, torch.compile(getattr(block, name)))

    def _streaming_metadata(self, cache: KVCache, latents: Tensor) -> AttentionMetadata:
        """Where the open chunk and what it attends to are."""

        def table(frames: list[int]) -> Rotary:
            return self.rotary(torch.tensor(frames, dtype=torch.long), latents)

        positions, window = cache.frame_positions(), cache.window
        return AttentionMetadata(
            query_positions=table(window.frame_positions(window.chunk_slots)),
            key_positions=table(positions.entries),
            past_positions=None if positions.past is None else table(positions.past),
            runtime=cache.runtime,
        )

    def all_blocks(self) -> list[Block]:
        """The blocks, in order."""
        return [cast(Block, block) for block in self.blocks]  # or what wraps one

    def self_attentions(self) -> list[SelfAttention]:
        """The self-attention of every block."""
        return [block.self_attn for block in self.all_blocks()]

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
        for block in self.all_blocks():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def keep_activations(self) -> None:
        """Undo `checkpoint_blocks`."""
        for block in self.all_blocks():
            del block.forward

    def unpatchify(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Patches (B, L, pt·ph·pw·C) to latents of the same shape as `latents`."""
        pt, ph, pw = self.config.geometry.patch_size
        batch, frames, _, height, width = latents.shape
        grid = patches.view(batch, frames // pt, height // ph, width // pw, pt, ph, pw, -1)
        # (B, F, h, w, pt, ph, pw, C) -> (B, F, pt, C, h, ph, w, pw)
        grid = grid.permute(0, 1, 4, 7, 2, 5, 3, 6)
        return grid.reshape(batch, frames, -1, height, width)


def check_size(config: ModelConfig, size: Sizes, quantised: bool = True) -> int:
    """Bytes of a token in all layers of a codec together.

    Args:
        config: The model's, with its codec.
        size: Size of the cache.
        quantised: Whether channels get bits.

    Raises:
        ConfigError: The size is below one channel of each layer, or above what the codec holds.
    """
    assert config.codec is not None
    asked, layers = size.token_bytes(config.geometry), config.geometry.num_layers
    # A size of 0.95 of 640 bytes is 32, whatever floating point makes of it.
    total = int(asked * layers + 1e-6)
    least = 1 if quantised else DENSE_ITEMSIZE
    most = config.codec.rank * DENSE_ITEMSIZE
    if total < least * layers:
        raise ConfigError(
            f"{asked:g} bytes per token are below {least}, the cost of a channel in each layer",
            f"use --bytes-per-token {least} or more",
        )
    if total > most * layers:
        raise ConfigError(
            f"{asked:g} bytes per token are above {most:g}, all that this codec holds",
            f"use --bytes-per-token {most:g} or less, or convert with more --channels",
        )
    return total


def check_runtime(config: ModelConfig, runtime: RuntimeConfig) -> None:
    """Refuse to run a model in a way that it cannot run.

    Raises:
        ConfigError: A dense model is asked for a size or to be absorbed, or a converted one for a
            dtype that only dense caches have.
    """
    if runtime.backend == "absorbed" and config.mla is None:
        raise ConfigError(
            "only MLA layers can be absorbed, and this model has none",
            "use --backend materialised, or convert with --preset videomla",
        )
    if runtime.size is not None and config.codec is None:
        raise ConfigError(
            "this model has no codec whose size could be chosen",
            "make one first: vmla convert CKPT -o OUT",
        )
    if runtime.cache_dtype in DENSE_BITS and not config.is_dense:
        raise ConfigError(
            f"cache_dtype {runtime.cache_dtype} quantises dense caches, and this model's is not",
            "use --bytes-per-token for a codec; MLA latents are not quantised",
        )


def _layer_cache(
    block: Block, rate: Rate | None, policy: CachePolicy, storage: Storage, runtime: RuntimeConfig
) -> LayerCache:
    attention, slots = block.self_attn, policy.window_frames
    if isinstance(attention, LatentSelfAttention):
        return LatentCache(attention.entry_widths, policy, storage)
    width, bits = attention.k.out_features, DENSE_BITS.get(runtime.cache_dtype)
    if block.codec is not None and rate is not None:
        store = CodecStore(block.codec, rate, slots, storage)
    elif bits is not None:
        store = QuantisedStore(attention.num_heads, width, bits, slots, storage)
    else:
        return DenseCache((width, width), policy, storage)
    return CompressedCache(store, width, policy, storage)


def masked_attention(rotary: Rotary, mask: AttentionMask | None) -> Attend:
    """Self-attention in one pass, every token at its own place in one table.

    Layers with a codec attend to decoded pasts, and exactly to the chunk of the query.
    """
    if mask is None:
        whole = AttentionMetadata(rotary, rotary)
        return lambda block, x: block.self_attn(
            x, AttendedTokens(block.self_attn.project(x)), whole
        )
    past = mask.visible & ~mask.dense
    # The noisy half of a teacher-forced pass is nobody's past.
    frames = past.any(0)
    tokens = mask.tokens_of(frames).to(rotary.table.device)
    both = torch.cat([past[:, frames], mask.dense], dim=1)
    groups, split_groups = (query_groups(m, mask.tokens_per_frame) for m in (mask.visible, both))
    whole = AttentionMetadata(rotary, rotary, groups=groups)
    split = AttentionMetadata(rotary, rotary, rotary.at(tokens), split_groups)

    def attend(block: Block, x: Tensor) -> Tensor:
        entries = block.self_attn.project(x)
        if block.codec is None:
            return block.self_attn(x, AttendedTokens(entries), whole)
        decoded = block.codec.past(*(entry[:, tokens] for entry in entries))
        return block.self_attn(x, AttendedTokens(entries, decoded), split)

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
