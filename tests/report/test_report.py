"""The report says the right size, shows every figure, and leaves out what was not measured."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from report_rows import (
    CODEC_POINT,
    DENSE_BYTES,
    DENSE_ERRORS,
    DENSE_LOSS,
    RANKS,
    SIZES,
    STEPS,
    codec_config,
    codec_error,
    codec_rows,
    dense_config,
    dense_rows,
    full_rows,
    measured,
    mla_config,
    point_rows,
    recovered,
    rollout,
    weight_spectra,
)

from vmla_convert.config import CachePolicy, CodecConfig, RuntimeConfig, Sizes
from vmla_convert.errors import MissingExtraError, VmlaError
from vmla_convert.report.answer import answer_reasons, answer_sentence, recommend
from vmla_convert.report.charts import draw_charts, spectra_notes
from vmla_convert.report.plots import Chart, Line, chart_csv, draw_chart, spread_apart
from vmla_convert.report.report import write_report
from vmla_convert.report.sections import PLOTS
from vmla_convert.report.settings import Setting, read_dense, read_settings
from vmla_convert.report.tables import (
    decisive_table,
    equal_errors,
    failed_table,
    memory_table,
    provenance_table,
    speed_table,
    streams_table,
)
from vmla_convert.results import Metric, Row, put_rows

Text = pytest.importorskip("matplotlib.text").Text

BOUND = 0.15
VOID_TAGS = {"meta", "img", "br", "link", "hr"}
ROOT = Path(__file__).parents[2]


def sized(nbytes: float, dtype: str = "auto") -> RuntimeConfig:
    return RuntimeConfig(Sizes(nbytes), cache_dtype=dtype)  # pyright: ignore[reportArgumentType]


def report_on(folder: Path, rows: Iterable[Row]) -> dict[str, Path]:
    put_rows(folder / "rows.jsonl", rows)
    return {path.name: path for path in write_report(folder)}


def best_of(rows: list[Row], bound: float = BOUND) -> Setting:
    best = recommend(read_settings(rows), bound)
    assert best is not None
    return best.setting


class Page(HTMLParser):
    """Collects texts and links of a page, and checks that its tags balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.texts: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# What rows become.


def test_a_codec_is_a_setting_for_each_size_and_dtype() -> None:
    settings = read_settings(codec_rows())
    found = {(each.nbytes, each.key.dtype) for each in settings}
    assert found == {(size, kept) for size in SIZES for kept in ("", "model")}
    assert {each.key.point for each in settings} == {CODEC_POINT}
    assert [each.nbytes for each in settings] == sorted(each.nbytes for each in settings)


def test_a_dtype_that_means_nothing_makes_no_setting() -> None:
    auto, model = RuntimeConfig(), RuntimeConfig(cache_dtype="model")
    for config in (mla_config("calibrated", 8, 4), codec_config()):
        rows = [*measured(config, 0.1, 0), *measured(config, 0.1, 0, runtime=auto)]
        assert len(read_settings(rows)) == 1
    mla = mla_config("calibrated", 8, 4)
    rows = [*measured(mla, 0.1, 0), *measured(mla, 0.1, 0, runtime=model)]
    assert len(read_settings(rows)) == 1
    plain = [*dense_rows(), *measured(dense_config(), 0.0, None, runtime=model)]
    assert len(read_settings(plain)) == len(DENSE_ERRORS)


def test_errors_are_medians_over_seeds_and_divergence_shows() -> None:
    errors = (0.02, 0.05, 0.03)
    rows = [row for seed, e in enumerate(errors) for row in point_rows([e, math.nan], seed=seed)]
    (setting,) = read_settings([*dense_rows()[:4], *rows])
    assert setting.seeds == 3
    assert setting.errors[0] == 0.03
    assert (setting.last_step, setting.error) == (10, math.inf)
    last = decisive_table(rows)[-1]
    assert last[-2:] == ["diverged", "–"]
    (whole,) = read_settings([row for row in rows if not row.step])
    assert whole.error_spread == (0.02, 0.05)


