"""Two processes over gloo do what one does with the whole batch, or are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CLIPS, RECOVER, Vmla, refused, untimed
from safetensors.torch import load_file
from workers import critic_step, one_step

from vmla_convert.loading.load import load
from vmla_convert.recovery.trained import new_names, unfreeze
from vmla_convert.results import read_rows

pytest_plugins = ["checkpoints"]

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WORKERS = [*TORCHRUN, "workers.py"]
HOW = [
    *(
        "--steps",
        RECOVER.training.steps,
        "--set",
        "recover.on_policy_steps=2",
        "--set",
        "recover.layerwise_steps=2",
    ),
    *(
        "--batch-size",
        4,
        "--lr",
        1e-3,
        "--set",
        f"recover.data.frames={CLIPS.frames}",
        "--set",
        "recover.training.eval_every=2",
    ),
]

SHARDED = [
    [*HOW, "--set", "recover.train=attention"],
    [
        *(
            "--steps",
            0,
            "--set",
            "recover.on_policy_steps=4",
            "--set",
            "recover.layerwise_steps=2",
            "--set",
            "recover.train=all",
        ),
        *(
            "--batch-size",
            4,
            "--set",
            "recover.training.accumulate=2",
            "--set",
            f"recover.data.frames={CLIPS.frames}",
        ),
        *(
            "--set",
            "recover.training.eval_every=2",
            "--set",
            "recover.training.gradient_checkpointing=true",
        ),
    ],
]


def launched(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a module in processes of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env=environment,
        timeout=300,
    )


def same_but_for_rounding(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Errors at the start and the end, as conversion.json has them."""
    for moment in ("first", "last"):
        assert one.pop(moment) == pytest.approx(two.pop(moment), rel=1e-5)
    assert one == two


