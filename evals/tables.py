"""Write the tables of README.md and docs/, and the README's picture, from measured rows.

    python -m evals.tables            write them
    python -m evals.tables --check    write nothing; exit with code 1 if a file differs

A document holds each table between `<!-- rows: NAME -->` and `<!-- end of rows -->`, made by the
function NAME here, in evals/memory.py or in
evals/worlds/tables.py. Rows are those in evals/results/.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from evals.markdown import number, percent, table, times
from evals.memory import memory_by_device, streams_per_card
from evals.picture import PICTURES, draw, drawn_points
from evals.rows import (
    above_dense,
    codec_rows,
    dense_bytes,
    dense_rows,
    named,
    rows_of,
    size,
)
from evals.worlds import tables as worlds
from vmla_convert.results import Metric, Row

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "vmla_convert" / "demo" / "checkpoint" / "README.md",
    ROOT / "evals" / "worlds" / "teacher" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

LAYERS = 30
"""Layers of Wan 1.3B."""

SHORT_LIST = (31.5, 16.3, 10.0)
"""Sizes of the codec that the README shows, in bytes per token and layer."""

BLOCK = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)


def main(
    check: Annotated[bool, typer.Option("--check", help="Only name files that differ.")] = False,
) -> None:
    """Write the tables and the picture from the rows in evals/results/."""
    if check:
        differing = stale()
        for path in differing:
            typer.echo(f"{path.relative_to(ROOT)} is not what the rows say")
        raise typer.Exit(1 if differing else 0)
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text()))
    draw()


def stale() -> list[Path]:
    """Files that differ from what the rows say."""
    texts = [path for path in DOCUMENTS if filled(path.read_text()) != path.read_text()]
    points = drawn_points()
    return texts + [p for p in PICTURES.values() if not p.is_file() or points not in p.read_text()]


def filled(text: str) -> str:
    """A document with its tables made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]]()}\n{m[3]}", text)


# Tables


def short() -> str:
    """The README's table: a few sizes of the codec beside quantised dense caches."""
    rows = dense_rows() + [r for r in codec_rows() if r.bytes_per_token in SHORT_LIST]
    best = sorted(above_dense(rows), key=lambda pair: pair[1])
    return table(
        ["cache", "bytes per token and layer", "smaller", "flow loss above dense"],
        [
            ["dense, bfloat16", number(dense_bytes()), "1×", "0"],
            *[
                [named(r), number(size(r)), times(dense_bytes() / size(r)), percent(value)]
                for r, value in best
                if r.cache_dtype != "int8"
            ],
        ],
        "codec",
    )


def sizes() -> str:
    """Every measured size of the codec."""
    return error_table(codec_rows())


def uncalibrated() -> str:
    """The codec fitted without clips."""
    return error_table([r for r in rows_of("codec") if r.init == "assumed"])


def unquantised() -> str:
    """The codec with channels in the model's dtype."""
    return error_table([r for r in rows_of("codec") if r.cache_dtype == "model"])


def calibration_clips() -> str:
    """Codecs fitted to other numbers, lengths and sizes of samples."""
    rows = rows_of("clips")
    sets = dict.fromkeys((r.run, r.frames, r.note) for r in rows)
    sizes = sorted({size(r) for r in rows}, reverse=True)
    return table(
        ["clips", "frames", "latent size", *(f"velocity error at {s:g} bytes" for s in sizes)],
        [
            [key[0], str(key[1]), (key[2] or "").replace("x", " × "), *errors(rows, key, sizes)]
            for key in sets
        ],
        "clips",
    )


def errors(
    rows: list[Row], key: tuple[str, int | None, str | None], sizes: list[float]
) -> list[str]:
    """Median error of a set of clips at each size."""
    found = [r for r in rows if (r.run, r.frames, r.note) == key]
    return [number(median(r.value for r in found if size(r) == each)) for each in sizes]


def quantised_dense() -> str:
    """The dense cache, quantised in place."""
    return error_table(dense_rows())


