"""Pixels to files, and back: a clip as mp4, several as one contact sheet, two side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.errors import ConfigError, MissingExtraError, OutputError

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

# Light, as the dark clips stand out from it; the same value is the gap of `side_by_side`.
PAPER, INK, GREY = (246, 246, 243), (28, 28, 26), (118, 118, 112)
GAP_LEVEL = 0.9

LABEL_SIZE, NUMBER_SIZE = 15, 11
MARGIN, CELL_GAP, GROUP_GAP, LABEL_GAP = 14, 4, 14, 12
NUMBER_LINE = NUMBER_SIZE + 5


def write_mp4(path: Path, video: Tensor, fps: int = 8, scale: int = 8) -> None:
    """Write a clip (F, 3, H, W) in −1 … 1; other arguments and errors as `open_mp4`."""
    with open_mp4(path, fps, scale) as write:
        write(video)


@contextmanager
def open_mp4(path: Path, fps: int = 8, scale: int = 8) -> Iterator[Callable[[Tensor], None]]:
    """Write H.264 as frames come, each pixel enlarged to a square; parent folders are made.

    Args:
        path: Where; replaced in one step when the file is complete.
        fps: Frames per second.
        scale: Side of the square that one pixel becomes.

    Yields:
        What takes the next frames (F, 3, H, W) in −1 … 1, all of one size.

    Raises:
        MissingExtraError: PyAV is not installed.
        OutputError: The file cannot be written.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("video files", "video") from error
    with _complete_or_absent(path) as partial, _container(path, partial) as file:
        # x264's macroblock tree reads memory that it never wrote, so that with it the same frames
        # do not always become the same bytes.
        stream = file.add_stream("libx264", rate=fps, options={"crf": "16", "mbtree": "0"})
        stream.pix_fmt = "yuv420p"

        def write(frames: Tensor) -> None:
            pixels = _pad_to_even(_to_bytes(frames, scale))
            if not stream.codec_context.is_open:
                stream.height, stream.width = pixels.shape[1:3]
            with _writing(path):
                for frame in pixels.numpy():
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

        yield write
        with _writing(path):
            file.mux(stream.encode())


