"""Walk clips through the dense model and back: what each layer reads, and what its errors cost.

One block is needed at a time, forwards to keep each block's input, backwards to carry the gradient
of a random direction of the predicted velocity; so a model that does not fit in memory can be
calibrated block by block. What has been passed lies on a shelf: on disk it takes no memory, which
then holds the activations of one layer, and a walk that was stopped goes on from its block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.checkpoint.tensor_store import MemoryStore, TensorStore
from vmla_convert.config import Geometry, ModelConfig, Product
from vmla_convert.errors import ConfigError
from vmla_convert.layers.attention import DenseSelfAttention, split_heads
from vmla_convert.layers.dit import Attend, Block, CausalWanModel, masked_attention
from vmla_convert.maths.attention_stats import (
    AttentionSample,
    AttentionStats,
    measure_stats,
    merge_stats,
)
from vmla_convert.maths.masks import AttentionMask
from vmla_convert.maths.moments import Moments, measure_moments, merge_moments
from vmla_convert.maths.rope3d import Rotary
from vmla_convert.maths.rope_keys import expected_phases
from vmla_convert.media.clips import Batch, ClipSource, seeded
from vmla_convert.progress import Progress, Silent
from vmla_convert.training.losses import Example, make_example, teacher_forcing_inputs

CLIPS_AT_ONCE = 8
# Of all clips that pass a block together: its feed-forward holds a few tensors of this many rows.
TOKENS_AT_ONCE = 8192
QUERIES_PER_CLIP = 96
SAMPLES_PER_CLIP = 128
_SAMPLES = "samples"

ReadBlock = Callable[[int], Block]
"""A block by its index; the caller drops it before asking for the next."""


class LayerReads(NamedTuple):
    """What calibration measured of one layer, by group of keys.

    Attributes:
        past: Statistics of attention to cached keys, and moments of the clean inputs they become.
        own: What queries read of their own chunk, clean and noisy apart, each with the moments of
            the inputs; empty for a codec, whose chunks attend to their own exact keys.
        samples: Some [k; v] of cached tokens, (n, 2d), for a codec; else None.

    For an MLA layer the moments are of the layer's inputs. For a codec they are of [k; v], normed
    keys and values, and what a raw key's norm would add is left out of the reads.
    """

    past: tuple[AttentionStats, Moments]
    own: list[tuple[AttentionStats, Moments]]
    samples: Tensor | None = None


def calibrate(
    shell: CausalWanModel,
    read_block: ReadBlock,
    clips: ClipSource,
    count: int,
    seed: int = 0,
    progress: Progress | None = None,
    shelf: TensorStore | None = None,
    product: Product = "codec",
) -> Callable[[int], LayerReads]:
    """Measure every layer of a dense model.

    Args:
        shell: The model; only what is not in its blocks is used.
        read_block: Gives its blocks, which may live elsewhere.
        clips: Where clips come from.
        count: How many; a few dozen are enough, each brings thousands of tokens.
        seed: Of the noise, the random directions and the sampled queries.
        progress: Where to draw.
        shelf: Where activations and what was measured are kept; a walk that an equal one left
            unfinished there goes on. In memory by default.
        product: What the layers become.

    Returns:
        What was measured of a layer, by its index.

    Raises:
        ConfigError: The clips do not fit the model.
    """
    progress, shelf = progress or Silent(), shelf or MemoryStore()
    layers = range(shell.config.geometry.num_layers)
    if not shelf.has(_reads(0)):
        walk = _Walk(shell, clips, count, seed, shelf, product)
        for layer in progress.track(layers, "calibrating"):
            walk.forward(layer, read_block)
        walk.turn(len(layers))
        for layer in progress.track(reversed(layers), "weighing errors", len(layers)):
            walk.backward(layer, read_block)
    return lambda layer: _unpacked(shelf.get(_reads(layer)))


def deployed_phases(config: ModelConfig) -> Tensor:
    """Expected phase of each RoPE pair (D/2,) in the window the model runs with."""
    _, rows, columns = config.geometry.patch_size
    grid = (config.latent_size[0] // rows, config.latent_size[1] // columns)
    return expected_phases(config.cache, config.chunk_frames, grid, config.geometry.head_dim)


class _Batch(NamedTuple):
    """One batch on its way through the blocks."""

    example: Example
    modulation: Tensor
    time: Tensor
    text: Tensor
    seed: int


class _Walk:
    """Clips between two blocks: their activations on the way there, gradients on the way back.

    On the shelf, `input-l` is what block l reads, `gradient-l` is with respect to that, `reads-l`
    what was measured; each group holds a tensor for every batch. A block that was passed already
    is not passed again.
    """

    def __init__(
        self,
        shell: CausalWanModel,
        clips: ClipSource,
        count: int,
        seed: int,
        shelf: TensorStore,
        product: Product,
    ) -> None:
        self.shell, self.shelf = shell, shelf
        self.product: Product = product
        self.batches: list[_Batch] = []
        device = shell.patch_embedding.weight.device
        inputs: list[Tensor] = []
        for index, size in enumerate(_batch_sizes(shell.config, clips, count)):
            batch = clips.batch(index, size)
            check_clips(shell.config, batch)
            noise = seeded(seed, index, "calibration")
            example = make_example(batch, shell.config.chunk_frames, noise).to(device)
            with torch.no_grad():
                x, time, modulation = shell.embed(example.latents, example.timestep)
                text = shell.text_embedding(example.context)
            self.batches.append(_Batch(example, modulation, time, text, seed + index))
            inputs.append(x)
        example = self.batches[0].example
        positions, self.mask = teacher_forcing_inputs(shell.config, example)
        self.rotary = shell.rotary(positions, example.latents)
        self.attend = masked_attention(self.rotary, self.mask)
        if not shelf.has("input-0"):
            self._put("input-0", inputs)

    @torch.no_grad()
    def forward(self, layer: int, read_block: ReadBlock) -> None:
        """Pass a block."""
        # Once a block is measured, what came out of it is gone.
        if self.shelf.has(f"input-{layer + 1}") or self.shelf.has(_reads(layer)):
            return
        block = read_block(layer)
        outputs = [
            block(x, batch.modulation, batch.text, self.attend)
            for x, batch in zip(self._get(f"input-{layer}"), self.batches, strict=True)
        ]
        self._put(f"input-{layer + 1}", outputs)

    def turn(self, layers: int) -> None:
        """Gradient of one random direction of each clip's velocity."""
        if self.shelf.has(_gradient(layers)) or self.shelf.has(_reads(layers - 1)):
            return
        gradients: list[Tensor] = []
        for x, batch in zip(self._get(f"input-{layers}"), self.batches, strict=True):
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
                gradients += torch.autograd.grad((velocity * direction).sum(), leaf)
        self._put(_gradient(layers), gradients)

    def backward(self, layer: int, read_block: ReadBlock) -> None:
        """Pass a block backwards and measure its self-attention."""
        if self.shelf.has(_reads(layer)):
            return
        block = read_block(layer)
        assert isinstance(block.self_attn, DenseSelfAttention)
        measured: LayerReads | None = None
        gradients: list[Tensor] = []
        inputs, pulls = self._get(f"input-{layer}"), self._get(_gradient(layer + 1))
        for x, above, batch in zip(inputs, pulls, self.batches, strict=True):
            leaf, seen = x.detach().requires_grad_(True), list[tuple[Tensor, Tensor]]()
            with torch.enable_grad():
                y = block(leaf, batch.modulation, batch.text, _recorded(self.attend, seen))
                attention_input, attention_output = seen[0]
                pull, gradient = torch.autograd.grad(y, [attention_output, leaf], above)
            gradients.append(gradient)
            del y, seen, attention_output
            reads = measure_attention(
                block.self_attn,
                attention_input.detach(),
                pull,
                self.rotary,
                self.mask,
                seeded(batch.seed, 0, "queries"),
                self.product,
            )
            measured = merge_layer_reads([measured, reads]) if measured else reads
        assert measured is not None
        self._put(_gradient(layer), gradients)
        self.shelf.put(_reads(layer), _packed(measured))
        # What lies above is not needed again.
        self.shelf.drop(_gradient(layer + 1))
        self.shelf.drop(f"input-{layer + 1}")

    def _put(self, name: str, batches: list[Tensor]) -> None:
        self.shelf.put(name, {f"{i:04d}": x for i, x in enumerate(batches)})

    def _get(self, name: str) -> list[Tensor]:
        device = self.shell.patch_embedding.weight.device
        return [x.to(device) for _, x in sorted(self.shelf.get(name).items())]


