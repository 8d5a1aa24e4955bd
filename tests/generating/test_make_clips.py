"""Own samples and videos become the right latents, once and resumably, or an error says why."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
import pytest
import torch
from checkpoints import PowerCut, PowerCutError
from conftest import noise
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmla_convert.config import CachePolicy, DataConfig
from vmla_convert.errors import ConfigError, MissingExtraError, OutputError, VmlaError
from vmla_convert.generating import make_clips as module
from vmla_convert.generating.generate import generate
from vmla_convert.generating.make_clips import prepare_clips
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.media.clips import DemoClips, open_clips, seeded
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.video import write_mp4

pytest_plugins = ["checkpoints"]

OWN = DataConfig("self", frames=4, clips=10)
ORIGIN = {"sha256": "of the dense weights"}
MEDIA = DemoMedia()


def prepared(config: DataConfig, dense: CausalWanModel, folder: Path) -> dict[str, Tensor]:
    """The latents and contexts in all shards."""
    assert prepare_clips(config, dense, folder, ORIGIN) == replace(config, source=str(folder))
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([file[name] for file in files]) for name in ("latents", "context")}


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def prompted(clips: dict[str, Tensor]) -> list[int]:
    return clips["context"].argmax(-1).flatten().tolist()


def refuse(*_: object, **__: object) -> NoReturn:
    pytest.fail("work that should not have been done")


# Samples of the model's own


def test_own_samples_are_what_the_model_generates(dense: CausalWanModel, tmp_path: Path) -> None:
    config = replace(OWN, prompts=("a seven", "3", "one"), seed=5)
    stored = prepared(config, dense, tmp_path / "clips")
    prompts = [("a seven", "3", "one")[clip % 3] for clip in range(10)]
    expected = [
        torch.cat(list(generate(dense, part, 4, seeded(5, index, "self").initial_seed())), 1)
        for index, part in enumerate((prompts[:8], prompts[8:]))
    ]
    assert torch.equal(stored["latents"], torch.cat(expected))
    assert torch.equal(stored["context"], MEDIA.encode_prompts(prompts))
    assert len(stored["latents"].flatten(1).unique(dim=0)) == 10
    batch = open_clips(replace(config, source=str(tmp_path / "clips"))).batch(0, 3)
    assert batch.latents.shape == (3, 4, 12, 12, 12)


def test_own_samples_keep_dtype_and_fit_in_memory(
    dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES_AT_ONCE", 1)
    stored = prepared(replace(OWN, clips=3), dense.bfloat16(), tmp_path / "clips")
    assert stored["latents"].dtype == torch.bfloat16
    assert len(shards(tmp_path / "clips")) == 3
    assert len(stored["latents"].flatten(1).unique(dim=0)) == 3
    assert prompted(stored) == [0, 1, 2]


def test_interrupted_samples_continue_and_finished_ones_are_used_again(
    dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(OWN, dense, tmp_path / "whole")
    with pytest.raises(PowerCutError):
        prepare_clips(OWN, dense, tmp_path / "cut", ORIGIN, PowerCut("sampling clips", 1))
    assert not (tmp_path / "cut").exists()
    assert len(shards(tmp_path / "cut.partial")) == 1
    prompts: list[list[str]] = []

    def counted(model: CausalWanModel, part: list[str], *args: Any, **how: Any) -> Iterator[Tensor]:
        prompts.append(part)
        return generate(model, part, *args, **how)

    monkeypatch.setattr(module, "generate", counted)
    prepared(OWN, dense, tmp_path / "cut")
    assert prompts == [["8", "9"]]
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists()
    monkeypatch.setattr(module, "generate", refuse)
    prepared(OWN, dense, tmp_path / "cut")


@pytest.mark.parametrize("interrupted", [False, True])
def test_samples_of_other_settings_are_neither_used_nor_lost(
    interrupted: bool, dense: CausalWanModel, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    if interrupted:
        with pytest.raises(PowerCutError):
            prepare_clips(OWN, dense, folder, ORIGIN, PowerCut("sampling clips", 1))
    else:
        prepare_clips(OWN, dense, folder, ORIGIN)
    place = next(tmp_path.iterdir())
    before = shards(place)

    def refuses(origin: Any = ORIGIN, **change: Any) -> None:
        with pytest.raises(OutputError, match="clips"):
            prepare_clips(replace(OWN, **change), dense, folder, origin)
        assert list(tmp_path.iterdir()) == [place] and shards(place) == before

    refuses({"sha256": "another"})
    refuses(seed=1)
    refuses(frames=6)
    refuses(clips=11)
    refuses(prompts=("1",))
    dense.config = replace(dense.config, cache=CachePolicy(window_frames=4))
    refuses()


def test_own_samples_need_known_prompts_and_media(
    dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "generate", refuse)
    with pytest.raises(VmlaError, match="a cat"):
        prepare_clips(replace(OWN, prompts=("7", "a cat")), dense, tmp_path / "c", ORIGIN)
    with monkeypatch.context() as patch:
        patch.setattr(DemoMedia, "default_prompts", ())
        with pytest.raises(ConfigError) as caught:
            prepare_clips(OWN, dense, tmp_path / "c", ORIGIN)
        assert "--prompts" in caught.value.hint
    dense.config = replace(dense.config, media="wan")
    with pytest.raises(ConfigError) as caught:
        prepare_clips(OWN, dense, tmp_path / "c", ORIGIN)
    assert "media.base" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_the_demo_world_and_latents_stay_as_they_are(dense: CausalWanModel, tmp_path: Path) -> None:
    save_file({"latents": noise(2, 2, 12, 4, 4), "context": noise(2, 1, 10)}, tmp_path / "x")
    for source in ("demo", str(tmp_path / "x")):
        config = DataConfig(source)
        assert prepare_clips(config, dense, tmp_path / "clips", ORIGIN) == config
    assert not (tmp_path / "clips").exists()
    with pytest.raises(ConfigError, match=r"nowhere\.mp4"):
        prepare_clips(DataConfig("nowhere.mp4"), dense, tmp_path / "clips", ORIGIN)


# Videos


def demo_pixels(frames: int, index: int) -> Tensor:
    """A clip (F, 3, 24, 24) of the demo world."""
    return DemoClips(DataConfig(frames=frames)).clips(index, 1).video[0]


def film(path: Path, frames: int, index: int, prompt: str) -> Tensor:
    """Write a clip of the demo world as a video with its prompt, and return the pixels."""
    pixels = demo_pixels(frames, index)
    write_mp4(path, pixels)
    path.with_suffix(".txt").write_text(f"{prompt}\n")
    return pixels


@pytest.fixture
def footage(tmp_path: Path) -> Path:
    """Three videos in folders, each of two clips of 4 frames and one more frame."""
    for index, name in enumerate(("b", "a/x", "c")):
        film(tmp_path / "footage" / f"{name}.mp4", 9, index, str(index))
    return tmp_path / "footage"


def encoded(
    source: Path, dense: CausalWanModel, folder: Path, frames: int = 4, **settings: Any
) -> dict[str, Tensor]:
    return prepared(DataConfig(str(source), frames=frames, **settings), dense, folder)


def near(latents: Tensor, pixels: Tensor) -> bool:
    """Whether latents show the pixels, up to the loss of a video file; the next frame differs."""
    return bool((MEDIA.decode(latents) - pixels).abs().mean() < 0.03)


def test_videos_become_consecutive_clips_in_order_of_their_paths(
    footage: Path, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(footage / "aa.mp4", 3, 7, "7")  # too short for a clip
    clips = encoded(footage, dense, tmp_path / "clips")
    assert clips["latents"].shape == (6, 4, 12, 12, 12)
    whole = [demo_pixels(9, index) for index in (1, 0, 2)]  # a/x, b, c
    expected = torch.stack([part for clip in whole for part in (clip[:4], clip[4:8])])
    for latents, pixels in zip(clips["latents"], expected, strict=True):
        assert near(latents, pixels)
    assert not near(clips["latents"], expected.roll(1, 0))
    assert prompted(clips) == [1, 1, 0, 0, 2, 2]
    monkeypatch.setattr(module, "read_frames", refuse)
    again = encoded(footage, dense, tmp_path / "clips")
    assert torch.equal(clips["latents"], again["latents"])


def test_a_source_may_be_one_file_with_a_prompt_for_all(
    dense: CausalWanModel, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (48, 30), colour) for colour in ("red", "blue") * 4]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    clips = encoded(tmp_path / "clip.gif", dense, tmp_path / "clips", prompts=("a 9",))
    red, blue = (torch.tensor(c).view(3, 1, 1) for c in ((1.0, -1, -1), (-1.0, -1, 1)))
    expected = torch.stack([red, blue, red, blue]).expand(4, 3, 24, 24)
    assert near(clips["latents"], expected.expand(2, 4, 3, 24, 24))
    assert prompted(clips) == [9, 9]


def test_interrupted_encoding_continues(
    footage: Path, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLIPS_PER_SHARD", 2)
    encoded(footage, dense, tmp_path / "whole")
    config, cut = DataConfig(str(footage), frames=4), PowerCut("encoding videos", 2)
    with pytest.raises(PowerCutError):
        prepare_clips(config, dense, tmp_path / "cut", ORIGIN, cut)
    assert len(shards(tmp_path / "cut.partial")) == 2
    encodings: list[int] = []
    encode = DemoMedia.encode

    def counted(media: DemoMedia, video: Tensor) -> Tensor:
        encodings.append(len(video))
        return encode(media, video)

    monkeypatch.setattr(DemoMedia, "encode", counted)
    prepared(config, dense, tmp_path / "cut")
    assert encodings == [2]
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")


def test_clips_of_changed_videos_are_not_used(
    footage: Path, dense: CausalWanModel, tmp_path: Path
) -> None:
    encoded(footage, dense, tmp_path / "clips")
    before = shards(tmp_path / "clips")

    def refuses(frames: int = 4) -> None:
        with pytest.raises(OutputError, match="clips"):
            encoded(footage, dense, tmp_path / "clips", frames=frames)
        assert shards(tmp_path / "clips") == before

    refuses(frames=3)
    (footage / "c.txt").write_text("8")
    refuses()
    (footage / "c.txt").write_text("2\n")
    stat = (footage / "c.mp4").stat()
    os.utime(footage / "c.mp4", (1, 1))
    refuses()
    os.utime(footage / "c.mp4", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    encoded(footage, dense, tmp_path / "clips")
    for ending in ("mp4", "txt"):
        (footage / f"c.{ending}").rename(footage / f"d.{ending}")
    refuses()


@pytest.mark.parametrize(("frames", "clips"), [(3, 0), (7, 1)])
def test_too_few_clips_are_refused(
    frames: int, clips: int, dense: CausalWanModel, tmp_path: Path
) -> None:
    film(tmp_path / "clip.mp4", frames, 0, "7")
    with pytest.raises(ConfigError, match=rf"clip\.mp4 make {clips} clips"):
        encoded(tmp_path / "clip.mp4", dense, tmp_path / "clips")
    assert not list(tmp_path.glob("clips*"))


def test_a_video_without_a_prompt_is_named(
    footage: Path, dense: CausalWanModel, tmp_path: Path
) -> None:
    (footage / "c.txt").unlink()
    for prompts in ((), ("1", "2")):
        with pytest.raises(ConfigError, match=r"c\.mp4") as caught:
            encoded(footage, dense, tmp_path / "clips", prompts=prompts)
        assert "c.txt" in caught.value.hint and "--prompts" in caught.value.hint
    clips = encoded(footage, dense, tmp_path / "clips", prompts=("5",))
    assert prompted(clips) == [1, 1, 0, 0, 5, 5]


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "frames", "sound", "prompt"])
def test_a_video_that_cannot_be_used_is_named(
    damage: str, footage: Path, dense: CausalWanModel, tmp_path: Path
) -> None:
    file = footage / "c.mp4"
    whole = file.read_bytes()
    start = whole.index(b"mdat") + 4
    content = {
        "text": b"not a video",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "frames": whole[:start] + b"\xff" * 400 + whole[start + 400 :],
    }
    if damage == "prompt":
        (footage / "c.txt").write_text("a cat")
    elif damage == "sound":
        write_sound(file)
    else:
        file.write_bytes(content[damage])
    with pytest.raises(VmlaError, match="'a cat'" if damage == "prompt" else r"c\.mp4"):
        encoded(footage, dense, tmp_path / "clips")
    assert not list(tmp_path.glob("clips*"))


def test_videos_need_pyav(
    footage: Path, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError) as caught:
        encoded(footage, dense, tmp_path / "clips")
    assert "[video]" in caught.value.hint


def write_sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
