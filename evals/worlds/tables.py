"""Tables of the photograph world, and of both worlds side by side, from rows in evals/results/."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from evals.codec import DEMO_BYTES
from evals.markdown import number, percent, table, times
from evals.memory_for_bytes import ALL_OLD, DENSE_TOKEN_BYTES, OLD, cache_kilobytes
from evals.rollout import SEGMENTS
from evals.rows import named, rows_of, size
from vmla_convert.results import Metric, Row

FILES = {"digits": "codec", "photographs": "photographs_codec"}
"""Rows of the codec in each world."""
DENSE_BYTES = {"digits": DEMO_BYTES, "photographs": DENSE_TOKEN_BYTES}
SWEEPS = {"digits": "quickstart", "photographs": "photographs"}
"""Rows of a sweep in each world."""
SPECTRA = {"weights": "weights", "weights_x_activations": "activations"}
CODEC, SAME_SIZE = "**codec**", 0.02
"""Name of the codec in tables, and how far sizes may differ that count as equal."""


def two_worlds() -> str:
    """Flow loss above dense at equal shares of the dense bytes, in both worlds."""
    digits, photographs = (_above_dense(world) for world in FILES)
    lines: list[list[str]] = []
    for key, (ratio, loss) in sorted(photographs.items(), key=lambda item: item[1]):
        if key in digits:
            smaller = dict.fromkeys(map(times, (digits[key][0], ratio)))
            lines.append([key[0], " and ".join(smaller), percent(digits[key][1]), percent(loss)])
    header = ["cache", "smaller", *(f"flow loss above dense, {world}" for world in FILES)]
    return table(header, lines, "photographs_codec")


def two_worlds_equal() -> str:
    """Bytes of a quantised dense cache over bytes of the codec at the same error."""
    ratios = {
        world: {
            row.run: row.value for row in rows_of(file) if row.metric == Metric.BYTES_RATIO_AT_ERROR
        }
        for world, file in FILES.items()
    }
    return table(
        ["dense cache in", *(f"its bytes over the codec's, {world}" for world in FILES)],
        [
            [dtype, *(times(ratios[world][dtype]) for world in FILES)]
            for dtype in ratios["photographs"]
        ],
        "photographs_codec",
    )


def photographs_layers() -> str:
    """Codec and MLA layers of the photograph world, as they are converted."""
    rows = [r for r in rows_of("photographs") if not r.step]
    losses = {_key(r): r.value for r in rows if r.metric == Metric.FLOW_LOSS}
    errors = {_key(r): r.value for r in rows if r.metric == Metric.VELOCITY_ERROR}
    codec = {nbytes: error for (name, nbytes), error in errors.items() if name == CODEC}
    lines: list[list[str]] = []
    for (name, nbytes), error in sorted(errors.items(), key=lambda item: item[1]):
        above = losses[name, nbytes] / losses["dense", DENSE_TOKEN_BYTES] - 1
        equal = [e for own, e in codec.items() if abs(own / nbytes - 1) < SAME_SIZE]
        ratio = times(error / equal[0]) if equal and name != CODEC else ""
        lines.append([name, number(nbytes), number(error), percent(above), ratio])
    header = ["cache", "bytes per token and layer", "velocity error", "flow loss above dense"]
    return table([*header, "error over the codec's in equal bytes"], lines, "photographs")


def spectra() -> str:
    """Directions that hold 99 % of the energy of keys and values, by layer, in both worlds."""
    found = {
        (world, row.run, row.layer): f"{row.value:.0f}"
        for world, file in SWEEPS.items()
        for row in rows_of(file)
        if row.metric == Metric.EFFECTIVE_RANK_99 and row.product is None
    }
    columns = [(world, run) for world in SWEEPS for run in SPECTRA]
    layers = sorted({layer for _, _, layer in found if layer is not None})
    return table(
        ["layer", *(f"{SPECTRA[run]}, {world}" for world, run in columns)],
        [
            [str(layer), *(found.get((*column, layer), "–") for column in columns)]
            for layer in layers
        ],
        "photographs",
    )


def memory_for_bytes() -> str:
    """Quality of places that were seen long ago, for caches of some bytes."""
    rows = [r for r in rows_of("memory_for_bytes") if r.note == ALL_OLD]
    lines = [
        [
            _name(r),
            str(r.window_frames),
            number(size(r)),
            number(cache_kilobytes(r)),
            f"{r.value:.2f}",
        ]
        for r in sorted(rows, key=cache_kilobytes)
    ]
    return table(
        [
            "cache",
            "window in frames",
            "bytes per token and layer",
            "kB per layer",
            f"PSNR of places last seen {OLD} or more frames ago, in dB",
        ],
        lines,
        "memory_for_bytes",
    )


def teacher_by_age() -> str:
    """How well the model of the photograph world draws places, by the time since they were seen."""
    rows = [r for r in rows_of("memory_for_bytes") if r.run == "dense" and r.note != ALL_OLD]
    windows = sorted({r.window_frames or 0 for r in rows})
    ages = sorted({r.age or 0 for r in rows})
    found = {(r.age, r.window_frames): f"{r.value:.1f}" for r in rows}
    ends = [
        *(f"{a} to {b - 1}" for a, b in pairwise(ages[1:])),
        f"{ages[-1]} on",
    ]
    return table(
        ["frames since a place was seen", *(f"window {w}" for w in windows)],
        [
            [name, *(found.get((age, window), "–") for window in windows)]
            for name, age in zip(["never seen", *ends], ages, strict=True)
        ],
        "memory_for_bytes",
    )


def teacher_training() -> str:
    """Held-out flow loss of the photograph world's model while it was trained."""
    rows = rows_of("teacher_photographs")
    return table(
        ["phase", "frames of a clip", "step", "flow loss on held-out clips"],
        [[r.run.split()[-1], str(r.frames), str(r.step), number(r.value)] for r in rows],
        "teacher_photographs",
    )