def _reads(layer: int) -> str:
    return f"reads-{layer}"


def _gradient(layer: int) -> str:
    return f"gradient-{layer}"


def clips_at_once(geometry: Geometry, latents: Tensor) -> int:
    """How many clips like these (B, F, C, height, width) pass a model together, clean and noisy.

    By their size and not by what memory is free, so that figures do not depend on the machine.
    """
    return max(1, min(CLIPS_AT_ONCE, TOKENS_AT_ONCE // _clip_tokens(geometry, latents)))


def shelf_bytes(geometry: Geometry, latents: Tensor, clips: int, product: Product = "codec") -> int:
    """Most bytes that calibration has on its shelf at one time.

    Args:
        geometry: Of the dense model.
        latents: Clips like those that are measured, (B, F, C, height, width).
        clips: How many are measured.
        product: What the layers become.
    """
    dim, layers, tokens = geometry.dim, geometry.num_layers, _clip_tokens(geometry, latents)
    activations = 4 * clips * tokens * dim
    # Moments of keys with values, or those of inputs for the past and the own chunk twice.
    groups, width = (1, 2 * dim) if product == "codec" else (3, dim)
    sums = dim * (dim + 2 * geometry.head_dim + 2)
    reads = 8 * groups * (width * (width + 1) + sums)
    if product == "codec":
        reads += 4 * clips * min(SAMPLES_PER_CLIP, tokens // 2) * width
    # What every block reads and the last one gives, beside the gradients above and below a block;
    # from layer to layer one of these goes, and one layer's reads are added.
    return max((layers + 3) * activations + reads, 4 * activations + layers * reads)


def _clip_tokens(geometry: Geometry, latents: Tensor) -> int:
    """Tokens of one clip of latents (B, F, C, height, width), clean and noisy."""
    height, width = latents.shape[-2:]
    return 2 * latents.shape[1] * geometry.tokens_per_frame((height, width))


def _batch_sizes(config: ModelConfig, clips: ClipSource, count: int) -> list[int]:
    """How many clips go together."""
    most = clips_at_once(config.geometry, clips.batch(0, 1).latents)
    return [min(most, count - start) for start in range(0, count, most)]


def _packed(reads: LayerReads) -> dict[str, Tensor]:
    """Real tensors by name; a shelf may know no complex numbers."""
    packed: dict[str, Tensor] = {}
    for group, (sums, moments) in enumerate([reads.past, *reads.own]):
        for name, tensor in (*sums._asdict().items(), *moments._asdict().items()):
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            # Groups may share their moments; a file may not.
            packed[f"{group}.{name}"] = real.clone()
    return packed if reads.samples is None else packed | {_SAMPLES: reads.samples}


def _unpacked(packed: dict[str, Tensor]) -> LayerReads:
    def group(index: int) -> tuple[AttentionStats, Moments]:
        parts = {
            name: packed[f"{index}.{name}"] for name in (*AttentionStats._fields, *Moments._fields)
        }
        parts["phases"] = torch.view_as_complex(parts["phases"])
        return (
            AttentionStats(*(parts[name] for name in AttentionStats._fields)),
            Moments(*(parts[name] for name in Moments._fields)),
        )

    groups = sum(name.endswith(".queries") for name in packed)
    past, *own = (group(index) for index in range(groups))
    return LayerReads(past, own, packed.get(_SAMPLES))


def merge_layer_reads(parts: list[LayerReads]) -> LayerReads:
    """What was measured on all clips together."""
    groups = [[part.past, *part.own] for part in parts]
    past, *own = (
        (merge_stats(sums for sums, _ in group), merge_moments(moments for _, moments in group))
        for group in zip(*groups, strict=True)
    )
    samples = [part.samples for part in parts if part.samples is not None]
    return LayerReads(past, own, torch.cat(samples) if samples else None)


@torch.no_grad()
def measure_attention(
    attention: DenseSelfAttention,
    x: Tensor,
    pull: Tensor,
    rotary: Rotary,
    mask: AttentionMask,
    generator: torch.Generator,
    product: Product = "codec",
) -> LayerReads:
    """Moments and reads of one layer.

    Args:
        attention: The layer.
        x: Its input (B, 2L, d), clean then noisy.
        pull: Gradient with respect to its output, (B, 2L, d).
        rotary: Positions of the tokens.
        mask: Who sees whom.
        generator: Picks the queries that stand for all, and the samples.
        product: What the layer becomes.
    """
    length = x.shape[1] // 2
    clean, noisy = x.split(length, dim=1)
    picks = torch.randperm(x.shape[1], generator=generator)[:QUERIES_PER_CLIP].to(x.device)
    visible, dense = mask.of_queries(picks)
    late = torch.arange(x.shape[1], device=x.device) >= length
    own = [] if product == "codec" else [dense & ~late, dense & late]
    value_mean = split_heads(attention.v(clean.mean((0, 1))), attention.num_heads)
    turns = rotary.turns()
    heads = attention.num_heads
    sums: list[AttentionStats] = []
    # Clip by clip: the attention of many queries and heads to a whole window is large.
    for tokens, gradient in zip(x.split(1), pull.split(1), strict=True):
        raw_key = attention.k(tokens)
        norm = torch.rsqrt(raw_key.float().square().mean(-1) + (attention.norm_k.eps or 0.0))
        reads = AttentionSample(
            query=split_heads(attention.norm_q(attention.q(tokens[:, picks])), heads).float(),
            query_rotation=turns[picks],
            key=split_heads(attention.norm_k(raw_key), heads).float(),
            key_rotation=turns,
            # A codec stores normed keys, MLA raw ones, whose errors the norm scales.
            key_norm=torch.ones_like(norm) if product == "codec" else norm,
            value=split_heads(attention.v(tokens), heads).float(),
            value_mean=value_mean.float(),
            gradient=split_heads(gradient[:, picks] @ attention.o.weight, heads).float(),
            mask=visible,
        )
        clip = measure_stats(reads, [visible & ~dense, *own])
        sums = [merge_stats(both) for both in zip(sums, clip, strict=True)] if sums else clip
    if product == "codec":
        entries = torch.cat(attention.project(clean), -1)
        some = torch.randperm(length, generator=generator)[:SAMPLES_PER_CLIP].to(x.device)
        samples = entries[:, some].flatten(0, 1).float().cpu()
        return LayerReads((sums[0], measure_moments(entries)), [], samples)
    moments = measure_moments(clean)
    past, *rest = zip(sums, [moments, moments, measure_moments(noisy)], strict=True)
    return LayerReads(past, rest)


def check_clips(config: ModelConfig, batch: Batch) -> None:
    """Clips must fit the model, and be long enough that something reads a past.

    Raises:
        ConfigError: They do not, or are not, or hold numbers that are not finite.
    """
    latents, context = batch
    if latents.ndim != 5 or context.ndim != 3 or context.shape[-1] != config.geometry.text_dim:
        raise ConfigError(
            f"clips have latents of {latents.ndim} sides and contexts of shape "
            f"{tuple(context.shape)}, the model takes 5 and {config.geometry.text_dim} columns",
            "store latents (N, F, C, height, width) and context (N, text_len, text_dim)",
        )
    if not (latents.isfinite().all() and context.isfinite().all()):
        raise ConfigError("clips hold NaN or infinite numbers", "encode the clips again")
    frames, channels, *size = latents.shape[1:]
    _, rows, columns = config.geometry.patch_size
    if channels != config.geometry.in_dim or size[0] % rows or size[1] % columns:
        raise ConfigError(
            f"clips have frames of {[channels, *size]}, the model takes "
            f"{[config.geometry.in_dim, *config.latent_size]}, or others that its patches divide",
            "give latents of this model's own VAE: --data FILE.safetensors",
        )
    if frames < 2 * config.chunk_frames:
        raise ConfigError(
            f"clips of {frames} frames have no chunk with a past",
            f"use at least {2 * config.chunk_frames} frames",
        )


def _recorded(attend: Attend, seen: list[tuple[Tensor, Tensor]]) -> Attend:
    """Attention that notes its input and output."""

    def recording(block: Block, x: Tensor) -> Tensor:
        y = attend(block, x)
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
