"""The recipe and the commands in a report come to the settings of the recommended point."""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from checkpoints import Vmla
from report_rows import codec_config, codec_error, dense_config, dense_rows, measured, mla_config

from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    DMDConfig,
    EvaluateConfig,
    ModelConfig,
    RankPlan,
    Recipe,
    RecipeInfo,
    RecoverConfig,
    RuntimeConfig,
    Sizes,
    SourceConfig,
    SweepConfig,
    TrainingConfig,
    parse_recipe,
)
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.generating.clip_cost import PlannedWork
from vmla_convert.layers.memory import Memory
from vmla_convert.recipe import run as running
from vmla_convert.report.recipe import commands, recipe_toml, to_toml
from vmla_convert.report.report import write_report
from vmla_convert.report.settings import Setting, read_settings
from vmla_convert.results import put_rows
from vmla_convert.sweep.grid import SweepPoint, sweep_points
from vmla_convert.sweep.point import labelled
from vmla_convert.tables import to_dict

pytest_plugins = ["checkpoints"]

SHORT = DataConfig("demo", frames=6)
POINTS = {
    "codec": SweepPoint(ConvertConfig(), RecoverConfig()),
    "codec at many sizes": SweepPoint(
        ConvertConfig(size=Sizes(cut=0.9), channels=96, seed=4, data=SHORT),
        RecoverConfig(
            nested=(0.98, 0.9),
            levels="sampler",
            data=replace(SHORT, seed=5, sink_gap=2),
            training=TrainingConfig(lr=1.2345678e-3, seed=4, gradient_checkpointing=True),
        ),
    ),
    "MLA of explicit ranks": SweepPoint(
        ConvertConfig("mla", Sizes(kv_lora_rank=8, qk_rope_head_dim=4)),
        RecoverConfig(layerwise_steps=0, train="attention", dmd=DMDConfig(2, critic_lr=2e-5)),
    ),
    "MLA of a plan": SweepPoint(
        ConvertConfig("mla", Sizes(plan=RankPlan((8, 9), (2, 3), (4, 5))), latent="split"), None
    ),
}
SOURCE = SourceConfig("owner/name", file='a "b".pt', loras=("a.pt:0.5",))
WINDOW = {"cache": {"window_frames": 12}}
EVALUATE = EvaluateConfig(12, DataConfig("held out\\.safetensors", 21, seed=1))


class RanError(VmlaError):
    """A command came as far as the call that does the work."""


def recorded(point: SweepPoint, sweep: SweepConfig | None = None) -> Any:
    """The recipe of a run, as recipe.json holds it."""
    recipe = Recipe(
        RecipeInfo("x", "y"),
        SOURCE,
        WINDOW,
        evaluate=EVALUATE,
        convert=point.conversion,
        recover=point.recovery,
        sweep=sweep,
    )
    return json.loads(json.dumps(to_dict(recipe)))


def setting_of(point: SweepPoint, dtype: Any = "auto") -> Setting:
    """Return the setting that a report reads from the rows of a point."""
    convert = point.conversion
    config: ModelConfig = codec_config()
    if convert.product == "mla":
        config = mla_config(convert.init, 8, 4)
    runtime = RuntimeConfig(Sizes(25.6), cache_dtype=dtype) if config.codec else None
    rows = measured(config, 0.1, 0, point.seed, runtime)
    (setting,) = read_settings([labelled(row, point) for row in rows])
    return setting


@pytest.mark.parametrize("name", POINTS)
def test_the_recipe_has_the_settings_of_the_point(name: str) -> None:
    point = POINTS[name]
    recipe = parse_recipe(tomllib.loads(recipe_toml(setting_of(point), recorded(point))))
    assert (recipe.convert, recipe.recover) == (point.conversion, point.recovery)
    assert (recipe.source, recipe.model, recipe.evaluate) == (SOURCE, WINDOW, EVALUATE)
    assert recipe.stages() == ["convert", "recover"][: 2 if point.recovery else 1]


