"""Held-out errors of a model against the dense model, spectra of layers, and scores of rollouts.

Letters: B clips, F latent frames, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vmla_convert.config import EvaluateConfig, ModelConfig, RuntimeConfig
from vmla_convert.demo.judge import background_psnr, read_digits
from vmla_convert.errors import ConfigError
from vmla_convert.fitting.layer_statistics import LayerStatistics
from vmla_convert.fitting.weights import layer_weights
from vmla_convert.generating.make_clips import Need
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.maths.spectra import (
    activation_spectrum,
    effective_rank,
    energy_at_rank,
    spectrum,
    weight_spectrum,
)
from vmla_convert.measuring.rows import Errors, cache_rows, error_rows, row_fields
from vmla_convert.media.clip_checks import check_clips, clips_at_once
from vmla_convert.media.clips import Batch, ClipSource, open_clips, seeded, settled
from vmla_convert.media.demo import prompted_digit
from vmla_convert.progress import OneBar, Progress, Silent
from vmla_convert.results import Metric, Row
from vmla_convert.training.losses import (
    Example,
    make_example,
    predicted_velocity,
    streamed_velocity,
)
from vmla_convert.training.processes import ALONE, Share, averaged, narrowed, own_device

# Noise is drawn for this many clips at once, so that results do not depend on the batch size.
CLIPS_DRAWN = 8
MEASURING = "measuring"
SEGMENTS = 4
RANKS_DRAWN = 20


def held_out_needs(config: EvaluateConfig) -> list[Need]:
    """The held-out clips of a measurement."""
    return [Need(config.data, "held_out", config.clips)]


def check_held_out(model: ModelConfig, config: EvaluateConfig, streamed: bool = False) -> None:
    """Check one held-out clip.

    Raises:
        ConfigError: Clips are too short, or their frames do not fit the model, or the cache where
            clips are `streamed`.
    """
    latents, context = open_clips(config.data).batch(0, 1, "held_out")
    check_clips(model, Batch(latents, context))
    size = tuple(latents.shape[-2:])
    if streamed and size != model.latent_size:
        raise ConfigError(
            f"held-out clips of {list(size)} do not fit a cache of {list(model.latent_size)}",
            "give clips of the model's latent size",
        )


def measuring_bar(progress: Progress, config: EvaluateConfig, passes: int) -> OneBar:
    """One bar for several passes over held-out clips. Making a `HeldOut` is the first pass."""
    return OneBar(progress, MEASURING, passes * len(_starts(config)))


def _starts(config: EvaluateConfig) -> range:
    """Index of the first clip of each draw of noise."""
    return range(0, config.clips, CLIPS_DRAWN)


class HeldOut:
    """Held-out clips with noise and the dense model's velocities, prepared once.

    Args:
        teacher: The dense model.
        config: Number and source of the clips.
        streamed: Pass clips chunk by chunk through each model's own cache, which shows the effect
            of window and sink. Otherwise each clip is one masked pass.
        progress: Where each pass over the clips is drawn.
        clips: Source of the clips, in place of the source in `config`.
        mixed_precision: Dtype of matrix products, as in `TrainingConfig`.
        share: The clips of each draw that this process measures, where every process gets some;
            the figures are those of all clips. All processes must make the same calls.

    Raises:
        ConfigError: The clips do not fit, see `check_held_out`.
    """

    def __init__(
        self,
        teacher: CausalWanModel,
        config: EvaluateConfig,
        streamed: bool = False,
        progress: Progress | None = None,
        clips: ClipSource | None = None,
        mixed_precision: str = "no",
        share: Share = ALONE,
    ) -> None:
        self.config, self.streamed = teacher.config, streamed
        self.mixed_precision = mixed_precision
        self.progress = progress or Silent()
        config = replace(config, data=settled(config.data, teacher.config))
        check_held_out(self.config, config, streamed)
        clips = clips or open_clips(config.data)
        self.examples = [
            make_example(
                clips.batch(start, min(CLIPS_DRAWN, config.clips - start), "held_out"),
                self.config.chunk_frames,
                seeded(config.data.seed, index, "evaluation"),
            )
            for index, start in enumerate(_starts(config))
        ]
        divides = all(len(example.latents) % share.world == 0 for example in self.examples)
        self.share = share if divides else ALONE
        self.targets = self._velocities(teacher, self.examples)

    def measure(self, model: nn.Module, runtime: RuntimeConfig | None = None) -> Errors:
        """Measure a model; the `velocity_error` of the dense model itself is 0."""
        return self._errors(self._velocities(model, self.examples, runtime))

    def teacher_errors(self) -> Errors:
        """Errors of the dense model, from the velocities that are kept."""
        return self._errors(self.targets)

    def measure_other_past(self, teacher: CausalWanModel) -> Errors:
        """Measure the dense model on each clip with the past of another clip.

        The loss above that with the own past shows how much the model uses its cache.
        """
        pasts = torch.cat([example.latents.chunk(2, dim=1)[0] for example in self.examples])
        others = pasts.roll(1, dims=0).split([len(e.latents) for e in self.examples])
        swapped = [_with_past(e, past) for e, past in zip(self.examples, others, strict=True)]
        return self._errors(self._velocities(teacher, swapped))

    def _errors(self, velocities: Sequence[Tensor]) -> Errors:
        # The first chunk has no past.
        first = self.config.chunk_frames
        got = torch.cat([v[:, first:] for v in velocities])
        target = torch.cat([v[:, first:] for v in self.targets])
        truth = torch.cat([self.share.of(e).velocity[:, first:] for e in self.examples])
        relative = torch.stack([(got - target).square().sum(), target.square().sum()])
        loss = (got - truth).square().mean()
        if self.share.world > 1:
            relative, loss = (averaged(figure.to(own_device())) for figure in (relative, loss))
        return Errors((relative[0] / relative[1]).item(), loss.item())

    def _velocities(
        self, model: nn.Module, examples: Sequence[Example], runtime: RuntimeConfig | None = None
    ) -> list[Tensor]:
        """Velocities of a model on all clips."""
        tracked = self.progress.track(examples, MEASURING)
        return [self._velocity(model, self.share.of(example), runtime) for example in tracked]

    @torch.no_grad()
    def _velocity(
        self, model: nn.Module, example: Example, runtime: RuntimeConfig | None
    ) -> Tensor:
        past = example.latents.chunk(2, dim=1)[0]
        size = clips_at_once(self.config.geometry, past)
        parts = zip(*(tensor.split(size) for tensor in example), strict=True)
        return torch.cat([self._part(model, Example(*part), runtime) for part in parts])

    def _part(self, model: nn.Module, part: Example, runtime: RuntimeConfig | None) -> Tensor:
        """Velocity of clips that pass the model together."""
        part = part.to(next(model.parameters()).device)
        with narrowed(self.mixed_precision, part.latents.device):
            if self.streamed:
                assert isinstance(model, CausalWanModel)
                return streamed_velocity(model, part, runtime).cpu()
            return predicted_velocity(model, self.config, part).cpu()


def _with_past(example: Example, past: Tensor) -> Example:
    noisy = example.latents.chunk(2, dim=1)[1]
    return example._replace(latents=torch.cat([past, noisy], dim=1))


def dense_rows(teacher: CausalWanModel, held_out: HeldOut) -> list[Row]:
    """Rows of the dense model."""
    other = held_out.measure_other_past(teacher).flow_loss
    return [
        *error_rows(held_out.teacher_errors(), teacher.config, None),
        Row(Metric.FLOW_LOSS_OTHER_PAST, other, "squared velocity", **row_fields(teacher.config)),
        *cache_rows(teacher.config),
    ]


def spectrum_rows(
    teacher: CausalWanModel, measured: Iterable[LayerStatistics], rank: int
) -> list[Row]:
    """Rows of the joint spectrum of keys and values of each layer, of weights and of activations.

    Args:
        teacher: The dense model.
        measured: Statistics of every layer, in order, for either product.
        rank: A rank to report the energy at, besides the ranks that a plot of the spectrum needs.
    """
    read = teacher.state_dict().__getitem__
    rows: list[Row] = []
    for layer, statistics in enumerate(measured):
        weights = layer_weights(read, layer, teacher.config.geometry.num_heads)
        joint, covariance = torch.cat([weights.key, weights.value]), statistics.past[1].covariance
        # A codec is calibrated on keys and values, MLA layers on their inputs.
        is_codec = statistics.samples is not None
        spectra = {
            "weights": weight_spectrum(joint),
            "weights_x_activations": spectrum(covariance)
            if is_codec
            else activation_spectrum(joint, covariance),
        }
        rows += _energy_rows(spectra, layer, {rank, *_spread(joint.shape[1])})
    return rows


def learned_spectrum_rows(model: CausalWanModel, step: int, seed: int = 0) -> list[Row]:
    """Rows of the effective rank of each MLA layer's map from inputs to keys and values.

    A trained layer fills its rank whatever the init (VideoMLA, figures 2 and 8), so the rank says
    nothing about quality.
    """
    fields, rows = row_fields(model.config, seed), list[Row]()
    for layer, attention in enumerate(model.self_attentions()):
        assert isinstance(attention, LatentSelfAttention)
        down = attention.kv_a_proj.weight.double().cpu()
        key = attention.kv_b_proj_k.weight.double().cpu() @ down[: attention.key_rank]
        value = attention.kv_b_proj_v.weight.double().cpu() @ down[-attention.value_rank :]
        rank = effective_rank(weight_spectrum(torch.cat([key, value])))
        of_layer = {"layer": layer, "step": step, **fields}
        rows.append(Row(Metric.EFFECTIVE_RANK_99, rank, "directions", **of_layer))
    return rows


def _energy_rows(spectra: dict[str, Tensor], layer: int, ranks: set[int]) -> list[Row]:
    """Rows of one layer's spectra; a name, such as `weights`, becomes the `run` of its rows."""
    rows: list[Row] = []
    for run, energies in spectra.items():
        rank_99 = effective_rank(energies)
        rows.append(Row(Metric.EFFECTIVE_RANK_99, rank_99, "directions", run, layer=layer))
        for size in sorted(ranks):
            energy = energy_at_rank(energies, size)
            rows.append(
                Row(Metric.ENERGY_AT_RANK, energy, "share", run, layer=layer, kv_lora_rank=size)
            )
    return rows


