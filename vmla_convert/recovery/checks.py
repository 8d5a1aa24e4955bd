"""Everything that a recovery refuses before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from vmla_convert.generating.make_clips import Need, check_needs
from vmla_convert.loading.load import (
    Source,
    is_codec,
    locate,
    open_named,
    read_provenance,
)
from vmla_convert.loading.teacher import check_pair, teacher_of
from vmla_convert.measuring.evaluate import held_out_needs
from vmla_convert.recovery.stages import later_steps, stage_steps
from vmla_convert.recovery.trained import check_adapters
from vmla_convert.storage.output import refuse_taken
from vmla_convert.training.loop import check_tracker
from vmla_convert.training.processes import check_shares, processes

OWN_CLIPS = 128
"""Samples of the dense model that a recovery trains on by default."""


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
    media: MediaConfig | None = None,
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
    check_recovery(config, started)
    check_needs(dense, recovery_needs(config, evaluation), media)
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


def check_recovery(config: RecoverConfig, world: int) -> None:
    """Check the settings that a stage of `world` processes would fail on later.

    Raises:
        ConfigError: The batch or the models do not divide, or no stage has steps.
        MissingExtraError: Adapters are asked for, and peft is not installed.
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


def recovery_needs(config: RecoverConfig, evaluation: EvaluateConfig) -> list[Need]:
    """Clips to train on, and held-out clips where the whole model is measured."""
    needs = [Need(config.data, "train", OWN_CLIPS, spare=True)]
    measured = not config.offload or later_steps(config)
    return needs + held_out_needs(evaluation) if measured else needs


def recovery_passes(config: RecoverConfig, evaluation: EvaluateConfig) -> list[float]:
    """Forward passes of a clip, for each need of `recovery_needs`.

    A step passes each clip through the dense model, and through the student forward and backward.
    """
    training = config.training
    trained = (4.0 + training.gradient_checkpointing) * later_steps(config) * training.batch_size
    evaluations = 2 + training.steps // training.eval_every
    measured = [float(evaluations * evaluation.clips)]
    return [trained] + measured * (len(recovery_needs(config, evaluation)) - 1)
