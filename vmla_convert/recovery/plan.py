"""The plan of a recovery: checked and known before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vmla_convert.config import EvaluateConfig, MediaConfig, RecoverConfig
from vmla_convert.generating.clip_cost import PlannedWork, clip_shape, plan_work
from vmla_convert.generating.make_clips import check_needs
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import Source
from vmla_convert.recovery.checks import open_pair, recovery_needs, recovery_passes
from vmla_convert.recovery.memory import recovery_memory
from vmla_convert.recovery.stages import stage_steps
from vmla_convert.recovery.trained import add_adapters, unfreeze
from vmla_convert.training.processes import processes


@dataclass(frozen=True)
class PlannedRecovery:
    """The work of a recovery.

    Attributes:
        teacher: The dense model.
        steps: Steps of each stage.
        trains: Numbers that train.
        of: Numbers of the whole model.
        processes: Processes that share the work.
        out: Folder that would be written.
        nbytes: Bytes of its weights.
        work: Clips, and the time that sampling and training take on one process.
    """

    teacher: str
    steps: dict[str, int]
    trains: int
    of: int
    processes: int
    out: str
    nbytes: int
    work: PlannedWork


def plan_recovery(
    converted: str | Path,
    teacher: Source | None,
    out: Path,
    config: RecoverConfig,
    evaluation: EvaluateConfig,
    world: int | None = None,
    media: MediaConfig | None = None,
) -> PlannedRecovery:
    """Describe what `recover` would do with the same arguments; nothing is written.

    Raises:
        VmlaError: As `recover` raises before any work.
    """
    pair = open_pair(converted, teacher, out, config, evaluation, world, media)
    works = check_needs(pair.dense, recovery_needs(config, evaluation), media)
    with torch.device("meta"):
        student = CausalWanModel(pair.source.config).requires_grad_(False)
    unfreeze(student, config.train)
    if config.lora_rank:
        add_adapters(student, config.lora_rank, config.train)
    return PlannedRecovery(
        teacher=str(pair.dense.source.path),
        steps=stage_steps(config),
        trains=sum(p.numel() for p in student.parameters() if p.requires_grad),
        of=sum(p.numel() for p in student.parameters()),
        processes=processes().num_processes,
        out=str(out),
        nbytes=sum(spec.nbytes for spec in pair.written_specs().values()),
        work=plan_work(
            pair.dense,
            works,
            recovery_passes(config, evaluation),
            media or MediaConfig(),
            recovery_memory(
                pair.source.config,
                config,
                clip_shape(pair.dense.config, works[0]),
                processes().num_processes,
            ),
        ),
    )