def write_png(path: Path, frame: Tensor, scale: int = 1) -> None:
    """Write one frame (3, H, W) in −1 … 1; other arguments and errors as `open_mp4`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pictures", "video") from error
    pixels = _to_bytes(frame[None], scale)[0].numpy()
    with _complete_or_absent(path) as partial, _writing(path):
        Image.fromarray(pixels).save(partial, format="PNG")


def read_frames(path: Path) -> Iterator[Tensor]:
    """Decode a video: every frame (3, H, W) in −1 … 1, upright, one after the other.

    Raises:
        MissingExtraError: PyAV is not installed.
        ConfigError: The file is no video, or is damaged.
    """
    with _playable(path) as file:
        for frame in file.decode(video=0):
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            # Phones store how they were held, and pixels as the sensor lies.
            yield torch.rot90(pixels, frame.rotation // 90, (1, 2)).float() / 127.5 - 1


def check_playable(path: Path) -> None:
    """Open a video without decoding it.

    Raises:
        MissingExtraError: PyAV is not installed.
        ConfigError: The file is no video, or is damaged so that it shows at once.
    """
    with _playable(path):
        pass


def fit_frame(frame: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a frame (3, H, W) until it just covers `size`, and cut out the centre (3, *size)."""
    sides = frame.shape[1:]
    scale = max(wanted / side for wanted, side in zip(size, sides, strict=True))
    covering = [max(w, round(scale * s)) for w, s in zip(size, sides, strict=True)]
    resized = F.interpolate(frame[None], covering, mode="bilinear", antialias=True)[0]
    top, left = ((c - w) // 2 for c, w in zip(covering, size, strict=True))
    return resized[:, top : top + size[0], left : left + size[1]]


def contact_sheet(
    path: Path,
    rows: list[tuple[str, Tensor]],
    columns: int = 10,
    scale: int = 4,
    group: int = 2,
) -> None:
    """Write one PNG with evenly spaced frames of several clips, a row for each.

    Args:
        path: Where; replaced in one step when the file is complete.
        rows: Label and clip (F, 3, H, W) in −1 … 1, top to bottom; all frames of one size.
        columns: Frames shown of each clip, or all where there are fewer.
        scale: Side of the square that one pixel becomes.
        group: Rows that stand close together, such as dense and converted.

    Raises:
        MissingExtraError: Pillow is not installed.
        OutputError: The file cannot be written.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise MissingExtraError("contact sheets", "video") from error
    font, small = (ImageFont.load_default(size) for size in (LABEL_SIZE, NUMBER_SIZE))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widest = max(ruler.multiline_textbbox((0, 0), label, font)[2] for label, _ in rows)
    strips = [_Strip.pick(clip, columns, scale) for _, clip in rows]
    tops = _row_tops(strips, group)
    left = MARGIN + round(widest) + LABEL_GAP
    width = left + max(strip.right(len(strip.numbers)) for strip in strips) - CELL_GAP + MARGIN
    sheet = Image.new("RGB", (width, tops[-1] + strips[-1].pixels.shape[1] + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, ((label, _), strip, top) in enumerate(zip(rows, strips, tops, strict=True)):
        middle = top + strip.pixels.shape[1] / 2
        draw.multiline_text((MARGIN, middle), label, INK, font, anchor="lm")
        if _numbered(strips, i, group):
            _write_numbers(draw, strip, (left, top), small)
        for k, cell in enumerate(strip.pixels.numpy()):
            sheet.paste(Image.fromarray(cell), (left + strip.right(k), top))
    with _complete_or_absent(path) as partial, _writing(path):
        sheet.save(partial, format="PNG", optimize=True)


def side_by_side(left: Tensor, right: Tensor, gap: int = 2) -> Tensor:
    """Two clips (F, 3, H, W) in −1 … 1 as one (F, 3, H, W + gap + W), a light gap between them."""
    between = left.new_full((*left.shape[:3], gap), GAP_LEVEL)
    return torch.cat([left, between, right], dim=3)


class _Strip(NamedTuple):
    """The frames of one row.

    Attributes:
        numbers: Which frames of the clip these are.
        pixels: (columns, height, width, 3) bytes, enlarged.
    """

    numbers: list[int]
    pixels: Tensor

    @classmethod
    def pick(cls, clip: Tensor, columns: int, scale: int) -> _Strip:
        """Evenly spaced frames of a clip (F, 3, H, W), first and last included."""
        frames = len(clip)
        numbers = torch.linspace(0, frames - 1, min(columns, frames)).round().long().tolist()
        return cls(numbers, _to_bytes(clip[numbers], scale))

    def right(self, column: int) -> int:
        """Where a column begins, from the strip's left edge."""
        return column * (self.pixels.shape[2] + CELL_GAP)


def _numbered(strips: list[_Strip], row: int, group: int) -> bool:
    """A row repeats the numbers above it only where they differ, or a new group begins."""
    return row % group == 0 or strips[row].numbers != strips[row - 1].numbers


def _row_tops(strips: list[_Strip], group: int) -> list[int]:
    """The y of each row's frames."""
    tops, y = [], MARGIN
    for i, strip in enumerate(strips):
        if i and i % group == 0:
            y += GROUP_GAP
        y += NUMBER_LINE if _numbered(strips, i, group) else 0
        tops.append(y)
        y += strip.pixels.shape[1] + CELL_GAP
    return tops


def _write_numbers(
    draw: ImageDraw, strip: _Strip, corner: tuple[int, int], font: FreeTypeFont | ImageFont
) -> None:
    """Each frame's number, centred above it; `corner` is the top left of the frames."""
    left, top = corner
    draw.text((left - LABEL_GAP, top - 4), "frame", GREY, font, anchor="rs")
    half = strip.pixels.shape[2] / 2
    for k, number in enumerate(strip.numbers):
        draw.text((left + strip.right(k) + half, top - 4), str(number), GREY, font, anchor="ms")


def _to_bytes(video: Tensor, scale: int) -> Tensor:
    """(F, 3, H, W) in −1 … 1 to bytes (F, scale·H, scale·W, 3)."""
    levels = ((video.detach().float().cpu().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5).round()
    large = levels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return large.byte().permute(0, 2, 3, 1).contiguous()


def _pad_to_even(pixels: Tensor) -> Tensor:
    """Repeat the last row or column of (F, H, W, 3) where a size is odd, as yuv420p halves both."""
    height, width = pixels.shape[1:3]
    pixels = torch.cat([pixels, pixels[:, height - height % 2 :]], dim=1)
    return torch.cat([pixels, pixels[:, :, width - width % 2 :]], dim=2)


@contextmanager
def _playable(path: Path) -> Iterator[InputContainer]:
    """A file that holds a video, open."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise MissingExtraError("video files", "video") from error
    hint = "give another, or encode it again"
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise ConfigError(f"{path} holds no video", hint)
            yield file
    except FFmpegError as error:
        raise ConfigError(f"{path} cannot be played: {error.strerror}", hint) from error


def partial_path(path: Path) -> Path:
    """Where a file is written until it is whole; it stays where a run was killed."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """A sibling to write into, which becomes `path` when all went well and else disappears.

    Raises:
        OutputError: The file cannot be written.
    """
    partial = partial_path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        with _writing(path):
            partial.replace(path)
    finally:
        # An unwritable folder is already an error of its own.
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def _container(path: Path, partial: Path) -> Iterator[OutputContainer]:
    """An mp4 to write `partial` into, which will be `path`, whole at the end."""
    import av

    with _writing(path):
        file = av.open(str(partial), "w", format="mp4")
    try:
        yield file
        with _writing(path):
            file.close()
    finally:
        # Closing writes, and so may fail too; after a failure that one is the one to tell.
        with suppress(OSError):
            file.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What fails here is a file that cannot be written, and not what it was to hold.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
