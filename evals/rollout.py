"""Let models continue true scenes for a minute, and compare every frame with the truth.

    python -m evals.rollout CKPT --world digits --out evals/results/rollout.jsonl

The dense model and its conversions continue the first frames of the same held-out scenes from the
same noise: a codec at several sizes, MLA layers at their own. The figures are those of the world
(see `evals.worlds.worlds`) and those that need no truth (`vmla_convert.measuring.video`), by
segment, with 95 % bootstrap intervals over clips. `slope` is the change of a figure per minute,
from a straight line through its frames. With `--switch`, digits change their prompt halfway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from evals.worlds.worlds import UNITS, Digits, Scene, World, open_world
from vmla_convert.config import RuntimeConfig, Sizes, SourceConfig
from vmla_convert.console import out
from vmla_convert.generating.rollout import NewPrompt, rollout
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.loading.teacher import teacher_of
from vmla_convert.measuring import rollouts
from vmla_convert.measuring.rows import row_fields
from vmla_convert.measuring.video import FrameMeasures, interval
from vmla_convert.media.clips import seeded
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.video import contact_sheet
from vmla_convert.progress import Progress
from vmla_convert.results import Metric, Row, put_rows

MINUTE = 240
"""Latent frames that are generated."""
SEGMENTS = 4
CUTS = (11 / 12, 23 / 24, 47 / 48)
SHEET_COLUMNS, SHEET_CLIPS = 12, 2


def main(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Conversions of one model, to measure beside it.")
    ],
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    world: Annotated[str, typer.Option(help="digits or photographs.")] = "digits",
    teacher: Annotated[str | None, typer.Option(help="Dense model of MLA layers.")] = None,
    clips: Annotated[int, typer.Option(min=2, help="Number of scenes.")] = 16,
    frames: Annotated[int, typer.Option(min=SEGMENTS, help="Frames to generate.")] = MINUTE,
    cuts: Annotated[list[float] | None, typer.Option("--cut", help="Sizes of a codec.")] = None,
    switch: Annotated[bool, typer.Option("--switch", help="Change digits halfway.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet to draw (PNG).")] = None,
) -> None:
    """Measure a minute of a dense model and of its conversions against the truth."""
    scenery = open_world(world)
    if switch and not isinstance(scenery, Digits):
        raise typer.BadParameter("--switch changes a digit: use --world digits")
    named = SourceConfig(teacher) if teacher else None
    dense = load(teacher_of(SourceConfig(checkpoints[0]), named))
    runs: list[tuple[str, CausalWanModel, RuntimeConfig | None]] = [("dense", dense, None)]
    for model in map(load, checkpoints):
        if model.config.codec is not None:
            sizes = {
                f"codec, 1/{1 / (1 - cut):.0f} of dense": Sizes(cut=cut) for cut in cuts or CUTS
            }
            runs += [(name, model, RuntimeConfig(size)) for name, size in sizes.items()]
        else:
            runs.append(("MLA", model, None))
    scene = scenery.scenes(clips, scenery.given_frames + frames)
    shown: dict[str, Tensor] = {}
    with out.progress() as progress:
        for name, each, runtime in runs:
            made = continued(each, scenery, scene, runtime, switch, progress)
            put_rows(rows_file, scored(each, scenery, scene, made, runtime, switch))
            shown[name] = scenery.decode(made[:SHEET_CLIPS]).clamp(-1, 1)
    if sheet:
        truth = scenery.decode(scene.latents[:SHEET_CLIPS])
        draw_sheet(sheet, {"truth": truth, **shown}, scenery.given_frames)
        out.path("wrote", sheet)


def continued(
    model: CausalWanModel,
    world: World,
    scene: Scene,
    runtime: RuntimeConfig | None,
    switch: bool,
    progress: Progress,
) -> Tensor:
    """Given frames and what the model makes of them, (B, F, C, n, n)."""
    size, given = model.config.chunk_frames, world.given_frames
    start = NewPrompt(scene.context)
    chunks = -(-(scene.latents.shape[1] - given) // size)
    halfway = given + chunks // 2 * size

    def prompt(frame: int) -> NewPrompt | None:
        if switch and frame == halfway:
            return NewPrompt(switched(scene))
        return start if frame == 0 else None

    made = rollout(
        model,
        chunks,
        prompt,
        lambda index: [seeded(0, index, "rollout")],
        runtime,
        prefix=scene.latents[:, :given],
    )
    total = -(-given // size) + chunks
    latents = torch.cat(list(progress.track(made, "rolling out", total)), dim=1)
    return latents[:, : scene.latents.shape[1]]


def switched(scene: Scene) -> Tensor:
    """Prompts that ask for the next digit."""
    return DemoMedia().encode_labels(next_digit(scene.truth[0]))


def next_digit(digits: Tensor) -> Tensor:
    """The digits (B,) that prompts ask for after a switch."""
    return (digits + 1) % 10


def scored(
    model: CausalWanModel,
    world: World,
    scene: Scene,
    made: Tensor,
    runtime: RuntimeConfig | None,
    switch: bool = False,
) -> list[Row]:
    """Rows of a rollout."""
    given, frames = world.given_frames, made.shape[1] - world.given_frames
    fields = row_fields(model.config, runtime=runtime) | {"frames": frames}
    rows: list[Row] = []
    if switch:
        # Only the digit has a truth after the switch.
        digit, *others = scene.truth
        for name, labels in ("new digit", next_digit(digit)), ("old digit", digit):
            asked = scene._replace(truth=(labels, *others))
            hits = world.score(asked, made)[Metric.DIGIT_ACCURACY][:, frames // 2 :]
            rows += _segments(Metric.DIGIT_ACCURACY, hits, "share of frames", fields, name)
        return rows
    for metric, values in world.score(scene, made).items():
        rows += _segments(metric, values, UNITS[metric], fields)
        rows.append(_slope(metric, values, fields))
    measures = FrameMeasures()
    for chunk in world.decode(made[:, given:]).split(model.config.chunk_frames, dim=1):
        measures.add(chunk)
    for metric, unit in rollouts.UNITS.items():
        rows += _segments(metric, torch.cat(measures.values[metric], dim=1), unit, fields)
    seam = measures.chunk_seam()
    return [*rows, _mean(Metric.CHUNK_SEAM, seam, "motion at seams over all motion", fields)]


def _segments(
    metric: Metric, values: Tensor, unit: str, fields: dict[str, Any], note: str | None = None
) -> list[Row]:
    """Rows of equal parts of a figure of every frame (B, F)."""
    parts = values.tensor_split(SEGMENTS, dim=1)
    return [
        _mean(metric, part.nanmean(1), unit, fields, segment=segment, note=note)
        for segment, part in enumerate(parts)
    ]


def _slope(metric: Metric, values: Tensor, fields: dict[str, Any]) -> Row:
    """Change per minute of the least-squares line through a figure of every frame (B, F)."""
    known = values.isfinite()
    count = known.sum(1).clamp_min(1)
    minutes = torch.arange(values.shape[1]) / MINUTE
    time = torch.where(known, minutes - (known * minutes).sum(1, keepdim=True) / count[:, None], 0)
    slope = (time * values.nan_to_num()).sum(1) / time.square().sum(1).clamp_min(1e-12)
    return _mean(Metric.SLOPE, slope, f"{UNITS[metric]} per minute", fields, note=metric.value)


def _mean(metric: Metric, values: Tensor, unit: str, fields: dict[str, Any], **more: Any) -> Row:
    """A row of the mean over clips (B,) with its interval."""
    low, high = interval(values)
    return Row(metric, values.nanmean().item(), unit, **fields, **more, low=low, high=high)


def draw_sheet(path: Path, videos: dict[str, Tensor], given: int) -> None:
    """Draw frames of each scene, numbered from the last given one, evenly spaced to the end."""
    scenes = range(len(next(iter(videos.values()))))
    rows = [(name, video[scene, given - 1 :]) for scene in scenes for name, video in videos.items()]
    contact_sheet(path, rows, SHEET_COLUMNS, group=len(videos))


if __name__ == "__main__":
    typer.run(main)