def test_losses_are_shares_of_the_dense_models() -> None:
    rows = [*dense_rows()[:4], *point_rows([0.01])]
    assert read_settings(rows)[-1].losses == {0: pytest.approx(0.2)}
    dense = read_dense(rows)
    assert dense is not None
    assert (dense.nbytes, dense.flow_loss, dense.flow_loss_other_past) == (
        DENSE_BYTES,
        DENSE_LOSS,
        0.4,
    )
    assert read_dense(point_rows([0.01])) is None
    assert read_settings(point_rows([0.01]))[0].losses == {}


def test_frames_that_are_kept_dense_too_cost_what_they_cost() -> None:
    policy = CachePolicy(12, 2, "relative", dense_recent_frames=3)
    config = replace(codec_config(), cache=policy)
    rows = [
        *dense_rows(),
        *measured(codec_config(), 0.02, 0, runtime=sized(20)),
        *measured(config, 0.01, 0, runtime=sized(20)),
    ]
    one, other = (each for each in read_settings(rows) if each.product == "codec")
    assert (one.nbytes, other.nbytes) == (20, 20 + 3 / 12 * DENSE_BYTES)
    assert other.cut == pytest.approx(1 - other.nbytes / DENSE_BYTES)
    assert one.method != other.method


def test_methods_are_told_apart_by_what_differs() -> None:
    short = [replace(row, recovery_steps=None, point="short") for row in codec_rows()]
    white = replace(codec_config(), codec=CodecConfig(128, Sizes(20.0), calibrated=False))
    rows = [*codec_rows(), *short, *measured(white, 0.5, 0)]
    methods = {each.method for each in read_settings(rows)}
    assert len(methods) == 5
    assert len({each.method for each in read_settings(codec_rows())}) == 2
    names = [each.name for each in read_settings([*rows, *full_rows()])]
    assert len(set(names)) == len(names)
    twins = [*point_rows([0.1]), *(replace(row, point="twin") for row in point_rows([0.1]))]
    assert len({each.name for each in read_settings(twins)}) == 2
    sized_alike = [*codec_rows(), *(replace(row, point="twin") for row in codec_rows())]
    lines = [tuple(line[:2]) for line in decisive_table(sized_alike)]
    assert len(set(lines)) == len(lines)


# The answer.


def test_recommends_the_smallest_cache_within_the_bound() -> None:
    rows = full_rows(seeds=1)
    within = [each for each in read_settings(rows) if each.loss is not None and each.loss <= BOUND]
    found = recommend(read_settings(rows), BOUND)
    assert found is not None
    best = found.setting
    assert best.nbytes == min(each.nbytes for each in within) == 20
    assert (best.product, best.key.dtype) == ("codec", "")
    others = [(each.product, each.name) for each in found.others]
    assert others == [("mla", "MLA calibrated 32+16"), ("dense", "dense int4")]
    assert best_of(rows, 1.0).nbytes == 12
    assert best_of(rows, 0.01).nbytes == 51.2
    assert recommend(read_settings(point_rows([math.nan])), BOUND) is None


def test_a_difference_of_rounding_in_size_does_not_recommend_a_worse_setting() -> None:
    rows = [
        *dense_rows()[:3],
        *point_rows([0.005], "spectral", 95, 8),
        *point_rows([0.001], "calibrated", 96, 8),
        *point_rows([0.0005], "calibrated", 120, 8),
    ]
    assert best_of(rows, 0.12).sizes == "96+8"


def test_recommends_the_most_accurate_where_no_size_meets_the_bound() -> None:
    dense, poor = dense_rows(), point_rows([0.5], "random", 8, 4)
    unquantised = [row for row in dense if row.run == "dense"]
    unmeasured = [row for row in full_rows(seeds=1) if row.metric != Metric.FLOW_LOSS]
    for rows, within, name in (
        ([*dense, *poor], True, "dense int4"),
        ([*unquantised, *poor, *point_rows([0.2])], False, "MLA calibrated 16+8"),
        (unmeasured, None, "codec at 128 bytes"),
    ):
        best = recommend(read_settings(rows), BOUND)
        assert best is not None
        assert (best.within_bound, best.setting.name) == (within, name)