def equal_error() -> str:
    """Bytes of a quantised dense cache over bytes of the codec at the same error."""
    dense = {r.cache_dtype: size(r) for r in dense_rows()}
    return table(
        ["dense cache in", "its bytes", "codec's bytes at the same velocity error", "ratio"],
        [
            [r.run, number(dense[r.run]), number(size(r)), times(r.value)]
            for r in rows_of("codec")
            if r.metric == Metric.BYTES_RATIO_AT_ERROR
        ],
        "codec",
    )


def nested() -> str:
    """One codec at many ranks beside codecs of exactly these ranks."""
    (row,) = (r for r in rows_of("codec") if r.metric == Metric.NESTED_DIFFERENCE)
    return table(
        ["compared", "largest relative difference in velocity error"],
        [["one codec at eight ranks, eight codecs of these ranks", number(row.value)]],
        "codec",
    )


def lora() -> str:
    """A codec that was fitted before a LoRA, used with the LoRA."""
    return table(
        ["LoRA trained to make", "bytes per token and layer", "error, over a codec fitted with it"],
        [
            [f"{r.note} clips", number(size(r)), times(r.value)]
            for r in rows_of("codec")
            if r.metric == Metric.LORA_ERROR_RATIO
        ],
        "codec",
    )


def recovery() -> str:
    """Codec and MLA layers before and after recovery."""
    rows = [r for r in rows_of("quickstart") if r.metric == Metric.VELOCITY_ERROR and r.product]
    steps: dict[tuple[str, float], dict[int, float]] = {}
    for r in rows:
        if r.step is not None and (r.product == "mla" or r.cache_dtype == "auto"):
            steps.setdefault((named(r), size(r)), {})[r.step] = r.value
    return table(
        ["cache", "bytes per token and layer", "velocity error, converted", "recovered"],
        [
            [name, number(nbytes), number(errors[0]), number(errors[max(errors)])]
            for (name, nbytes), errors in sorted(steps.items(), key=lambda item: item[0][1])
        ],
        "quickstart",
    )


def mla_recovery() -> str:
    """MLA layers of the demo model before and after a longer recovery."""
    return worlds.recovery_table("mla_recovery")


def prediction() -> str:
    """Bits that predicting channels from other layers and frames would save."""
    return worlds.prediction_table("prediction")


def refinements() -> str:
    """Other ways of fitting a codec to the demo model."""
    return worlds.refinements_table("refinements")


def minute() -> str:
    """The last quarter of a minute of the demo world."""
    return worlds.minute_table("rollout_digits")


def prompt_switch() -> str:
    """The digit of the demo world after its prompt was changed."""
    return worlds.switch_table("rollout_switch")


def scale() -> str:
    """Time, memory and disk of a conversion at true sizes."""
    found = {r.metric: r.value for r in rows_of("scale_1.3b") if "," not in r.run}
    return table(
        ["measured", "value"],
        [
            ["time", f"{found[Metric.CONVERT_SECONDS]:.0f} s"],
            ["peak resident memory", f"{found[Metric.PEAK_RSS_BYTES] / 1e9:.2f} GB"],
            ["size of the codec's folder", f"{found[Metric.WRITTEN_BYTES] / 1e6:.0f} MB"],
        ],
        "scale_1.3b",
    )


def verification() -> str:
    """The time that comparing checksums adds to a load of a true-size checkpoint."""
    rows = [r for r in rows_of("verify_cost") if r.metric == Metric.SECONDS_RATIO]
    cells = [[r.run, r.unit, f"{r.value:.3f}", r.note or ""] for r in rows]
    return table(["load", "ratio", "median", "machine"], cells, "verify_cost")


def host_errors() -> str:
    """Velocity errors of codecs that were fitted in a running program."""
    rows = [r for r in rows_of("host") if r.metric == Metric.VELOCITY_ERROR]
    best = {size(r): r.value for r in rows if r.run == "convert"}
    fitted_by = {
        "host": "`vmla.fit`",
        "host, gradients": "`vmla.fit`, observed with gradients",
        "convert": "`vmla convert`",
    }
    return table(
        ["codec of", "bytes per token", "velocity error", "times that of `vmla convert`"],
        [
            [fitted_by[r.run], f"{size(r):g}", number(r.value), times(r.value / best[size(r)])]
            for r in rows
        ],
        "host",
    )


