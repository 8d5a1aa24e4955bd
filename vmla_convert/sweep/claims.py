"""The paper's claims (arXiv 2605.30351) measured on one checkpoint, with our figures beside them.

The paper's layer is built twice, with the paper's spectral init and with random weights, and both
are recovered for the same steps. The codec of the same bytes is fitted and not trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

import torch

from vmla_convert.config import (
    ConvertConfig,
    EvaluateConfig,
    MediaConfig,
    ModelConfig,
    RecoverConfig,
    Sizes,
    SourceConfig,
)
from vmla_convert.fitting.calibrate import Statistics, calibrate, model_blocks
from vmla_convert.fitting.calibration_clips import calibration_needs, calibration_passes
from vmla_convert.fitting.codec import fit_model
from vmla_convert.fitting.dense_source import refuse_converted
from vmla_convert.fitting.mla import convert_model, planned_config
from vmla_convert.fitting.rank_plan import uniform_plan
from vmla_convert.generating.clip_cost import PlannedWork, clip_shape, plan_work
from vmla_convert.generating.make_clips import Need, check_needs, ready_clips
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import build, compute_device, open_named
from vmla_convert.measuring.evaluate import HeldOut, learned_spectrum_rows, spectrum_rows
from vmla_convert.measuring.rows import Errors
from vmla_convert.media.clips import open_clips
from vmla_convert.progress import Progress
from vmla_convert.recovery.checks import recovery_needs, recovery_passes
from vmla_convert.recovery.memory import recovery_memory
from vmla_convert.recovery.stages import recover_model
from vmla_convert.results import Metric

FILLED = 0.8
"""Share of a latent's rank that must hold 99 % of the energy for the latent to count as full."""
ALIKE = 1.25
"""Ratio of two velocity errors that counts as no difference."""
LOSSLESS = 0.01
"""Share of the dense model's flow loss that a conversion may add and count as without loss."""
INITS = ("spectral", "random")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, measured.

    Attributes:
        claim: The claim.
        measured: The figure that decides it.
        value: The figure on this checkpoint.
        bound: The value that the figure must reach, or must not exceed, for the claim to hold.
        holds: Whether the claim holds here.
        ours: The figure that this package sets beside it.
        our_value: Its value.
    """

    claim: str
    measured: str
    value: float
    bound: float
    holds: bool
    ours: str
    our_value: float


@dataclass(frozen=True)
class _Recovered:
    """The paper's layers of one init, before and after recovery.

    Attributes:
        filled: Least share of a layer's rank that holds 99 % of the energy, before and after.
        errors: Held-out errors before and after.
    """

    filled: tuple[float, float]
    errors: tuple[Errors, Errors]


def measure_claims(
    source: SourceConfig,
    convert: ConvertConfig,
    recover: RecoverConfig,
    evaluate: EvaluateConfig,
    media: MediaConfig | None = None,
    progress: Progress | None = None,
) -> list[Claim]:
    """Measure every claim on a dense checkpoint.

    Args:
        source: The dense checkpoint.
        convert: Size of the paper's layers, by default the paper's; calibration of the codec.
        recover: Recovery of both inits.
        evaluate: Held-out clips.
        media: Text encoder and VAE for clips that have to be made.
        progress: Receives the progress bars.

    Raises:
        CheckpointError: The checkpoint cannot be found, or is converted.
        ConfigError: Clips or sizes do not fit.
    """
    dense = open_named(source)
    refuse_converted(dense)
    needs = _needs(convert, recover, evaluate)
    calibration, training, held_out_data = ready_clips(dense, needs, media, progress)
    teacher = build(dense, compute_device(), torch.float32)
    held_out = HeldOut(teacher, replace(evaluate, data=held_out_data), progress=progress)
    statistics = calibrate(
        teacher,
        model_blocks(teacher),
        open_clips(calibration, teacher.config.cache.sink_frames),
        convert.calibration_clips,
        convert.seed,
        progress,
    )
    size = convert.size or Sizes.default_mla(teacher.config.geometry)
    convert, recover = replace(convert, size=size), replace(recover, data=training)
    recovered = {
        init: _recovered(teacher, replace(convert, init=init), recover, held_out, progress)
        for init in INITS
    }
    codec = held_out.measure(fit_model(teacher, convert, statistics))
    return [
        _not_low_rank(teacher, statistics),
        *_bottleneck(recovered),
        _init_does_not_matter(recovered),
        _without_loss(
            recovered["spectral"], codec, held_out.teacher_errors(), size, teacher.config
        ),
    ]


def plan_claims(
    source: SourceConfig,
    convert: ConvertConfig,
    recover: RecoverConfig,
    evaluate: EvaluateConfig,
    media: MediaConfig,
) -> PlannedWork:
    """Check the measurement as `measure_claims` does, and predict its work."""
    dense = open_named(source)
    refuse_converted(dense)
    works = check_needs(dense, _needs(convert, recover, evaluate), media)
    passes = calibration_passes(convert)
    passes += [len(INITS) * each for each in recovery_passes(recover, evaluate)]
    latent = planned_config(dense.config, convert, uniform_plan(dense.config, convert))
    memory = recovery_memory(latent, recover, clip_shape(latent, works[1]))
    return plan_work(dense, works, passes, media, memory)


def _needs(convert: ConvertConfig, recover: RecoverConfig, evaluate: EvaluateConfig) -> list[Need]:
    return [*calibration_needs(convert), *recovery_needs(recover, evaluate)]


def _recovered(
    teacher: CausalWanModel,
    convert: ConvertConfig,
    recover: RecoverConfig,
    held_out: HeldOut,
    progress: Progress | None,
) -> _Recovered:
    student = convert_model(teacher, convert)
    before, filled = held_out.measure(student), _filled(student)
    recover_model(student, teacher, recover, held_out, lambda _, __: None, progress=progress)
    return _Recovered((filled, _filled(student)), (before, held_out.measure(student)))


def _filled(student: CausalWanModel) -> float:
    """Least share of a layer's rank that 99 % of the energy takes."""
    mla = student.config.mla
    assert mla is not None
    rows = zip(learned_spectrum_rows(student, 0), mla.kv_lora_rank, strict=True)
    return min(row.value / rank for row, rank in rows)