def test_the_answer_is_one_sentence_with_bytes_cut_and_error() -> None:
    rows = full_rows(seeds=1)
    best = recommend(read_settings(rows), BOUND)
    sentence = answer_sentence(best, BOUND)
    error = recovered(codec_error(20), STEPS[-1])
    for fact in ("20 bytes", "96.1 %", "15 %", f"{error:.3g}", f"+{20 * 100 * error:.0f} %"):
        assert fact in sentence
    reasons = " ".join(answer_reasons(best, read_dense(rows), 2))
    for fact in ("98 bytes", "151 bytes", "0.04", "0.4", "2 points"):
        assert fact in reasons


# Tables.


def test_the_table_starts_with_dense_and_is_sorted_by_size() -> None:
    header, dense, *lines = decisive_table(full_rows())
    assert dense == ["dense", "512", "0 %", "0", "+0 %", "–", "–"]
    assert len(lines) == 2 * len(SIZES) + 2 * len(RANKS) + len(DENSE_ERRORS)
    assert {len(line) for line in lines} == {len(header)} == {7}
    spread = "0.00742 (0.00707 to 0.00778)"
    assert ["codec", "20", "96.1 %", "0.0371", "+74 %", spread, "+15 %"] in lines
    assert ["dense int4", "151", "70.5 %", "0.004", "+8.0 %", "–", "–"] in lines
    sizes = [float(line[1]) for line in lines]
    assert sizes == sorted(sizes)
    header, *lines = decisive_table(point_rows([0.2]))
    assert (len(header), [line[1:] for line in lines]) == (5, [["50", "90.2 %", "0.2", "–"]])


def test_bytes_at_equal_errors_are_of_the_last_step_that_tells_them() -> None:
    rows = full_rows(seeds=1)
    curve = sorted(
        (row for row in rows if row.metric == "bytes_at_error" and row.step == STEPS[-1]),
        key=lambda row: -row.value,
    )
    sentences = equal_errors(rows, read_settings(rows))
    assert len(sentences) == len(curve) == 4
    for row, sentence in zip(curve, sentences, strict=True):
        assert row.cache_dtype is not None
        assert row.cache_dtype in sentence
        assert f"{row.value:.3g}" in sentence
    assert "at most 12" in sentences[-1] and "at most" not in sentences[0]
    others = [row for row in rows if row.metric != Metric.BYTES_AT_ERROR]
    assert equal_errors(others, read_settings(rows)) == []


def test_memory_of_one_clip_by_its_length() -> None:
    rows = full_rows(seeds=1)
    header, *lines = memory_table(rows, read_settings(rows))
    assert header == ["cache", "window", "5 s", "30 s", "60 s"]
    assert lines[0] == ["dense", "1.33 MB", "8.85 MB", "53.1 MB", "106 MB"]
    amounts = {
        (row.run, row.bytes_per_token): row.value
        for row in rows
        if row.metric == "cache_bytes" and row.batch == 1 and row.clip_seconds == 60
    }
    assert len(lines) == len(set(amounts.values())) == 1 + len(DENSE_ERRORS) + len(SIZES) + 3
    assert f"{amounts['codec', 20] / 1e6:.3g} MB" in [line[-1] for line in lines]
    assert memory_table(point_rows([0.1]), []) == []


def test_streams_by_the_memory_of_a_gpu() -> None:
    rows = full_rows(seeds=1)
    header, dense, *smaller = streams_table(rows, read_settings(rows))
    assert header == ["cache", "on 24 GB", "on 48 GB", "on 80 GB", "on 141 GB"]
    assert dense[0] == "dense" and len(smaller) > len(SIZES)
    for line in (dense, *smaller):
        counts = [int(cell) for cell in line[1:]]
        assert counts == sorted(counts) and counts[0] > 0
    counted = {
        r.value for r in rows if r.metric == "streams" and (r.run, r.card_gb) == ("dense", 24)
    }
    assert counted == {float(dense[1])}
    assert streams_table(point_rows([0.1]), []) == []


def test_speed_is_beside_the_dense_models() -> None:
    rows = full_rows(seeds=1)
    _, dense, *lines = speed_table(rows, read_settings(rows))
    assert dense == ["dense", "80 ms", "1"]
    assert ["MLA calibrated 8+4", "45.2 ms", "0.565"] in lines
    assert len(lines) == 2 * len(RANKS)
    assert speed_table(point_rows([0.1]), []) == []


