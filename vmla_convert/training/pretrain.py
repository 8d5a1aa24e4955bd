"""Pretrain a dense teacher by flow matching and save it in Self-Forcing's format."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vmla_convert.checkpoint.writer import write_pickle
from vmla_convert.config import DataConfig, ModelConfig, TeacherConfig
from vmla_convert.errors import refuse_existing
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.metadata_files import wan_config
from vmla_convert.media.clips import open_clips, open_openings, seeded
from vmla_convert.progress import Progress
from vmla_convert.results import Metric, Row, put_rows
from vmla_convert.training.loop import clip_examples, train
from vmla_convert.training.losses import flow_matching, make_example
from vmla_convert.training.processes import processes

HELD_OUT_CLIPS = 24


def pretrain(config: TeacherConfig, out: Path, progress: Progress | None = None) -> None:
    """Train from scratch into `out/checkpoint/` and append the curve to `out/rows.jsonl`.

    An interrupted run resumes from `out/state.pt`.

    Raises:
        OutputError: The checkpoint exists already.
    """
    target = out / "checkpoint"
    refuse_existing(target)
    torch.manual_seed(config.training.seed)
    model = CausalWanModel(config.model)
    initialise(model)
    chunk_frames = config.model.chunk_frames
    clips = open_clips(config.data, config.model.cache.sink_frames)
    loss = flow_matching(config.model)
    held_out = open_clips(DataConfig(config.data.source, config.data.frames, seed=1))
    example = make_example(
        held_out.batch(0, HELD_OUT_CLIPS, "held_out"), chunk_frames, seeded(1, 0, "eval")
    )

    @torch.no_grad()
    def measure(trained: nn.Module, step: int) -> float:
        value = loss(trained, example.to(next(trained.parameters()).device)).item()
        row = Row(Metric.FLOW_LOSS, value, "squared velocity", "pretraining", step=step)
        if processes().is_main_process:
            put_rows(out / "rows.jsonl", [row])
        return value

    if config.training.gradient_checkpointing:
        model.checkpoint_blocks(config.training.offload_activations)
    openings = open_openings(config.data, chunk_frames)
    train(
        model,
        loss,
        clip_examples(clips, chunk_frames, config.training, openings),
        config.training,
        measure,
        out / "state.pt",
        progress,
        "pretraining",
    )
    save_self_forcing(model.state_dict(), config.model, target)


def save_self_forcing(state: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write `model.pt` (bf16, key `generator_ema`, prefix `model.`) and Wan's `config.json`."""
    weights = {f"model.{name}": tensor.bfloat16() for name, tensor in state.items()}
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    files = {"config.json": wan_config(config)}
    write_pickle(folder, nbytes, weights.items(), "generator_ema", files)


def initialise(model: CausalWanModel) -> None:
    """Initialise as Wan does: Xavier projections and a head that starts at zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    nn.init.zeros_(model.head.head.weight)
