"""Films of a dense and a converted model from the same noise, side by side, with scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vmla_convert.config import GenerateConfig, RuntimeConfig
from vmla_convert.generating.film import write_comparison
from vmla_convert.generating.generate import generate_pixels
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.measuring.evaluate import rollout_rows
from vmla_convert.media.base import Media
from vmla_convert.media.open import open_media
from vmla_convert.progress import Progress
from vmla_convert.results import Row


def compare(
    dense: CausalWanModel,
    converted: CausalWanModel,
    config: GenerateConfig,
    path: Path,
    keep_rows: Callable[[list[Row]], object],
    progress: Progress | None = None,
    media: Media | None = None,
    runtime: RuntimeConfig | None = None,
) -> None:
    """Score both models, and then write a film and a contact sheet of both.

    Only the demo world has a ground truth to score against; other models give no rows.

    Args:
        dense: The dense model.
        converted: The converted model.
        config: Prompts, length and seed.
        path: The mp4 file; the contact sheet is written beside it.
        keep_rows: Receives the scores before a file appears: a resumed recipe takes the files as a
            sign that the scores are written.
        progress: Where progress is drawn.
        media: Text encoder and VAE of both models; by default those of the dense model.
        runtime: How the converted model runs.
    """
    prompts = list(config.prompts)
    media = media or open_media(dense.config, device=dense.patch_embedding.weight.device)
    models = {"dense": dense, "converted": converted}
    clips = {
        name: generate_pixels(
            model,
            prompts,
            config.frames,
            config.seed,
            progress,
            f"rolling out {name}",
            media=media,
            runtime=runtime if name == "converted" else None,
        )
        for name, model in models.items()
    }
    rows: list[Row] = []
    scored = models if dense.config.media == "demo" else {}
    for name, model in scored.items():
        rows += rollout_rows(clips[name], prompts, model.config, config.seed)
    keep_rows(rows)
    shown = {name: video[: config.shown] for name, video in clips.items()}
    write_comparison(path, shown, prompts[: config.shown], media)
