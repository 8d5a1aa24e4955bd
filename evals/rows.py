"""Rows in evals/results/, and which of them tables and pictures show."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vmla_convert.results import Metric, Row, read_rows

RESULTS = Path(__file__).parent / "results"


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
