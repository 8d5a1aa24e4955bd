"""The first stage of recovery: each layer learns its dense layer's output, on that layer's inputs.

Clips pass through the dense model block by block, so one dense block is in memory at a time. A
layer's fit does not depend on the others: processes divide the layers, a store keeps the finished
ones, and a layer whose held-out error did not fall keeps its old weights.

Shapes: N clips, F frames, L tokens of a clip, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast
from torch import Tensor

from vmla_convert.config import Geometry, RecoverConfig
from vmla_convert.fitting.calibrate import ReadBlock, model_blocks
from vmla_convert.layers.attention import DenseSelfAttention, in_float32
from vmla_convert.layers.block import Attend, Block, gated, masked_attention
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.media.clip_checks import clips_at_once
from vmla_convert.media.clips import Batch, ClipSource, open_clips, seeded
from vmla_convert.progress import Progress
from vmla_convert.recovery.nested import NestedSizes
from vmla_convert.recovery.trained import new_parameters, new_tensors
from vmla_convert.storage.tensor_store import FolderStore, MemoryStore, TensorStore
from vmla_convert.training.loop import learning_rate_factor
from vmla_convert.training.losses import make_example, teacher_forcing_inputs
from vmla_convert.training.processes import DTYPES, Share, narrowed, own_share
from vmla_convert.training.weights import place

LAYERWISE = "layer by layer"
CLIPS, HELD_CLIPS, LEAST_CLIPS = 36, 12, 2
# Most tokens of all clips together, to bound memory: a layer's input, its output and the block's
# output have one row per token.
TOKENS = 2**18
# Clips per held-out figure; the figures are averaged.
HELD_TOGETHER = 8
WARMUP_STEPS = 5
# At 1e-3, ten steps move a codec away from its layer's output.
CODEC_RATE, MLA_RATE = 5e-5, 1e-3


class Lesson(NamedTuple):
    """Inputs and targets of one layer; clean tokens, then noisy ones.

    Attributes:
        inputs: Inputs of the layer (N, 2L, D).
        outputs: Outputs of the dense layer (N, 2L, D).
        gate: The block's gate of these outputs (N, 2F, D). Errors behind a closed gate count 0.
        attend: Self-attention of a block over a clip.
        trained: Number of clips to train on; the rest is held out.
        at_once: Clips that pass a layer together.
        mixed_precision: Dtype of matrix products, as in `TrainingConfig`.
    """

    inputs: Tensor
    outputs: Tensor
    gate: Tensor
    attend: Attend
    trained: int
    at_once: int
    mixed_precision: str = "no"

    def errors(self, block: Block, picks: Tensor) -> Iterator[Tensor]:
        """Relative squared error of a block's gated self-attention on some clips, in summands."""
        parts = picks.split(self.at_once)
        whole = sum(gated(self.outputs[p], self.gate[p]).square().sum() for p in parts)
        for part in parts:
            with narrowed(self.mixed_precision, self.inputs.device):
                given = self.attend(block, self.inputs[part])
            yield gated(given - self.outputs[part], self.gate[part]).square().sum() / whole


def fit_layers(
    student: CausalWanModel,
    shell: CausalWanModel,
    read_block: ReadBlock,
    config: RecoverConfig,
    folder: Path | None,
    progress: Progress,
    read_layer: ReadBlock | None = None,
) -> None:
    """Fit all layers of a converted model, in place; processes share the layers.

    Args:
        student: The converted model. With `read_layer` only its new weights need be there.
        shell: The dense model; its own blocks are not used.
        read_block: Gives the dense blocks.
        config: Steps, learning rate and data.
        folder: Keeps finished layers for a resumed run; None keeps them in memory.
        progress: Where progress is drawn.
        read_layer: Gives the converted blocks; None for those of `student`.
    """
    share, store = own_share(), MemoryStore()
    if folder is not None:
        store = FolderStore(folder / f"layers-{share.rank}", {"world": share.world})
    fit_share(student, shell, read_block, config, store, share, progress, read_layer)
    apply_layers(student.all_blocks(), store, share)


def fit_share(
    student: CausalWanModel,
    shell: CausalWanModel,
    read_block: ReadBlock,
    config: RecoverConfig,
    store: TensorStore,
    share: Share,
    progress: Progress,
    read_layer: ReadBlock | None = None,
) -> None:
    """Fit one process's layers, and put their new parameters into a store.

    Layers that the store holds are not fitted again.
    """
    read_layer = read_layer or model_blocks(student)
    sizes, count = NestedSizes(student, config.nested, config.training.seed), len(student.blocks)
    todo = {i for i in range(share.rank, count, share.world) if not store.has(_name(i))}
    lessons = _walk(shell, read_block, config) if todo else iter(())
    for index, lesson in enumerate(progress.track(lessons, LAYERWISE, count)):
        if index in todo:
            layer = read_layer(index)
            before, after = fit_layer(layer, lesson, config, sizes)
            progress.note(f"error of layer {index} {before:.4g} to {after:.4g}")
            store.put(_name(index), new_tensors(layer))
            del layer


