"""Films and comparisons land whole or not at all; a prefix comes from a file."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import noise
from PIL import Image
from tiny_wan import LATENT_SIZE, PROMPT, wan_latents
from torch import Tensor

from vmla_convert.config import GenerateConfig, SourceConfig
from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.generating.film import check_video_path, write_film
from vmla_convert.generating.prefix import prefix_chunks, read_prefix
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.measuring.compare import compare
from vmla_convert.media.base import Media
from vmla_convert.media.video import partial_path, read_frames, write_mp4
from vmla_convert.results import Row

pytest_plugins = ["checkpoints", "tiny_wan"]


def test_a_film_shows_its_first_frame_early(wan_media: Media, tmp_path: Path) -> None:
    seen: list[bool] = []

    def chunks() -> Iterator[Tensor]:
        for chunk in wan_latents(6).split(2, dim=1):
            seen.append((tmp_path / "a.png").is_file())
            assert not (tmp_path / "a.mp4").exists()
            yield chunk

    paths = write_film(tmp_path / "a.mp4", chunks(), wan_media)
    assert seen == [False, True, True]
    assert [path.name for path in paths] == ["a.mp4", "a.png"]
    first = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
    expected = (wan_media.decode(wan_latents(6))[0, 0] + 1) * 127.5
    assert (first - expected).abs().max() <= 0.5 + 1e-3
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert stream.average_rate == 16
        assert (stream.height, stream.width, len(list(file.decode(stream)))) == (32, 48, 21)


def test_a_film_holds_one_chunk_at_a_time(
    wan_media: Media, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    decoder = wan_media.decoder()

    class Watched:
        def decode(self, latents: Tensor) -> Tensor:
            pixels = decoder.decode(latents)
            made.append(weakref.ref(pixels))
            return pixels

    def chunks() -> Iterator[Tensor]:
        for _ in range(4):
            assert all(pixels() is None for pixels in made[:-1])
            yield wan_latents(1)

    monkeypatch.setattr(wan_media, "decoder", Watched)
    write_film(tmp_path / "a.mp4", chunks(), wan_media)
    assert len(made) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "weights cannot be read")])
def test_a_film_that_fails_leaves_nothing_and_the_first_error(
    error: BaseException, wan_media: Media, tmp_path: Path
) -> None:
    def chunks() -> Iterator[Tensor]:
        yield wan_latents(1)
        raise error

    with pytest.raises(type(error)) as caught:
        write_film(tmp_path / "a.mp4", chunks(), wan_media)
    assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_a_path_that_must_not_be_written_is_refused(wan_media: Media, tmp_path: Path) -> None:
    check_video_path(tmp_path / "new.mp4")
    for name in ("old.mp4", "sheet.png"):
        (tmp_path / name).write_text("mine")
    for name in ("clip.gif", "clip", "old.mp4", "sheet.mp4"):
        with pytest.raises(OutputError):
            check_video_path(tmp_path / name)
    # A killed run left its first frame and a partial film.
    partial_path(tmp_path / "sheet.mp4").write_text("some frames")
    check_video_path(tmp_path / "sheet.mp4")
    write_film(tmp_path / "sheet.mp4", iter([wan_latents(1)]), wan_media)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["old.mp4", "sheet.mp4", "sheet.png"]


def test_a_comparison_leaves_no_files_before_it_is_scored(
    dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vmla_convert.measuring.compare.rollout_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(dense, dense, GenerateConfig(("7",), frames=4), tmp_path / "a.mp4", print)
    assert not list(tmp_path.iterdir())


def test_a_comparison_outside_the_demo_world_has_no_scores(
    wan_source: SourceConfig, wan_converted: Path, wan_media: Media, tmp_path: Path
) -> None:
    models, config = (load(wan_source), load(wan_converted)), GenerateConfig((PROMPT,), frames=3)
    kept: list[Row] = []
    compare(*models, config, tmp_path / "a.mp4", kept.extend, media=wan_media)
    assert kept == []
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.png"}


# Prefix files


@pytest.mark.parametrize(("given", "sizes"), [(1, [1]), (2, [2]), (3, [1, 2]), (5, [1, 2, 2])])
def test_a_prefix_is_split_with_the_short_chunk_first(given: int, sizes: list[int]) -> None:
    chunks = prefix_chunks(wan_latents(given), 2)
    assert [chunk.shape[1] for chunk in chunks] == sizes
    assert torch.equal(torch.cat(chunks, dim=1), wan_latents(given))


def test_a_prefix_may_be_an_image(wan_media: Media, tmp_path: Path) -> None:
    Image.new("RGB", (200, 90), (255, 0, 0)).save(tmp_path / "red.jpg")
    red = torch.tensor([1.0, -1, -1]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 32, 48)
    got = read_prefix(tmp_path / "red.jpg", wan_media, LATENT_SIZE, 4)
    torch.testing.assert_close(got, wan_media.encode(red), atol=0.05, rtol=0)


@pytest.mark.parametrize(("frames", "given"), [(1, 1), (4, 1), (5, 2), (12, 3)])
def test_a_prefix_may_be_the_end_of_a_video(
    frames: int, given: int, wan_media: Media, tmp_path: Path
) -> None:
    write_mp4(tmp_path / "a.mp4", noise(frames, 3, 32, 48).clamp(-1, 1), scale=1)
    pixels = torch.stack(list(read_frames(tmp_path / "a.mp4")))[-(4 * given - 3) :]
    got = read_prefix(tmp_path / "a.mp4", wan_media, LATENT_SIZE, 8)
    assert torch.equal(got, wan_media.encode(pixels[None]))


def test_a_prefix_that_cannot_be_read_is_named(wan_media: Media, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    write_mp4(tmp_path / "long.mp4", torch.zeros(9, 3, 32, 48), scale=1)
    for name in ("nowhere.png", "text.png", "long.mp4"):
        with pytest.raises(ConfigError, match=name):
            read_prefix(tmp_path / name, wan_media, LATENT_SIZE, 3)
