"""Write the tables of README.md and docs/, and the README's picture, from measured rows.

    python -m evals.tables            write them
    python -m evals.tables --check    write nothing; exit with code 1 if a file differs

A document holds each table between `<!-- rows: NAME -->` and `<!-- end of rows -->`, made by the
function NAME here or in evals/memory.py. Rows are those in evals/results/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from evals.memory import memory_by_device, streams_per_card
from vmla_convert.results import Metric, Row, read_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evals" / "results"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "vmla_convert" / "demo" / "checkpoint" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PICTURES = {name: ROOT / "docs" / "images" / f"error_{name}.svg" for name in ("light", "dark")}

COMMANDS = {
    "codec": "python -m evals.codec --out evals/results/codec.jsonl",
    "clips": (
        "python -m evals.clips --out evals/results/clips.jsonl --picture docs/images/clips.png"
    ),
    "prediction": "python -m evals.prediction --out evals/results/prediction.jsonl",
    "host": "python -m evals.host --out evals/results/host.jsonl",
    "quickstart": "vmla run recipes/quickstart.toml -o runs/quickstart",
    "rollout_digits": "python -m evals.rollout runs/kv --world digits --clips 8 --out "
    "evals/results/rollout_digits.jsonl",
    "scale_1.3b": "python -m evals.scale 1.3b --out evals/results/scale_1.3b.jsonl",
    "verify_cost": "python -m evals.verify_cost --out evals/results/verify_cost.jsonl --rounds 3",
    "teacher_16_seeds": "python -m evals.teacher --seeds 16 --out "
    "evals/results/teacher_16_seeds.jsonl",
}
"""The command that made each file of rows."""

LAST_SEGMENT = 3
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


def prediction() -> str:
    """Bits that predicting channels from other layers and frames would save."""
    rows = rows_of("prediction")
    sizes = sorted({size(r) for r in rows}, reverse=True)
    saved = {(r.note, size(r)): f"{100 * r.value:.0f} %" for r in rows}
    return table(
        ["predicted from", *(f"bits saved at {number(s)} bytes" for s in sizes)],
        [
            [str(name), *(saved[name, s] for s in sizes)]
            for name in dict.fromkeys(r.note for r in rows)
        ],
        "prediction",
    )


def minute() -> str:
    """The last quarter of a minute, dense and codec, against the dense model's interval."""
    rows = [r for r in rows_of("rollout_digits") if r.segment == LAST_SEGMENT]
    dense = {r.metric: r for r in rows if r.run == "dense"}
    sizes = sorted({size(r) for r in rows if r.run == "codec"}, reverse=True)
    codec = {(r.metric, size(r)): r for r in rows if r.run == "codec"}

    def cell(metric: Metric, nbytes: float) -> str:
        own, row = dense[metric], codec[metric, nbytes]
        assert own.low is not None and own.high is not None
        inside = own.low <= row.value <= own.high
        return number(row.value) if inside else f"**{number(row.value)}**"

    return table(
        ["last quarter of a minute", "dense", "its 95 % interval", *map(_bytes, sizes)],
        [
            [
                f"`{metric}`",
                number(row.value),
                f"{number(row.low or 0)} to {number(row.high or 0)}",
                *(cell(metric, nbytes) for nbytes in sizes),
            ]
            for metric, row in dense.items()
        ],
        "rollout_digits",
    )


def _bytes(nbytes: float) -> str:
    return f"codec, {number(nbytes)} bytes"


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
        prediction,
        minute,
        scale,
        verification,
        host_errors,
        host_costs,
        teacher,
        memory_by_device,
        streams_per_card,
    )
}


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


def table(header: list[str], lines: list[list[str]], source: str) -> str:
    """A Markdown table, and the command that made its rows."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in (header, marks, *lines)),
            "",
            f"Rows: `evals/results/{source}.jsonl`, made by `{COMMANDS[source]}`.",
        ]
    )


# Rows


def rows_of(name: str) -> list[Row]:
    """Rows of one file."""
    return read_rows(RESULTS / f"{name}.jsonl")


def codec_rows() -> list[Row]:
    """Errors of the quantised codec on the clips that it was fitted for, by size."""
    rows = [r for r in rows_of("codec") if r.cache_dtype == "auto" and r.note is None]
    return [r for r in rows if r.init == "calibrated"]


def dense_rows() -> list[Row]:
    """Errors of the dense cache quantised in place."""
    return [r for r in rows_of("codec") if r.run.startswith("dense")]


def above_dense(rows: Iterable[Row]) -> list[tuple[Row, float]]:
    """Rows of flow loss, and how far each lies above the dense model's."""
    return [(r, r.value) for r in rows if r.metric == Metric.FLOW_LOSS_ABOVE_DENSE]