def _spread(width: int) -> list[int]:
    """Ranks up to the width, evenly spaced by ratio, to draw a spectrum with."""
    return [round(width ** (i / (RANKS_DRAWN - 1))) for i in range(RANKS_DRAWN)]


def rollout_rows(video: Tensor, prompts: list[str], config: ModelConfig, seed: int) -> list[Row]:
    """Score a demo rollout (B, F, 3, height, width), whole and by segment.

    `background_psnr` compares with the background of the first chunk. `digit_accuracy` is the share
    of frames in which the judge recognises the prompted digit.
    """
    labels = torch.tensor([prompted_digit(prompt) for prompt in prompts])
    hits = (read_digits(video) == labels[:, None]).float()
    psnr = background_psnr(video, config.chunk_frames)[:, config.chunk_frames :]
    fields = {**row_fields(config, seed), "frames": video.shape[1]}
    rows = [
        Row(Metric.BACKGROUND_PSNR, psnr.nanmean().item(), "dB", **fields),
        Row(Metric.DIGIT_ACCURACY, hits.mean().item(), "share of frames", **fields),
    ]
    for segment, part in enumerate(torch.tensor_split(psnr, SEGMENTS, dim=1)):
        rows.append(
            Row(Metric.BACKGROUND_PSNR, part.nanmean().item(), "dB", segment=segment, **fields)
        )
    for segment, part in enumerate(torch.tensor_split(hits, SEGMENTS, dim=1)):
        value = part.mean().item()
        rows.append(Row(Metric.DIGIT_ACCURACY, value, "share of frames", segment=segment, **fields))
    return rows


def drift_rows(latents: Tensor, config: ModelConfig, seed: int) -> list[Row]:
    """Rows of how far clean latents (B, F, C, height, width) drift, by segment; for any model.

    Drift is the squared distance of mean and standard deviation, per clip and channel, from those
    of the first segment, relative to the first segment's variance.
    """
    fields = {**row_fields(config, seed), "frames": latents.shape[1]}
    parts = [part.transpose(1, 2).flatten(2) for part in latents.tensor_split(SEGMENTS, dim=1)]
    moments = [torch.stack([part.mean(2), part.std(2)]) for part in parts]
    first = moments[0]
    return [
        Row(
            Metric.DRIFT,
            ((each - first).square().sum(0) / first[1].square().clamp_min(1e-12)).mean().item(),
            "squared, relative to the spread",
            segment=segment,
            **fields,
        )
        for segment, each in enumerate(moments)
    ]
