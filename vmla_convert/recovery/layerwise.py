"""The first stage of recovery: each layer learns its dense layer's output, on that one's inputs.

Clips walk through the dense model block by block; nothing else is needed at a time. What a layer
learns does not depend on the others, so processes divide the layers, a shelf keeps those that are
done, and no layer ends worse than it began.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate.utils import broadcast
from torch import Tensor

from vmla_convert.checkpoint.tensor_store import TensorStore
from vmla_convert.config import RecoverConfig, TrainingConfig
from vmla_convert.fitting.calibrate import ReadBlock
from vmla_convert.fitting.calibration_clips import clips_at_once
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.dit import Attend, Block, CausalWanModel, gated, masked_attention
from vmla_convert.media.clips import Batch, ClipSource, seeded
from vmla_convert.progress import Progress
from vmla_convert.recovery.nested import Sizes
from vmla_convert.recovery.on_policy import Share
from vmla_convert.recovery.trained import new_parameters
from vmla_convert.training.loop import learning_rate_factor
from vmla_convert.training.losses import make_example, teacher_forcing_inputs
from vmla_convert.training.sharding import scattered

CLIPS, HELD_CLIPS, LEAST_CLIPS = 36, 12, 2
# Of all clips; a layer's input, output and what the block makes of them have as many rows.
TOKENS = 2**18
# Clips whose errors are one figure; their mean is what counts.
HELD_TOGETHER = 8
WARMUP_STEPS = 5
# At 1e-3 ten steps take a codec further from its layer, not nearer.
CODEC_RATE, MLA_RATE = 5e-5, 1e-3


class Lesson(NamedTuple):
    """What one layer is taught; n clips, clean then noisy, the last of them held out.

    Attributes:
        inputs: (n, 2L, d).
        outputs: Of the dense layer, (n, 2L, d).
        gate: What the block multiplies them by, (n, 2F, d): errors behind a closed gate are none.
        attend: How a layer sees a clip.
        taught: Clips that it learns from; the others say whether it got better.
        at_once: Clips that pass a layer together.
    """

    inputs: Tensor
    outputs: Tensor
    gate: Tensor
    attend: Attend
    taught: int
    at_once: int

    def errors(self, block: Block, picks: Tensor) -> Iterator[Tensor]:
        """Squared error of what self-attention adds to its block, relative to what it should add.

        In parts, of as many clips as pass a layer together, that add up to it.
        """
        parts = picks.split(self.at_once)
        whole = sum(gated(self.outputs[p], self.gate[p]).square().sum() for p in parts)
        for part in parts:
            given = self.attend(block, self.inputs[part])
            yield gated(given - self.outputs[part], self.gate[part]).square().sum() / whole


def recover_layers(
    shell: CausalWanModel,
    read_block: ReadBlock,
    layers: list[Block],
    clips: ClipSource,
    config: RecoverConfig,
    shelf: TensorStore,
    share: Share,
    progress: Progress,
    sizes: Sizes,
) -> None:
    """Fit layers, in place, and put their new parameters on the shelf.

    Args:
        shell: The dense model; only what is not in its blocks is used.
        read_block: Gives its blocks, one at a time.
        layers: The converted ones.
        clips: Training clips.
        config: Steps, learning rate and seed.
        shelf: Gets `layer-l` for each layer; one that is there already is not fitted again.
        share: Which layers are this process's.
        progress: Where to draw.
        sizes: Sizes that a codec trains at.
    """
    todo = {i for i in range(share.rank, len(layers), share.world) if not shelf.has(_name(i))}
    lessons = _walk(shell, read_block, clips, config) if todo else iter(())
    for index, lesson in enumerate(progress.track(lessons, "layer by layer", len(layers))):
        if index in todo:
            before, after = fit_layer(layers[index], lesson, config, sizes)
            progress.note(f"error of layer {index} {before:.4g} to {after:.4g}")
            shelf.put(_name(index), _new_tensors(layers[index]))


def apply_layers(layers: list[Block], shelf: TensorStore, share: Share) -> None:
    """Give layers what was put on the shelf, each from the process that fitted it."""
    with torch.no_grad():
        for index, layer in enumerate(layers):
            owner = index % share.world
            kept = shelf.get(_name(index)) if owner == share.rank else {}
            for name, parameter in _new_tensors(layer).items():
                tensor = torch.empty(parameter.shape, device=parameter.device)
                if kept:
                    tensor.copy_(kept[name])
                # In place; alone, it does nothing.
                broadcast(tensor, owner)
                parameter.copy_(scattered(tensor, parameter))


def fit_layer(
    layer: Block, lesson: Lesson, config: RecoverConfig, sizes: Sizes
) -> tuple[float, float]:
    """Regress one layer's output; returns its error on clips of its own, before and after."""
    parameters = [p.requires_grad_(True) for p in new_parameters(layer)]
    start = [p.detach().clone() for p in parameters]
    before = sizes.mean_error(lambda: _held_error(layer, lesson))
    peak = config.layerwise_lr
    if peak is None:
        peak = MLA_RATE if layer.codec is None else CODEC_RATE
    optimiser = torch.optim.Adam(parameters, lr=peak)
    schedule = TrainingConfig(steps=config.layerwise_steps, warmup_steps=WARMUP_STEPS)
    for step in range(config.layerwise_steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * learning_rate_factor(step, schedule)
        generator = seeded(config.training.seed, step, "layerwise batch")
        picks = torch.randint(lesson.taught, (config.training.batch_size,), generator=generator)
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
    held = torch.arange(lesson.taught, len(lesson.inputs))
    errors = (sum(lesson.errors(layer, p)) * len(p) for p in held.split(HELD_TOGETHER))
    return sum(map(float, errors)) / len(held)


@torch.no_grad()
def _walk(
    shell: CausalWanModel,
    read_block: ReadBlock,
    clips: ClipSource,
    config: RecoverConfig,
) -> Iterator[Lesson]:
    """A lesson for each layer, in order."""
    seed, chunk_frames = config.training.seed, shell.config.chunk_frames
    device = shell.patch_embedding.weight.device
    drawn, taught = _draw(shell, clips)
    at_once = clips_at_once(shell.config.geometry, drawn.latents)
    example = make_example(drawn, chunk_frames, seeded(seed, 0, "layerwise")).to(device)
    positions, mask = teacher_forcing_inputs(shell.config, example)
    attend = masked_attention(shell.rotary(positions, example.latents), mask)
    x, _, modulation = shell.embed(example.latents, example.timestep)
    text = shell.text_embedding(example.context)
    for layer in range(shell.config.geometry.num_layers):
        block = read_block(layer)
        assert isinstance(block.self_attn, DenseSelfAttention)
        inputs = block.attention_input(x, modulation)
        outputs = [attend(block, part) for part in inputs.split(at_once)]
        gate = block.attention_gate(modulation)
        lesson = Lesson(inputs, torch.cat(outputs), gate, attend, taught, at_once)
        yield lesson
        parts = zip(*(t.split(at_once) for t in (x, lesson.outputs, modulation, text)), strict=True)
        x = torch.cat([block.after_attention(*part) for part in parts])


def _draw(shell: CausalWanModel, clips: ClipSource) -> tuple[Batch, int]:
    """Clips, of which the first few are to learn from, and how many; fewer where they are long."""
    frames, _, height, width = clips.batch(0, 1).latents.shape[1:]
    tokens = 2 * frames * shell.config.geometry.tokens_per_frame((height, width))
    share = min(1.0, TOKENS / (tokens * (CLIPS + HELD_CLIPS)))
    taught, held = (max(LEAST_CLIPS, int(share * count)) for count in (CLIPS, HELD_CLIPS))
    both = clips.batch(0, taught), clips.batch(0, held, "held_out")
    return Batch(*(torch.cat(parts) for parts in zip(*both, strict=True))), taught


def _name(layer: int) -> str:
    return f"layer-{layer:03d}"


def _new_tensors(layer: Block) -> dict[str, Tensor]:
    """The new parameters of a layer, by name."""
    new = {id(parameter) for parameter in new_parameters(layer)}
    return {n: p.detach() for n, p in layer.named_parameters() if id(p) in new}
