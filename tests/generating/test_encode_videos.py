"""Videos become clips of latents, once and resumably, or an error says why."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
import pytest
import torch
from checkpoints import PowerCut, PowerCutError
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.config import DataConfig, MediaConfig
from vmla_convert.errors import ConfigError, MissingExtraError, VmlaError
from vmla_convert.generating import encode_videos as module
from vmla_convert.generating.make_clips import Need, ready_clips
from vmla_convert.loading.load import open_named
from vmla_convert.media.clips import DemoClips, open_clips
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.video import write_mp4

pytest_plugins = ["checkpoints"]

MEDIA = DemoMedia()


@pytest.fixture
def opened(teacher: Path) -> OpenCheckpoint:
    return open_named(teacher)


def prepared(
    data: DataConfig, opened: OpenCheckpoint, root: Path
) -> tuple[Path, dict[str, Tensor]]:
    """The folder of a set of clips, and the latents and contexts in all of its files."""
    [ready] = ready_clips(opened, [Need(data, "train", 99)], MediaConfig(clips_dir=str(root)))
    folder = Path(ready.source)
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return folder, {n: torch.cat([file[n] for file in files]) for n in ("latents", "context")}


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def prompted(clips: dict[str, Tensor]) -> list[int]:
    return clips["context"].argmax(-1).flatten().tolist()


def refuse(*_: object, **__: object) -> NoReturn:
    pytest.fail("work that should not have been done")


def demo_pixels(frames: int, index: int) -> Tensor:
    """A clip (F, 3, 24, 24) of the demo world."""
    return DemoClips(DataConfig("demo", frames=frames)).clips(index, 1).video[0]


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
    source: Path, opened: OpenCheckpoint, root: Path, frames: int = 4, **settings: Any
) -> dict[str, Tensor]:
    return prepared(DataConfig(str(source), frames=frames, **settings), opened, root)[1]


def near(latents: Tensor, pixels: Tensor) -> bool:
    """Whether latents show the pixels, up to the loss of a video file; the next frame differs."""
    return bool((MEDIA.decode(latents) - pixels).abs().mean() < 0.03)


def test_videos_become_consecutive_clips_in_order_of_their_paths(
    footage: Path, opened: OpenCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(footage / "aa.mp4", 3, 7, "7")  # too short for a clip
    clips = encoded(footage, opened, tmp_path / "clips")
    assert clips["latents"].shape == (6, 4, 12, 12, 12)
    whole = [demo_pixels(9, index) for index in (1, 0, 2)]  # a/x, b, c
    expected = torch.stack([part for clip in whole for part in (clip[:4], clip[4:8])])
    for latents, pixels in zip(clips["latents"], expected, strict=True):
        assert near(latents, pixels)
    assert not near(clips["latents"], expected.roll(1, 0))
    assert prompted(clips) == [1, 1, 0, 0, 2, 2]
    monkeypatch.setattr(module, "read_frames", refuse)
    again = encoded(footage, opened, tmp_path / "clips")
    assert torch.equal(clips["latents"], again["latents"])


def test_a_source_may_be_one_file_with_a_prompt_for_all(
    opened: OpenCheckpoint, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (48, 30), colour) for colour in ("red", "blue") * 4]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    clips = encoded(tmp_path / "clip.gif", opened, tmp_path / "clips", prompts=("a 9",))
    red, blue = (torch.tensor(c).view(3, 1, 1) for c in ((1.0, -1, -1), (-1.0, -1, 1)))
    expected = torch.stack([red, blue, red, blue]).expand(4, 3, 24, 24)
    assert near(clips["latents"], expected.expand(2, 4, 3, 24, 24))
    assert prompted(clips) == [9, 9]


def test_interrupted_encoding_continues(
    footage: Path, opened: OpenCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLIPS_PER_SHARD", 2)
    data, cut = DataConfig(str(footage), frames=4), PowerCut("encoding videos", 2)
    whole, _ = prepared(data, opened, tmp_path / "whole")
    media = MediaConfig(clips_dir=str(tmp_path / "cut"))
    with pytest.raises(PowerCutError):
        ready_clips(opened, [Need(data, "train", 2)], media, cut)
    assert len(shards(tmp_path / "cut")) == 2
    encodings: list[int] = []
    encode = DemoMedia.encode

    def counted(media: DemoMedia, video: Tensor) -> Tensor:
        encodings.append(len(video))
        return encode(media, video)

    monkeypatch.setattr(DemoMedia, "encode", counted)
    folder, _ = prepared(data, opened, tmp_path / "cut")
    assert encodings == [2]
    assert shards(folder) == shards(whole)


def test_clips_of_changed_videos_are_made_anew(
    footage: Path, opened: OpenCheckpoint, tmp_path: Path
) -> None:
    def place(frames: int = 4) -> Path:
        return prepared(DataConfig(str(footage), frames=frames), opened, tmp_path / "clips")[0]

    first = place()
    before = shards(first)
    places = {first, place(frames=8)}
    (footage / "c.txt").write_text("8")
    places.add(place())
    (footage / "c.txt").write_text("2\n")
    stat = (footage / "c.mp4").stat()
    os.utime(footage / "c.mp4", (1, 1))
    places.add(place())
    os.utime(footage / "c.mp4", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert place() == first
    for ending in ("mp4", "txt"):
        (footage / f"c.{ending}").rename(footage / f"d.{ending}")
    places.add(place())
    assert len(places) == 5 and shards(first) == before


def test_only_as_many_clips_as_asked_for(
    footage: Path, opened: OpenCheckpoint, tmp_path: Path
) -> None:
    clips = encoded(footage, opened, tmp_path / "clips", clips=3)
    assert prompted(clips) == [1, 1, 0]
    data = replace(DataConfig(str(footage), frames=4), latent_size=(8, 6))
    folder, _ = prepared(data, opened, tmp_path / "clips")
    batch = open_clips(DataConfig(str(folder))).batch(0, 2)
    assert batch.latents.shape == (2, 4, 12, 8, 6)


@pytest.mark.parametrize(("frames", "clips"), [(3, 0), (7, 1)])
def test_too_few_clips_are_refused(
    frames: int, clips: int, opened: OpenCheckpoint, tmp_path: Path
) -> None:
    film(tmp_path / "clip.mp4", frames, 0, "7")
    with pytest.raises(ConfigError, match=rf"clip\.mp4 make {clips} clips"):
        encoded(tmp_path / "clip.mp4", opened, tmp_path / "clips")
    assert not shards(tmp_path / "clips")


def test_a_video_without_a_prompt_is_named(
    footage: Path, opened: OpenCheckpoint, tmp_path: Path
) -> None:
    (footage / "c.txt").unlink()
    for prompts in ((), ("1", "2")):
        with pytest.raises(ConfigError, match=r"c\.mp4") as caught:
            encoded(footage, opened, tmp_path / "clips", prompts=prompts)
        assert "c.txt" in caught.value.hint and "--prompts" in caught.value.hint
    clips = encoded(footage, opened, tmp_path / "clips", prompts=("5",))
    assert prompted(clips) == [1, 1, 0, 0, 5, 5]


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "frames", "sound", "prompt"])
def test_a_video_that_cannot_be_used_is_named(
    damage: str, footage: Path, opened: OpenCheckpoint, tmp_path: Path
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
        encoded(footage, opened, tmp_path / "clips")
    assert not shards(tmp_path / "clips")


def test_videos_need_pyav(
    footage: Path, opened: OpenCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError) as caught:
        encoded(footage, opened, tmp_path / "clips")
    assert "[video]" in caught.value.hint


def write_sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