def test_failures_are_named_with_their_seeds_and_reasons() -> None:
    why = "diverged at step 12"
    rows = [Row(Metric.FAILED, 1.0, "point", "a", seed=seed, note=why) for seed in (1, 0)]
    assert failed_table(rows)[1:] == [["a", "0, 1", why]]
    assert failed_table(dense_rows()) == []


def test_provenance_tells_rows_devices_versions_and_time() -> None:
    rows = full_rows()
    facts = dict(provenance_table(rows, {"versions": {"torch": "2.13.0"}})[1:])
    assert facts["rows"] == str(len(rows))
    assert facts["seeds"] == "0, 1"
    assert facts["measured by torch"] == "2.13.0"
    assert facts["sweep_seconds: calibrating"] == "12.5 s"
    assert facts["recover_seconds"] == "40 s"
    assert facts["learning rates"] == "0.001"


# Charts.


def charts_of(rows: list[Row]) -> dict[str, Chart]:
    best = recommend(read_settings(rows), BOUND)
    return draw_charts(rows, best.setting if best is not None else None)


def lines_of(chart: Chart) -> dict[str, Line]:
    return {line.label: line for panel in chart for line in panel.lines}


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (full_rows(), list(PLOTS)),
        (codec_rows(), ["quality", "recovery", "rollout"]),
        (point_rows([0.6]), ["quality"]),
        (point_rows([0.6, math.nan]), ["quality"]),
        (point_rows([math.nan, math.nan]), []),
        (list(weight_spectra()), ["spectra"]),
        (list(rollout(dense_config(), 0.0)), ["rollout"]),
        (dense_rows()[:2], []),
    ],
)  # fmt: skip
def test_draws_what_the_rows_allow_and_no_empty_axes(rows: list[Row], names: list[str]) -> None:
    charts = charts_of(rows)
    assert list(charts) == names
    for chart in charts.values():
        figure = draw_chart(chart)
        assert len(figure.axes) == len(chart) > 0
        for axes in figure.axes:
            assert axes.get_lines()
            assert axes.get_xlabel()
            assert axes.get_ylabel()


def test_quality_has_every_method_before_and_after_recovery() -> None:
    rows = full_rows(seeds=1)
    chart = charts_of(rows)["quality"]
    (panel,) = chart
    assert (panel.xscale, panel.yscale) == ("log", "log")
    lines = lines_of(chart)
    named = {line.label for line in panel.lines if line.named}
    assert named == {
        "codec", "codec, unquantised", "dense, quantised", "MLA calibrated", "MLA spectral"
    }  # fmt: skip
    assert lines["codec"].xs == list(SIZES)
    ends = [recovered(codec_error(size), STEPS[-1]) for size in SIZES]
    assert lines["codec"].ys == pytest.approx(ends)
    assert lines["codec, as converted"].ys == pytest.approx([codec_error(size) for size in SIZES])
    assert lines["dense, quantised"].ys == sorted(DENSE_ERRORS.values(), reverse=True)
    assert "dense, quantised, as converted" not in lines
    assert (lines["recommended"].xs, lines["recommended"].ys) == ([20], [ends[1]])
    assert list(panel.marks.values()) == [DENSE_BYTES]
    colours = {label: lines[label].colour for label in named}
    assert len(set(colours.values())) == len(named)


def test_recovery_has_a_panel_per_method_and_a_line_per_size_on_one_scale() -> None:
    chart = charts_of(full_rows(seeds=1))["recovery"]
    assert [len(panel.lines) for panel in chart] == [len(SIZES)] * 2 + [len(RANKS)] * 2
    assert len({panel.ylimits for panel in chart}) == 1
    assert {(line.xs[0], line.xs[-1]) for p in chart for line in p.lines} == {(0, STEPS[-1])}
    many = [
        row
        for nbytes in range(10, 90, 5)
        for step, error in ((0, 0.2), (10, 0.1))
        for row in measured(codec_config(), error, step, runtime=sized(float(nbytes)))
    ]
    (panel,) = charts_of(many)["recovery"]
    labels = [line.label for line in panel.lines]
    assert (len(labels), labels[0], labels[-1]) == (6, "10", "85")


