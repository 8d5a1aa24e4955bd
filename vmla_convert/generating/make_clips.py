"""Clips that need a model: sampled from the dense model, or encoded from video files.

Every stage asks for its clips here. They lie in one cache folder, where later stages, other
commands and resumed runs find them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.source import fingerprint
from vmla_convert.config import DataConfig, MediaConfig, ModelConfig
from vmla_convert.demo.world import Split
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.generating.clip_sets import clips_folder
from vmla_convert.generating.encode_videos import EncodedVideos
from vmla_convert.generating.own_samples import OwnSamples
from vmla_convert.loading.load import build, compute_device
from vmla_convert.media.clip_checks import check_clips
from vmla_convert.media.clips import held_out_clips, identity_of, open_clips, settled, source_kind
from vmla_convert.media.components import parts_beside
from vmla_convert.media.open import open_media
from vmla_convert.progress import Progress, Silent
from vmla_convert.storage.lock import in_turn
from vmla_convert.storage.output import require_room


class Need(NamedTuple):
    """Clips that a stage needs.

    Attributes:
        data: Where the clips come from.
        split: Split that the clips are for.
        clips: Number of samples of the dense model, unless `data.clips` says it.
        spare: Whether a tenth more is held out beside training clips.
    """

    data: DataConfig
    split: Split
    clips: int
    spare: bool = False


Work = OwnSamples | EncodedVideos
Clips = Work | DataConfig
"""Clips of a need: the work that makes them, or where they are."""


def ready_clips(
    dense: OpenCheckpoint,
    needs: Sequence[Need],
    media: MediaConfig | None = None,
    progress: Progress | None = None,
) -> list[DataConfig]:
    """Make the clips that are missing, and return where all of them are: `demo` or latents.

    Prompts are encoded before the dense model is loaded, and the text encoder is dropped in
    between. Interrupted work continues with the first clip that is missing. Where several
    processes run, one must finish the call before the others make it.

    Args:
        dense: The dense model, which clips are sampled from, and whose VAE encodes videos.
        needs: The clips of all stages to come.
        media: Text encoder, VAE, and the folder of the clips.
        progress: Draws the bars.

    Raises:
        VmlaError: As `check_needs` raises, before any work; or a video cannot be read.
    """
    media, progress = media or MediaConfig(), progress or Silent()
    works = check_needs(dense, needs, media)
    if missing := to_make(works):
        device = compute_device()
        own = open_media(dense.config, media, dense.source.path, device)
        for work in missing:
            work.encode_prompts(own, progress)
        own.free_text_encoder()
        for work in (work for work in missing if isinstance(work, EncodedVideos)):
            with in_turn(work.folder):
                work.make(own, progress)
        del own
        if samples := [work for work in missing if isinstance(work, OwnSamples)]:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            model = build(dense, device, dtype)
            for work in samples:
                with in_turn(work.folder):
                    work.make(model, progress)
    return [work.ready() if isinstance(work, Work) else work for work in works]


def check_needs(
    dense: OpenCheckpoint, needs: Sequence[Need], media: MediaConfig | None = None
) -> list[Clips]:
    """Refuse clips that cannot be made or used, before any weights are read.

    Returns:
        For each need the work that makes its clips, done or not; or where its clips are.

    Raises:
        CheckpointError: The text encoder or the VAE is missing.
        ConfigError: Clips do not fit the model, or there are too few prompts, or a video has none.
        MissingExtraError: A package for clips of this kind is not installed.
        NoClipsError: A path holds no clips.
        OutputError: The disk has no room for the clips.
        VmlaError: The text encoder does not understand a prompt.
    """
    media = media or MediaConfig()
    works = [_checked(dense, need, media) for need in needs]
    if missing := to_make(works):
        try:
            open_media(dense.config, media, dense.source.path)
        except VmlaError as error:
            error.hint += "; latents of your own need no text encoder: --data FILE"
            raise
        for work in missing:
            work.check()
        nbytes = sum(work.nbytes() for work in missing)
        require_room(clips_folder(media), nbytes, "make room there, or choose another --clips-dir")
    return works


def to_make(works: Sequence[Clips]) -> list[Work]:
    """The sets of clips that are not complete; of needs that share a set, the largest."""
    largest: dict[Path, Work] = {}
    for work in (work for work in works if isinstance(work, Work) and not work.is_done()):
        before = largest.get(work.folder, work)
        largest[work.folder] = max(before, work, key=lambda each: each.clips or 0)
    return list(largest.values())


def like(clips: Clips, model: ModelConfig) -> Tensor:
    """Latents of the shape of one clip (1, F, C, height, width), which take no memory."""
    if isinstance(clips, DataConfig):
        shape = open_clips(clips).shape
    else:
        frames, size = clips.data.frames, clips.data.latent_size or model.latent_size
        assert frames is not None
        shape = (frames, model.geometry.in_dim, *size)
    return torch.empty(1, *shape, device="meta")


def _checked(dense: OpenCheckpoint, need: Need, media: MediaConfig) -> Clips:
    data, model = settled(need.data, dense.config), dense.config
    assert data.frames is not None
    if need.split == "train" and data.frames < 2 * model.chunk_frames:
        raise ConfigError(
            f"clips of {data.frames} frames have no chunk with a past",
            f"use at least {2 * model.chunk_frames} frames",
        )
    kind = source_kind(data.source)
    if kind == "demo":
        return data
    if kind == "latents":
        _refuse_foreign(dense, Path(data.source))
        check_clips(model, open_clips(data).batch(0, 1, need.split))
        return data
    folder, parts = clips_folder(media), _parts(dense, media)
    if kind == "videos":
        return EncodedVideos.find(data, model, folder, parts)
    clips = data.clips or need.clips
    spare = held_out_clips(clips) if need.spare else 0
    weights = _weights(dense)
    return OwnSamples(data, need.split, clips + spare, model, folder, weights, parts, spare)


def _refuse_foreign(dense: OpenCheckpoint, folder: Path) -> None:
    """Refuse samples of another model, which somebody names as latents."""
    weights = identity_of(folder).get("weights")
    if weights is not None and weights != _weights(dense):
        raise ConfigError(
            f"{folder} holds samples of another model than {dense.source.path}",
            "leave --data out: the clips of this model are found by themselves",
        )


def _weights(dense: OpenCheckpoint) -> dict[str, Any]:
    """Hashes of the weights that samples come from."""
    loras = [[fingerprint(lora.path), lora.scale] for lora in dense.loras]
    return {
        "sha256": fingerprint(dense.source.path),
        "key": dense.source.key,
        "loras": loras,
    }


def _parts(dense: OpenCheckpoint, media: MediaConfig) -> Any:
    """Text encoder and VAE, as far as they are known without a network."""
    beside = {part: str(place) for part, place in parts_beside(dense.source.path).items()}
    return media.base or beside or None