def test_every_point_of_a_sweep_has_a_recipe() -> None:
    sizes = Sizes(cut=0.8765432), Sizes(cut=0.9)
    sweep = SweepConfig(sizes=sizes, seeds=(3, 4), recovery_steps=(7, 9))
    convert, recover = ConvertConfig(data=SHORT, calibration_clips=3), RecoverConfig(data=SHORT)
    recipe = recorded(SweepPoint(convert, recover), sweep)
    points = {point.key: point for point in reversed(sweep_points(sweep, convert, recover))}
    assert len(points) > 1
    for point in points.values():
        again = parse_recipe(tomllib.loads(recipe_toml(setting_of(point), recipe)))
        # Calibration noise has the seed of the run, whatever the seed of the recovery.
        assert again.convert == replace(point.conversion, seed=convert.seed)
        assert again.recover == point.recovery


def test_toml_holds_any_value() -> None:
    table = {
        "text": 'a "b" \\ \n \x7f é',
        "numbers": [1, 2.5e-7, 1e22],
        "truth": True,
        "tables": [{"cut": 0.9}, {"rank": 3}],
        "empty": {},
        "outer": {"inner": {"x": 1}},
        "both": {"x": "y", "inner": {"z": []}},
    }
    assert tomllib.loads(to_toml(table)) == table


def test_a_point_that_the_recipe_lacks_has_none() -> None:
    point = POINTS["codec"]
    setting = setting_of(point)
    assert recipe_toml(setting, {}) == ""
    assert recipe_toml(setting, recorded(POINTS["codec at many sizes"])) == ""
    with pytest.raises(ConfigError):
        recipe_toml(setting, {"convert": {"no_such_key": 1}})


def test_commands_name_size_and_dtype() -> None:
    setting = setting_of(POINTS["codec"])
    run, generate = map(shlex.split, commands(setting, {}, has_recipe=True).splitlines())
    assert run == ["vmla", "run", "recipe.toml", "-o", "DIR"]
    assert generate[2:5] == ["DIR/converted", "--bytes-per-token", "25.6"]
    assert "--cache-dtype" not in generate
    whole = commands(setting_of(POINTS["codec"], "model"), {}, has_recipe=False)
    assert "OUT" in whole and "--cache-dtype model" in whole
    mla = commands(setting_of(POINTS["MLA of explicit ranks"]), {}, has_recipe=True)
    assert "--bytes-per-token" not in mla


def test_commands_are_taken_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vmla: Vmla
) -> None:
    point, size = POINTS["codec at many sizes"], Sizes(51.2)
    rows = measured(codec_config(), codec_error(51.2), 0, 4, RuntimeConfig(size))
    put_rows(tmp_path / "rows.jsonl", [*dense_rows(), *(labelled(row, point) for row in rows)])
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": recorded(point), "versions": {}}))
    assert tmp_path / "recipe.toml" in write_report(tmp_path)
    asked: dict[str, Any] = {}

    def keep(name: str, *values: Any) -> NoReturn:
        asked[name] = values
        raise RanError(name)

    opened = "vmla_convert.loading.load.open_named"  # generate plans before it makes a video
    monkeypatch.setattr(
        "vmla_convert.recipe.plan.plan_recipe",
        lambda *_: SimpleNamespace(work=PlannedWork("", Memory(0))),
    )
    monkeypatch.setattr(running, "run_recipe", lambda recipe, *_: keep("run", recipe))
    monkeypatch.setattr(opened, lambda source, *_: keep("load", source))
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    for line in text.split("```sh\n")[1].split("```")[0].splitlines():
        vmla(*shlex.split(line)[1:])
    (recipe,) = asked["run"]
    assert (recipe.convert, recipe.recover) == (point.conversion, point.recovery)
    assert asked["load"][0].checkpoint == "DIR/converted"
    # A quantised dense cache needs no recipe, but the settings of its source.
    runtime = RuntimeConfig(cache_dtype="int4")
    (dense,) = read_settings(measured(dense_config(), 0.1, None, runtime=runtime))
    assert recipe_toml(dense, recorded(point)) == ""
    vmla(*shlex.split(commands(dense, recorded(point), has_recipe=False))[1:])
    source = asked["load"][0]
    assert source == replace(SOURCE, overrides=WINDOW)