def test_rollouts_have_dense_and_the_recommended_first() -> None:
    chart = charts_of(full_rows(seeds=1))["rollout"]
    assert len(chart) == 3
    for panel in chart:
        assert [line.label for line in panel.lines][:2] == ["dense", "codec at 20 bytes"]
        assert len(panel.lines) == 6
        assert len({line.colour for line in panel.lines}) == 6
        assert all(line.xs == [0, 1, 2, 3] for line in panel.lines)


def test_spectra_are_of_weights_of_activations_and_of_mla() -> None:
    rows = full_rows(seeds=1)
    kept, needed, filled = charts_of(rows)["spectra"]
    (weights, data), (_, data_ranks) = kept.lines, needed.lines
    assert weights.xs == data.xs
    assert all(w <= d + 1e-12 for w, d in zip(weights.ys, data.ys, strict=True))
    assert data_ranks.xs == list(range(6))
    after = {line.label: line for line in filled.lines}
    for method in ("MLA calibrated", "MLA spectral"):
        pairs = zip(after[f"{method}, as converted"].ys, after[method].ys, strict=True)
        assert all(0.7 < before < now <= 1 for before, now in pairs)
    (note,) = spectra_notes(rows)
    low, high = min(data_ranks.ys), max(data_ranks.ys)
    assert f"{low:g} to {high:g}" in note
    assert spectra_notes(dense_rows()) == []


def test_lines_lie_within_their_axes_and_names_do_not_overlap() -> None:
    for name, chart in charts_of(full_rows()).items():
        figure = draw_chart(chart)
        figure.draw_without_rendering()
        for panel, axes in zip(chart, figure.axes, strict=True):
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            for line in panel.lines:
                assert left <= min(line.xs) <= max(line.xs) <= right, (name, line.label)
                assert low <= min(line.ys) <= max(line.ys) <= high, (name, line.label)
            named = {line.label for line in panel.lines if line.named}
            labels = [text for text in axes.texts if text.get_text() in named]
            boxes = [Text.get_window_extent(label) for label in labels]  # without the leader
            assert len(boxes) == len(named)
            assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_csv_holds_what_is_drawn() -> None:
    for chart in charts_of(full_rows(seeds=1)).values():
        header, *lines = csv.reader(chart_csv(chart).splitlines())
        assert header == ["panel", "line", "x", "y"]
        points = [
            [panel.title, line.label, str(x), str(y)]
            for panel in chart
            for line in panel.lines
            for x, y in zip(line.xs, line.ys, strict=True)
        ]
        marks = [[p.title, name, str(x), ""] for p in chart for name, x in p.marks.items()]
        assert sorted(lines) == sorted([*points, *marks])


def test_spread_apart_keeps_order_and_gap() -> None:
    moved = spread_apart([0.5, 0.52, 0.1, 0.51], gap=0.1)
    assert moved == pytest.approx([0.41, 0.61, 0.1, 0.51])
    capped = spread_apart([0.98, 0.99, 0.2], gap=0.1, top=1.0)
    assert capped == pytest.approx([0.9, 1.0, 0.2])
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(sorted(moved)))


# Files.


