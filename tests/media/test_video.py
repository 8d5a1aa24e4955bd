"""Files show the pixels they were given, and no half-written file stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vmla_convert.errors import MissingExtraError, OutputError
from vmla_convert.media.video import (
    contact_sheet,
    fit_frame,
    read_frames,
    side_by_side,
    write_mp4,
)

Writer = Callable[[Path, Tensor], None]

RED, BLUE = (1.0, -1.0, -1.0), (-1.0, -1.0, 1.0)


def plain(colour: tuple[float, float, float], frames: int = 6, size: int = 8) -> Tensor:
    return torch.tensor(colour)[:, None, None].expand(frames, 3, size, size)


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def count(sheet: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((sheet == colour).all(-1).sum())


def sheet_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_mp4_shows_every_frame_enlarged(tmp_path: Path) -> None:
    clip = torch.cat([plain(RED, 3), plain(BLUE, 2)])
    clip[:, :, :4] = -1
    write_mp4(tmp_path / "new" / "clip.mp4", clip, fps=5, scale=4)
    frames = decoded(tmp_path / "new" / "clip.mp4").astype(int)
    assert frames.shape == (5, 32, 32, 3)
    expected = ((clip + 1) * 127.5).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert np.abs(frames - expected.permute(0, 2, 3, 1).numpy()).mean() < 8
    with av.open(str(tmp_path / "new" / "clip.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 5


ENCODE = """
import sys, torch
from pathlib import Path
from vmla_convert.media.video import write_mp4

torch.manual_seed(0)
wide = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 6), (32, 74), mode="bilinear")[0]
clip = torch.stack([wide[:, :, 2 * frame :][:, :, :48] for frame in range(13)])
write_mp4(Path(sys.argv[1]), clip, scale=1)
"""


@pytest.mark.slow
def test_the_same_frames_become_the_same_bytes(tmp_path: Path) -> None:
    """glibc fills fresh memory with one byte or another, which must not matter."""
    files = [tmp_path / "85.mp4", tmp_path / "170.mp4"]
    for file in files:
        environment = {**os.environ, "MALLOC_PERTURB_": file.stem}
        subprocess.run([sys.executable, "-c", ENCODE, file], env=environment, check=True)
    one, other = (file.read_bytes() for file in files)
    assert one == other


OVERFULL = """
import resource, signal, sys
from pathlib import Path

import torch

from vmla_convert.errors import OutputError
from vmla_convert.media.video import open_mp4

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
torch.manual_seed(0)
try:
    with open_mp4(Path(sys.argv[1]), scale=8) as write:
        for _ in range(40):
            write(torch.randn(8, 3, 32, 48).clamp(-1, 1))
except OutputError as error:
    sys.exit(error.message)
