"""Pass clips through the dense model and back, and measure every self-attention layer.

The forward pass keeps each block's input. The backward pass starts from the inner product of the
predicted velocity and a random vector. Only one block and one batch of clips are on the device at a
time, so a model that does not fit there can be calibrated. A store in a folder keeps the
activations out of memory, and an interrupted calibration continues from its last block.

Clips pass in groups, each forward and back, because the inputs of all blocks of one 480p clip of 21
frames take 13 GB for Wan 1.3B. Statistics are sums over clips, so groups change no result.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.config import ConvertConfig, Geometry, ModelConfig, Product
from vmla_convert.fitting.calibration_clips import batch_sizes
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
from vmla_convert.media.clip_checks import check_clips, clip_tokens, clips_at_once
from vmla_convert.media.clips import ClipSource, open_clips, seeded
from vmla_convert.progress import Progress, Silent
from vmla_convert.storage.tensor_store import MemoryStore, TensorStore
from vmla_convert.training.losses import Example, make_example, teacher_forcing_inputs
from vmla_convert.training.processes import narrowed

CALIBRATING, WEIGHING = "calibrating", "weighing errors"
"""Labels of the two passes: statistics of activations, and what reads them."""

GROUP_BYTES = 52 * 10**9
"""Most bytes of activations that the store holds: four 480p clips of 21 frames of Wan 1.3B."""

_X = "x"

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
    mixed_precision: str = "no",
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
        mixed_precision: Dtype of matrix products in the passes, as in `ConvertConfig`.

    Raises:
        ConfigError: The clips do not fit the model.
    """
    progress, store = progress or Silent(), store or MemoryStore()
    layers = range(shell.config.geometry.num_layers)
    groups = _groups(shell.config.geometry, clips, count)
    done = _Done(store, len(groups))
    for group in groups:
        if done.has(0, group.number):
            continue
        walk = _Walk(shell, clips, group, seed, done, product, mixed_precision)
        if len(groups) > 1:
            progress.note(f"group {group.number + 1} of {len(groups)} of clips")
        for layer in progress.track(layers, CALIBRATING):
            walk.forward(layer, get_block)
        walk.start_backward(len(layers))
        for layer in progress.track(reversed(layers), WEIGHING, len(layers)):
            walk.backward(layer, get_block)
        walk.forget()
    return lambda layer: LayerStatistics.from_tensors(done.get(layer, len(groups) - 1))