def teacher_scores() -> str:
    """Flow loss of the photograph world's model with its own past and with another."""
    rows = {r.metric: r.value for r in rows_of("photographs") if r.run == "dense"}
    return table(
        ["measured on held-out clips of 48 frames", "value"],
        [
            ["flow loss", number(rows[Metric.FLOW_LOSS])],
            ["flow loss with another clip's past", number(rows[Metric.FLOW_LOSS_OTHER_PAST])],
        ],
        "photographs",
    )


def needles() -> str:
    """Quality of a place that was seen once and is asked for."""

    def column(nbytes: float) -> str:
        return "dense" if nbytes == DENSE_TOKEN_BYTES else f"codec, {number(nbytes)} bytes"

    def cell(row: Row) -> str:
        return f"{row.value:.1f} ({row.low:.1f} to {row.high:.1f})"

    return _by_size("needle", "place", column, cell)


def photographs_recovery() -> str:
    """MLA layers of the photograph world before and after recovery."""
    return recovery_table("photographs_recovery")


def recovery_table(file: str) -> str:
    """Errors of MLA layers before and after recovery."""
    rows = rows_of(file)
    (dense,) = (r.value for r in rows if r.run == "dense")
    found = {(r.metric, r.step): r.value for r in rows if r.product}
    steps = sorted({step for _, step in found if step is not None})
    return table(
        ["steps of recovery", "velocity error", "flow loss above dense"],
        [
            [
                str(step),
                number(found[Metric.VELOCITY_ERROR, step]),
                percent(found[Metric.FLOW_LOSS, step] / dense - 1),
            ]
            for step in steps
        ],
        file,
    )


def minute_photographs() -> str:
    """The last quarter of a minute in the photograph world."""
    return minute_table("rollout_photographs")


def minute_table(file: str) -> str:
    """The last quarter of a minute, conversions against the dense model's interval."""
    rows = [r for r in rows_of(file) if r.segment == SEGMENTS - 1]
    return _against_dense(file, rows, "last quarter of a minute", lambda r: f"`{r.metric}`")


