"""Videos come chunk by chunk, depend on the seed alone, and take constant memory."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODEL
from conftest import noise
from torch import Tensor, nn

from vmla_convert.config import MediaConfig, RuntimeConfig, SamplerConfig, SourceConfig
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.generating import generate as module
from vmla_convert.generating import rollout as loop
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
from vmla_convert.media.base import Media
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.open import open_media
from vmla_convert.media.wan import WanMedia

pytest_plugins = ["checkpoints", "tiny_wan"]


@pytest.fixture(params=["teacher", "converted"])
def model(request: pytest.FixtureRequest) -> CausalWanModel:
    return load(request.getfixturevalue(request.param))


def clip(model: CausalWanModel, frames: int = 6, seed: int = 0, **how: Any) -> Tensor:
    return torch.cat(list(generate(model, "7", frames, seed, **how)), dim=1)


def test_chunks_come_when_they_are_asked_for(
    model: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[int] = []
    sample = loop.sample_chunk

    def counted(*args: Any) -> Tensor:
        sampled.append(len(sampled))
        return sample(*args)

    monkeypatch.setattr(loop, "sample_chunk", counted)
    chunks = generate(model, "7", 10**9)
    first, second = next(chunks), next(chunks)
    assert sampled == [0, 1]
    assert first.shape == second.shape == (1, 2, 12, 12, 12)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("frames", "lengths"), [(1, [1]), (2, [2]), (5, [2, 2, 1])])
def test_the_last_chunk_is_cut(frames: int, lengths: list[int], dense: CausalWanModel) -> None:
    chunks = list(generate(dense, ["1", "a nine"], frames))
    assert [tuple(chunk.shape) for chunk in chunks] == [(2, f, 12, 12, 12) for f in lengths]


def test_seed_and_prompt_decide_everything(model: CausalWanModel) -> None:
    first, again, other = (clip(model, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.cat(list(generate(model, "2", 6, 3)), dim=1))
    assert torch.equal(clip(model, 10, 3)[:, :6], first)


@pytest.mark.parametrize("renoise", [False, True])
def test_dense_and_converted_start_from_the_same_noise(
    renoise: bool, dense: CausalWanModel, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    sample = loop.sample_chunk

    def watched(model: CausalWanModel, noise: Tensor, *rest: Any) -> Tensor:
        chunk = sample(model, noise, *rest)
        # The next draw shows that as much fresh noise was drawn.
        seen.extend([noise, rest[2]()])
        return chunk

    monkeypatch.setattr(loop, "sample_chunk", watched)
    clips: list[Tensor] = []
    for model in (dense, load(converted)):
        model.config = replace(model.config, sampler=SamplerConfig((1000, 500), 2.0, renoise))
        clips.append(clip(model))
    assert all(torch.equal(a, b) for a, b in zip(seen[:6], seen[6:], strict=True))
    assert len({noise.sum().item() for noise in seen[:6:2]}) == 3
    assert not torch.equal(*clips)


def test_memory_does_not_grow_with_the_length(
    model: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[KVCache] = []
    new_cache = model.new_cache

    def kept(batch: int, runtime: RuntimeConfig | None, frames: int) -> KVCache:
        caches.append(new_cache(batch, runtime, frames))
        return caches[-1]

    monkeypatch.setattr(model, "new_cache", kept)
    window = MODEL.cache.window_frames
    promised = 2 * model.config.cache_bytes(window)  # float32 here, two bytes by formula
    for count, _ in enumerate(generate(model, "7", 20), 1):
        assert caches[0].nbytes == promised
        assert caches[0].window.held == min(2 * count, window)
    assert len(caches) == 1


def test_the_past_reaches_the_next_chunk(dense: CausalWanModel) -> None:
    chunks = list(generate(dense, "7", 4))
    dense.config = replace(dense.config, cache=replace(MODEL.cache, window_frames=2, sink_frames=0))
    blind = list(generate(dense, "7", 4))
    assert torch.equal(chunks[0], blind[0])
    assert not torch.equal(chunks[1], blind[1])


def test_pixels_are_in_range(model: CausalWanModel) -> None:
    video = generate_pixels(model, ["1", "2"], 5)
    assert video.shape == (2, 5, 3, 24, 24)
    assert video.abs().max() <= 1


@pytest.mark.parametrize(
    ("prompt", "frames", "named"),
    [("a cat", 2, "'a cat'"), (["7", "nothing"], 2, "nothing"), ("7", 0, "0"), ("7", -3, "-3")],
)
def test_what_cannot_be_generated_is_refused(
    prompt: str | list[str], frames: int, named: str, dense: CausalWanModel
) -> None:
    with pytest.raises(VmlaError, match=named):
        next(generate(dense, prompt, frames))


# Switches


def test_a_switch_changes_what_follows_and_nothing_before(model: CausalWanModel) -> None:
    plain, other = clip(model, 14), clip(model, 14, switches=[Switch(5, ["2"])])
    # The first chunk that starts at frame 5 or later.
    assert torch.equal(plain[:, :6], other[:, :6])
    for start in range(6, 14, 2):
        assert not torch.equal(plain[:, start : start + 2], other[:, start : start + 2])
    back = clip(model, 14, switches=[Switch(9, ["7"]), Switch(5, ["2"])])
    assert torch.equal(other[:, :10], back[:, :10])
    assert not torch.equal(other[:, 10:], back[:, 10:])


@pytest.mark.parametrize("frame", [4, 6])
def test_a_switch_writes_the_window_again(model: CausalWanModel, frame: int) -> None:
    """A switch to the same prompt changes nothing while the window holds every chunk."""
    same = clip(model, frame + 2, switches=[Switch(frame, ["7"])])
    torch.testing.assert_close(same, clip(model, frame + 2), atol=2e-4, rtol=0)


@pytest.mark.parametrize("frame", [2, 4, 6, 12])
def test_a_kept_sink_is_not_written_again(
    dense: CausalWanModel, frame: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    stream = dense.stream

    def noted(latents: Tensor, timestep: Tensor, *rest: Any, keep: bool = True) -> Tensor:
        if keep:
            written.extend(rest[1].window.chunk_frames)
        return stream(latents, timestep, *rest, keep=keep)

    monkeypatch.setattr(dense, "stream", noted)
    kept = clip(dense, frame + 2, switches=[Switch(frame, ["2"])])
    sink, window = dense.config.cache.sink_frames, dense.config.cache.window_frames
    again = range(max(sink, frame - (window - sink)), frame)
    assert written == [*range(frame), *again, frame, frame + 1]
    dropped = clip(dense, frame + 2, switches=[Switch(frame, ["2"], keep_sink=False)])
    assert torch.equal(kept[:, :frame], dropped[:, :frame])
    assert not torch.equal(kept[:, frame:], dropped[:, frame:])


def test_of_switches_before_one_chunk_the_last_one_counts(dense: CausalWanModel) -> None:
    several = [Switch(3, ["5"]), Switch(4, ["2"]), Switch(1, ["7"])]
    expected = clip(dense, 8, switches=[Switch(2, ["7"]), Switch(4, ["2"])])
    assert torch.equal(clip(dense, 8, switches=several)[:, 4:], expected[:, 4:])


def test_a_switch_that_does_not_fit_is_refused(dense: CausalWanModel) -> None:
    for frames in (4, 5, 6):
        last = (frames - 1) // 2 * 2
        next(generate(dense, "7", frames, switches=[Switch(last, ["2"])]))
        with pytest.raises(ConfigError, match=str(last)):
            next(generate(dense, "7", frames, switches=[Switch(last + 1, ["2"])]))
    with pytest.raises(ConfigError, match="2 prompts from frame 4"):
        next(generate(dense, "7", 8, switches=[Switch(4, ["1", "2"])]))


def test_all_prompts_are_encoded_once_before_the_first_chunk(dense: CausalWanModel) -> None:
    encoded: list[list[str]] = []

    class Counting:
        def encode_prompts(self, prompts: list[str]) -> Tensor:
            encoded.append(prompts)
            return DemoMedia().encode_prompts(prompts)

    chunks = generate(dense, "7", 8, switches=[Switch(4, ["3"])], text=Counting())
    next(chunks)
    assert encoded == [["7", "3"]]
    assert len(list(chunks)) == 3 and len(encoded) == 1


def test_a_text_encoder_opened_by_generate_is_freed_before_the_first_chunk(
    wan_source: SourceConfig, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[nn.Module]] = []

    def opened(config: Any, **how: Any) -> Media:
        media = open_media(config, MediaConfig(str(wan_folder)), **how)
        assert isinstance(media, WanMedia)
        held.append(weakref.ref(media.component("text_encoder")))
        return media

    monkeypatch.setattr(module, "open_media", opened)
    chunks = generate(load(wan_source), "a cat", frames=4)
    next(chunks)
    gc.collect()
    assert [encoder() for encoder in held] == [None]


@pytest.mark.parametrize("text", ["", "7", "a:7", "-1:7", "3:", ":7", "s:7", "1.5:7", "3m:7"])
def test_a_switch_is_a_time_and_a_prompt(text: str) -> None:
    expected = Switch(40, ["a two: dancing"] * 2, False)
    for time in ("40", "10s", "10 s", " 10.0s"):
        assert parse_switch(f"{time}: a two: dancing", 2, False, 4.0) == expected
    with pytest.raises(ConfigError, match="FRAME:PROMPT"):
        parse_switch(text, 1, True, 4.0)


def test_a_length_is_in_seconds_or_in_frames() -> None:
    assert clip_frames(None, None, 4.0) == 20
    assert clip_frames(None, 7, 4.0) == 7
    assert clip_frames(60, None, 4.0) == 240
    assert clip_frames(0.01, None, 4.0) == 1
    for seconds, frames in ((1.0, 4), (0.0, None), (-1.0, None), (float("nan"), None)):
        with pytest.raises(ConfigError):
            clip_frames(seconds, frames, 4.0)


# Prefix


@pytest.mark.parametrize("given", [1, 2, 3, 7])
def test_a_prefix_begins_the_clip_and_is_continued(given: int, model: CausalWanModel) -> None:
    def made(prefix: Tensor | None, frames: int = given + 3, **how: Any) -> Tensor:
        return torch.cat(list(generate(model, ["1", "2"], frames, prefix=prefix, **how)), dim=1)

    prefix = noise(1, given, 12, 12, 12)
    clip = made(prefix)
    assert clip.shape[:2] == (2, given + 3)
    assert torch.equal(clip[:, :given], prefix.expand(2, -1, -1, -1, -1))
    # The noise is that of a clip without a prefix, so only the past makes a difference.
    assert not torch.equal(clip[:, given:], made(None, 3))
    assert not torch.equal(clip[:, given:], made(1 + prefix)[:, given:])
    switched = made(prefix, switches=[Switch(given + 2, ["3", "4"])])
    assert torch.equal(clip[:, : given + 2], switched[:, : given + 2])
    assert not torch.equal(clip[:, given + 2 :], switched[:, given + 2 :])


def test_generated_chunks_as_prefix_continue_alike(
    model: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seeded = clip(model, 8), module.seeded
    monkeypatch.setattr(module, "seeded", lambda seed, i, name: seeded(seed, i + 2, name))
    assert torch.equal(clip(model, 8, prefix=whole[:, :4]), whole)


@pytest.mark.parametrize("shape", [(3, 1, 12, 12, 12), (1, 1, 12, 6, 12), (1, 1, 4, 12, 12), (12,)])
def test_a_prefix_that_does_not_fit_is_refused(dense: CausalWanModel, shape: tuple[int]) -> None:
    with pytest.raises(ConfigError, match="prefix"):
        next(generate(dense, ["1", "2"], 40, prefix=torch.zeros(shape)))
    for frames in (2, 3):
        with pytest.raises(ConfigError, match="at least 4"):
            next(generate(dense, "7", frames, prefix=noise(1, 3, 12, 12, 12)))
