"""Rows: written, read back equal, and refused with the line that is wrong."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmla_convert.errors import VmlaError
from vmla_convert.results import Metric, Row, put_rows, read_rows

ROW = Row(Metric.VELOCITY_ERROR, 0.125, "ratio", run="calibrated")

RESULTS = Path(__file__).parents[2] / "evals" / "results"

rows = st.builds(
    Row,
    metric=st.sampled_from(Metric),
    value=st.floats(allow_nan=False),
    unit=st.text(),
    run=st.text(),
    layer=st.none() | st.integers(0, 40),
    init=st.none() | st.text(),
    step=st.none() | st.integers(0),
)


def test_round_trip_over_several_appends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    written = [ROW, Row(Metric.CACHE_CUT, 0.875, "share", "a", seed=3, layer=0, latent="joint")]
    put_rows(path, written[:1])
    put_rows(path, written[1:])
    assert read_rows(path) == written


@given(rows)
def test_a_row_survives_its_json(row: Row) -> None:
    line = row.to_json()
    assert len(line.splitlines()) == 1
    assert Row(**json.loads(line)) == row


def test_fields_that_do_not_apply_are_left_out() -> None:
    assert set(json.loads(ROW.to_json())) == {"metric", "value", "unit", "run", "seed", "device"}


def test_zero_is_a_value_and_stays() -> None:
    row = Row(Metric.DRIFT, 0.0, "ratio", "a", layer=0, segment=0)
    fields = json.loads(row.to_json())
    assert fields["layer"] == 0
    assert fields["segment"] == 0


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        "3",
        '{"metric": "drift"}',
        '{"metric": "drift", "value": 1, "unit": "s", "run": "a", "colour": "red"}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    put_rows(path, [ROW])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(VmlaError, match=r"line 2 of .*rows\.jsonl is not a row"):
        read_rows(path)


def test_an_unknown_metric_is_named_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    put_rows(path, [ROW])
    with path.open("a") as file:
        file.write('{"metric": "velocity_eror", "value": 1, "unit": "1", "run": "a"}\n')
    with pytest.raises(VmlaError, match=r"line 2 of .*rows\.jsonl .*'velocity_eror'") as caught:
        read_rows(path)
    assert "velocity_error" in caught.value.hint


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_published_rows_can_be_read(path: Path) -> None:
    assert read_rows(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(VmlaError, match="no rows at") as caught:
        read_rows(tmp_path / "rows.jsonl")
    assert "vmla sweep" in caught.value.hint


def test_no_rows_leave_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    put_rows(path, [])
    assert read_rows(path) == []


def test_a_figure_that_is_measured_again_replaces_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    other = replace(ROW, step=1)
    put_rows(path, [ROW, other])
    put_rows(path, [replace(ROW, value=0.5)])
    assert read_rows(path) == [replace(ROW, value=0.5), other]


def test_processes_that_write_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: put_rows(path, [replace(ROW, step=step)]), range(24)))
    assert sorted(row.step or 0 for row in read_rows(path)) == list(range(24))
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
