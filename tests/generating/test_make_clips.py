"""Own samples and videos become the right latents, once and resumably, or a sentence says why."""

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
from vmla_convert.generating import make_clips as pipeline
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


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def latents(folder: Path) -> dict[str, Tensor]:
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([file[name] for file in files]) for name in ("latents", "context")}


def refuse(*_: object, **__: object) -> NoReturn:
    pytest.fail("work that should not have been done")


class TestOwnSamples:
    def test_are_what_the_model_generates(self, dense: CausalWanModel, tmp_path: Path) -> None:
        config = replace(OWN, prompts=("a seven", "3", "one"), seed=5)
        prepared = prepare_clips(config, dense, tmp_path / "clips", ORIGIN)
        assert prepared == replace(config, source=str(tmp_path / "clips"))
        prompts = [("a seven", "3", "one")[clip % 3] for clip in range(10)]
        expected = [
            torch.cat(list(generate(dense, part, 4, seeded(5, index, "self").initial_seed())), 1)
            for index, part in enumerate((prompts[:8], prompts[8:]))
        ]
        stored = latents(tmp_path / "clips")
        assert torch.equal(stored["latents"], torch.cat(expected))
        assert torch.equal(stored["context"], MEDIA.encode_prompts(prompts))

    def test_are_stored_as_the_model_makes_them(
        self, dense: CausalWanModel, tmp_path: Path
    ) -> None:
        prepare_clips(replace(OWN, clips=2), dense.bfloat16(), tmp_path / "clips", ORIGIN)
        assert latents(tmp_path / "clips")["latents"].dtype == torch.bfloat16

    def test_are_different_and_can_be_trained_on(
        self, dense: CausalWanModel, tmp_path: Path
    ) -> None:
        prepared = prepare_clips(replace(OWN, clips=12), dense, tmp_path / "clips", ORIGIN)
        stored = latents(tmp_path / "clips")
        assert len(stored["latents"].flatten(1).unique(dim=0)) == 12
        assert stored["context"].argmax(-1).flatten().tolist() == [*range(10), 0, 1]
        batch = open_clips(prepared).batch(0, 3)
        assert batch.latents.shape == (3, 4, 12, 12, 12)
        assert batch.context.shape == (3, 1, 10)

    def test_are_sampled_once(
        self, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = prepare_clips(OWN, dense, tmp_path / "clips", ORIGIN)
        before = shards(tmp_path / "clips")
        monkeypatch.setattr(pipeline, "generate", refuse)
        assert prepare_clips(OWN, dense, tmp_path / "clips", ORIGIN) == first
        assert shards(tmp_path / "clips") == before

    def test_go_on_where_they_were_interrupted(
        self, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepare_clips(OWN, dense, tmp_path / "whole", ORIGIN)
        with pytest.raises(PowerCutError):
            prepare_clips(OWN, dense, tmp_path / "cut", ORIGIN, PowerCut("sampling clips", 1))
        assert not (tmp_path / "cut").exists()
        assert len(shards(tmp_path / "cut.partial")) == 1
        prompts: list[list[str]] = []

        def counted(
            model: CausalWanModel, part: list[str], *args: Any, **more: Any
        ) -> Iterator[Tensor]:
            prompts.append(part)
            return generate(model, part, *args, **more)

        monkeypatch.setattr(pipeline, "generate", counted)
        prepare_clips(OWN, dense, tmp_path / "cut", ORIGIN)
        assert prompts == [["8", "9"]]
        assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
        assert not (tmp_path / "cut.partial").exists()

    @pytest.mark.parametrize("interrupted", [False, True])
    def test_of_other_settings_are_neither_used_nor_lost(
        self, interrupted: bool, dense: CausalWanModel, tmp_path: Path
    ) -> None:
        folder = tmp_path / "clips"
        if interrupted:
            with pytest.raises(PowerCutError):
                prepare_clips(OWN, dense, folder, ORIGIN, PowerCut("sampling clips", 1))
        else:
            prepare_clips(OWN, dense, folder, ORIGIN)
        place = next(tmp_path.iterdir())
        before = shards(place)

        def refuses(config: DataConfig, origin: Any = ORIGIN) -> None:
            with pytest.raises(OutputError, match="clips"):
                prepare_clips(config, dense, folder, origin)
            assert list(tmp_path.iterdir()) == [place] and shards(place) == before

        refuses(OWN, {"sha256": "another"})
        changes: list[dict[str, Any]] = [
            {"seed": 1},
            {"frames": 6},
            {"clips": 11},
            {"prompts": ("1",)},
        ]
        for change in changes:
            refuses(replace(OWN, **change))
        dense.config = replace(dense.config, cache=CachePolicy(window_frames=4))
        refuses(OWN)

    def test_of_large_models_are_sampled_one_by_one(
        self, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline, "CACHE_BYTES_AT_ONCE", 1)
        prepare_clips(replace(OWN, clips=3), dense, tmp_path / "clips", ORIGIN)
        assert len(shards(tmp_path / "clips")) == 3
        assert len(latents(tmp_path / "clips")["latents"].flatten(1).unique(dim=0)) == 3

    def test_need_prompts_that_can_be_read(
        self, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline, "generate", refuse)
        with pytest.raises(VmlaError, match="a cat"):
            prepare_clips(replace(OWN, prompts=("7", "a cat")), dense, tmp_path / "c", ORIGIN)
        monkeypatch.setattr(DemoMedia, "default_prompts", ())
        with pytest.raises(ConfigError, match="need prompts") as caught:
            prepare_clips(OWN, dense, tmp_path / "c", ORIGIN)
        assert "--prompts" in caught.value.hint
        assert not list(tmp_path.iterdir())


def test_the_demo_world_and_latents_stay_as_they_are(dense: CausalWanModel, tmp_path: Path) -> None:
    save_file({"latents": noise(2, 2, 12, 4, 4), "context": noise(2, 1, 10)}, tmp_path / "x")
    (tmp_path / "shards").mkdir()
    save_file({"latents": noise(2)}, tmp_path / "shards" / "x.safetensors")
    for source in ("demo", str(tmp_path / "x"), str(tmp_path / "shards")):
        config = DataConfig(source)
        assert prepare_clips(config, dense, tmp_path / "clips", ORIGIN) == config
    assert not (tmp_path / "clips").exists()


def test_a_place_without_clips_is_refused(dense: CausalWanModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.mp4"):
        prepare_clips(DataConfig("nowhere.mp4"), dense, tmp_path / "clips", ORIGIN)


def demo_pixels(frames: int, index: int) -> Tensor:
    """A clip (F, 3, 24, 24) of the demo world."""
    return DemoClips(DataConfig(frames=frames)).clips(index, 1).video[0]


def film(path: Path, frames: int, index: int, prompt: str | None = None) -> Tensor:
    """Write a clip of the demo world as a video, and give back its pixels."""
    pixels = demo_pixels(frames, index)
    write_mp4(path, pixels)
    if prompt is not None:
        path.with_suffix(".txt").write_text(f"{prompt}\n")
    return pixels


@pytest.fixture
def footage(tmp_path: Path) -> Path:
    """Three videos, each of two clips of 4 frames and a rest, in folders."""
    for index, name in enumerate(("b", "a/x", "c")):
        film(tmp_path / "footage" / f"{name}.mp4", 9, index, str(index))
    return tmp_path / "footage"


def encoded(
    source: Path, dense: CausalWanModel, folder: Path, frames: int = 4, **settings: Any
) -> dict[str, Tensor]:
    config = DataConfig(str(source), frames=frames, **settings)
    assert prepare_clips(config, dense, folder, ORIGIN) == replace(config, source=str(folder))
    return latents(folder)


def near(got: Tensor, pixels: Tensor) -> bool:
    """Whether latents are those of pixels, but for what video files lose; one frame on is more."""
    return bool((MEDIA.decode(got) - pixels).abs().mean() < 0.03)


class TestVideos:
    def test_become_consecutive_clips_in_order_of_their_paths(
        self, footage: Path, dense: CausalWanModel, tmp_path: Path
    ) -> None:
        got = encoded(footage, dense, tmp_path / "clips")
        assert got["latents"].shape == (6, 4, 12, 12, 12)
        whole = [demo_pixels(9, index) for index in (1, 0, 2)]  # a/x, b, c
        expected = torch.stack([part for clip in whole for part in (clip[:4], clip[4:8])])
        for clip, pixels in zip(got["latents"], expected, strict=True):
            assert near(clip, pixels)
        assert not near(got["latents"], expected.roll(1, 0))
        assert got["context"].argmax(-1).flatten().tolist() == [1, 1, 0, 0, 2, 2]

    def test_may_be_one_file_with_a_prompt_for_all(
        self, dense: CausalWanModel, tmp_path: Path
    ) -> None:
        pixels = film(tmp_path / "clip.mp4", 8, 0)
        got = encoded(tmp_path / "clip.mp4", dense, tmp_path / "clips", prompts=("a 9",))
        assert near(got["latents"].flatten(0, 1)[None], pixels)
        assert got["context"].argmax(-1).flatten().tolist() == [9, 9]

    def test_of_other_kinds_are_read(self, dense: CausalWanModel, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (48, 30), colour) for colour in ("red", "blue") * 4]
        frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
        got = encoded(tmp_path / "clip.gif", dense, tmp_path / "clips", prompts=("1",))
        red, blue = (torch.tensor(c).view(3, 1, 1) for c in ((1.0, -1, -1), (-1.0, -1, 1)))
        expected = torch.stack([red, blue, red, blue]).expand(4, 3, 24, 24)
        assert near(got["latents"], expected.expand(2, 4, 3, 24, 24))

    def test_are_encoded_once(
        self, footage: Path, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = encoded(footage, dense, tmp_path / "clips")
        monkeypatch.setattr(pipeline, "read_frames", refuse)
        after = encoded(footage, dense, tmp_path / "clips")
        assert torch.equal(before["latents"], after["latents"])

    def test_go_on_where_they_were_interrupted(
        self, footage: Path, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline, "CLIPS_PER_SHARD", 2)
        encoded(footage, dense, tmp_path / "whole")
        config, cut = DataConfig(str(footage), frames=4), PowerCut("encoding videos", 2)
        with pytest.raises(PowerCutError):
            prepare_clips(config, dense, tmp_path / "cut", ORIGIN, cut)
        assert len(shards(tmp_path / "cut.partial")) == 2
        encodings: list[int] = []

        def counted(media: DemoMedia, video: Tensor) -> Tensor:
            encodings.append(len(video))
            return encode(media, video)

        encode = DemoMedia.encode
        monkeypatch.setattr(DemoMedia, "encode", counted)
        prepare_clips(config, dense, tmp_path / "cut", ORIGIN)
        assert encodings == [2]
        assert shards(tmp_path / "cut") == shards(tmp_path / "whole")

    def test_that_changed_are_not_taken_for_the_old_ones(
        self, footage: Path, dense: CausalWanModel, tmp_path: Path
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

    def test_too_short_for_a_clip_are_left_out(
        self, footage: Path, dense: CausalWanModel, tmp_path: Path
    ) -> None:
        expected = encoded(footage, dense, tmp_path / "clips")
        film(footage / "aa.mp4", 3, 7, "7")
        got = encoded(footage, dense, tmp_path / "others")
        assert torch.equal(got["latents"], expected["latents"])

    @pytest.mark.parametrize(("frames", "clips"), [(3, 0), (7, 1)])
    def test_that_make_too_few_clips_are_refused(
        self, frames: int, clips: int, dense: CausalWanModel, tmp_path: Path
    ) -> None:
        film(tmp_path / "clip.mp4", frames, 0, "7")
        with pytest.raises(ConfigError, match=rf"clip\.mp4 make {clips} clips"):
            encoded(tmp_path / "clip.mp4", dense, tmp_path / "clips")
        assert not list(tmp_path.glob("clips*"))

    def test_without_a_prompt_are_named(
        self, footage: Path, dense: CausalWanModel, tmp_path: Path
    ) -> None:
        (footage / "c.txt").unlink()
        for prompts in ((), ("1", "2")):
            with pytest.raises(ConfigError, match=r"c\.mp4 has no prompt") as caught:
                encoded(footage, dense, tmp_path / "clips", prompts=prompts)
            assert "c.txt" in caught.value.hint and "--prompts" in caught.value.hint
        got = encoded(footage, dense, tmp_path / "clips", prompts=("5",))
        assert got["context"].argmax(-1).flatten().tolist() == [1, 1, 0, 0, 5, 5]

    def test_with_a_prompt_that_cannot_be_read_are_refused_before_any_work(
        self, footage: Path, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline, "read_frames", refuse)
        (footage / "c.txt").write_text("a cat")
        with pytest.raises(VmlaError, match="a cat"):
            encoded(footage, dense, tmp_path / "clips")

    @pytest.mark.parametrize("damage", ["text", "empty", "cut", "frames", "sound"])
    def test_that_cannot_be_played_are_named(
        self, damage: str, footage: Path, dense: CausalWanModel, tmp_path: Path
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
        if damage == "sound":
            write_sound(file)
        else:
            file.write_bytes(content[damage])
        with pytest.raises(ConfigError, match=r"c\.mp4"):
            encoded(footage, dense, tmp_path / "clips")
        assert not list(tmp_path.glob("clips*"))

    def test_need_pyav(
        self, footage: Path, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(MissingExtraError) as caught:
            encoded(footage, dense, tmp_path / "clips")
        assert "[video]" in caught.value.hint

    def test_need_media(self, footage: Path, dense: CausalWanModel, tmp_path: Path) -> None:
        dense.config = replace(dense.config, media="wan")
        with pytest.raises(ConfigError, match="text encoder and VAE"):
            encoded(footage, dense, tmp_path / "clips")


def write_sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
