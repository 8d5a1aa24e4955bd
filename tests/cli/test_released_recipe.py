"""The recipe of a released model with only its source replaced, from a Hub id to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Vmla, refused
from hub_stub import Hub
from tiny_wan import SET

from vmla_convert.generating import make_clips
from vmla_convert.generating.clip_sets import clip_sets
from vmla_convert.results import Metric, read_rows

pytest_plugins = ["checkpoints", "tiny_wan", "hub_stub"]

REPO = "someone/tiny-wan"
SMALL = [word for setting in (
    "convert.calibration_clips=3",
    "recover.data.clips=4",
    "recover.layerwise_steps=1",
    "recover.training.steps=2",
    "recover.training.batch_size=2",
    "recover.training.accumulate=1",
    "recover.training.lr=0.001",
    "evaluate.clips=2",
    "generate.frames=4",
) for word in ("--set", setting)]  # fmt: skip


@pytest.fixture
def run(stub: Hub, wan_folder: Path, tmp_path: Path) -> list[Any]:
    stub.put_folder(REPO, wan_folder)
    clips = ["--clips-dir", tmp_path / "clips"]
    source = ["--set", f"source.checkpoint={REPO}", *SET]
    return ["run", "self_forcing_1_3b", "-o", tmp_path / "out", *source, *clips, *SMALL]


def test_a_recipe_goes_from_an_id_to_a_report(
    run: list[Any], vmla: Vmla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry = vmla(*run, "--dry-run")
    assert dry.code == 0, dry.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "clips").exists()
    loads: list[Any] = []
    build = make_clips.build

    def counted(*args: Any) -> Any:
        loads.append(args)
        return build(*args)

    monkeypatch.setattr(make_clips, "build", counted)
    ran = vmla(*run)
    assert ran.code == 0, ran.err
    assert len(loads) == 1, "the model is loaded once for the clips of all stages"
    sets = sorted((each.clips, each.split) for each in clip_sets(tmp_path / "clips"))
    assert sets == [(2, "held_out"), (5, "train")]
    out = tmp_path / "out"
    assert {"report.md", "report.html", "compare.mp4", "compare.png"} <= {
        path.name for path in out.iterdir()
    }
    metrics = {row.metric for row in read_rows(out / "rows.jsonl")}
    assert {Metric.FLOW_LOSS, Metric.VELOCITY_ERROR, Metric.CACHE_BYTES} <= metrics
    record = json.loads((out / "converted" / "conversion.json").read_text())
    train, held_out = record["calibration"], record["recovered"]["errors"]["held_out"]
    assert set(train["prompts"]).isdisjoint(held_out["prompts"])


def test_hours_on_a_cpu_are_asked_about(
    run: list[Any], vmla: Vmla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmla_convert.cli.cost.LONG_OPERATIONS", 1.0)
    ran = vmla(*run)
    assert refused(ran)
    assert "--yes" in ran.err and "--demo" in ran.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "clips").exists()


def test_a_sweep_measures_on_the_models_own_clips(
    run: list[Any], vmla: Vmla, tmp_path: Path
) -> None:
    grid = ("sizes=[{cut=0.5}]", 'products=["codec"]', "mla_sizes=[]", "dense_dtypes=[]",
            "unquantised=false", "timed=false", "rollout_frames=0")  # fmt: skip
    words = [word for setting in grid for word in ("--set", f"sweep.{setting}")]
    ran = vmla("sweep", "size_ablation", *run[2:], *words)
    assert ran.code == 0, ran.err
    sets = sorted((each.clips, each.split) for each in clip_sets(tmp_path / "clips"))
    assert sets == [(2, "held_out"), (5, "train")]
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert any(row.product == "codec" and row.metric == Metric.VELOCITY_ERROR for row in rows)