@pytest.mark.slow
def test_two_processes_recover_as_one_does_with_the_whole_batch(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["recover", converted, "--teacher", teacher, *HOW]
    assert vmla(*map(str, command), "-o", one).code == 0
    more = ("-o", two, "--processes", 2, "--set", "recover.training.accumulate=2")
    ran = launched(*TORCHRUN, "-m", "vmla_convert", *command, *more)
    assert ran.returncode == 0, ran.stderr
    # Only the main process prints.
    assert ran.stdout.count("wrote: ") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    before, alone, shared = (load_file(f / "model.safetensors") for f in (converted, one, two))
    new = new_names(load(converted))
    for name in new:
        moved = (alone[name] - before[name]).abs().max()
        assert (alone[name] - shared[name]).abs().max() < 0.05 * moved, name
    assert all(torch.equal(shared[name], before[name]) for name in before.keys() - new)
    records = [json.loads((f / "conversion.json").read_text()) for f in (one, two)]
    assert records[1]["recover"]["training"].pop("accumulate") == 2
    assert records[0]["recover"]["training"].pop("accumulate") == 1
    errors = [record["recovered"].pop("errors") for record in records]
    assert errors[0].pop("held_out") == errors[1].pop("held_out")
    same_but_for_rounding(*errors)
    for record in records:
        del record["weights"]  # hashes of tensors that differ by rounding
    assert records[0] == records[1]


def test_a_wrong_number_of_processes_is_refused(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    command = ["recover", converted, "--teacher", teacher, "-o", tmp_path / "out"]
    ran = vmla(*command, "--processes", "2")
    assert refused(ran)
    assert "--nproc_per_node 2" in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", SHARDED, ids=["attention, rate given", "all, rate found"])
def test_a_sharded_recovery_is_that_of_one_process(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla, how: list[object]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["recover", converted, "--teacher", teacher, "--json", *how]
    single = vmla(*map(str, command), "-o", one)
    assert single.code == 0
    ran = launched(*TORCHRUN, "-m", "vmla_convert", *command, "-o", two, "--shard")
    assert ran.returncode == 0, ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    before, alone, sharded = (load_file(f / "model.safetensors") for f in (converted, one, two))
    for name, tensor in before.items():
        moved = (alone[name] - tensor).abs().max()
        # A weight without gradient moves by rounding.
        assert (alone[name] - sharded[name]).abs().max() <= 0.05 * moved + 1e-6, name
    records = [json.loads((f / "conversion.json").read_text()) for f in (one, two)]
    same_but_for_rounding(*(record["recovered"].pop("errors") for record in records))
    assert records[0]["recovered"] == records[1]["recovered"]
    # Steps after the best one are measured too.
    curves = [json.loads(out.splitlines()[0]) for out in (single.out, ran.stdout)]
    errors = [[row["velocity_error"] for row in curve] for curve in curves]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.slow
def test_a_sharded_recovery_that_is_cut_resumes_bit_for_bit(
    teacher: Path, converted: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    worker = [*WORKERS, "cut_recovery", converted, teacher]
    assert launched(*worker, whole, "no bar", 0).returncode == 0
    for label, before in (("distilling", 3), ("on policy", 1)):
        assert launched(*worker, cut, label, before).returncode != 0
        assert not cut.exists()
    ran = launched(*worker, cut, "no bar", 0)
    assert ran.returncode == 0, ran.stderr
    uninterrupted, resumed = (load_file(f / "model.safetensors") for f in (whole, cut))
    assert all(torch.equal(resumed[name], t) for name, t in uninterrupted.items())
    rows = [untimed(read_rows(folder / "rows.jsonl")) for folder in (whole, cut)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_sharded_student_steps_as_a_whole_one(
    teacher: Path, converted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sharded.safetensors"
    ran = launched(*WORKERS, "sharded_step", converted, teacher, out)
    assert ran.returncode == 0, ran.stderr
    student, before = load(converted), load(converted).state_dict()
    unfreeze(student, "all")
    one_step(student, load(teacher))
    sharded = load_file(out)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(sharded[name], tensor, atol=1e-6, rtol=1e-5)
    moved = [n for n, t in sharded.items() if not torch.equal(t, before[n])]
    assert len(moved) > len(before) / 2


@pytest.mark.slow
def test_processes_hold_equal_critics_that_learn_from_the_whole_batch(tmp_path: Path) -> None:
    ran = launched(*WORKERS, "shared_critic", tmp_path)
    assert ran.returncode == 0, ran.stderr
    first, second = (load_file(tmp_path / f"critic-{rank}") for rank in (0, 1))
    for name, tensor in critic_step().items():
        assert torch.equal(first[name], second[name])
        if "gradient" in name:
            torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-6)


SWEEP = """
[recipe]
name = "two"
description = "points shared by processes"
[source]
checkpoint = "{teacher}"
[evaluate]
clips = 4
data = {{ frames = 6, seed = 1 }}
[convert]
calibration_clips = 4
data = {{ frames = 6 }}
[sweep]
alone = true
recover = false
products = ["mla"]
inits = ["random", "spectral", "calibrated"]
sizes = [{{ cut = 0.8 }}, {{ cut = 0.9 }}]
"""


@pytest.mark.slow
def test_two_processes_share_the_points_of_a_sweep(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text(SWEEP.format(teacher=teacher))
    assert vmla("sweep", str(recipe), "-o", str(tmp_path / "one")).code == 0
    ran = launched(*TORCHRUN, "-m", "vmla_convert", "sweep", recipe, "-o", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr
    # Only the leader draws.
    assert ran.stderr.count("sweep: ") == ran.stderr.count("sweep: 6 in") == 1
    rows = [untimed(read_rows(tmp_path / name / "rows.jsonl")) for name in ("one", "two")]
    assert Counter(rows[0]) == Counter(rows[1])
    assert len({row.point for row in rows[0]} - {None}) == 6
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"recipe.json", "rows.jsonl"}


@pytest.mark.slow
def test_several_processes_are_refused_where_one_does_the_work(
    teacher: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text(SWEEP.format(teacher=teacher).replace("alone = true", ""))
    ran = launched(*TORCHRUN, "-m", "vmla_convert", "run", recipe, "-o", tmp_path / "two")
    assert ran.returncode != 0
    assert not (tmp_path / "two").exists()


RUN = """
[recipe]
name = "run"
description = "converted by one, recovered by both"
[source]
checkpoint = "{teacher}"
[evaluate]
clips = 4
data = {{ frames = 6, seed = 1 }}
[convert]
calibration_clips = 4
data = {{ frames = 6 }}
[recover]
layerwise_steps = 2
data = {{ frames = 6 }}
training = {{ steps = 2, batch_size = 2, lr = 1e-3, eval_every = 2 }}
"""


@pytest.mark.slow
def test_two_processes_run_a_recipe_and_recover_together(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(RUN.format(teacher=teacher))
    assert vmla("run", str(recipe), "-o", str(tmp_path / "one")).code == 0
    ran = launched(*TORCHRUN, "-m", "vmla_convert", "run", recipe, "-o", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1] == {"converted", "recipe.json", "rows.jsonl"}
    one, two = (
        [r for r in untimed(read_rows(tmp_path / name / "rows.jsonl")) if r.unit != "bytes"]
        for name in ("one", "two")
    )
    assert [replace(row, value=0.0) for row in one] == [replace(row, value=0.0) for row in two]
    assert [row.value for row in one] == pytest.approx([row.value for row in two], rel=1e-3)
