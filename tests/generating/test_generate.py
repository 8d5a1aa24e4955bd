"""Rollouts: chunk by chunk, decided by the seed alone, in constant memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODEL
from conftest import tiny_model
from torch import Tensor

from vmla_convert.config import GenerateConfig, RuntimeConfig, SamplerConfig
from vmla_convert.errors import ConfigError, OutputError, VmlaError
from vmla_convert.generating import rollout as loop
from vmla_convert.generating.film import check_video_path, write_comparison
from vmla_convert.generating.generate import (
    Switch,
    clip_frames,
    generate,
    generate_pixels,
    parse_switch,
)
from vmla_convert.layers.cache import KVCache
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.measuring.compare import compare
from vmla_convert.media.demo import DemoMedia

pytest_plugins = ["checkpoints"]

MEDIA = DemoMedia()


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
    sample = loop.sample_chunk

    def counted(*args: object) -> Tensor:
        made.append(len(made))
        return sample(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(loop, "sample_chunk", counted)
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
    sample = loop.sample_chunk

    def watched(model: CausalWanModel, noise: Tensor, *rest: object) -> Tensor:
        chunk = sample(model, noise, *rest)  # pyright: ignore[reportArgumentType]
        draw = rest[2]
        assert callable(draw)
        # What would be drawn next shows that as much fresh noise was drawn.
        following = draw()
        assert isinstance(following, Tensor)
        seen.extend([noise, following])
        return chunk

    monkeypatch.setattr(loop, "sample_chunk", watched)
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

    def kept(batch: int, runtime: RuntimeConfig | None) -> KVCache:
        caches.append(new_cache(batch, runtime))
        return caches[-1]

    monkeypatch.setattr(model, "new_cache", kept)
    window = MODEL.cache.window_frames
    promised = 2 * model.config.cache_bytes(window)  # four bytes a number here, two there
    count = 0
    for _ in generate(model, "7", 40):
        count += 1
        assert caches[0].nbytes == promised
        assert caches[0].window.held == min(2 * count, window)
    assert count == 20
    assert len(caches) == 1


def test_the_past_reaches_the_next_chunk(dense: CausalWanModel) -> None:
    chunks = list(generate(dense, "7", 4))
    dense.config = replace(dense.config, cache=replace(MODEL.cache, window_frames=2, sink_frames=0))
    blind = list(generate(dense, "7", 4))
    assert torch.equal(chunks[0], blind[0])
    assert not torch.equal(chunks[1], blind[1])


def test_a_rollout_is_pixels_in_range(model: CausalWanModel) -> None:
    video = generate_pixels(model, ["1", "2"], 5)
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


# Other prompts on the way


def switched(model: CausalWanModel, *switches: Switch, frames: int = 16) -> Tensor:
    return torch.cat(list(generate(model, "7", frames, switches=switches)), dim=1)


def test_a_switch_changes_what_follows_it_and_nothing_before(model: CausalWanModel) -> None:
    plain, other = clip(model, 16), switched(model, Switch(5, ["2"]))
    # The first chunk that starts at or after frame 5.
    assert torch.equal(plain[:, :6], other[:, :6])
    for start in range(6, 16, 2):
        assert not torch.equal(plain[:, start : start + 2], other[:, start : start + 2])


@pytest.mark.parametrize("frame", [4, 6])
def test_a_switch_writes_the_window_again(model: CausalWanModel, frame: int) -> None:
    """To the same prompt it changes nothing, while chunks that are held saw no others."""
    same = switched(model, Switch(frame, ["7"]), frames=frame + 2)
    torch.testing.assert_close(same, clip(model, frame + 2), atol=2e-4, rtol=0)


def test_a_kept_sink_remembers_the_first_prompt(model: CausalWanModel) -> None:
    kept, dropped = (switched(model, Switch(12, ["2"], keep)) for keep in (True, False))
    assert torch.equal(kept[:, :12], dropped[:, :12])
    assert not torch.equal(kept[:, 12:], dropped[:, 12:])


@pytest.mark.parametrize("frame", [2, 4, 6, 12])
def test_the_kept_sink_is_what_was_written_first(
    dense: CausalWanModel, frame: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However early the switch: no frame of the sink is written again."""
    written: list[list[int]] = []
    stream = dense.stream

    def noted(latents: Tensor, timestep: Tensor, *rest: Any, keep: bool = True) -> Tensor:
        if keep:
            written.append(rest[1].window.chunk_frames)
        return stream(latents, timestep, *rest, keep=keep)

    monkeypatch.setattr(dense, "stream", noted)
    switched(dense, Switch(frame, ["2"]), frames=frame + 2)
    frames = [f for chunk in written for f in chunk]
    sink, window = dense.config.cache.sink_frames, dense.config.cache.window_frames
    again = range(max(sink, frame - (window - sink)), frame)
    assert frames == [*range(frame), *again, frame, frame + 1]