"""


@pytest.mark.slow
def test_a_video_without_room_fails_with_its_first_error(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    ran = subprocess.run([sys.executable, "-c", OVERFULL, file], capture_output=True, text=True)
    assert ran.stderr.strip().endswith(f"cannot write {file}: File too large")
    assert (ran.returncode, list(tmp_path.iterdir())) == (1, [])


def test_odd_sizes_are_padded_and_pixels_clamped(tmp_path: Path) -> None:
    write_mp4(tmp_path / "odd.mp4", torch.zeros(2, 3, 9, 13), scale=1)
    frames = decoded(tmp_path / "odd.mp4")
    assert frames.shape == (2, 10, 14, 3)
    assert np.abs(frames.astype(int) - 128).max() < 4
    contact_sheet(tmp_path / "x.png", [("x", plain((3.0, -3.0, float("nan")), 1))], scale=2)
    assert count(sheet_of(tmp_path / "x.png"), (255, 0, 0)) == 16 * 16


def test_sheet_puts_each_clip_in_its_cells(tmp_path: Path) -> None:
    rows = [("dense", plain(RED)), ("converted", plain(BLUE))]
    contact_sheet(tmp_path / "sheet.png", rows, columns=3, scale=4)
    sheet = sheet_of(tmp_path / "sheet.png")
    assert count(sheet, (255, 0, 0)) == count(sheet, (0, 0, 255)) == 3 * 32 * 32
    red, blue = ((sheet == c).all(-1).any(1).nonzero()[0] for c in ([255, 0, 0], [0, 0, 255]))
    assert red.max() < blue.min()
    labels = sheet[red.min() : red.max(), : (sheet == [255, 0, 0]).all(-1).any(0).argmax()]
    assert (labels < 100).any()
    numbers = sheet[: red.min()]
    assert (numbers < 200).any()


def test_sheet_shows_first_and_last_frame(tmp_path: Path) -> None:
    clip = plain(BLUE, 9).clone()
    clip[[0, 8]] = plain(RED, 2)
    contact_sheet(tmp_path / "sheet.png", [("clip", clip)], columns=4, scale=1)
    sheet = sheet_of(tmp_path / "sheet.png")
    assert (count(sheet, (255, 0, 0)), count(sheet, (0, 0, 255))) == (2 * 64, 2 * 64)


def test_groups_stand_apart_and_share_their_numbers(tmp_path: Path) -> None:
    rows = [("row", plain(RED)) for _ in range(4)]
    contact_sheet(tmp_path / "sheet.png", rows)
    filled = (sheet_of(tmp_path / "sheet.png") == [255, 0, 0]).all(-1).any(1)
    starts = (filled[1:] & ~filled[:-1]).nonzero()[0]
    steps = np.diff(starts)
    assert steps[0] == steps[2] < steps[1]


def test_side_by_side_keeps_both_clips() -> None:
    joined = side_by_side(plain(RED), plain(BLUE), gap=3)
    assert joined.shape == (6, 3, 8, 19)
    assert torch.equal(joined[..., :8], plain(RED)) and torch.equal(joined[..., 11:], plain(BLUE))
    assert joined[..., 8:11].min() > 0.8


def write_sheet(path: Path, clip: Tensor) -> None:
    contact_sheet(path, [("clip", clip)])


@pytest.mark.parametrize("write", [write_mp4, write_sheet])
class TestFailure:
    def test_leaves_the_old_file_and_no_other(
        self, write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", full)
        monkeypatch.setattr(av.VideoFrame, "from_ndarray", full)
        path = tmp_path / "file"
        path.write_text("old")
        with pytest.raises(OutputError, match="No space left"):
            write(path, plain(RED))
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
        assert path.read_text() == "old"

    def test_names_a_place_that_cannot_be_written(self, write: Writer, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("")
        with pytest.raises(OutputError, match="cannot write"):
            write(tmp_path / "taken" / "file", plain(RED))

    def test_names_the_extra(
        self, write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(MissingExtraError) as caught:
            write(tmp_path / "file", plain(RED))
        assert "[video]" in caught.value.hint


def test_frames_are_upright_however_the_camera_was_held(tmp_path: Path) -> None:
    seen = torch.full((3, 64, 32), -1.0)  # as it is to be shown: bright at the top
    seen[:, :16] = 1
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90)
        stored = ((torch.rot90(seen, -1, (1, 2)) + 1) * 127.5).byte().permute(1, 2, 0)
        for _ in range(2):
            picture = av.VideoFrame.from_ndarray(stored.contiguous().numpy(), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    frames = list(read_frames(tmp_path / "clip.mp4"))
    assert len(frames) == 2
    assert (frames[0] - seen).abs().mean() < 0.05


@pytest.mark.parametrize("size", [(24, 24), (10, 8)])
@pytest.mark.parametrize("sides", [(96, 160), (160, 96), (12, 9), (25, 1000)])
def test_frames_are_cut_at_the_centre_and_keep_their_shape(
    sides: tuple[int, int], size: tuple[int, int]
) -> None:
    rows, columns = (torch.arange(side) + 0.5 - side / 2 for side in sides)
    picture = torch.stack([rows[:, None].expand(sides), columns.expand(sides), torch.ones(sides)])
    got = fit_frame(picture, size)
    assert got.shape == (3, *size)
    assert torch.allclose(got[2], torch.ones(size))
    # From the centre both ways, in pixels of the picture.
    step = min(side / wanted for side, wanted in zip(sides, size, strict=True))
    middle = got[:, size[0] // 2 - 1 : size[0] // 2 + 1, size[1] // 2 - 1 : size[1] // 2 + 1]
    assert abs(middle[0].mean()) < step and abs(middle[1].mean()) < step
    assert middle[0].diff(dim=0).mean().item() == pytest.approx(step, rel=0.1)
    assert middle[1].diff(dim=1).mean().item() == pytest.approx(step, rel=0.1)
