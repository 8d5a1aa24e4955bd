"""The commands that a report prints make the very point that it recommends."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from checkpoints import Vmla

from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    DMDConfig,
    RecoverConfig,
    SweepConfig,
    TrainingConfig,
)
from vmla_convert.errors import VmlaError
from vmla_convert.pipelines import convert as converting
from vmla_convert.pipelines import recovery
from vmla_convert.pipelines.grid import SweepPoint, find_point, sweep_points
from vmla_convert.pipelines.report.answer import answer_sentence, recommend
from vmla_convert.pipelines.report.commands import how_to_use
from vmla_convert.pipelines.report.points import Point, read_points, setting_names
from vmla_convert.pipelines.report.tables import decisive_table
from vmla_convert.pipelines.sweep import labelled
from vmla_convert.recipe import Recipe, RecipeInfo
from vmla_convert.results import Row
from vmla_convert.tables import to_dict

pytest_plugins = ["checkpoints"]

CLIPS = DataConfig("clips.safetensors", 21)
SHORT = DataConfig(frames=6)
SWEEPS = {
    "several splits of one rope width": (
        SweepConfig(kv_lora_ranks=(8, 16), head_splits=((20, 4), (12, 4))),
        ConvertConfig(),
        RecoverConfig(),
    ),
    "heads truncated alike": (
        SweepConfig(
            latents=("joint", "split"), kv_lora_ranks=(8,), qk_rope_head_dims=(4,), cuts=(0.9,)
        ),
        ConvertConfig(qk_nope_head_dim=12, data=CLIPS, calibration_clips=3, seed=4),
        RecoverConfig(data=CLIPS, training=TrainingConfig(lr=1.2345678e-3, seed=9)),
    ),
    "budgets, rules, seeds and lengths": (
        SweepConfig(
            inits=("random", "calibrated", "mha2mla"),
            latents=("joint", "split"),
            cuts=(0.8765432, 0.9),
            ranks=("budget", "uniform"),
            seeds=(3, 4),
            recovery_steps=(7, 9),
        ),
        ConvertConfig(dtype="bfloat16", data=SHORT, calibrate=False),
        RecoverConfig(
            layerwise_steps=0,
            levels="sampler",
            train="attention",
            data=replace(SHORT, seed=5, sink_gap=2),
            training=TrainingConfig(batch_size=8, accumulate=8, gradient_checkpointing=True),
            dmd=DMDConfig(steps=2, critic_lr=2e-5),
        ),
    ),
    "untrained": (
        SweepConfig(inits=("spectral",), cuts=(0.8,), recover=False),
        ConvertConfig(ranks="uniform"),
        RecoverConfig(),
    ),
}


class RanError(VmlaError):
    """A command came as far as its pipeline."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configs that commands come to, in place of what they do."""
    got: dict[str, Any] = {}

    def keep(name: str, config: Any) -> NoReturn:
        got[name] = config
        raise RanError(name)

    monkeypatch.setattr(converting, "convert", lambda _, __, config, *___: keep("convert", config))
    monkeypatch.setattr(
        recovery, "recover", lambda _, __, ___, config, *____: keep("recover", config)
    )
    return got


def report_point(point: SweepPoint) -> Point:
    """What a report reads of the rows of a point."""
    conversion = point.conversion
    error = Row(
        "velocity_error", 0.1, "relative", "run", init=conversion.init, step=0,
        latent=conversion.latent,
        kv_lora_rank=conversion.kv_lora_rank, qk_rope_head_dim=conversion.qk_rope_head_dim,
    )  # fmt: skip
    (read,) = read_points([labelled(error, point)])
    return read


def told_recipe(sweep: SweepConfig, convert: ConvertConfig, recover: RecoverConfig) -> Any:
    """As recipe.json has it."""
    info = RecipeInfo("x", "y")
    return json.loads(
        json.dumps(to_dict(Recipe(info, convert=convert, recover=recover, sweep=sweep)))
    )


def in_first_seed(points: list[SweepPoint]) -> Iterator[SweepPoint]:
    seen: set[str] = set()
    for point in points:
        if point.key not in seen:
            yield point
        seen.add(point.key)


@pytest.mark.parametrize("name", SWEEPS)
def test_commands_come_to_the_settings_of_the_point(
    name: str, asked: dict[str, Any], vmla: Vmla
) -> None:
    sweep, convert, recover = SWEEPS[name]
    recipe = told_recipe(sweep, convert, recover)
    points = list(in_first_seed(sweep_points(sweep, convert, recover)))
    assert len(points) > 3 or name == "untrained"
    for point in points:
        asked.clear()
        *commands, _ = how_to_use(report_point(point), None, recipe).splitlines()
        for command in commands:
            _, *words = shlex.split(command)
            ran = vmla(*words)
            assert "Error: " + words[0] in ran.err, ran.err
        conversion = point.conversion
        if conversion.init != "random":  # noise to calibrate with is drawn once
            conversion = replace(conversion, seed=convert.seed)
        assert asked["convert"] == conversion
        assert asked.get("recover") == point.recovery


def test_what_no_option_says_is_told() -> None:
    sweep, convert, recover = SWEEPS["untrained"]
    convert = replace(convert, data=DataConfig(seed=5, sink_gap=3))
    (point,) = sweep_points(sweep, convert, recover)
    recipe = told_recipe(sweep, convert, recover)
    *told, command, _ = how_to_use(report_point(point), None, recipe).splitlines()
    assert told == [
        "# convert has no option for data.sink_gap; here it was 3",
        "# convert has no option for data.seed; here it was 5",
    ]
    assert command.startswith("vmla convert demo")


def test_a_recipe_that_has_not_the_point_leaves_it_to_the_rows() -> None:
    sweep, convert, recover = SWEEPS["several splits of one rope width"]
    point = sweep_points(sweep, convert, recover)[0]
    recipe = told_recipe(sweep, convert, recover)
    assert find_point(point.key, recipe) == point
    assert find_point("another", recipe) is None
    assert find_point(point.key, {}) is None


def split_rows() -> list[Row]:
    """Two splits of one rope width."""
    fields: dict[str, Any] = {"init": "calibrated", "step": 0, "latent": "joint"}
    fields |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4}
    return [
        Row("velocity_error", 0.2, "relative", "run", point="a", qk_nope_head_dim=20, **fields),
        Row("velocity_error", 0.1, "relative", "run", point="b", qk_nope_head_dim=12, **fields),
    ]


def test_rows_alone_tell_the_width_that_heads_were_truncated_to() -> None:
    points = read_points(split_rows())
    told = [how_to_use(point, None, {"sweep": {"head_splits": [[16, 4]]}}) for point in points]
    assert "--qk-nope-head-dim 12" in told[0]
    assert "--qk-nope-head-dim 20" in told[1]
    assert list(setting_names(points).values()) == [
        "calibrated 8+4 (nope12)",
        "calibrated 8+4 (nope20)",
    ]
    header, *lines = decisive_table(split_rows())
    place = header.index("qk_nope_head_dim")
    assert [line[place] for line in lines] == ["12", "20"]


def test_the_answer_names_the_width_that_heads_were_truncated_to() -> None:
    best = recommend(read_points(split_rows()), 0.15)
    assert best is not None
    told = answer_sentence(best, None, 0.15)
    assert "kv_lora_rank 8, qk_rope_head_dim 4 and qk_nope_head_dim 12 (joint latent)" in told
    divided = replace(best, point=replace(best.point, kv_lora_rank=None, scalars=13))
    told = answer_sentence(divided, None, 0.15)
    assert "divided among layers, and qk_nope_head_dim 12 (joint latent)" in told
