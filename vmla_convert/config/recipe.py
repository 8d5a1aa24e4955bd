"""The whole configuration surface: every table of a recipe, and of `--set`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vmla_convert.config.cache import RuntimeConfig
from vmla_convert.config.fitting import ConvertConfig
from vmla_convert.config.measuring import EvaluateConfig, GenerateConfig, ReportConfig, SweepConfig
from vmla_convert.config.model import MediaConfig
from vmla_convert.config.source import SourceConfig
from vmla_convert.config.training import RecoverConfig, TeacherConfig
from vmla_convert.errors import ConfigError
from vmla_convert.tables import from_dict, merged, override, set_key

STAGES = ("teacher", "convert", "recover", "sweep", "generate", "report")


@dataclass(frozen=True)
class RecipeInfo:
    """Name and description of a recipe."""

    name: str
    description: str


@dataclass(frozen=True)
class Recipe:
    """Settings of a job. A stage whose table is missing (None) does not run.

    Attributes:
        recipe: Name and description.
        source: The dense checkpoint.
        model: Values for settings that tensors do not contain, such as `cache.window_frames`; they
            replace `SourceConfig.overrides`.
        runtime: How the converted model runs when it generates.
        media: Text encoder and VAE.
        evaluate: Held-out measurement.
    """

    recipe: RecipeInfo = RecipeInfo("", "")
    source: SourceConfig = field(default_factory=SourceConfig)
    model: dict[str, Any] = field(default_factory=dict[str, Any])
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    teacher: TeacherConfig | None = None
    convert: ConvertConfig | None = None
    recover: RecoverConfig | None = None
    sweep: SweepConfig | None = None
    generate: GenerateConfig | None = None
    report: ReportConfig | None = None

    @property
    def dense(self) -> SourceConfig:
        """The dense checkpoint with its settings."""
        return replace(self.source, overrides=merged(self.source.overrides, self.model))

    def stages(self) -> list[str]:
        """Names of the stages that will run, in order.

        In a sweep without [convert], [recover] is a setting of the points, not a stage. With
        `sweep.alone` neither [convert] nor [recover] is a stage.
        """
        shared = set[str]()
        if self.sweep is not None and (self.convert is None or self.sweep.alone):
            shared = {"convert", "recover"}
        return [s for s in STAGES if getattr(self, s) is not None and s not in shared]


def parse_recipe(tables: Mapping[str, Any]) -> Recipe:
    """Parse the tables of a recipe.

    Where [evaluate.data] names no source, clips are held out from the source of [recover.data].

    Raises:
        ConfigError: An unknown key, or a value that a key cannot have.
    """
    recipe = from_dict(Recipe, dict(tables))  # refuses values of other types
    trained: dict[str, Any] = tables.get("recover", {}).get("data", {})
    measured: dict[str, Any] = tables.get("evaluate", {}).get("data", {})
    if not trained or "source" in measured:
        return recipe
    shared = {key: value for key, value in trained.items() if key != "clips"}
    held_out = {**shared, "seed": trained.get("seed", 0) + 1}
    return from_dict(Recipe, merged({"evaluate": {"data": held_out}}, tables))


def command_recipe(
    tables: Collection[str],
    options: Mapping[str, Any],
    changes: Collection[str] | None,
    preset: Mapping[str, Any] | None = None,
) -> Recipe:
    """Settings of one command, from its options and `--set`.

    Args:
        tables: Tables that the command uses.
        options: Values of the command's own options by recipe key; None means left out.
        changes: `key=value` strings of `--set`, which come last.
        preset: Tables that options and changes replace.

    Raises:
        ConfigError: A table that the command does not use, an unknown key, or a wrong value.
    """
    built = dict(preset or {})
    for key, value in options.items():
        if value is not None:
            set_key(built, key, value)
    for change in changes or ():
        override(built, change)
    for name in built:
        if name not in tables:
            raise ConfigError(
                f"this command has no settings '{name}'",
                f"--set takes full keys of its tables, as in recipes: {', '.join(tables)}",
            )
    return parse_recipe(built)
