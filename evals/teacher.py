"""Score a dense model of moving digits: does it need its past, and do its rollouts hold?

    python -m evals.teacher --out rows.jsonl

* `flow_loss` on held-out clips, and `flow_loss_other_past` with another clip's past in the cache;
* `background_psnr` and `digit_accuracy` of rollouts of every digit, whole and by segment. The
  background is compared with the first chunk's; a small classifier reads the digit;
* the same two for true clips (`run` = `truth`), as their ceiling.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import DataConfig, EvaluateConfig
from vmla_convert.console import out
from vmla_convert.demo.judge import background_psnr, read_digits
from vmla_convert.generating.generate import generate_pixels
from vmla_convert.loading.load import load
from vmla_convert.measuring.evaluate import HeldOut, dense_rows, rollout_rows
from vmla_convert.media.clips import DemoClips
from vmla_convert.results import Metric, Row, put_rows

HELD_OUT_SEED = 2


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    checkpoint: Annotated[str, typer.Option(help="Dense checkpoint, or 'demo'.")] = "demo",
    clips: Annotated[int, typer.Option(min=2, help="Number of held-out clips.")] = 64,
    frames: Annotated[int, typer.Option(min=1, help="Latent frames of each rollout.")] = 20,
    seeds: Annotated[int, typer.Option(min=0, help="Number of rollouts of each digit.")] = 4,
) -> None:
    """Score a dense model of moving digits on held-out clips and on its own rollouts.

    Flow loss is measured with the clip's own past and with another clip's past.
    Rollouts of every digit are scored by the stability of their background and
    by a classifier that reads the digit.
    """
    model = load(checkpoint)
    held_out = HeldOut(model, EvaluateConfig(clips, DataConfig(seed=HELD_OUT_SEED)))
    prompts = [str(digit) for digit in range(10)]
    rows = dense_rows(model, held_out) + truth_rows(frames, clips, model.config.chunk_frames)
    with out.progress() as progress:
        for seed in range(seeds):
            video = generate_pixels(
                model, prompts, frames, seed, progress, f"rolling out, seed {seed}"
            )
            rows += rollout_rows(video, prompts, model.config, seed)
    put_rows(rows_file, rows)
    show(rows)


def truth_rows(frames: int, clips: int, chunk_frames: int) -> list[Row]:
    """Digit accuracy and background PSNR of true held-out clips."""
    truth = DemoClips(DataConfig(frames=frames, seed=HELD_OUT_SEED)).clips(0, clips, "held_out")
    hits = (read_digits(truth.video) == truth.labels[:, None]).float().mean().item()
    psnr = background_psnr(truth.video, chunk_frames)[:, chunk_frames:].nanmean().item()
    return [
        Row(Metric.DIGIT_ACCURACY, hits, "share of frames", "truth", frames=frames),
        Row(Metric.BACKGROUND_PSNR, psnr, "dB", "truth", frames=frames),
    ]


def show(rows: list[Row]) -> None:
    """Print the figures of whole rollouts, averaged over seeds."""
    whole = [row for row in rows if row.segment is None]
    keys = list(dict.fromkeys((row.run, row.metric, row.unit) for row in whole))
    cells: list[list[str]] = []
    for run, metric, unit in keys:
        values = [row.value for row in whole if (row.run, row.metric) == (run, metric)]
        cells.append([run, metric, f"{sum(values) / len(values):.4g}", unit])
    out.table("Demo teacher", ["run", "metric", "value", "unit"], cells)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