def apply_layers(layers: list[Block], store: TensorStore, share: Share) -> None:
    """Copy stored parameters into the layers, each sent by the process that fitted it."""
    with torch.no_grad():
        for index, layer in enumerate(layers):
            owner = index % share.world
            stored = store.get(_name(index)) if owner == share.rank else {}
            for name, parameter in new_tensors(layer).items():
                tensor = torch.empty(parameter.shape, device=parameter.device)
                if stored:
                    tensor.copy_(stored[name])
                broadcast(tensor, owner)
                parameter.copy_(place(tensor, parameter))


def fit_layer(
    layer: Block, lesson: Lesson, config: RecoverConfig, sizes: NestedSizes
) -> tuple[float, float]:
    """Fit one layer; return its error on held-out clips before and after."""
    parameters = [p.requires_grad_(True) for p in new_parameters(layer)]
    start = [p.detach().clone() for p in parameters]
    before = sizes.mean_error(lambda: _held_error(layer, lesson))
    peak = config.layerwise_lr
    if peak is None:
        peak = MLA_RATE if layer.codec is None else CODEC_RATE
    optimiser = torch.optim.Adam(parameters, lr=peak)
    steps = config.layerwise_steps
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * learning_rate_factor(step, steps, WARMUP_STEPS)
        generator = seeded(config.training.seed, step, "layerwise batch")
        picks = torch.randint(lesson.trained, (config.training.batch_size,), generator=generator)
        sizes.draw(step)
        optimiser.zero_grad()
        for error in lesson.errors(layer, picks):
            error.backward()
        optimiser.step()
    after = sizes.mean_error(lambda: _held_error(layer, lesson))
    if not after < before:
        after = before
        with torch.no_grad():
            for parameter, was in zip(parameters, start, strict=True):
                parameter.copy_(was)
    optimiser.zero_grad()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return before, after


@torch.no_grad()
def _held_error(layer: Block, lesson: Lesson) -> float:
    held = torch.arange(lesson.trained, len(lesson.inputs))
    errors = (sum(lesson.errors(layer, p)) * len(p) for p in held.split(HELD_TOGETHER))
    return sum(map(float, errors)) / len(held)


@torch.no_grad()
def _walk(shell: CausalWanModel, read_block: ReadBlock, config: RecoverConfig) -> Iterator[Lesson]:
    """The lesson of each layer, in order; the next one replaces the tensors of the last."""
    clips = open_clips(config.data, shell.config.cache.sink_frames)
    seed, chunk_frames = config.training.seed, shell.config.chunk_frames
    device = shell.patch_embedding.weight.device
    drawn, trained = _draw(shell, clips)
    at_once = clips_at_once(shell.config.geometry, drawn.latents)
    example = make_example(drawn, chunk_frames, seeded(seed, 0, "layerwise")).to(device)
    positions, mask = teacher_forcing_inputs(shell.config, example)
    attend = masked_attention(shell.rotary(positions, example.latents), mask)
    narrow = partial(narrowed, config.training.mixed_precision, device)
    with narrow():
        x, _, modulation = shell.embed(example.latents, example.timestep)
        text = shell.text_embedding(example.context)
    # Whole clips of a large model take gigabytes, so every tensor of all clips is made once.
    x, mixed = in_float32(x), config.training.mixed_precision
    inputs, outputs = torch.empty_like(x), torch.empty_like(x, dtype=DTYPES.get(mixed))
    parts = [slice(start, start + at_once) for start in range(0, len(x), at_once)]
    for layer in range(shell.config.geometry.num_layers):
        block = read_block(layer)
        assert isinstance(block.self_attn, DenseSelfAttention)
        for part in parts:
            with narrow():
                inputs[part] = block.attention_input(x[part], modulation[part])
                outputs[part] = attend(block, inputs[part])
        gate = block.attention_gate(modulation)
        yield Lesson(inputs, outputs, gate, attend, trained, at_once, mixed)
        for part in parts:
            with narrow():
                x[part] = block.after_attention(
                    x[part], outputs[part], modulation[part], text[part]
                )


def drawn_clips(geometry: Geometry, frames: int, size: tuple[int, int]) -> tuple[int, int]:
    """Clips of F latent frames of (height, width) to train on and to hold out; fewer long ones."""
    tokens = 2 * frames * geometry.tokens_per_frame(size)
    share = min(1.0, TOKENS / (tokens * (CLIPS + HELD_CLIPS)))
    trained, held = (max(LEAST_CLIPS, int(share * count)) for count in (CLIPS, HELD_CLIPS))
    return trained, held


def _draw(shell: CausalWanModel, clips: ClipSource) -> tuple[Batch, int]:
    """Clips, and how many of them to train on."""
    frames, _, height, width = clips.batch(0, 1).latents.shape[1:]
    trained, held = drawn_clips(shell.config.geometry, frames, (height, width))
    both = clips.batch(0, trained), clips.batch(0, held, "held_out")
    return Batch(*(torch.cat(parts) for parts in zip(*both, strict=True))), trained


def _name(layer: int) -> str:
    return f"layer-{layer:03d}"
