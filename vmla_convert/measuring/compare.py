"""Roll dense and converted out from the same noise, show them side by side and score both."""

from __future__ import annotations

from pathlib import Path

from vmla_convert.config import GenerateConfig
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
    progress: Progress | None = None,
    media: Media | None = None,
) -> list[Row]:
    """Write `path` (mp4) and a contact sheet beside it, and return the scores of both models.

    Only the demo world can be scored, which has ground truth; of others there are no rows.

    Args:
        dense: The source.
        converted: Its conversion.
        config: Prompts, length and seed.
        path: Of the mp4.
        progress: Where to draw.
        media: Of both models; by default the dense model's own, opened anew.
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
        )
        for name, model in models.items()
    }
    rows: list[Row] = []
    scored = models if dense.config.media == "demo" else {}
    for name, model in scored.items():
        rows += rollout_rows(clips[name], prompts, model.config, config.seed)
    # Files last: a restarted recipe takes them as the sign that nothing is left to score.
    shown = {name: video[: config.shown] for name, video in clips.items()}
    write_comparison(path, shown, prompts[: config.shown], media)
    return rows