def headings(folder: Path) -> list[str]:
    return re.findall(r"^## (.*)$", (folder / "report.md").read_text("utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a whole sweep, with everything beside its rows that a report can show."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = {"source": {"checkpoint": "demo"}, "recover": {"layerwise_steps": 41}}
    told = {"recipe": recipe, "versions": {"torch": "2.13.0"}}
    (folder / "recipe.json").write_text(json.dumps(told))
    (folder / "strips").mkdir()
    for name in ("a-0", "spectral-16+8-0", f"{CODEC_POINT}-0", "calibrated-16+8-0"):
        (folder / "strips" / f"{name}.png").write_bytes(bytes(50_000))
    (folder / "compare.png").write_bytes(bytes(1_500_000))
    (folder / "compare.mp4").write_bytes(b"")
    return report_on(folder, full_rows())


def test_a_whole_sweep_is_answered_in_the_order_of_the_questions(whole: dict[str, Path]) -> None:
    titles = headings(whole["report.md"].parent)
    firsts = [title.split()[0] for title in titles]
    assert firsts == [
        "Which", "Quality", "Recovery", "Memory", "Speed", "Rollouts", "Spectra", "Failures",
        "Provenance",
    ]  # fmt: skip


def test_the_page_is_one_balanced_file_with_every_value(whole: dict[str, Path]) -> None:
    text = whole["report.html"].read_text("utf-8")
    page = Page(text)
    assert {cell for line in decisive_table(full_rows()) for cell in line} <= set(page.texts)
    images = [r for r in page.references if r.startswith("data:image/png;base64,")]
    assert len(images) == len(PLOTS) + 3  # strips, but not the large sheet
    assert {"compare.png", "compare.mp4"} <= set(page.references)
    assert not re.search("https?://", text)
    assert "<script" not in text
    assert whole["report.html"].stat().st_size < 3_000_000


def test_markdown_refers_to_every_picture_and_its_data(whole: dict[str, Path]) -> None:
    markdown, folder = whole["report.md"].read_text("utf-8"), whole["report.md"].parent
    links = re.findall(r"\]\((.*?)\)", markdown)
    assert {f"plots/{name}.{kind}" for name in PLOTS for kind in ("png", "csv")} <= set(links)
    assert all((folder / link.replace("%2B", "+")).is_file() for link in links)
    shown = [link for link in links if link.startswith("strips/")]
    assert shown == [
        f"strips/{CODEC_POINT}-0.png", "strips/calibrated-16%2B8-0.png",
        "strips/spectral-16%2B8-0.png",
    ]  # fmt: skip
    assert "2.13.0" in markdown
    assert "layerwise_steps = 41" in markdown


def test_sections_follow_their_rows(tmp_path: Path) -> None:
    report_on(tmp_path, weight_spectra())
    assert headings(tmp_path) == ["Spectra", "Provenance"]
    put_rows(tmp_path / "rows.jsonl", point_rows([0.2]))
    write_report(tmp_path)
    assert len(headings(tmp_path)) == 4


def test_what_can_no_longer_be_is_removed(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("of an earlier report")
    written = report_on(tmp_path, full_rows(seeds=1))
    plots = {f"{name}.{kind}" for name in PLOTS for kind in ("png", "csv")}
    assert set(written) == {"report.md", "report.html", *plots}
    assert not (tmp_path / "recipe.toml").exists()
    (tmp_path / "rows.jsonl").unlink()
    report_on(tmp_path, weight_spectra())
    left = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert left == ["spectra.csv", "spectra.png"]


def test_titles_and_names_are_escaped(tmp_path: Path) -> None:
    rows = point_rows([0.2], "<b>&|*")
    put_rows(tmp_path / "rows.jsonl", [*rows, Row(Metric.FAILED, 1, "point", "<i>", note="a|b\nc")])
    write_report(tmp_path, title="<i>A & B")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert {"<i>A & B", "MLA <b>&|* 16+8", "<i>", "a|b\nc"} <= set(page.texts)
    markdown = (tmp_path / "report.md").read_text("utf-8")
    assert not re.search(r"(?<!\\)<[bi]>", markdown)
    assert r"| \<i> | 0 | a\|b c |" in markdown
    assert r"MLA \<b>&\|\* 16+8" in markdown


@pytest.mark.parametrize("text", ['{"metric": "flow_loss"}\n', "not json\n", "[1]\n", ""])
def test_refuses_rows_it_cannot_understand(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(VmlaError):
        write_report(tmp_path)
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("text", ["not json", "[1]", '{"recipe": {"convert": {"x": 1}}}'])
def test_refuses_settings_that_it_cannot_understand(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(VmlaError):
        report_on(tmp_path, point_rows([0.2]))
    assert not (tmp_path / "report.md").exists()


def test_names_the_extra_when_matplotlib_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_rows(tmp_path / "rows.jsonl", point_rows([0.2]))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError) as caught:
        write_report(tmp_path)
    assert "plots" in caught.value.hint


def test_runs_without_torch(tmp_path: Path) -> None:
    put_rows(tmp_path / "rows.jsonl", full_rows(seeds=1))
    recipe: dict[str, Any] = {"recipe": {"convert": {}, "recover": {}}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    program = (
        "import sys; from pathlib import Path; from vmla_convert.report.report import "
        "write_report; before = 'matplotlib' in sys.modules; write_report(Path(sys.argv[1])); "
        "print(before, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert result.stdout.split() == ["False", "False"]
