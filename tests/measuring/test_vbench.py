"""VBench: its names for videos, the command that measures them, and its results as rows."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Vmla

from vmla_convert.config import RuntimeConfig, SourceConfig
from vmla_convert.errors import ConfigError
from vmla_convert.measuring import vbench
from vmla_convert.measuring.vbench import (
    VideoSuite,
    evaluation_command,
    plan_videos,
    result_rows,
    write_videos,
)
from vmla_convert.results import Metric, read_rows

pytest_plugins = ["checkpoints"]

# The form of VBench_full_info.json, with prompts that the demo model understands.
INFO = [
    {"prompt_en": "a bouncing seven", "dimension": ["subject_consistency", "motion_smoothness"]},
    {"prompt_en": "a three, on the left", "dimension": ["spatial_relationship"]},
    {"prompt_en": "a bouncing seven", "dimension": ["dynamic_degree"]},
]


@pytest.fixture
def info(tmp_path: Path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(INFO))
    return path


def looked_for(entries: list[dict[str, Any]], dimensions: set[str], samples: int) -> set[str]:
    """The names that VBench looks for: a prompt, a dash, an index, and the videos' ending."""
    return {
        f"{entry['prompt_en']}-{index}.mp4"
        for entry in entries
        if dimensions & set(entry["dimension"])
        for index in range(samples)
    }


def test_videos_have_the_names_that_vbench_looks_for(info: Path, teacher: Path) -> None:
    suite, folder = VideoSuite(info, ("dynamic_degree",), 2, 3), info.parent / "videos"
    write_videos(SourceConfig(str(teacher)), suite, folder)
    assert {path.name for path in folder.iterdir()} == looked_for(INFO, {"dynamic_degree"}, 2)


def test_an_interrupted_suite_goes_on_and_dimensions_share_videos(
    info: Path, teacher: Path
) -> None:
    source, folder = SourceConfig(str(teacher)), info.parent / "videos"
    first, all_of_them = VideoSuite(info, ("dynamic_degree",), 1, 3), VideoSuite(info, (), 1, 3)
    made = write_videos(source, first, folder)
    before = made[0].read_bytes()
    left, work = plan_videos(source, all_of_them, folder, RuntimeConfig())
    assert left == 1 and work.operations > 0
    assert [path.name for path in write_videos(source, all_of_them, folder)] == [
        "a three, on the left-0.mp4"
    ]
    assert made[0].read_bytes() == before
    assert plan_videos(source, all_of_them, folder, RuntimeConfig())[1].operations == 0


def test_samples_differ_and_repeat(info: Path, teacher: Path) -> None:
    source, suite = SourceConfig(str(teacher)), VideoSuite(info, ("dynamic_degree",), 2, 3)
    one, other = (write_videos(source, suite, info.parent / name) for name in ("a", "b"))
    assert one[0].read_bytes() != one[1].read_bytes()
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


@pytest.mark.parametrize("long", [False, True])
def test_the_command_names_videos_prompts_and_dimensions(info: Path, long: bool) -> None:
    suite = VideoSuite(info, ("dynamic_degree",), 3)
    words = shlex.split(evaluation_command(suite, info.parent / "my videos", long))
    assert words[words.index("--videos_path") + 1] == str(info.parent / "my videos")
    assert words[words.index("--full_json_dir") + 1] == str(info)
    assert words[words.index("--dimension") + 1 :] == ["dynamic_degree"]
    assert ("--num_of_samples_per_prompt" in words) == long


def test_results_become_rows_with_intervals(tmp_path: Path, vmla: Vmla) -> None:
    def results_of(*values: object) -> list[dict[str, object]]:
        return [{"video_path": "a.mp4", "video_results": value} for value in values]

    results = {
        "dynamic_degree": [0.5, results_of(True, False)],
        "aesthetic_quality": [0.61, results_of(0.6, 0.62)],
        "color": [0.9, [{"video_path": "a.mp4", "frame_results": [1, 0]}]],
    }
    path = tmp_path / "x_eval_results.json"
    path.write_text(json.dumps(results))
    ran = vmla("vbench", "import", path, "-o", tmp_path / "rows", "--run", "codec", "--json")
    rows = {row.note: row for row in read_rows(tmp_path / "rows" / "rows.jsonl")}
    assert ran.code == 0
    assert {name: row.value for name, row in rows.items()} == {n: r[0] for n, r in results.items()}
    assert all(row.metric == Metric.VBENCH and row.run == "codec" for row in rows.values())
    assert rows["color"].low is None
    quality = rows["aesthetic_quality"]
    assert quality.low is not None and quality.high is not None
    assert 0.6 <= quality.low < quality.value < quality.high <= 0.62


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"a": 1}', '{"a": [null, []]}'])
def test_a_file_without_results_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x_eval_results.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        result_rows(path, {"run": "codec"})


@pytest.mark.parametrize(
    ("entries", "dimensions"),
    [
        ("nonsense", ()),
        ('[{"prompt": "seven"}]', ()),
        ('[{"prompt_en": "a/b seven", "dimension": ["x"]}]', ()),
        (json.dumps([{"prompt_en": "seven " * 60, "dimension": ["x"]}]), ()),
        (json.dumps(INFO), ("y",)),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(
    tmp_path: Path, entries: str, dimensions: tuple[str, ...]
) -> None:
    path = tmp_path / "info.json"
    path.write_text(entries)
    with pytest.raises(ConfigError):
        VideoSuite(path, dimensions).videos()


def test_a_dry_run_makes_nothing(
    info: Path, teacher: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vbench, "write_videos", lambda *_: pytest.fail("videos were made"))
    folder = info.parent / "videos"
    ran = vmla("vbench", "generate", teacher, info, "-o", folder, "--dry-run", "--json")
    assert ran.code == 0 and not folder.exists()
    assert json.loads(ran.out)["missing"] == 10
