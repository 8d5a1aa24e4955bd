"""A batch is a function of seed, index and split; files of latents are read or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import noise
from safetensors.torch import save_file
from torch import Tensor

from vmla_convert.config import DataConfig
from vmla_convert.errors import ConfigError
from vmla_convert.pipelines.codecs import DemoCodec
from vmla_convert.pipelines.data import ClipSource, DemoClips, LatentFile, open_clips, seeded

CLIPS, FRAMES = 40, 6


@pytest.fixture
def latent_file(tmp_path: Path) -> Path:
    """Clips that carry their own number in every latent and context."""
    number = torch.arange(CLIPS).float()
    path = tmp_path / "clips.safetensors"
    latents = number[:, None, None, None, None] + torch.zeros(CLIPS, FRAMES, 4, 2, 2)
    latents += torch.arange(FRAMES)[:, None, None, None] / 100
    context = number[:, None, None] + torch.zeros(CLIPS, 3, 5)
    save_file({"latents": latents, "context": context}, path)
    return path


@pytest.fixture(params=["demo", "file"])
def source(request: pytest.FixtureRequest, latent_file: Path) -> str:
    return "demo" if request.param == "demo" else str(latent_file)


def opened(source: str, seed: int = 0) -> ClipSource:
    return open_clips(DataConfig(source, frames=4, seed=seed))


def test_the_same_index_gives_the_same_batch(source: str) -> None:
    first, again = (opened(source).batch(5, 4) for _ in range(2))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.context, again.context)
    assert first.latents.shape[:2] == (4, 4)


def test_index_seed_and_split_each_change_the_batch(source: str) -> None:
    batches = [
        opened(source).batch(5, 8).latents,
        opened(source).batch(6, 8).latents,
        opened(source, seed=1).batch(5, 8).latents,
        opened(source).batch(5, 8, "held_out").latents,
    ]
    for i, one in enumerate(batches):
        for other in batches[:i]:
            assert not torch.equal(one, other)


def test_a_batch_does_not_depend_on_batches_before_it(source: str) -> None:
    used = opened(source)
    for index in (3, 1):
        used.batch(index, 4)
    assert torch.equal(used.batch(2, 4).latents, opened(source).batch(2, 4).latents)


def test_demo_latents_and_prompts_are_those_of_the_clips() -> None:
    clips = DemoClips(DataConfig(frames=4))
    truth, batch = clips.clips(2, 3), clips.batch(2, 3)
    assert torch.equal(DemoCodec().decode(batch.latents), truth.video)
    assert torch.equal(batch.context.squeeze(1).argmax(-1), truth.labels)


def test_a_sink_gap_skips_frames_after_the_sink_in_half_of_the_training_clips() -> None:
    gapped = DemoClips(DataConfig(frames=6, sink_gap=20), sink_frames=2)
    steps = gapped.clips(0, 64).alpha.diff(dim=1).abs().amax(dim=(2, 3))
    assert torch.isfinite(steps).all()
    usual = steps[:, [0, 2, 3, 4]].mean()
    across_gap = steps[:, 1]
    assert across_gap.mean() > 1.2 * usual
    held_out = [
        DemoClips(DataConfig(frames=6, sink_gap=gap), sink_frames=2).clips(0, 8, "held_out")
        for gap in (0, 20)
    ]
    assert torch.equal(held_out[0].video, held_out[1].video)


def numbers(latents: Tensor) -> set[int]:
    return {int(x) for x in latents[:, 0, 0, 0, 0]}


def test_a_file_keeps_prompts_with_their_clips_and_cuts_them(latent_file: Path) -> None:
    batch = LatentFile(DataConfig(str(latent_file), frames=4)).batch(0, 16)
    assert torch.equal(batch.latents[:, 0, 0, 0, 0], batch.context[:, 0, 0])
    assert batch.latents.shape == (16, 4, 4, 2, 2)
    place = batch.latents[:, :, 0, 0, 0] - batch.context[:, :1, 0]
    expected = torch.arange(4) / 100
    torch.testing.assert_close(place, expected.expand(16, 4), atol=1e-4, rtol=0)


def test_the_last_tenth_of_a_file_is_held_out(latent_file: Path) -> None:
    clips = LatentFile(DataConfig(str(latent_file), frames=4))
    assert numbers(clips.batch(0, 400).latents) == set(range(36))
    assert numbers(clips.batch(0, 100, "held_out").latents) == set(range(36, 40))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match="no latent file at nowhere"):
        open_clips(DataConfig("nowhere.safetensors"))


def test_a_file_without_latents_or_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"latents": noise(4, 2, 4, 2, 2)}, path)
    with pytest.raises(ConfigError, match="'latents' and 'context'"):
        open_clips(DataConfig(str(path)))


def test_seeds_are_independent_and_do_not_change_with_the_process() -> None:
    keys = [(s, i, name) for s in range(4) for i in range(4) for name in ("train", "noise")]
    draws = {torch.rand(1, generator=seeded(*key)).item() for key in keys}
    assert len(draws) == len(keys)
    assert seeded(1, 23, "train").initial_seed() != seeded(12, 3, "train").initial_seed()
    # FNV-1a of b"0/0/train" less its top bit, by hand; a stored run depends on it.
    state = 14695981039346656037
    for byte in b"0/0/train":
        state = ((state ^ byte) * 1099511628211) & (2**64 - 1)
    assert seeded(0, 0, "train").initial_seed() == state & (2**63 - 1)
