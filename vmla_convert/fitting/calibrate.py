"""Pass clips through the dense model and back, and measure every self-attention layer.

The forward pass keeps each block's input. The backward pass starts from the inner product of the
predicted velocity and a random vector. Only one block is in memory at a time, so a model that does
not fit in memory can be calibrated. A store in a folder keeps the activations out of memory, and an
interrupted calibration continues from its last block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.config import ConvertConfig, Geometry, ModelConfig, Product
from vmla_convert.fitting.calibration_clips import (
    batch_sizes,
    check_clips,
    clip_tokens,
    open_calibration,
)
from vmla_convert.fitting.layer_statistics import (
    SAMPLES_PER_CLIP,
    LayerStatistics,
    measure_layer,
    merge_statistics,
)
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.block import Attend, Block, masked_attention
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import build_shell, compute_device, read_block
from vmla_convert.maths.rope_keys import expected_phases
from vmla_convert.media.clips import ClipSource, seeded
from vmla_convert.progress import Progress, Silent
from vmla_convert.storage.tensor_store import MemoryStore, TensorStore
from vmla_convert.training.losses import Example, make_example, teacher_forcing_inputs

CALIBRATING, WEIGHING = "calibrating", "weighing errors"
"""Labels of the two passes: statistics of activations, and what reads them."""

ReadBlock = Callable[[int], Block]
"""Gives a block by index. The caller drops the block before asking for the next one."""

Statistics = Callable[[int], LayerStatistics]
"""Gives the statistics of a layer by index."""


def calibrate(
    shell: CausalWanModel,
    get_block: ReadBlock,
    clips: ClipSource,
    count: int,
    seed: int = 0,
    progress: Progress | None = None,
    store: TensorStore | None = None,
    product: Product = "codec",
) -> Statistics:
    """Measure every layer of a dense model.

    Args:
        shell: The model; blocks of the model are not used.
        get_block: Gives the model's blocks, which may live elsewhere.
        clips: Source of the clips.
        count: Number of clips. A few dozen are enough, as each has thousands of tokens.
        seed: Seed of the noise, the random directions and the sampled queries.
        progress: Where progress is drawn.
        store: Keeps activations and statistics, in memory by default. An unfinished calibration in
            the store is continued.
        product: What the layers become.

    Raises:
        ConfigError: The clips do not fit the model.
    """
    progress, store = progress or Silent(), store or MemoryStore()
    layers = range(shell.config.geometry.num_layers)
    if not store.has(_statistics(0)):
        walk = _Walk(shell, clips, count, seed, store, product)
        for layer in progress.track(layers, CALIBRATING):
            walk.forward(layer, get_block)
        walk.start_backward(len(layers))
        for layer in progress.track(reversed(layers), WEIGHING, len(layers)):
            walk.backward(layer, get_block)
    return lambda layer: LayerStatistics.from_tensors(store.get(_statistics(layer)))


def calibrate_checkpoint(
    checkpoint: OpenCheckpoint, config: ConvertConfig, store: TensorStore | None, progress: Progress
) -> Statistics:
    """Measure every layer of a dense checkpoint, which is read block by block."""
    device = compute_device()
    return calibrate(
        build_shell(checkpoint, device),
        lambda layer: read_block(checkpoint, layer, device),
        open_calibration(checkpoint.config, config),
        config.calibration_clips,
        config.seed,
        progress,
        store,
        config.product,
    )


def model_blocks(model: CausalWanModel) -> ReadBlock:
    """Give the blocks of a model in memory."""

    def get(layer: int) -> Block:
        block = model.blocks[layer]
        assert isinstance(block, Block)
        return block

    return get


def deployed_phases(config: ModelConfig) -> Tensor:
    """Expected phase of each RoPE pair (D/2,) in the window the model runs with."""
    _, rows, columns = config.geometry.patch_size
    grid = (config.latent_size[0] // rows, config.latent_size[1] // columns)
    return expected_phases(config.cache, config.chunk_frames, grid, config.geometry.head_dim)


def store_bytes(geometry: Geometry, latents: Tensor, clips: int, product: Product = "codec") -> int:
    """Most bytes that calibration keeps in its store at one time.

    Args:
        geometry: Geometry of the dense model.
        latents: Clips like the calibration clips, (B, F, C, height, width).
        clips: Number of calibration clips.
        product: What the layers become.
    """
    dim, layers, tokens = geometry.dim, geometry.num_layers, clip_tokens(geometry, latents)
    activations = 4 * clips * tokens * dim
    # A codec has moments of [k; v] of the past. MLA has moments of inputs in three groups: the
    # past, and the own chunk clean and noisy.
    groups, width = (1, 2 * dim) if product == "codec" else (3, dim)
    sums = dim * (dim + 2 * geometry.head_dim + 2)
    statistics = 8 * groups * (width * (width + 1) + sums)
    if product == "codec":
        statistics += 4 * clips * min(SAMPLES_PER_CLIP, tokens // 2) * width
    # When the backward pass starts, the store holds every block's input, the last output, and the
    # gradients above and below a block. Each further layer drops one input and adds statistics.
    return max((layers + 3) * activations + statistics, 4 * activations + layers * statistics)


class _Batch(NamedTuple):
    """Inputs of the blocks that are the same for every block, for one batch of clips."""

    example: Example
    modulation: Tensor
    time: Tensor
    text: Tensor
    seed: int


class _Walk:
    """A pass of all clips through the blocks, forward and then backward.

    The store holds `input-l`, the input of block l; `gradient-l`, the gradient with respect to that
    input; and `statistics-l`. Each of the first two has one tensor for every batch. A block that
    was passed already is skipped.
    """

    def __init__(
        self,
        shell: CausalWanModel,
        clips: ClipSource,
        count: int,
        seed: int,
        store: TensorStore,
        product: Product,
    ) -> None:
        self.shell, self.store = shell, store
        self.product: Product = product
        self.batches: list[_Batch] = []
        device = shell.patch_embedding.weight.device
        inputs: list[Tensor] = []
        for index, size in enumerate(batch_sizes(shell.config, clips, count)):
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
        if not store.has("input-0"):
            self._put("input-0", inputs)

    @torch.no_grad()
    def forward(self, layer: int, get_block: ReadBlock) -> None:
        """Pass all clips through a block."""
        # Once a block has statistics, the output of the block is gone.
        if self.store.has(f"input-{layer + 1}") or self.store.has(_statistics(layer)):
            return
        block = get_block(layer)
        outputs = [
            block(x, batch.modulation, batch.text, self.attend)
            for x, batch in zip(self._get(f"input-{layer}"), self.batches, strict=True)
        ]
        self._put(f"input-{layer + 1}", outputs)

    def start_backward(self, layers: int) -> None:
        """Start the backward pass with the gradient of (velocity · random vector)."""
        if self.store.has(_gradient(layers)) or self.store.has(_statistics(layers - 1)):
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
                # Zero the clean half and the first noisy chunk: later chunks alone attend to a
                # past.
                direction[:, : velocity.shape[1] // 2 + self.shell.config.chunk_frames] = 0
                gradients += torch.autograd.grad((velocity * direction).sum(), leaf)
        self._put(_gradient(layers), gradients)

    def backward(self, layer: int, get_block: ReadBlock) -> None:
        """Pass the gradient back through a block and measure the block's self-attention."""
        if self.store.has(_statistics(layer)):
            return
        block = get_block(layer)
        assert isinstance(block.self_attn, DenseSelfAttention)
        measured: LayerStatistics | None = None
        gradients: list[Tensor] = []
        inputs, above = self._get(f"input-{layer}"), self._get(_gradient(layer + 1))
        for x, upper, batch in zip(inputs, above, self.batches, strict=True):
            leaf, seen = x.detach().requires_grad_(True), list[tuple[Tensor, Tensor]]()
            with torch.enable_grad():
                y = block(leaf, batch.modulation, batch.text, _recorded(self.attend, seen))
                attention_input, attention_output = seen[0]
                at_output, gradient = torch.autograd.grad(y, [attention_output, leaf], upper)
            gradients.append(gradient)
            del y, seen, attention_output
            part = measure_layer(
                block.self_attn,
                attention_input.detach(),
                at_output,
                self.rotary,
                self.mask,
                seeded(batch.seed, 0, "queries"),
                self.product,
            )
            measured = merge_statistics([measured, part]) if measured else part
        assert measured is not None
        self._put(_gradient(layer), gradients)
        self.store.put(_statistics(layer), measured.to_tensors())
        self.store.drop(_gradient(layer + 1))
        self.store.drop(f"input-{layer + 1}")

    def _put(self, name: str, batches: list[Tensor]) -> None:
        self.store.put(name, {f"{i:04d}": x for i, x in enumerate(batches)})

    def _get(self, name: str) -> list[Tensor]:
        device = self.shell.patch_embedding.weight.device
        return [x.to(device) for _, x in sorted(self.store.get(name).items())]


def _statistics(layer: int) -> str:
    return f"statistics-{layer}"


def _gradient(layer: int) -> str:
    return f"gradient-{layer}"


def _recorded(attend: Attend, seen: list[tuple[Tensor, Tensor]]) -> Attend:
    """Append the input and output of attention to `seen`."""

    def recording(block: Block, x: Tensor) -> Tensor:
        y = attend(block, x)
        seen.append((x, y))
        return y

    return recording
