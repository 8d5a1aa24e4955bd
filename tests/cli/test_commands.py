"""The recipe and the commands that a report prints make the very size that it recommends."""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from checkpoints import Vmla
from report_rows import codec_config, codec_error, dense_config, dense_rows, measured, mla_config

from vmla_convert import recipe as running
from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    DMDConfig,
    EvaluateConfig,
    ModelConfig,
    RankPlan,
    RecoverConfig,
    RuntimeConfig,
    Sizes,
    SourceConfig,
    SweepConfig,
    TrainingConfig,
)
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.loading import load as loading
from vmla_convert.recipe import Recipe, RecipeInfo, read_recipe
from vmla_convert.report.recipe import changes, commands, recipe_toml, to_toml
from vmla_convert.report.report import write_report
from vmla_convert.report.settings import Setting, read_settings
from vmla_convert.results import append_rows
from vmla_convert.sweep.grid import SweepPoint, find_point, sweep_points
from vmla_convert.sweep.point import labelled
from vmla_convert.tables import to_dict

pytest_plugins = ["checkpoints"]

SHORT = DataConfig(frames=6)
MADE = {
    "a codec as it comes": (ConvertConfig(), None),
    "a codec, recovered as it comes": (ConvertConfig(), RecoverConfig()),
    "a codec of one size, recovered at many": (
        ConvertConfig(size=Sizes(cut=0.9), channels=96, seed=4, data=SHORT),
        RecoverConfig(
            nested=(0.98, 0.9),
            levels="sampler",
            data=replace(SHORT, seed=5, sink_gap=2),
            training=TrainingConfig(lr=1.2345678e-3, seed=4, gradient_checkpointing=True),
        ),
    ),
    "MLA of explicit ranks": (
        ConvertConfig(product="mla", size=Sizes(kv_lora_rank=8, qk_rope_head_dim=4)),
        RecoverConfig(layerwise_steps=0, train="attention", dmd=DMDConfig(2, critic_lr=2e-5)),
    ),
    "MLA of a plan": (
        ConvertConfig(
            product="mla",
            size=Sizes(plan=RankPlan((8, 9), (2, 3), (4, 5))),
            init="random",
            latent="split",
        ),
        None,
    ),
}
SOURCE = SourceConfig(
    "owner/name", file='a "b".pt', overrides=("cache.window_frames=12",), loras=("a.pt:0.5",)
)
EVALUATE = EvaluateConfig(12, DataConfig("held out\\.safetensors", 21, seed=1))


class RanError(VmlaError):
    """A command came as far as its pipeline."""


def told(
    convert: ConvertConfig, recover: RecoverConfig | None, sweep: SweepConfig | None = None
) -> Any:
    """The recipe of a run, as recipe.json has it."""
    info = RecipeInfo("x", "y")
    recipe = Recipe(info, SOURCE, EVALUATE, convert=convert, recover=recover, sweep=sweep)
    return json.loads(json.dumps(to_dict(recipe)))


def setting_of(point: SweepPoint, config: ModelConfig, dtype: Any = "auto") -> Setting:
    """What a report takes from the rows of a point."""
    runtime = RuntimeConfig(Sizes(25.6), cache_dtype=dtype) if config.codec else None
    rows = measured(config, 0.1, 0, point.seed, runtime)
    (setting,) = read_settings([labelled(row, point) for row in rows])
    return setting


def model_of(convert: ConvertConfig) -> ModelConfig:
    return codec_config() if convert.product == "codec" else mla_config(convert.init, 8, 4)


def remade(setting: Setting, recipe: Any, folder: Path) -> Recipe:
    """The printed recipe, as `vmla run` would read it."""
    path = folder / "recipe.toml"
    path.write_text(recipe_toml(setting, recipe), encoding="utf-8")
    return read_recipe(path)


@pytest.mark.parametrize("name", MADE)
def test_a_recipe_comes_to_the_settings_of_the_point(name: str, tmp_path: Path) -> None:
    convert, recover = MADE[name]
    point = SweepPoint(convert, recover)
    setting = setting_of(point, model_of(convert))
    recipe = remade(setting, told(convert, recover), tmp_path)
    assert (recipe.convert, recipe.recover) == (convert, recover)
    assert (recipe.source, recipe.evaluate) == (SOURCE, EVALUATE)
    assert recipe.stages() == ["convert", *(["recover"] if recover else [])]


def test_a_recipe_comes_to_every_point_of_a_sweep(tmp_path: Path) -> None:
    sweep = SweepConfig(
        sizes=(Sizes(cut=0.8765432), Sizes(cut=0.9)), seeds=(3, 4), recovery_steps=(7, 9)
    )
    convert, recover = ConvertConfig(data=SHORT, calibration_clips=3), RecoverConfig(data=SHORT)
    recipe = told(convert, recover, sweep)
    points = {point.key: point for point in reversed(sweep_points(sweep, convert, recover))}
    assert len(points) > 1
    for key, point in points.items():
        again = remade(setting_of(point, model_of(point.conversion)), recipe, tmp_path)
        found = find_point(key, recipe)
        assert found is not None
        assert (again.convert, again.recover) == (found.conversion, point.recovery)
        assert replace(found.conversion, seed=point.seed) == point.conversion


