"""Rollouts: chunk by chunk, decided by the seed alone, in constant memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import MODEL
from conftest import tiny_model
from torch import Tensor

from vmla_convert.config import GenerateConfig, SamplerConfig
from vmla_convert.errors import ConfigError, OutputError, VmlaError
from vmla_convert.layers.cache import KVCache
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.pipelines import generate as pipeline
from vmla_convert.pipelines.compare import compare
from vmla_convert.pipelines.generate import check_video_path, generate, rollout, write_clips
from vmla_convert.pipelines.load import load

pytest_plugins = ["checkpoints"]


@pytest.fixture(params=["teacher", "converted", "budgeted"])
def model(request: pytest.FixtureRequest) -> CausalWanModel:
    return load(request.getfixturevalue(request.param))


def clip(model: CausalWanModel, frames: int = 6, prompt: str = "7", seed: int = 0) -> Tensor:
    return torch.cat(list(generate(model, prompt, frames, seed)), dim=1)


@pytest.mark.parametrize(
    ("frames", "lengths"), [(1, [1]), (2, [2]), (5, [2, 2, 1]), (6, [2, 2, 2])]
)
def test_chunks_come_one_by_one_and_the_last_is_cut(
    frames: int, lengths: list[int], model: CausalWanModel
) -> None:
    chunks = list(generate(model, ["1", "a nine"], frames))
    assert [tuple(chunk.shape) for chunk in chunks] == [(2, f, 12, 12, 12) for f in lengths]
    assert all(chunk.isfinite().all() for chunk in chunks)


def test_chunks_are_made_when_they_are_asked_for(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    sample = pipeline.sample_chunk

    def counted(*args: object) -> Tensor:
        made.append(len(made))
        return sample(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(pipeline, "sample_chunk", counted)
    chunks = generate(dense, "7", 10**9)
    next(chunks)
    next(chunks)
    assert made == [0, 1]


def test_the_seed_decides_everything(model: CausalWanModel) -> None:
    first, again, other = (clip(model, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_prompt_matters(model: CausalWanModel) -> None:
    assert not torch.equal(clip(model, prompt="7"), clip(model, prompt="2"))
    assert torch.equal(clip(model, prompt="7"), clip(model, prompt="a bouncing SEVEN"))


def test_a_longer_rollout_begins_as_the_shorter_one(model: CausalWanModel) -> None:
    assert torch.equal(clip(model, 10)[:, :5], clip(model, 5))


def test_chunks_differ_from_each_other(model: CausalWanModel) -> None:
    chunks = list(generate(model, "7", 6))
    assert not torch.equal(chunks[0], chunks[1])
    assert not torch.equal(chunks[1], chunks[2])


@pytest.mark.parametrize("renoise", [False, True])
def test_dense_and_converted_start_from_the_same_noise(
    renoise: bool,
    dense: CausalWanModel,
    converted: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    sample = pipeline.sample_chunk

    def watched(model: CausalWanModel, noise: Tensor, *rest: object) -> Tensor:
        chunk = sample(model, noise, *rest)  # pyright: ignore[reportArgumentType]
        generator = rest[2]
        assert isinstance(generator, torch.Generator)
        # What the generator would draw next shows that as much fresh noise was drawn.
        seen.extend([noise, torch.rand(3, generator=generator)])
        return chunk

    monkeypatch.setattr(pipeline, "sample_chunk", watched)
    clips: list[Tensor] = []
    for model in (dense, load(converted)):
        model.config = replace(model.config, sampler=SamplerConfig((1000, 500), 2.0, renoise))
        clips.append(clip(model))
    assert all(torch.equal(a, b) for a, b in zip(seen[:6], seen[6:], strict=True))
    assert len({noise.sum().item() for noise in seen[:6:2]}) == 3
    assert not torch.equal(*clips)


def test_the_dense_rollout_is_that_of_the_weights_that_were_saved(
    dense: CausalWanModel, teacher: Path
) -> None:
    saved = tiny_model(MODEL).bfloat16().float().requires_grad_(False)
    assert torch.equal(clip(dense), clip(saved))
    assert torch.equal(clip(dense), clip(load(teacher)))


def test_memory_does_not_grow_with_the_length(
    model: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[KVCache] = []
    new_cache = model.new_cache

    def kept(batch: int) -> KVCache:
        caches.append(new_cache(batch))
        return caches[-1]

    monkeypatch.setattr(model, "new_cache", kept)
    window = MODEL.cache.window_frames
    promised = model.config.cache_bytes(window, bytes_per_scalar=4)
    count = 0
    for _ in generate(model, "7", 40):
        count += 1
        assert caches[0].nbytes == promised
        assert len(caches[0].positions()) == min(2 * count, window)
    assert count == 20
    assert len(caches) == 1


def test_the_past_reaches_the_next_chunk(dense: CausalWanModel) -> None:
    chunks = list(generate(dense, "7", 4))
    dense.config = replace(dense.config, cache=replace(MODEL.cache, window_frames=2, sink_frames=0))
    blind = list(generate(dense, "7", 4))
    assert torch.equal(chunks[0], blind[0])
    assert not torch.equal(chunks[1], blind[1])


def test_a_rollout_is_pixels_in_range(model: CausalWanModel) -> None:
    video = rollout(model, ["1", "2"], 5)
    assert video.shape == (2, 5, 3, 24, 24)
    assert video.abs().max() <= 1


@pytest.mark.parametrize("prompt", ["", "a cat", "3 and 4", ["7", "nothing"]])
def test_a_prompt_that_names_no_single_digit_is_refused(
    prompt: str | list[str], dense: CausalWanModel
) -> None:
    with pytest.raises(VmlaError, match="one digit") as caught:
        next(generate(dense, prompt, 2))
    assert caught.value.hint


@pytest.mark.parametrize("frames", [0, -3])
def test_no_frames_are_refused(frames: int, dense: CausalWanModel) -> None:
    with pytest.raises(ConfigError, match=str(frames)):
        next(generate(dense, "7", frames))


def test_a_video_is_refused_before_any_work_where_it_cannot_go(tmp_path: Path) -> None:
    check_video_path(tmp_path / "new.mp4")
    for name in ("old.mp4", "sheet.png"):
        (tmp_path / name).write_text("mine")
    for name in ("clip.gif", "clip", "old.mp4", "sheet.mp4"):
        with pytest.raises(OutputError) as caught:
            check_video_path(tmp_path / name)
        assert caught.value.hint


def test_clips_land_as_video_and_sheet(dense: CausalWanModel, tmp_path: Path) -> None:
    video = rollout(dense, ["1", "2"], 3)
    paths = write_clips(tmp_path / "clip.mp4", {"dense": video, "copy": video}, ["1", "2"])
    assert [path.name for path in paths] == ["clip.mp4", "clip.png"]
    assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"
    assert (tmp_path / "clip.png").read_bytes()[1:4] == b"PNG"


def test_a_comparison_leaves_no_files_before_it_is_scored(
    dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    config = GenerateConfig(("7",), frames=4)
    with monkeypatch.context() as patch:
        patch.setattr("vmla_convert.pipelines.compare.rollout_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(dense, dense, config, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())
    assert compare(dense, dense, config, tmp_path / "a.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.png"}