def calibrate_checkpoint(
    checkpoint: OpenCheckpoint, config: ConvertConfig, store: TensorStore | None, progress: Progress
) -> Statistics:
    """Measure every layer of a dense checkpoint, which is read block by block."""
    device = compute_device()
    return calibrate(
        build_shell(checkpoint, device),
        lambda layer: read_block(checkpoint, layer, device),
        open_clips(config.data, checkpoint.config.cache.sink_frames),
        config.calibration_clips,
        config.seed,
        progress,
        store,
        config.product,
        config.mixed_precision,
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
    layers, tokens = geometry.num_layers, clip_tokens(geometry, latents)
    together = min(clips, clips_of_a_group(geometry, latents))
    activations = 4 * together * tokens * geometry.dim
    statistics = statistics_bytes(geometry, product)
    if product == "codec":
        statistics += 4 * clips * min(SAMPLES_PER_CLIP, tokens // 2) * 2 * geometry.dim
    # When the backward pass starts, the store holds every block's input, and the gradients above
    # and below a block. Each further layer drops one input and adds statistics, which are there
    # already from the second group on. The statistics of a layer are replaced by newer ones.
    start = (layers + 2) * activations + statistics
    if clips > together:
        return start + layers * statistics
    return max(start, 3 * activations + layers * statistics)


def statistics_bytes(geometry: Geometry, product: Product) -> int:
    """Bytes of the sums of one layer, all float64."""
    dim = geometry.dim
    # A codec has moments of [k; v] of the past. MLA has moments of inputs in three groups: the
    # past, and the own chunk clean and noisy.
    groups, width = (1, 2 * dim) if product == "codec" else (3, dim)
    sums = dim * (dim + 2 * geometry.head_dim + 2)
    return 8 * groups * (width * (width + 1) + sums)


def clips_of_a_group(geometry: Geometry, latents: Tensor) -> int:
    """Clips whose block inputs the store holds together: whole batches, at least one."""
    together = clips_at_once(geometry, latents)
    clip = 4 * (geometry.num_layers + 2) * clip_tokens(geometry, latents) * geometry.dim
    return together * max(1, GROUP_BYTES // (together * clip))


class _Group(NamedTuple):
    """Clips that pass forward and back before others do.

    Attributes:
        number: Number of the group.
        batches: Number, first clip and size of each batch.
    """

    number: int
    batches: list[tuple[int, int, int]]


def _groups(geometry: Geometry, clips: ClipSource, count: int) -> list[_Group]:
    """All batches, in groups of consecutive ones."""
    sizes = batch_sizes(geometry, clips, count)
    starts = accumulate(sizes, initial=0)
    batches = [(i, start, size) for i, (start, size) in enumerate(zip(starts, sizes, strict=False))]
    most = max(1, clips_of_a_group(geometry, clips.batch(0, 1).latents) // sizes[0])
    parts = [batches[i : i + most] for i in range(0, len(batches), most)]
    return [_Group(number, part) for number, part in enumerate(parts)]


class _Done(NamedTuple):
    """Statistics in a store: those of a layer include all groups up to the last one measured.

    Attributes:
        store: The store.
        groups: Number of groups.
    """

    store: TensorStore
    groups: int

    def has(self, layer: int, group: int) -> bool:
        """Whether the statistics of a layer include a group."""
        return any(self.store.has(self._name(layer, n)) for n in range(group, self.groups))

    def get(self, layer: int, group: int) -> dict[str, Tensor]:
        """Statistics of a layer after a group."""
        return self.store.get(self._name(layer, group))

    def put(self, layer: int, group: int, statistics: LayerStatistics) -> None:
        """Replace the statistics of a layer by those that include a group more."""
        self.store.put(self._name(layer, group), statistics.to_tensors())
        self.store.drop(self._name(layer, group - 1))

    @staticmethod
    def _name(layer: int, group: int) -> str:
        return f"statistics-{layer}-{group}"


class _Batch(NamedTuple):
    """Inputs of the blocks that are the same for every block, for one batch of clips."""

    name: str
    example: Example
    modulation: Tensor
    time: Tensor
    text: Tensor
    seed: int


class _Walk:
    """A pass of a group of clips through the blocks, forward and then backward.

    For every batch the store holds `input-l/BATCH`, the input of block l, and `gradient-l/BATCH`,
    the gradient with respect to that input. A block that was passed already is skipped.
    """

    def __init__(
        self,
        shell: CausalWanModel,
        clips: ClipSource,
        group: _Group,
        seed: int,
        done: _Done,
        product: Product,
        mixed_precision: str,
    ) -> None:
        self.shell, self.store, self.done, self.group = shell, done.store, done, group.number
        self.product: Product = product
        self.device, self.mixed_precision = shell.patch_embedding.weight.device, mixed_precision
        self.batches: list[_Batch] = []
        inputs: list[Tensor] = []
        for index, start, size in group.batches:
            batch = clips.batch(start, size)
            check_clips(shell.config, batch)
            noise = seeded(seed, index, "calibration")
            example = make_example(batch, shell.config.chunk_frames, noise).to(self.device)
            with torch.no_grad():
                x, time, modulation = shell.embed(example.latents, example.timestep)
                text = shell.text_embedding(example.context)
            name = f"{index:04d}"
            self.batches.append(_Batch(name, example, modulation, time, text, seed + index))
            inputs.append(x)
        example = self.batches[0].example
        positions, self.mask = teacher_forcing_inputs(shell.config, example)
        self.rotary = shell.rotary(positions, example.latents)
        self.attend = masked_attention(self.rotary, self.mask)
        if not self._has_started_back():
            for batch, x in zip(self.batches, inputs, strict=True):
                self._put("input-0", batch.name, x)

    @torch.no_grad()
    def forward(self, layer: int, get_block: ReadBlock) -> None:
        """Pass all clips of the group through a block."""
        output = f"input-{layer + 1}"
        todo = [each for each in self.batches if not self._has(output, each.name)]
        if not todo or self._has_started_back():
            return
        block = get_block(layer)
        for batch in todo:
            x = self._get(f"input-{layer}", batch.name)
            with narrowed(self.mixed_precision, self.device):
                y = block(x, batch.modulation, batch.text, self.attend)
            self._put(output, batch.name, y)

    def start_backward(self, layers: int) -> None:
        """Start the backward pass with the gradient of (velocity · random vector)."""
        if self.done.has(layers - 1, self.group):
            return
        for batch in self.batches:
            if self._has(f"gradient-{layers}", batch.name):
                continue
            leaf = self._get(f"input-{layers}", batch.name).requires_grad_(True)
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
                (gradient,) = torch.autograd.grad((velocity * direction).sum(), leaf)
            self._put(f"gradient-{layers}", batch.name, gradient)
        self._drop(f"input-{layers}")

    def backward(self, layer: int, get_block: ReadBlock) -> None:
        """Pass the gradient back through a block and measure the block's self-attention."""
        if self.done.has(layer, self.group):
            return
        block = get_block(layer)
        assert isinstance(block.self_attn, DenseSelfAttention)
        measured: LayerStatistics | None = None
        if self.group:
            before = self.done.get(layer, self.group - 1)
            measured = LayerStatistics.from_tensors(before, self.device)
        for batch in self.batches:
            part = self._measure(layer, block, block.self_attn, batch)
            measured = merge_statistics([measured, part]) if measured else part
        assert measured is not None
        self.done.put(layer, self.group, measured)
        self._drop(f"gradient-{layer + 1}")
        self._drop(f"input-{layer}")

    def forget(self) -> None:
        """Drop what is left of the group."""
        self._drop("gradient-0")

    def _measure(
        self, layer: int, block: Block, attention: DenseSelfAttention, batch: _Batch
    ) -> LayerStatistics:
        """Statistics of one batch; the gradient below the block goes to the store."""
        leaf = self._get(f"input-{layer}", batch.name).requires_grad_(True)
        upper = self._get(f"gradient-{layer + 1}", batch.name)
        seen = list[tuple[Tensor, Tensor]]()
        with torch.enable_grad(), narrowed(self.mixed_precision, self.device):
            y = block(leaf, batch.modulation, batch.text, _recorded(self.attend, seen))
        attention_input, attention_output = seen[0]
        at_output, gradient = torch.autograd.grad(y, [attention_output, leaf], upper)
        self._put(f"gradient-{layer}", batch.name, gradient)
        del y, seen, attention_output, gradient, leaf, upper
        return measure_layer(
            attention,
            attention_input.detach(),
            at_output.to(attention_input.dtype),
            self.rotary,
            self.mask,
            seeded(batch.seed, 0, "queries"),
            self.product,
        )

    def _has_started_back(self) -> bool:
        """Whether the backward pass started, which drops the inputs of blocks one by one."""
        last = self.shell.config.geometry.num_layers
        whole = all(self._has(f"gradient-{last}", batch.name) for batch in self.batches)
        return whole or self.done.has(last - 1, self.group)

    def _has(self, kind: str, batch: str) -> bool:
        return self.store.has(f"{kind}/{batch}")

    def _put(self, kind: str, batch: str, tensor: Tensor) -> None:
        self.store.put(f"{kind}/{batch}", {_X: tensor.detach()})

    def _get(self, kind: str, batch: str) -> Tensor:
        return self.store.get(f"{kind}/{batch}")[_X].to(self.device).detach()

    def _drop(self, kind: str) -> None:
        for batch in self.batches:
            self.store.drop(f"{kind}/{batch.name}")


def _recorded(attend: Attend, seen: list[tuple[Tensor, Tensor]]) -> Attend:
    """Append the input and output of attention to `seen`."""

    def recording(block: Block, x: Tensor) -> Tensor:
        y = attend(block, x)
        seen.append((x, y))
        return y

    return recording
