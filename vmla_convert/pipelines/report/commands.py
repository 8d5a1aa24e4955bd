"""The commands that make a setting again, and run it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from vmla_convert.config import ConvertConfig, RecoverConfig
from vmla_convert.pipelines.grid import find_point
from vmla_convert.pipelines.report.points import Dense, Point
from vmla_convert.tables import to_dict

Settings = Mapping[str, Any]

# Options of a size, in the order in which they are told.
_SIZES = ("kv_lora_rank", "qk_rope_head_dim", "cache_scalars", "cut")
# What `convert` has options for, and what of a recovery is not left to `--set`.
_CONVERT_SAYS = {
    *(*_SIZES, "plan", "init", "latent", "seed", "dtype"),
    *("calibrate", "calibration_clips", "data.source", "data.frames"),
}
_RECOVER_SAYS = {
    *("layerwise_steps", "training.steps", "training.lr", "training.seed"),
    *("data.source", "data.frames"),
}
# Of clips that only recovery makes.
_CONVERT_IGNORES = {"data.prompts", "data.clips", "data.base"}


def how_to_use(point: Point, dense: Dense | None, recipe: dict[str, Any]) -> str:
    """The commands that make and run a setting.

    Args:
        point: The setting.
        dense: What a cut is a share of, where rows alone tell the size.
        recipe: Of the run, as `recipe.json` holds it; empty where there is none. It tells all of
            a setting, where it has the point; rows tell most.
    """
    told = recipe.get("source", {})
    source = str(told.get("checkpoint", "CKPT"))
    known = find_point(point.key, recipe)
    if known is not None:
        convert = to_dict(known.conversion)
        recover = to_dict(known.recovery) if known.recovery else None
    else:
        convert, recover = _read_conversion(point, dense, recipe), _read_recovery(point, recipe)
    lines = [["vmla", "convert", source, "-o", "OUT", *_convert_words(convert, told)]]
    made = "OUT"
    if recover is not None:
        made = "OUT-recovered"
        words = ["vmla", "recover", "OUT", "--teacher", source, "-o", made]
        lines.append(words + _recover_words(recover))
    lines.append(["vmla", "generate", made, "--prompt", "…", "-o", "clip.mp4"])
    unsaid = [
        f"# convert has no option for {name}; here it was {json.dumps(value)}"
        for name, value in _unusual(convert, to_dict(ConvertConfig()), _CONVERT_SAYS)
        if name not in _CONVERT_IGNORES
    ]
    commands = [shlex.join(line).replace("'…'", '"…"') for line in lines]
    return "\n".join([*unsaid, *commands])


def _read_conversion(point: Point, dense: Dense | None, recipe: Settings) -> dict[str, Any]:
    """What rows tell of a conversion, and the recipe of what all have in common."""
    shared = dict(recipe.get("convert") or {})
    for name in (*_SIZES, "plan"):
        shared.pop(name, None)
    shared |= {"init": point.init, "latent": point.latent or None}
    if point.kv_lora_rank is not None:
        shared["kv_lora_rank"] = point.kv_lora_rank
        shared["qk_rope_head_dim"] = point.qk_rope_head_dim or None
    elif point.scalars is not None and dense is not None and dense.scalars:
        # Rounded down, so that no layer gets less than it had.
        shared["cut"] = math.floor(1e4 * (1 - point.scalars / dense.scalars)) / 1e4
    return shared


def _read_recovery(point: Point, recipe: Settings) -> dict[str, Any] | None:
    """Likewise of a recovery; None where there was none."""
    if point.recovery_steps is None and not point.last_step:
        return None
    shared = dict(recipe.get("recover") or {})
    # Rows of a recovery by itself tell only the last step, of all stages together.
    steps = point.last_step if point.recovery_steps is None else point.recovery_steps
    # A sweep gives each point its seed.
    training = {**shared.get("training", {}), "steps": steps, "seed": 0}
    return {**shared, "training": training}


def _convert_words(convert: Settings, source: Settings) -> list[str]:
    usual, data = ConvertConfig(), convert.get("data", {})
    words = ["--init", str(convert["init"])]
    for name in _SIZES:
        words += _option(name, convert.get(name))
    words += ["--plan", "PLAN"] if convert.get("plan") else []
    words += _option("latent", convert.get("latent"))
    words += _reading(source)
    words += [] if convert.get("calibrate", True) else ["--no-calibration"]
    for name in ("calibration_clips", "seed", "dtype"):
        value = convert.get(name)
        words += _option(name, value) if value != getattr(usual, name) else []
    return words + _clips(data)


def _recover_words(recover: Settings) -> list[str]:
    training = recover["training"]
    words = _option("steps", training["steps"])
    words += _option("layerwise_steps", recover.get("layerwise_steps"))
    words += _option("lr", training.get("lr"))
    words += _option("seed", training.get("seed") or None)
    words += _clips(recover.get("data", {}))
    for name, value in _unusual(recover, to_dict(RecoverConfig()), _RECOVER_SAYS):
        words += ["--set", f"{name}={json.dumps(value)}"]
    return words


def _reading(source: Settings) -> list[str]:
    """How a checkpoint was read, which decides what it is."""
    words: list[str] = []
    for name in ("file", "key", "model"):
        words += _option(name, source.get(name) or None)
    for setting in source.get("overrides", ()):
        words += ["--set", setting]
    for lora in source.get("loras", ()):
        words += ["--lora", lora]
    return words


def _clips(data: Settings) -> list[str]:
    """Where a stage's clips came from, and how long they were, unless that is as usual."""
    usual = ConvertConfig().data
    source, frames = data.get("source", usual.source), data.get("frames", usual.frames)
    words = _option("data", source) if source != usual.source else []
    return words + (_option("frames", frames) if words or frames != usual.frames else [])


def _option(name: str, value: Any) -> list[str]:
    return [] if value is None else [f"--{name.replace('_', '-')}", str(value)]


def _unusual(
    settings: Settings, usual: Settings, said: set[str], where: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted names and values that are not the default, but for those that options say."""
    for key, value in settings.items():
        name = f"{where}{key}"
        if isinstance(value, Mapping) and name not in said:
            yield from _unusual(value, usual.get(key) or {}, said, f"{name}.")
        elif name not in said and value is not None and value != usual.get(key):
            yield name, value