def switch_table(file: str) -> str:
    """The digit after a change of prompt, conversions against the dense model's interval."""

    def label(row: Row) -> str:
        assert row.frames is not None and row.segment is not None
        count = row.frames // 2 // SEGMENTS
        return f"{row.note}, frames {row.segment * count + 1} to {(row.segment + 1) * count}"

    return _against_dense(file, rows_of(file), "after the switch", label)


def _against_dense(file: str, rows: list[Row], heading: str, label: Callable[[Row], str]) -> str:
    """Figures of conversions beside the dense model's; one outside of its interval is bold."""
    dense = {label(r): r for r in rows if r.run == "dense"}
    found = {(_column(r), label(r)): r for r in rows if r.run != "dense"}

    def cell(column: str, name: str) -> str:
        own, row = dense[name], found[column, name]
        assert own.low is not None and own.high is not None
        inside = own.low <= row.value <= own.high
        return number(row.value) if inside else f"**{number(row.value)}**"

    columns = list(dict.fromkeys(column for column, _ in found))
    return table(
        [heading, "dense", "its 95 % interval", *columns],
        [
            [
                name,
                number(row.value),
                f"{number(row.low or 0)} to {number(row.high or 0)}",
                *(cell(column, name) for column in columns),
            ]
            for name, row in dense.items()
        ],
        file,
    )


def photographs_refinements() -> str:
    """Other ways of fitting a codec, in the photograph world."""
    return refinements_table("photographs_refinements")


def refinements_table(file: str) -> str:
    """Other ways of fitting a codec: errors over the codec's, and bits that positions save."""
    plain = {size(r): r.value for r in rows_of(file) if r.note == "as fitted"}

    def cell(row: Row) -> str:
        if row.metric == Metric.BITS_SAVED:
            return f"{100 * row.value:.1f} % fewer bits"
        return f"{row.value / plain[size(row)]:.3f}× the error"

    return _by_size(file, "way", lambda nbytes: f"{number(nbytes)} bytes", cell)


def photographs_prediction() -> str:
    """Bits that predicting channels would save, in the photograph world."""
    return prediction_table("photographs_prediction")


def prediction_table(file: str) -> str:
    """Bits that predicting channels from other layers and frames would save."""
    return _by_size(
        file,
        "predicted from",
        lambda nbytes: f"bits saved at {number(nbytes)} bytes",
        lambda row: f"{100 * row.value:.0f} %",
    )


def _by_size(
    file: str, heading: str, column: Callable[[float], str], cell: Callable[[Row], str]
) -> str:
    """A line for each note of a file's rows, with a column for each size, the largest first."""
    rows = rows_of(file)
    sizes = sorted({size(r) for r in rows}, reverse=True)
    found = {(str(r.note), size(r)): cell(r) for r in rows}
    return table(
        [heading, *map(column, sizes)],
        [
            [name, *(found[name, nbytes] for nbytes in sizes)]
            for name in dict.fromkeys(name for name, _ in found)
        ],
        file,
    )


def _above_dense(world: str) -> dict[tuple[str, str], tuple[float, float]]:
    """How many times smaller a cache is, and its flow loss above dense, by name and size."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for r in rows_of(FILES[world]):
        if r.metric == Metric.FLOW_LOSS_ABOVE_DENSE and r.init != "assumed" and r.note is None:
            ratio = DENSE_BYTES[world] / size(r)
            found[named(r), times(ratio) if r.product else ""] = (ratio, r.value)
    return found


def _name(row: Row) -> str:
    return "dense" if row.run == "dense" else named(row)


def _column(row: Row) -> str:
    """Name and size of a conversion at the head of a column."""
    return f"{'MLA' if row.product == 'mla' else row.product}, {number(size(row))} bytes"


def _key(row: Row) -> tuple[str, float]:
    return _name(row), size(row)


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block
    for block in (
        two_worlds,
        two_worlds_equal,
        photographs_layers,
        photographs_recovery,
        spectra,
        memory_for_bytes,
        teacher_by_age,
        teacher_training,
        teacher_scores,
        needles,
        minute_photographs,
        photographs_refinements,
        photographs_prediction,
    )
}
