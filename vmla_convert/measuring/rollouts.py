"""A dense model and its conversion from the same noise: how long they agree, and how they differ.

No truth is needed, so any checkpoint can be measured. Three rollouts run chunk by chunk: the dense
model's, the conversion's, and the conversion's predictions along the dense rollout, with the dense
model's own past in the conversion's cache.

Shapes: B clips, F latent frames, C channels, L tokens, d width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmla_convert.config import RuntimeConfig
from vmla_convert.generating.own_samples import clips_at_once
from vmla_convert.generating.rollout import NewPrompt, rollout
from vmla_convert.generating.sampler import State
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.flow import TRAIN_TIMESTEPS
from vmla_convert.measuring.features import FrameFeatures, Lpips, open_features
from vmla_convert.measuring.rows import row_fields
from vmla_convert.measuring.video import (
    SSIM_SIDE,
    FrameMeasures,
    frame_psnr,
    frame_ssim,
    interval,
)
from vmla_convert.media.base import Media
from vmla_convert.media.clips import seeded
from vmla_convert.progress import Progress
from vmla_convert.results import Metric, Row

AGREEING_DB = 30.0
"""Frames with at least this PSNR count as agreeing: the difference is hard to see."""
SEGMENTS = 4
UNITS = {
    Metric.SHARPNESS: "RMS difference of neighbouring pixels",
    Metric.DYNAMIC_DEGREE: "difference of consecutive frames",
    Metric.FLICKER: "distance from the neighbours' middle",
    Metric.COLOUR_DRIFT: "distance from the first chunk's mean colour",
}


class _Key(NamedTuple):
    """One figure of every clip.

    Attributes:
        of_dense: Whether the dense model was measured alone.
    """

    metric: Metric
    unit: str
    of_dense: bool = False
    chunk: int | None = None
    segment: int | None = None
    note: str | None = None


def rollout_agreement(
    dense: CausalWanModel,
    converted: CausalWanModel,
    context: Tensor,
    frames: int,
    media: Media,
    progress: Progress,
    runtime: RuntimeConfig | None = None,
    seed: int = 0,
    prompts: Sequence[str] = (),
    features: Sequence[str] = (),
) -> list[Row]:
    """Rows of two rollouts from the same noise.

    * `frame_psnr` and `frame_ssim` of each chunk against the dense rollout, and
      `agreeing_frames`, the pixel frames until the PSNR falls below `AGREEING_DB`;
    * `velocity_error` along the dense rollout by timestep, and `layer_error`, the error of each
      block's output;
    * for both models by segment `sharpness`, `dynamic_degree`, `flicker` and `colour_drift`, and
      `chunk_seam` of the whole video;
    * with models in `features`, of the last frame of each chunk: `feature_agreement` with the dense
      rollout and `lpips` by chunk, and for both models by segment `feature_consistency` with the
      first chunk and `prompt_agreement`.

    Values are means over clips with their 95 % bootstrap interval.

    Args:
        dense: The dense model.
        converted: The conversion, or another copy of the dense model, to quantise its cache.
        context: Prompts (B, text_len, text_dim).
        frames: Latent frames of the video; whole chunks are generated.
        media: Decodes both videos.
        progress: Draws one bar of chunks.
        runtime: Size and precision of the conversion's cache.
        seed: Seed of all noise.
        prompts: Texts of the prompts, for models that read them.
        features: Models that compare frames, as in `EvaluateConfig`.
    """
    models, lpips = open_features(features)
    size = dense.config.chunk_frames
    chunks, along = -(-frames // size), _AlongDense(dense, converted, runtime)
    found: dict[_Key, list[Tensor]] = defaultdict(list)
    groups = context.split(clips_at_once(dense.config))
    with along, progress.bar("rolling out both models", chunks * len(groups)) as advance:
        for number, group in enumerate(groups):
            pairs = zip(
                _rolled_out(dense, group, chunks, (seed, number), None, along.predict),
                _rolled_out(converted, group, chunks, (seed, number), runtime),
                strict=True,
            )
            start = sum(map(len, groups[:number]))
            texts = prompts[start : start + len(group)]
            videos = _Videos(media, [_Likeness(model, texts) for model in models], lpips)
            along.begin(group)
            for one, other in pairs:
                along.write(one)
                videos.add(one, other)
                advance(1)
            for key, values in videos.figures().items():
                found[key].append(values)
    fields = row_fields(converted.config, seed, runtime) | {"frames": chunks * size}
    of_dense = row_fields(dense.config, seed) | {"frames": chunks * size}
    return along.rows(fields) + [
        _mean_row(key, torch.cat(values), of_dense if key.of_dense else fields)
        for key, values in found.items()
    ]


def _rolled_out(
    model: CausalWanModel,
    context: Tensor,
    chunks: int,
    seed: tuple[int, int],
    runtime: RuntimeConfig | None,
    before_step: Callable[[State], None] | None = None,
) -> Iterator[Tensor]:
    return rollout(
        model,
        chunks,
        lambda frame: NewPrompt(context) if frame == 0 else None,
        lambda index: [seeded(seed[0], index, f"rollout {seed[1]}")],
        runtime,
        before_step=before_step,
    )


def _mean_row(key: _Key, values: Tensor, fields: dict[str, Any]) -> Row:
    """The mean over clips (B,), with its bootstrap interval; NaN values are left out."""
    low, high = interval(values)
    more = {"chunk": key.chunk, "segment": key.segment, "note": key.note}
    mean = values.nanmean().item()
    return Row(key.metric, mean, key.unit, **fields, **more, low=low, high=high)


class _Videos:
    """The dense and the converted video of some clips, decoded and measured chunk by chunk."""

    def __init__(self, media: Media, likenesses: list[_Likeness], lpips: Lpips | None) -> None:
        self._likenesses, self._lpips = likenesses, lpips
        self._distances = list[Tensor]()
        self._decoders = media.decoder(), media.decoder()
        self._measures = FrameMeasures(), FrameMeasures()
        self._psnr, self._ssim = list[Tensor](), list[Tensor]()

    def add(self, dense: Tensor, converted: Tensor) -> None:
        """Measure the next chunk of latents of both models."""
        shown: list[Tensor] = []
        for latents, decoder, measures in zip(
            (dense, converted), self._decoders, self._measures, strict=True
        ):
            shown.append(decoder.decode(latents).float().cpu().clamp(-1, 1))
            measures.add(shown[-1])
        self._psnr.append(frame_psnr(shown[1], shown[0]))
        if min(shown[0].shape[-2:]) >= SSIM_SIDE:
            self._ssim.append(frame_ssim(shown[1], shown[0]))
        for likeness in self._likenesses:
            likeness.add(shown[0][:, -1], shown[1][:, -1])
        if self._lpips is not None:
            self._distances.append(self._lpips(shown[1][:, -1], shown[0][:, -1]))

    def figures(self) -> dict[_Key, Tensor]:
        """Every figure, (B,)."""
        found: dict[_Key, Tensor] = {}
        for number, values in enumerate(self._psnr):
            found[_Key(Metric.FRAME_PSNR, "dB", chunk=number)] = values.mean(1)
        for number, values in enumerate(self._ssim):
            found[_Key(Metric.FRAME_SSIM, "share", chunk=number)] = values.mean(1)
        for number, values in enumerate(self._distances):
            found[_Key(Metric.LPIPS, "distance", chunk=number)] = values
        for likeness in self._likenesses:
            found |= likeness.figures()
        agrees = (torch.cat(self._psnr, dim=1) >= AGREEING_DB).long().cumprod(1).sum(1)
        key = _Key(Metric.AGREEING_FRAMES, "pixel frames", note=f"at least {AGREEING_DB:g} dB")
        found[key] = agrees.float()
        for of_dense, measures in zip((True, False), self._measures, strict=True):
            for metric in measures.values:
                for segment, part in enumerate(measures.segments(metric, SEGMENTS)):
                    found[_Key(metric, UNITS[metric], of_dense, segment=segment)] = part
            if measures.seams:
                key = _Key(Metric.CHUNK_SEAM, "motion at seams over all motion", of_dense)
                found[key] = measures.chunk_seam()
        return found


class _Likeness:
    """Features of one frame per chunk of the dense and the converted video, by one model."""

    def __init__(self, model: FrameFeatures, prompts: Sequence[str]) -> None:
        self._model, self._text = model, model.prompts(prompts) if prompts else None
        self._dense, self._converted = list[Tensor](), list[Tensor]()

    def add(self, dense: Tensor, converted: Tensor) -> None:
        """Take a frame (B, 3, H, W) of each video."""
        self._dense.append(self._model.images(dense))
        self._converted.append(self._model.images(converted))

    def figures(self) -> dict[_Key, Tensor]:
        """Cosines of features, (B,)."""
        found: dict[_Key, Tensor] = {}
        name, pairs = self._model.name, zip(self._dense, self._converted, strict=True)
        for number, (one, other) in enumerate(pairs):
            key = _Key(Metric.FEATURE_AGREEMENT, "cosine", chunk=number, note=name)
            found[key] = (one * other).sum(-1)
        for of_dense, frames in ((True, self._dense), (False, self._converted)):
            video = torch.stack(frames, dim=1)
            series = {Metric.FEATURE_CONSISTENCY: video @ video[:, 0, :, None]}
            if self._text is not None:
                series[Metric.PROMPT_AGREEMENT] = video @ self._text[:, :, None]
            for metric, cosines in series.items():
                for segment, part in enumerate(cosines.tensor_split(SEGMENTS, dim=1)):
                    if part.numel():
                        key = _Key(metric, "cosine", of_dense, segment=segment, note=name)
                        found[key] = part.mean((1, 2))
        return found


class _AlongDense:
    """Errors of a conversion's predictions at the states of the dense model's rollout.

    The conversion runs before each step of the dense model on the same noisy chunk. Hooks on the
    blocks and on the output keep what the conversion made, and compare what the dense model makes.
    """

    def __init__(
        self,
        dense: CausalWanModel,
        converted: CausalWanModel,
        runtime: RuntimeConfig | None,
    ) -> None:
        self._dense, self._converted, self._runtime = dense, converted, runtime
        self._expected = dict[int | None, Tensor]()
        self._timestep = 0.0
        self._opened = False
        # By layer (None: the velocity) and timestep: squared errors and squared dense values.
        self._sums: dict[tuple[int | None, float], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._hooks = ExitStack()

    def __enter__(self) -> _AlongDense:
        for layer, module in _parts(self._dense):
            handle = module.register_forward_hook(self._comparing(layer))
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()

    @torch.no_grad()
    def begin(self, context: Tensor) -> None:
        """Begin a video with the prompts (B, text_len, text_dim)."""
        self._cache = self._converted.new_cache(len(context), self._runtime)
        weight = self._converted.patch_embedding.weight
        self._prompt = self._converted.project_prompt(context.to(weight))

    @torch.no_grad()
    def predict(self, state: State) -> None:
        """Run the conversion on the noisy chunk that the dense model denoises next."""
        if not self._opened:
            self._cache.open_chunk(state.latents.shape[1])
            self._opened = True
        latents = state.latents.to(self._converted.patch_embedding.weight)
        self._timestep = (state.sigma * TRAIN_TIMESTEPS).item()
        times = state.latents.new_full(state.latents.shape[:2], self._timestep)
        made = dict[int | None, Tensor]()
        with ExitStack() as hooks:
            for layer, module in _parts(self._converted):
                handle = module.register_forward_hook(_keeping(made, layer))
                hooks.callback(handle.remove)
            self._converted.stream(latents, times, self._prompt, self._cache, keep=False)
        self._expected = made

    @torch.no_grad()
    def write(self, clean: Tensor) -> None:
        """Write the dense model's clean chunk to the conversion's cache."""
        clean = clean.to(self._converted.patch_embedding.weight)
        times = clean.new_zeros(clean.shape[:2])
        self._converted.stream(clean, times, self._prompt, self._cache)
        self._opened = False

    def rows(self, fields: dict[str, Any]) -> list[Row]:
        """Errors of the velocity by timestep, and of block outputs by layer."""
        rows: list[Row] = []
        by_layer: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for (layer, timestep), (error, square) in self._sums.items():
            if layer is None:
                share = error / square
                rows.append(
                    Row(Metric.VELOCITY_ERROR, share, "relative", **fields, timestep=timestep)
                )
            else:
                by_layer[layer][0] += error
                by_layer[layer][1] += square
        return rows + [
            Row(Metric.LAYER_ERROR, error / square, "relative", **fields, layer=layer)
            for layer, (error, square) in by_layer.items()
        ]

    def _comparing(self, layer: int | None) -> Callable[[nn.Module, Any, Tensor], None]:
        def compare(_: nn.Module, __: Any, output: Tensor) -> None:
            # Nothing is expected when the dense model writes its clean chunk.
            if (expected := self._expected.pop(layer, None)) is not None:
                sums = self._sums[layer, self._timestep]
                sums[0] += (output.float() - expected.float()).square().sum().item()
                sums[1] += output.float().square().sum().item()

        return compare


def _keeping(
    found: dict[int | None, Tensor], layer: int | None
) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        found[layer] = output

    return keep


def _parts(model: CausalWanModel) -> list[tuple[int | None, nn.Module]]:
    """Blocks by number, and the head, whose output is the velocity in patches."""
    return [*enumerate(model.all_blocks()), (None, model.head)]