def test_of_switches_before_one_chunk_the_last_holds(dense: CausalWanModel) -> None:
    several = switched(dense, Switch(3, ["5"]), Switch(4, ["2"]), Switch(1, ["7"]))
    assert torch.equal(several[:, 4:], switched(dense, Switch(2, ["7"]), Switch(4, ["2"]))[:, 4:])


def test_a_switch_after_the_last_chunk_is_refused(dense: CausalWanModel) -> None:
    for frames in (4, 5, 6):
        next(generate(dense, "7", frames, switches=[Switch((frames - 1) // 2 * 2, ["2"])]))
        with pytest.raises(ConfigError, match="after the start of the last chunk"):
            next(generate(dense, "7", frames, switches=[Switch((frames + 1) // 2 * 2, ["2"])]))


def test_a_switch_back_is_a_switch(model: CausalWanModel) -> None:
    there = switched(model, Switch(4, ["2"]))
    back = switched(model, Switch(8, ["7"]), Switch(4, ["2"]))
    assert torch.equal(there[:, :8], back[:, :8])
    assert not torch.equal(there[:, 8:], back[:, 8:])


def test_a_switch_needs_a_prompt_for_each_clip(dense: CausalWanModel) -> None:
    with pytest.raises(ConfigError, match="2 prompts from frame 4 on, 1 before"):
        next(generate(dense, "7", 8, switches=[Switch(4, ["1", "2"])]))


@pytest.mark.parametrize("text", ["", "7", "a:7", "-1:7", "3:", ":7", "s:7", "1.5:7", "3m:7"])
def test_a_switch_is_a_time_and_a_prompt(text: str) -> None:
    expected = Switch(40, ["a two: dancing"] * 2, False)
    for time in ("40", "10s", "10 s", " 10.0s"):
        assert parse_switch(f"{time}: a two: dancing", 2, False, 4.0) == expected
    with pytest.raises(ConfigError, match="FRAME:PROMPT") as caught:
        parse_switch(text, 1, True, 4.0)
    assert caught.value.hint


def test_a_length_is_in_seconds_or_in_frames() -> None:
    assert clip_frames(None, None, 4.0) == 20
    assert clip_frames(None, 7, 4.0) == 7
    assert clip_frames(60, None, 4.0) == 240
    assert clip_frames(0.01, None, 4.0) == 1
    for seconds, frames in ((1.0, 4), (0.0, None), (-1.0, None), (float("nan"), None)):
        with pytest.raises(ConfigError) as caught:
            clip_frames(seconds, frames, 4.0)
        assert caught.value.hint


def test_an_offloaded_rollout_is_the_same(converted: Path) -> None:
    model = load(converted)

    def made(runtime: RuntimeConfig) -> Tensor:
        return torch.cat(list(generate(model, "7", 8, runtime=runtime)), dim=1)

    plain = made(RuntimeConfig())
    assert torch.equal(made(RuntimeConfig(offload=True)), plain)


def test_a_video_is_refused_before_any_work_where_it_cannot_go(tmp_path: Path) -> None:
    check_video_path(tmp_path / "new.mp4")
    for name in ("old.mp4", "sheet.png"):
        (tmp_path / name).write_text("mine")
    for name in ("clip.gif", "clip", "old.mp4", "sheet.mp4"):
        with pytest.raises(OutputError) as caught:
            check_video_path(tmp_path / name)
        assert caught.value.hint


def test_clips_land_as_video_and_sheet(dense: CausalWanModel, tmp_path: Path) -> None:
    video = generate_pixels(dense, ["1", "2"], 3)
    paths = write_comparison(
        tmp_path / "clip.mp4", {"dense": video, "copy": video}, ["1", "2"], MEDIA
    )
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
        patch.setattr("vmla_convert.measuring.compare.rollout_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(dense, dense, config, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())
    assert compare(dense, dense, config, tmp_path / "a.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.png"}


@pytest.mark.parametrize("shape", [(3, 1, 12, 12, 12), (1, 1, 12, 6, 12), (1, 1, 4, 12, 12), (12,)])
def test_a_prefix_that_does_not_fit_is_refused(dense: CausalWanModel, shape: tuple[int]) -> None:
    with pytest.raises(ConfigError, match="prefix"):
        next(generate(dense, ["1", "2"], 40, prefix=torch.zeros(shape)))
