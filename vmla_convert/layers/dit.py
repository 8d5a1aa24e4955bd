"""The causal video DiT in Wan's layout and parameter names, dense or converted.

Shapes: B batch, F frames, C latent channels, L tokens of the F frames, S prompt tokens, d width.
Latents are (B, F, C, height, width) in every public method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
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
from vmla_convert.layers.attention import AttentionMetadata, Entries
from vmla_convert.layers.block import Block, Head, SelfAttention, masked_attention
from vmla_convert.layers.cache import KVCache, Storage
from vmla_convert.layers.parallel import ALONE, OneProcess
from vmla_convert.layers.runtime import check_runtime, codec_rates, new_layer_cache
from vmla_convert.maths.masks import AttentionMask
from vmla_convert.maths.rates import Rate
from vmla_convert.maths.rope3d import Rotary, rotary_table, token_positions
from vmla_convert.storage.limits import require_memory

Prompt = tuple[Entries, ...]
"""Key and value of the prompt in the cross-attention of every block, both (B, S, d)."""


class CausalWanModel(nn.Module):
    """A Wan DiT that runs masked over a whole clip, or streamed chunk by chunk with a cache.

    Attributes:
        config: Sizes and settings.
        parallel: Processes that compute streams together; set before a cache is made.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        geometry = config.geometry
        dim = geometry.dim
        self.config, self.parallel = config, cast(OneProcess, ALONE)
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

    # Passes

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        frames: Tensor,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """Velocity of all frames in one masked pass, (B, F, C, height, width).

        Args:
            latents: (B, F, C, height, width).
            timestep: (B, F), 0 to 1000.
            context: Prompt (B, text_len, text_dim).
            frames: Time position of each frame, (F,); positions repeat under teacher forcing.
            mask: Attention mask; None when the frames are one chunk that attends to all of itself.
        """
        x, time, modulation = self.embed(latents, timestep)
        attend = masked_attention(self.rotary(frames, latents), mask)
        text = self.text_embedding(context)
        for block in self.blocks:
            x = block(x, modulation, text, attend)
        return self.unpatchify(self.head(x, time), latents)

    def project_prompt(self, context: Tensor) -> Prompt:
        """Keys and values of prompts (B, text_len, text_dim), the same for all chunks."""
        text = self.text_embedding(context)
        return tuple(block.project_prompt(text) for block in self.all_blocks())

    def stream(
        self, latents: Tensor, timestep: Tensor, prompt: Prompt, cache: KVCache, keep: bool = True
    ) -> Tensor:
        """Velocity of the cache's open chunk, which attends to the window.

        Args:
            latents: (B, F, C, height, width); the frames are those of `cache.open_chunk`.
            timestep: (B, F), 0 to 1000.
            prompt: Keys and values from `project_prompt`.
            cache: A cache from `new_cache`.
            keep: Whether later chunks attend to this pass. False for all passes but the chunk's
                last saves work.
        """
        x, time, modulation = self.embed(latents, timestep)
        x, parallel = self.parallel.own_tokens(x), self.parallel
        metadata = cache.metadata = cache.metadata or self._streaming_metadata(cache, latents)
        for layer, (block, text) in enumerate(zip(self.all_blocks(), prompt, strict=True)):

            def attend(block: Block, x: Tensor, layer: int = layer) -> Tensor:
                entries = block.self_attn.exchange(block.self_attn.project(x), parallel)
                return block.self_attn(x, cache.update(layer, entries, keep), metadata)

            x = block(x, modulation, text, attend)
        return self.unpatchify(parallel.gather_tokens(self.head(x, time)), latents)

    # Parts of a pass

    def embed(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L, d), time embedding (B, F, d), and its projection (B, F, 6, d)."""
        x = self.patch_embedding(latents.transpose(1, 2)).flatten(2).transpose(1, 2)
        wave = sinusoids(timestep, self.config.geometry.freq_dim)
        time = self.time_embedding(wave.to(self.patch_embedding.weight.dtype))
        return x, time, self.time_projection(time).unflatten(-1, (6, -1))

    def rotary(self, frames: Tensor, latents: Tensor) -> Rotary:
        """Rotation of all tokens of frames at the given time positions."""
        _, rows, columns = self.config.geometry.patch_size
        height, width = latents.shape[-2] // rows, latents.shape[-1] // columns
        positions = token_positions(frames.cpu(), height, width)
        return rotary_table(positions, self.config.geometry.head_dim, latents.device)

    def unpatchify(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Patches (B, L, pt·ph·pw·C) as latents of the same shape as `latents`."""
        pt, ph, pw = self.config.geometry.patch_size
        batch, frames, _, height, width = latents.shape
        grid = patches.view(batch, frames // pt, height // ph, width // pw, pt, ph, pw, -1)
        # (B, F, h, w, pt, ph, pw, C) -> (B, F, pt, C, h, ph, w, pw)
        grid = grid.permute(0, 1, 4, 7, 2, 5, 3, 6)
        return grid.reshape(batch, frames, -1, height, width)

    def _streaming_metadata(self, cache: KVCache, latents: Tensor) -> AttentionMetadata:
        """Positions of the open chunk and of the tokens that it attends to."""

        def table(frames: list[int]) -> Rotary:
            return self.rotary(torch.tensor(frames, dtype=torch.long), latents)

        positions, window = cache.frame_positions(), cache.window
        return AttentionMetadata(
            query_positions=table(window.frame_positions(window.chunk_slots)),
            key_positions=table(positions.entries),
            past_positions=None if positions.past is None else table(positions.past),
            runtime=cache.runtime,
            parallel=self.parallel,
        )

    # The cache

    def new_cache(
        self, batch: int, runtime: RuntimeConfig | None = None, frames: int | None = None
    ) -> KVCache:
        """An empty cache for a batch of clips, under the model's own policy.

        Args:
            batch: Number of clips.
            runtime: Size, precision and place of the cache.
            frames: Frames that will be written in all, where that is known. A video that is shorter
                than the window takes no more slots than it has frames.

        Raises:
            ConfigError: The model cannot run with these settings, or memory is lacking.
        """
        runtime = runtime or RuntimeConfig()
        check_runtime(self.config, runtime)
        weight, policy = self.patch_embedding.weight, _shortened(self.config, frames)
        slots, window = policy.window_frames, self.config.cache.window_frames
        require_memory(
            self.cache_bytes(batch, runtime) * slots // window,
            torch.device("cpu") if runtime.offload else weight.device,
            f"a cache of {slots} frames for {batch} clips",
            "use a smaller window (--set model.cache.window_frames=21) or fewer prompts",
        )
        storage = Storage(
            batch,
            self.config.tokens_per_frame,
            weight.dtype,
            weight.device,
            runtime.offload,
            self.parallel,
        )
        layers = [
            new_layer_cache(block, rate, policy, storage, runtime)
            for block, rate in zip(self.all_blocks(), self._rates(runtime), strict=True)
        ]
        return KVCache(policy, layers, runtime)

    def cache_bytes(self, batch: int, runtime: RuntimeConfig | None = None) -> int:
        """Bytes that `new_cache` allocates, by formula."""
        config, itemsize = self.config, self.patch_embedding.weight.dtype.itemsize
        frames, runtime = config.cache.window_frames, runtime or RuntimeConfig()
        if config.codec is None:
            nbytes = config.cache_bytes(frames, batch, runtime)
            quantised = runtime.cache_dtype in DENSE_BITS
            return nbytes if quantised else nbytes * itemsize // DENSE_ITEMSIZE
        recent = config.cache.dense_recent_frames * config.geometry.dense_cache_scalars * itemsize
        token_bytes = [rate.token_bytes(itemsize) for rate in self._rates(runtime) if rate]
        held = sum(frames * each + recent for each in token_bytes)
        return batch * config.tokens_per_frame * held

    def rates(self, size: Sizes, quantised: bool = True) -> list[Rate]:
        """The rate of each layer's codec at a size, quantised or in the model's dtype.

        Raises:
            ConfigError: The codec does not have the size.
        """
        codecs = [block.codec for block in self.all_blocks() if block.codec is not None]
        return codec_rates(self.config, codecs, size, quantised)

    def resize(self, size: Sizes, quantised: bool = True) -> None:
        """Set the size of the codec, for masked passes and as the default of caches."""
        for block, rate in zip(self.all_blocks(), self.rates(size, quantised), strict=True):
            assert block.codec is not None
            block.codec.rate = rate

    def _rates(self, runtime: RuntimeConfig) -> Sequence[Rate | None]:
        """The rate of each layer's codec; None where there is no codec."""
        codec = self.config.codec
        if codec is None:
            return [None] * self.config.geometry.num_layers
        if runtime.size is None and runtime.cache_dtype == "auto":
            return [block.codec.rate for block in self.all_blocks() if block.codec is not None]
        return self.rates(runtime.size or codec.size, runtime.cache_dtype == "auto")

    # Blocks

    def all_blocks(self) -> list[Block]:
        """The blocks, in order."""
        return [cast(Block, block) for block in self.blocks]  # FSDP may wrap a block

    def self_attentions(self) -> list[SelfAttention]:
        """The self-attention of every block."""
        return [block.self_attn for block in self.all_blocks()]

    def compile_blocks(self) -> None:
        """Compile every block but for the self-attention, whose sizes differ from pass to pass.

        Norms and modulation fuse, and one compilation serves all blocks.
        """
        for block in self.all_blocks():
            for name in ("attention_input", "after_attention"):
                setattr(block, name, torch.compile(getattr(block, name)))

    def checkpoint_blocks(self, offload: bool = False) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again.

        With `offload` the inputs wait in host memory: for 30 blocks of Wan 1.3B and a 480p clip of
        21 frames they take 12 GB.
        """
        for block in self.all_blocks():
            block.forward = partial(_checkpointed, block.forward, offload)

    def keep_activations(self) -> None:
        """Undo `checkpoint_blocks`."""
        for block in self.all_blocks():
            del block.forward


def _checkpointed(run: Callable[..., Any], offload: bool, *inputs: Any, **more: Any) -> Any:
    """Run a block of which only the inputs are kept, in host memory with `offload`."""
    if not offload:
        return checkpoint(run, *inputs, **more, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu(pin_memory=inputs[0].is_cuda):
        return checkpoint(run, *inputs, **more, use_reentrant=False)


def _shortened(config: ModelConfig, frames: int | None) -> CachePolicy:
    """The policy of a cache that will see so many frames, which never fill a larger window."""
    policy = config.cache
    least = policy.sink_frames + policy.dense_recent_frames + config.chunk_frames
    slots = policy.window_frames if frames is None else max(least, frames)
    return replace(policy, window_frames=min(policy.window_frames, slots))


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (..., width) of timesteps, cosines first (Wan 2.1)."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[..., None] * 10_000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