def host_costs() -> str:
    """Time and bytes of a program's layer with a codec's cache and with its own."""
    rows = [r for r in rows_of("host") if r.metric != Metric.VELOCITY_ERROR]
    own, ours = ({r.metric: r.value for r in rows if r.run == run} for run in ("dense", "host"))
    seconds, nbytes, peak = Metric.STEP_SECONDS, Metric.CACHE_BYTES, Metric.PEAK_DEVICE_BYTES
    return table(
        ["measured", "the program's dense cache", "codec", "ratio"],
        [
            [
                "processor seconds of a step",
                f"{own[seconds]:.1f}",
                f"{ours[seconds]:.1f}",
                times(ours[Metric.SECONDS_RATIO]),
            ],
            [
                "MB of the layer's cache, float32",
                f"{own[nbytes] / 1e6:.1f}",
                f"{ours[nbytes] / 1e6:.1f}",
                times(ours[nbytes] / own[nbytes]),
            ],
            [
                "MB of tensors that a step makes, at most",
                f"{own[peak] / 1e6:.1f}",
                f"{ours[peak] / 1e6:.1f}",
                times(ours[peak] / own[peak]),
            ],
            [
                f"MB of {LAYERS} layers: caches, and one step",
                f"{(LAYERS * own[nbytes] + own[peak]) / 1e6:.0f}",
                f"{(LAYERS * ours[nbytes] + ours[peak]) / 1e6:.0f}",
                times((LAYERS * ours[nbytes] + ours[peak]) / (LAYERS * own[nbytes] + own[peak])),
            ],
        ],
        "host",
    )


def teacher() -> str:
    """How well the demo model itself does."""
    whole = [r for r in rows_of("teacher_16_seeds") if r.segment is None]

    def mean(metric: Metric, run: str = "dense") -> str:
        values = [r.value for r in whole if r.metric == metric and r.run == run]
        average = number(sum(values) / len(values))
        spread = f" ({number(min(values))} to {number(max(values))} by seed)"
        return average + (spread if len(values) > 1 else "")

    return table(
        ["measured", "demo model", "true clips"],
        [
            ["flow loss", mean(Metric.FLOW_LOSS), ""],
            ["flow loss with another clip's past", mean(Metric.FLOW_LOSS_OTHER_PAST), ""],
            *[
                [name, mean(metric), mean(metric, "truth")]
                for name, metric in (
                    ("rollouts: share of frames with the right digit", Metric.DIGIT_ACCURACY),
                    ("rollouts: background PSNR in dB", Metric.BACKGROUND_PSNR),
                )
            ],
        ],
        "teacher_16_seeds",
    )


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block
    for block in (
        short,
        sizes,
        unquantised,
        uncalibrated,
        calibration_clips,
        quantised_dense,
        equal_error,
        nested,
        lora,
        recovery,
        mla_recovery,
        prediction,
        refinements,
        minute,
        prompt_switch,
        scale,
        verification,
        host_errors,
        host_costs,
        teacher,
        memory_by_device,
        streams_per_card,
    )
} | worlds.BLOCKS


def error_table(rows: Iterable[Row]) -> str:
    """Velocity error and flow loss at each size."""
    by_size: dict[tuple[str, float], dict[str, float]] = {}
    for r in rows:
        by_size.setdefault((named(r), size(r)), {})[r.metric] = r.value
    measured = ["velocity error", "flow loss above dense"]
    return table(
        ["cache", "bytes per token and layer", "smaller", *measured],
        [
            [
                name,
                number(nbytes),
                times(dense_bytes() / nbytes),
                number(found[Metric.VELOCITY_ERROR]),
                percent(found[Metric.FLOW_LOSS_ABOVE_DENSE]),
            ]
            for (name, nbytes), found in by_size.items()
        ],
        "codec",
    )


if __name__ == "__main__":
    typer.run(main)