def mla_above_dense() -> list[tuple[Row, float]]:
    """MLA layers before recovery, and how far their flow loss lies above the dense model's."""
    rows = [r for r in rows_of("quickstart") if r.metric == Metric.FLOW_LOSS]
    (dense,) = (r.value for r in rows if r.run == "dense")
    return [(r, r.value / dense - 1) for r in rows if r.product == "mla" and r.step == 0]


def dense_bytes() -> float:
    """Bytes per token and layer of the demo model's dense cache."""
    return next(size(r) for r in rows_of("quickstart") if r.run == "dense")


def size(row: Row) -> float:
    """Bytes per token and layer."""
    assert row.bytes_per_token is not None
    return row.bytes_per_token


def named(row: Row) -> str:
    """Return the name of a row's cache in tables."""
    if row.product == "mla":
        return "MLA, the paper's init" if row.init == "spectral" else f"MLA, {row.init} init"
    if row.init == "assumed":
        return "codec, without calibration"
    if row.product == "codec":
        return "**codec**" if row.cache_dtype == "auto" else "codec, unquantised"
    return f"dense, quantised to {row.cache_dtype}"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def times(ratio: float) -> str:
    """A ratio, as in 20.3×."""
    return f"{ratio:.3g}×"


def percent(share: float) -> str:
    """A share of the dense model's loss, with its sign."""
    value = 100 * share
    return (f"{value:+.0f}" if abs(value) >= 100 else f"{value:+#.2g}".rstrip(".")) + " %"


# The picture


def curves() -> dict[str, list[tuple[float, float]]]:
    """Bytes per token and layer, and flow loss above dense in percent, of each curve."""
    found = {
        "cache codec": above_dense(codec_rows()),
        "dense cache, quantised": above_dense(dense_rows()),
        **{named(r): [(r, value)] for r, value in mla_above_dense()},
    }
    return {
        name: sorted((round(size(r), 1), round(100 * value, 4)) for r, value in pairs)
        for name, pairs in found.items()
    }


def drawn_points() -> str:
    """The points as the picture's description holds them."""
    return json.dumps(curves()).replace('"', "'")


def draw() -> None:
    """Draw flow loss over bytes, once for light pages and once for dark ones."""
    import matplotlib.pyplot as plt

    for name, path in PICTURES.items():
        ink, colours = INKS[name]
        style: dict[Any, Any] = {
            "svg.fonttype": "none",
            "svg.hashsalt": "vmla",
            "font.size": 11,
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
            "axes.edgecolor": ink,
        }
        with plt.rc_context(style):
            figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
            for (label, points), colour in zip(curves().items(), colours, strict=True):
                axes.plot(*zip(*points, strict=True), "o-", color=colour)
                axes.annotate(label, points[0], (9, 3), textcoords="offset points", color=colour)
            axes.axvline(dense_bytes(), color=ink, linestyle=":")
            axes.annotate("dense, bfloat16 ", (dense_bytes(), 1.3), color=ink, ha="right")
            axes.set(xscale="log", yscale="log", xlabel="bytes per token and layer")
            axes.set_ylabel("flow loss above dense")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g} %")
            axes.set_xticks([6, 12, 25, 50, 100, 200, 400, 640], minor=False)
            axes.minorticks_off()
            axes.grid(color=ink, alpha=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            path.parent.mkdir(exist_ok=True)
            description = drawn_points()
            figure.savefig(
                path, transparent=True, metadata={"Date": None, "Description": description}
            )
            plt.close(figure)


INKS = {
    "light": ("#24292f", ("#0072b2", "#d55e00", "#7a7a7a", "#009e73")),
    "dark": ("#d8dee4", ("#56b4e9", "#e69f00", "#a0a0a0", "#2fd0a0")),
}
"""Colour of text and axes, and of each curve."""


if __name__ == "__main__":
    typer.run(main)
