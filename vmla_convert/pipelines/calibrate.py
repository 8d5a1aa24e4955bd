"""Walk clips through the dense model and back: what each layer reads, and what its errors cost.

One block is needed at a time, forwards to keep each block's input, backwards to carry the gradient
of a random direction of the predicted velocity; so a model that does not fit in memory can be
calibrated block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import ModelConfig
from vmla_convert.errors import ConfigError
from vmla_convert.layers.attention import DenseSelfAttention, split_heads
from vmla_convert.layers.dit import Attend, Block, CausalWanModel, SelfAttention, masked_attention
from vmla_convert.maths.masks import Visibility
from vmla_convert.maths.moments import Moments, measure_moments, merge_moments
from vmla_convert.maths.positions import expected_phases
from vmla_convert.maths.reads import Reads, ReadSums, measure_reads, merge_reads
from vmla_convert.maths.rope3d import Rotary
from vmla_convert.pipelines.data import Batch, ClipSource, seeded
from vmla_convert.pipelines.losses import Example, make_example, teacher_forcing_inputs
from vmla_convert.progress import Progress, Silent

CLIPS_AT_ONCE = 8
QUERIES_PER_CLIP = 96

ReadBlock = Callable[[int], Block]
"""A block by its index; the caller drops it before asking for the next."""


class LayerReads(NamedTuple):
    """What calibration measured of one layer, by group of keys.

    Attributes:
        past: Reads of cached keys, and the moments of the clean inputs that become them.
        own: Reads of the reader's own chunk, clean and noisy apart, each with its inputs' moments;
            they matter to layers that read the current chunk from its latents.
    """

    past: tuple[ReadSums, Moments]
    own: list[tuple[ReadSums, Moments]]


class _Batch(NamedTuple):
    """One batch on its way through the blocks."""

    example: Example
    modulation: Tensor
    time: Tensor
    text: Tensor
    seed: int


def calibrate(
    shell: CausalWanModel,
    read_block: ReadBlock,
    clips: ClipSource,
    count: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LayerReads]:
    """Measure every layer of a dense model.

    Args:
        shell: The model; only what is not in its blocks is used.
        read_block: Gives its blocks, which may live elsewhere.
        clips: Where clips come from.
        count: How many; a few dozen are enough, each brings thousands of tokens.
        seed: Of the noise, the random directions and the sampled queries.
        progress: Where to draw.

    Returns:
        What was measured, layer by layer.
    """
    progress = progress or Silent()
    walk = _Walk(shell, clips, count, seed)
    layers = range(shell.config.geometry.num_layers)
    for layer in progress.track(layers, "calibrating"):
        walk.forward(read_block(layer))
    walk.turn()
    measured = [
        walk.backward(read_block(layer))
        for layer in progress.track(reversed(layers), "weighing errors", len(layers))
    ]
    return measured[::-1]


def deployed_phases(config: ModelConfig) -> Tensor:
    """Expected phase of each RoPE pair (D/2,) in the window the model runs with."""
    _, rows, columns = config.geometry.patch_size
    grid = (config.latent_size[0] // rows, config.latent_size[1] // columns)
    return expected_phases(config.cache, config.chunk_frames, grid, config.geometry.head_dim)


class _Walk:
    """Clips between two blocks: their activations on the way there, gradients on the way back."""

    def __init__(self, shell: CausalWanModel, clips: ClipSource, count: int, seed: int) -> None:
        self.shell = shell
        self.batches: list[_Batch] = []
        self.current: list[Tensor] = []
        self.passed: list[list[Tensor]] = []
        device = shell.patch_embedding.weight.device
        for index in range(-(-count // CLIPS_AT_ONCE)):
            batch = clips.batch(index, min(CLIPS_AT_ONCE, count - index * CLIPS_AT_ONCE))
            _check_clips(shell.config, batch)
            noise = seeded(seed, index, "calibration")
            example = make_example(batch, shell.config.chunk_frames, noise).to(device)
            with torch.no_grad():
                x, time, modulation, text = shell.embed(
                    example.latents, example.timestep, example.context
                )
            self.batches.append(_Batch(example, modulation, time, text, seed + index))
            self.current.append(x)
        positions, self.mask = teacher_forcing_inputs(shell.config, self.batches[0].example)
        self.rotary = shell.rotary(positions, self.batches[0].example.latents)
        self.attend = masked_attention(self.rotary, self.mask)

    @torch.no_grad()
    def forward(self, block: Block) -> None:
        """Pass a block, and keep what went in."""
        self.passed.append(self.current)
        self.current = [
            block(x, batch.modulation, batch.text, self.attend)
            for x, batch in zip(self.current, self.batches, strict=True)
        ]

    def turn(self) -> None:
        """Gradient of one random direction of each clip's velocity."""
        for index, (x, batch) in enumerate(zip(self.current, self.batches, strict=True)):
            leaf = x.detach().requires_grad_(True)
            with torch.enable_grad():
                velocity = self.shell.unpatchify(
                    self.shell.head(leaf, batch.time), batch.example.latents
                )
                direction = torch.randn(
                    velocity.shape, generator=seeded(batch.seed, 0, "direction")
                ).to(velocity)
                # Of the noisy clip, and of it the chunks that read a cache.
                direction[:, : velocity.shape[1] // 2 + self.shell.config.chunk_frames] = 0
                (gradient,) = torch.autograd.grad((velocity * direction).sum(), leaf)
            self.current[index] = gradient

    def backward(self, block: Block) -> LayerReads:
        """Pass a block backwards and measure its self-attention."""
        inputs, measured = self.passed.pop(), list[LayerReads]()
        for index, (x, batch) in enumerate(zip(inputs, self.batches, strict=True)):
            leaf, seen = x.detach().requires_grad_(True), list[tuple[Tensor, Tensor]]()
            with torch.enable_grad():
                y = block(leaf, batch.modulation, batch.text, _recorded(self.attend, seen))
                attention_input, attention_output = seen[0]
                pull, self.current[index] = torch.autograd.grad(
                    y, [attention_output, leaf], self.current[index]
                )
            assert isinstance(block.self_attn, DenseSelfAttention)
            measured.append(
                measure_attention(
                    block.self_attn,
                    attention_input.detach(),
                    pull,
                    self.rotary,
                    self.mask,
                    seeded(batch.seed, 0, "queries"),
                )
            )
        return merge_layer_reads(measured)


def merge_layer_reads(parts: list[LayerReads]) -> LayerReads:
    """What was measured on all clips together."""
    groups = [[part.past, *part.own] for part in parts]
    past, *own = (
        (merge_reads(sums for sums, _ in group), merge_moments(moments for _, moments in group))
        for group in zip(*groups, strict=True)
    )
    return LayerReads(past, own)


@torch.no_grad()
def measure_attention(
    attention: DenseSelfAttention,
    x: Tensor,
    pull: Tensor,
    rotary: Rotary,
    mask: Visibility,
    generator: torch.Generator,
) -> LayerReads:
    """Moments and reads of one layer.

    Args:
        attention: The layer.
        x: Its input (B, 2L, d), clean then noisy.
        pull: Gradient with respect to its output, (B, 2L, d).
        rotary: Positions of the tokens.
        mask: Who sees whom.
        generator: Picks the queries that stand for all.
    """
    length = x.shape[1] // 2
    clean, noisy = x.split(length, dim=1)
    picks = torch.randperm(x.shape[1], generator=generator)[:QUERIES_PER_CLIP].to(x.device)
    seen, own = mask.seen[picks], mask.seen[picks] & mask.own[picks]
    late = torch.arange(x.shape[1], device=x.device) >= length
    groups = [seen & ~own, own & ~late, own & late]
    value_mean = split_heads(attention.v(clean.mean((0, 1))), attention.num_heads)
    turns = rotary.turns()
    heads = attention.num_heads
    sums: list[list[ReadSums]] = []
    # Clip by clip: the attention of many queries and heads to a whole window is large.
    for tokens, gradient in zip(x.split(1), pull.split(1), strict=True):
        raw_key = attention.k(tokens)
        norm = torch.rsqrt(raw_key.float().square().mean(-1) + (attention.norm_k.eps or 0.0))
        reads = Reads(
            query=split_heads(attention.norm_q(attention.q(tokens[:, picks])), heads).float(),
            query_turn=turns[picks],
            key=split_heads(attention.norm_k(raw_key), heads).float(),
            key_turn=turns,
            key_norm=norm,
            value=split_heads(attention.v(tokens), heads).float(),
            value_mean=value_mean.float(),
            pull=split_heads(gradient[:, picks] @ attention.o.weight, heads).float(),
            seen=seen,
        )
        sums.append(measure_reads(reads, groups))
    past, own_clean, own_noisy = (merge_reads(group) for group in zip(*sums, strict=True))
    moments = measure_moments(clean), measure_moments(noisy)
    return LayerReads((past, moments[0]), [(own_clean, moments[0]), (own_noisy, moments[1])])


def _check_clips(config: ModelConfig, batch: Batch) -> None:
    """Clips must fit the model, and be long enough that something reads a past."""
    frames, *size = batch.latents.shape[1:]
    expected = [config.geometry.in_dim, *config.latent_size]
    if size != expected:
        raise ConfigError(
            f"calibration clips have frames of {size}, the model takes {expected}",
            "give latents of this model's own codec: --data FILE.safetensors",
        )
    if frames < 2 * config.chunk_frames:
        raise ConfigError(
            f"calibration clips of {frames} frames have no chunk with a past",
            f"use at least {2 * config.chunk_frames} frames",
        )


def _recorded(attend: Attend, seen: list[tuple[Tensor, Tensor]]) -> Attend:
    """Attention that notes its input and output."""

    def recording(attention: SelfAttention, x: Tensor) -> Tensor:
        y = attend(attention, x)
        seen.append((x, y))
        return y

    return recording


def model_blocks(model: CausalWanModel) -> ReadBlock:
    """The blocks of a model in memory."""

    def read(layer: int) -> Block:
        block = model.blocks[layer]
        assert isinstance(block, Block)
        return block

    return read
