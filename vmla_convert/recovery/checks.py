"""Everything that a recovery refuses before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.config import (
    DENSE_ITEMSIZE,
    EvaluateConfig,
    MediaConfig,
    ModelConfig,
    RecoverConfig,
    Sizes,
)
from vmla_convert.errors import CheckpointError, ConfigError, VmlaError
from vmla_convert.fitting.calibration_clips import check_clips
from vmla_convert.generating.make_clips import check_makeable
from vmla_convert.loading.load import (
    Source,
    is_codec,
    locate,
    open_named,
    read_provenance,
)
from vmla_convert.loading.teacher import check_pair, teacher_of
from vmla_convert.measuring.evaluate import check_held_out
from vmla_convert.media.base import Media
from vmla_convert.media.clips import open_clips, source_kind
from vmla_convert.media.open import open_media
from vmla_convert.recovery.stages import later_steps, stage_steps
from vmla_convert.recovery.trained import check_adapters
from vmla_convert.storage.output import refuse_taken
from vmla_convert.training.loop import check_tracker
from vmla_convert.training.processes import check_shares, processes


class Pair(NamedTuple):
    """The opened conversion, and the opened dense model that it is trained against.

    A codec is opened together with its base model.

    `provenance` is the record of the conversion.
    """

    source: OpenCheckpoint
    dense: OpenCheckpoint
    is_codec: bool
    provenance: dict[str, Any]

    def written_specs(self) -> dict[str, TensorSpec]:
        """The tensors that a recovery writes: the codec alone, or the whole checkpoint."""
        specs = self.source.specs()
        if not self.is_codec:
            return specs
        return {name: spec for name, spec in specs.items() if ".codec." in name}


def open_pair(
    converted: str | Path,
    teacher: Source | None,
    out: Path,
    config: RecoverConfig,
    evaluation: EvaluateConfig,
    world: int | None,
) -> Pair:
    """Open a conversion and its dense model, and check all that can be checked before any work.

    Raises:
        CheckpointError: The models do not fit, or one cannot be opened.
        ConfigError: The settings do not fit the conversion, the clips or the processes.
        OutputError: The output exists, or a file is in its way.
        VmlaError: Not `world` processes were started.
    """
    started = processes().num_processes
    if world is not None and started != world:
        raise VmlaError(
            f"{world} processes were asked for, and {started} started",
            f"torchrun --standalone --nproc_per_node {world} -m vmla_convert recover …",
        )
    refuse_taken(out)
    source, dense = open_named(converted), open_named(teacher_of(str(converted), teacher))
    pair = Pair(source, dense, is_codec(locate(str(converted))[0]), read_provenance(converted))
    if source.config.is_dense:
        raise CheckpointError(
            f"{converted} is not a converted checkpoint", "make one first: vmla convert CKPT -o OUT"
        )
    check_pair(source.config, dense.config)
    if config.nested:
        _check_nested(source.config, config.nested)
    if pair.is_codec and (config.train != "new" or config.lora_rank):
        what = "lora_rank" if config.lora_rank else f"train '{config.train}'"
        raise ConfigError(
            f"{what} would change the base model, which {converted} leaves as it is",
            f"make a whole checkpoint first: vmla export {converted} -o whole",
        )
    check_recovery(dense, config, evaluation, started)
    return pair


def _check_nested(config: ModelConfig, cuts: Sequence[float]) -> None:
    if config.codec is None:
        raise ConfigError("only a codec has nested sizes", "leave --nested out")
    most = config.codec.rank * DENSE_ITEMSIZE
    for cut in cuts:
        asked = Sizes(cut=cut).token_bytes(config.geometry)
        if not 1 <= asked <= most:
            raise ConfigError(
                f"nested size {cut:g} makes {asked:g} bytes per token, which are not between 1 and "
                f"{most}, all that this codec holds",
                "give sizes that it holds: --set recover.nested=[0.98,0.95]",
            )


def check_recovery(
    dense: OpenCheckpoint, config: RecoverConfig, evaluation: EvaluateConfig, world: int
) -> None:
    """Check what a stage of `world` processes would fail on later; at most two clips are read.

    Raises:
        CheckpointError: Clips must be made, and the text encoder or VAE is missing.
        ConfigError: The batch or the models do not divide, or clips are missing, too short, or
            cannot be made.
        MissingExtraError: Adapters are asked for, and peft is not installed.
        VmlaError: The text encoder cannot encode a prompt of clips that must be made.
    """
    check_shares(config.training, world)
    check_tracker(config.training)
    check_adapters(config.lora_rank)
    if config.shard and world == 1:
        raise ConfigError(
            "shard divides models over processes, and there is one",
            "torchrun --standalone --nproc_per_node 2 -m vmla_convert recover …",
        )
    if not any(stage_steps(config).values()):
        raise ConfigError("no stage has any steps", "give some: --steps 100")
    if config.data.frames < 2 * dense.config.chunk_frames:
        raise ConfigError(
            f"clips of {config.data.frames} frames have no chunk with a past",
            f"use at least {2 * dense.config.chunk_frames} frames",
        )
    made = is_made(config)
    if made:
        check_makeable(config.data, dense.config, open_dense_media(dense, config, "cpu"))
    else:
        check_clips(dense.config, open_clips(config.data).batch(0, 1))
    measured = not config.offload or later_steps(config)
    if measured and not (made and evaluation.data.source == config.data.source):
        check_held_out(dense.config, evaluation)


def is_made(config: RecoverConfig) -> bool:
    """Whether the dense model makes the training clips before the recovery."""
    return source_kind(config.data.source) in ("self", "videos")


def open_dense_media(
    dense: OpenCheckpoint, config: RecoverConfig, device: torch.device | str
) -> Media:
    """Text encoder and VAE that make clips for the dense model."""
    how = MediaConfig(config.data.base)
    return open_media(dense.config, how, dense.source.path, torch.device(device))
