"""Tables of memory by device, by formula: what stages of recipes need, and what streams fit."""

from __future__ import annotations

from dataclasses import replace

from vmla_convert.checkpoint.known import known_by_repo, known_model
from vmla_convert.checkpoint.settings import DEFAULTS
from vmla_convert.config import ConvertConfig, ModelConfig, RuntimeConfig, Sizes
from vmla_convert.doctor.stages import (
    RELEASED,
    STAGES,
    Need,
    Room,
    Stage,
    with_savings,
)
from vmla_convert.fitting.codec import plan_codec
from vmla_convert.layers.memory import GPU_HEADROOM, most, streaming_memory, streams_on
from vmla_convert.measuring.rows import CARDS_GB
from vmla_convert.recipe.read import available_recipes, read_recipe
from vmla_convert.tables import from_dict, merged, to_dict

# Host memory and disk are shown, and not a reason to save.
UNBOUNDED = 10**15
# GPUs of the recipe that shards.
SHARDS = 8
CUTS = (0.95, 0.975, 0.985)
"""Sizes of the codec in the table of streams, as shares of the dense cache to save."""

LATENTS_A_SECOND = 4


def memory_by_device() -> str:
    """Peak memory of each stage, and what changes on smaller GPUs."""
    header = ["recipes", "stage", "GPU", "host", "disk", *(f"on {card} GB" for card in CARDS_GB)]
    lines = [header, ["---", "---", "---:", "---:", "---:", *["---"] * len(CARDS_GB)]]
    for recipes, model in shared_models().items():
        processes = SHARDS if shards(recipes[0]) else 1
        names = ", ".join(f"`{name}`" for name in recipes)
        if processes > 1:
            names += f" on {processes} GPUs"
        for stage in STAGES:
            lines.append([names, *stage_cells(recipes[0], model, stage, processes)])
            names = ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def streams_per_card() -> str:
    """Streams of a full window that fit beside each other, and seconds of video in one cache."""
    header = ["model", "cache", "bytes a token and layer", "cache of a window"]
    lines = [[*header, *(f"on {card} GB" for card in CARDS_GB)]]
    lines.append(["---", "---", *["---:"] * (len(CARDS_GB) + 2)])
    for name in ("Wan 1.3B 480p", "Wan 14B 480p"):
        dense, shown = RELEASED[name], name
        codec = plan_codec(dense, ConvertConfig())
        for model, cut in ((dense, None), *((codec, cut) for cut in CUTS)):
            runtime = RuntimeConfig(size=None if cut is None else Sizes(cut=cut))
            token = Sizes(cut=cut or 0.0).token_bytes(dense.geometry)
            held = model.cache_bytes(model.cache.window_frames, 1, runtime)
            cells = [
                shown,
                "dense" if cut is None else f"codec, {100 * cut:g} % less",
                f"{token:.0f}",
                f"{held / 1e9:.2f} GB",
            ]
            lines.append([*cells, *(fitting(model, runtime, card * 10**9) for card in CARDS_GB)])
            shown = ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fitting(model: ModelConfig, runtime: RuntimeConfig, card: int) -> str:
    """A cell: how many streams fit on a card, and how many seconds of video in one cache."""
    room, chunk = card - GPU_HEADROOM, model.chunk_frames

    def fits(chunks: int) -> bool:
        longer = replace(model, cache=replace(model.cache, window_frames=chunk * chunks))
        return streaming_memory(longer, runtime, 2).device <= room

    streams, seconds = streams_on(model, runtime, card), chunk * most(fits) / LATENTS_A_SECOND
    return f"{streams}, {seconds:.0f} s" if streams else "none"


def shared_models() -> dict[tuple[str, ...], ModelConfig]:
    """Models of recipes without a sweep, by the names of recipes that share shape and settings."""
    models: dict[str, ModelConfig] = {}
    for name in available_recipes():
        recipe = read_recipe(name)
        known = known_by_repo(recipe.source.checkpoint)
        if known is not None and recipe.sweep is None:
            models[name] = released_model(known)
    groups: dict[str, list[str]] = {}
    for name, model in models.items():
        recipe = read_recipe(name)
        shape = (model.geometry, model.cache, model.chunk_frames, recipe.convert, recipe.recover)
        groups.setdefault(repr(shape), []).append(name)
    return {tuple(names): models[names[0]] for names in groups.values()}


def released_model(known: str) -> ModelConfig:
    """Config of a known model of one width, without its checkpoint."""
    width, settings = known_model(known).widths[0], known_model(known).settings
    geometry = next(m.geometry for m in RELEASED.values() if m.geometry.dim == width)
    return from_dict(ModelConfig, merged(DEFAULTS, settings) | {"geometry": to_dict(geometry)})


def shards(recipe: str) -> bool:
    """Whether a recipe divides its models over GPUs."""
    recover = read_recipe(recipe).recover
    return recover is not None and recover.shard


def stage_cells(recipe: str, model: ModelConfig, stage: Stage, processes: int) -> list[str]:
    """Cells of a stage: its needs as the recipe has it, and what changes on each card."""

    def on(nbytes: int) -> Need:
        room = Room(nbytes, UNBOUNDED, processes=processes)
        return with_savings(recipe, model, stage, room, recipe)

    need = on(UNBOUNDED)
    fits = [fit(on(card * 10**9)) for card in CARDS_GB]
    needed = (need.device_bytes, need.host_bytes, need.disk_bytes)
    return [stage, *(f"{nbytes / 1e9:.1f}" if nbytes else "–" for nbytes in needed), *fits]


def fit(need: Need) -> str:
    """A cell: yes, the settings that make the stage fit and its peak then, or no."""
    if not need.fits:
        return "no"
    if not need.changes:
        return "yes"
    settings = " ".join(f"`{change}`" for change in need.changes)
    return f"{settings}: {need.device_bytes / 1e9:.1f}"