def test_only_what_differs_from_defaults_is_told() -> None:
    assert changes(RecoverConfig()) == {}
    assert changes(ConvertConfig(channels=9, data=DataConfig(seed=2))) == {
        "channels": 9,
        "data": {"seed": 2},
    }
    # The table is what `from_dict` starts from, whatever the outer config would have put there.
    assert changes(EvaluateConfig(data=DataConfig("x", seed=0))) == {"data": {"source": "x"}}
    assert changes(EvaluateConfig(data=DataConfig("x"))) == {"data": {"source": "x"}}
    assert changes(EvaluateConfig(data=DataConfig("x", seed=1)))["data"]["seed"] == 1


def test_toml_reads_back_whatever_the_values_are() -> None:
    table = {
        "text": 'a "b" \\ \n \x7f é',
        "numbers": [1, 2.5e-7, 1e22],
        "truth": True,
        "pairs": [[1, 2], [3, 4]],
        "empty": {},
        "outer": {"inner": {"x": 1}},
        "both": {"x": "y", "inner": {"z": []}},
    }
    assert tomllib.loads(to_toml(table)) == table
    recipe = told(
        ConvertConfig(data=SHORT), RecoverConfig(), SweepConfig(sizes=(Sizes(cut=0.9),), seeds=(3,))
    )
    assert tomllib.loads(to_toml(recipe)) == recipe


def test_what_the_recipe_has_not_is_not_made_up() -> None:
    convert, recover = MADE["a codec, recovered as it comes"]
    setting = setting_of(SweepPoint(convert, recover), codec_config())
    recipe = told(convert, recover)
    assert find_point(setting.key.point, recipe) == SweepPoint(convert, recover)
    for other in ({}, told(ConvertConfig(size=Sizes(cut=0.9)), recover)):
        assert recipe_toml(setting, other) == ""
    with pytest.raises(ConfigError):
        recipe_toml(setting, {"convert": {"no_such_key": 1}})


def generate_words(setting: Setting, recipe: Any, made_here: bool) -> list[str]:
    *_, last = commands(setting, recipe, made_here).splitlines()
    return shlex.split(last)


def test_commands_ask_for_the_size_and_the_dtype() -> None:
    convert, recover = MADE["a codec as it comes"]
    point = SweepPoint(convert, recover)
    setting = setting_of(point, codec_config())
    run, _ = commands(setting, {}, made_here=True).splitlines()
    assert shlex.split(run) == ["vmla", "run", "recipe.toml", "-o", "DIR"]
    words = generate_words(setting, {}, made_here=True)
    assert words[2:5] == ["DIR/converted", "--bytes-per-token", "25.6"]
    assert "--cache-dtype" not in words
    whole = generate_words(setting_of(point, codec_config(), "model"), {}, made_here=False)
    assert whole[2] == "OUT"
    assert whole[whole.index("--cache-dtype") + 1] == "model"
    convert, recover = MADE["MLA of explicit ranks"]
    mla = setting_of(SweepPoint(convert, recover), mla_config("calibrated", 8, 4))
    assert "--bytes-per-token" not in generate_words(mla, {}, made_here=True)


def test_a_quantised_dense_cache_needs_no_recipe() -> None:
    runtime = RuntimeConfig(cache_dtype="int4")
    (setting,) = read_settings(measured(dense_config(), 0.1, None, runtime=runtime))
    recipe = told(ConvertConfig(), None)
    assert recipe_toml(setting, recipe) == ""
    words = generate_words(setting, recipe, made_here=False)
    assert words[2:5] == ["owner/name", "--file", 'a "b".pt']
    for option, value in (
        ("--set", "cache.window_frames=12"), ("--lora", "a.pt:0.5"), ("--cache-dtype", "int4")
    ):  # fmt: skip
        assert words[words.index(option) + 1] == value


def test_the_command_line_takes_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vmla: Vmla
) -> None:
    """From rows beside a recipe.json to the configs that both commands come to."""
    convert, recover = MADE["a codec of one size, recovered at many"]
    point, size = SweepPoint(convert, recover), Sizes(51.2)
    rows = measured(codec_config(), codec_error(51.2), 0, 4, RuntimeConfig(size))
    append_rows(tmp_path / "rows.jsonl", [*dense_rows(), *(labelled(row, point) for row in rows)])
    run = {"recipe": told(convert, recover), "versions": {}}
    (tmp_path / "recipe.json").write_text(json.dumps(run))
    assert tmp_path / "recipe.toml" in write_report(tmp_path)
    asked: dict[str, Any] = {}

    def keep(name: str, *values: Any) -> NoReturn:
        asked[name] = values
        raise RanError(name)

    monkeypatch.setattr(running, "run_recipe", lambda recipe, *_: keep("run", recipe))
    monkeypatch.setattr(loading, "open_named", lambda source: keep("load", source))
    text = (tmp_path / "report.md").read_text("utf-8")
    blocks = [b.split("```")[0] for b in text.split("```sh\n")[1:]]
    lines = [line for line in blocks[0].splitlines() if line]
    monkeypatch.chdir(tmp_path)
    for line in lines:
        vmla(*shlex.split(line)[1:])
    (recipe,) = asked["run"]
    assert (recipe.convert, recipe.recover) == (convert, recover)
    assert asked["load"][0].checkpoint == "DIR/converted"
    assert lines[1].split()[3:5] == ["--bytes-per-token", "51.2"]