def _not_low_rank(teacher: CausalWanModel, statistics: Statistics) -> Claim:
    geometry = teacher.config.geometry
    layers = map(statistics, range(geometry.num_layers))
    rows = spectrum_rows(teacher, layers, geometry.dim // 8)
    weights, activations = (
        [r.value for r in rows if r.metric == Metric.EFFECTIVE_RANK_99 and r.run == run]
        for run in ("weights", "weights_x_activations")
    )
    bound = float(geometry.dim // 8)
    return Claim(
        "the weights of keys and values are not low-rank",
        "directions that hold 99 % of the energy of the weights, least of all layers",
        min(weights),
        bound,
        min(weights) > bound,
        "the same of keys and values that the model computes, median of all layers",
        median(activations),
    )


def _bottleneck(recovered: dict[str, _Recovered]) -> list[Claim]:
    claims: list[Claim] = []
    for place, when in enumerate(("before", "after")):
        filled = {init: each.filled[place] for init, each in recovered.items()}
        claims.append(
            Claim(
                f"the bottleneck sets the rank, {when} recovery",
                "share of the rank that 99 % of the energy takes, spectral init, least layer",
                filled["spectral"],
                FILLED,
                min(filled.values()) >= FILLED,
                "the same with random weights",
                filled["random"],
            )
        )
    return claims


def _init_does_not_matter(recovered: dict[str, _Recovered]) -> Claim:
    before, after = (
        recovered["random"].errors[place].velocity_error
        / recovered["spectral"].errors[place].velocity_error
        for place in (0, 1)
    )
    return Claim(
        "after recovery the init makes no difference",
        "velocity error with random weights over that with the spectral init, recovered",
        after,
        ALIKE,
        max(after, 1 / after) <= ALIKE,
        "the same before recovery",
        before,
    )


def _without_loss(
    spectral: _Recovered, codec: Errors, dense: Errors, size: Sizes, model: ModelConfig
) -> Claim:
    cut = 1 - size.token_bytes(model.geometry) / model.geometry.dense_token_bytes
    above = spectral.errors[1].flow_loss / dense.flow_loss - 1
    return Claim(
        f"{100 * cut:.1f} % less cache without loss",
        "flow loss above the dense model's, spectral init, recovered",
        above,
        LOSSLESS,
        above <= LOSSLESS,
        "the same of a codec in the same bytes, not trained",
        codec.flow_loss / dense.flow_loss - 1,
    )
