"""Train the teacher of the photograph world: `python -m evals.worlds.train --out DIR`.

Phases lengthen the clips: copying from the past is learned on short clips, where a step is cheap,
and then stretched to the whole window. A run that was interrupted goes on where it stopped. To
train the shipped weights further, add a phase to `PHASES` (each phase draws clips of its own) and
run that phase alone:

    python -m evals.worlds.train --out DIR --start evals/worlds/teacher --phase 5

It runs for hours on two cores. Every phase ends with a checkpoint in DIR/teacher.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from evals.worlds.photographs import (
    CHANNELS,
    CHUNK_FRAMES,
    FRAME_SIZE,
    PATCH,
    TEXT_DIM,
    TEXT_LEN,
    PhotographClips,
)
from vmla_convert.config import (
    CachePolicy,
    Geometry,
    ModelConfig,
    SamplerConfig,
    TrainingConfig,
)
from vmla_convert.console import out
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.media.clips import seeded
from vmla_convert.results import Metric, Row, put_rows
from vmla_convert.training.loop import clip_examples, train
from vmla_convert.training.losses import flow_matching, make_example
from vmla_convert.training.pretrain import initialise, save_self_forcing

HELD_OUT_CLIPS = 8

CONFIG = ModelConfig(
    geometry=Geometry(
        dim=256,
        ffn_dim=768,
        num_heads=4,
        num_layers=8,
        in_dim=CHANNELS,
        out_dim=CHANNELS,
        freq_dim=128,
        text_dim=TEXT_DIM,
        text_len=TEXT_LEN,
    ),
    latent_size=(FRAME_SIZE // PATCH, FRAME_SIZE // PATCH),
    chunk_frames=CHUNK_FRAMES,
    cache=CachePolicy(window_frames=48, sink_frames=1, frame_positions="relative"),
    sampler=SamplerConfig((1000, 875, 750, 625, 500, 375, 250, 125), shift=2.0, renoise=False),
    family="self_forcing",
    licence="apache-2.0",
    frames_per_second=8,
)


def _phase(steps: int, batch: int, lr: float) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch_size=batch,
        optimizer="muon",
        lr=lr,
        warmup_steps=50,
        weight_decay=0.01,
        ema=0.995,
        context_noise=0.15,
        eval_every=100,
        checkpoint_every=50,
        mixed_precision="bf16",
    )


PHASES = (
    (12, _phase(400, 4, 2e-3)),
    (24, _phase(800, 2, 2e-3)),
    (48, _phase(1000, 1, 2e-3)),
    (48, _phase(800, 1, 2e-3)),
    (48, _phase(1700, 1, 2e-3)),
)
"""Frames of a clip, and the training of each phase."""


def main() -> None:
    """Run the phases that are not done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for states and weights")
    parser.add_argument("--start", help="checkpoint to begin with")
    parser.add_argument("--phase", type=int, default=0, help="first phase to run")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = CausalWanModel(CONFIG)
    initialise(model)
    if asked.start:
        model.load_state_dict(load(asked.start).state_dict())
    for block in model.blocks:  # half as fast again on two cores
        block.compile(dynamic=False)
    for number, (frames, config) in enumerate(PHASES):
        if number < asked.phase:
            continue
        done = asked.out / f"phase-{number}.safetensors"
        if done.exists():
            model.load_state_dict(load_file(done))
            continue
        _train_phase(model, number, frames, config, asked.out)
        save_file(dict(model.state_dict()), done)
        shutil.rmtree(asked.out / "teacher", ignore_errors=True)
        save_self_forcing(model.state_dict(), CONFIG, asked.out / "teacher")


def _train_phase(
    model: CausalWanModel, number: int, frames: int, config: TrainingConfig, folder: Path
) -> None:
    clips = PhotographClips(frames, seed=number)
    openings = PhotographClips(CONFIG.chunk_frames, seed=100 + number)
    loss = flow_matching(CONFIG)
    held_out = PhotographClips(frames, seed=1).batch(0, HELD_OUT_CLIPS, "held_out")
    example = make_example(held_out, CONFIG.chunk_frames, seeded(1, 0, "eval"))
    started = perf_counter()

    @torch.no_grad()
    def measure(trained: nn.Module, step: int) -> float:
        value = loss(trained, example).item()
        note, run = f"{perf_counter() - started:.0f} s", f"phase {number}"
        unit = "squared velocity"
        row = Row(Metric.FLOW_LOSS, value, unit, run, step=step, frames=frames, note=note)
        put_rows(folder / "rows.jsonl", [row])
        return value

    with out.progress() as progress:
        train(
            model,
            loss,
            clip_examples(clips, CONFIG.chunk_frames, config, openings),
            config,
            measure,
            folder / f"state-{number}.pt",
            progress,
            f"phase {number} ({frames} frames)",
        )


if __name__ == "__main__":
    main()
