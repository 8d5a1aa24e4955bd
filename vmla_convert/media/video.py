"""Write pixels as mp4, PNG or contact sheet, and read video files.

F frames of height H and width W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.errors import ConfigError, MissingExtraError, OutputError

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer

# A light background, because clips of the demo world are dark. `side_by_side` uses the same level.
PAPER, INK, GREY = (246, 246, 243), (28, 28, 26), (118, 118, 112)
GAP_LEVEL = 0.9

LABEL_SIZE, NUMBER_SIZE = 15, 11
MARGIN, CELL_GAP, GROUP_GAP, LABEL_GAP = 14, 4, 14, 12
NUMBER_LINE = NUMBER_SIZE + 5


def write_mp4(path: Path, video: Tensor, fps: int = 8, scale: int = 8) -> None:
    """Write a clip (F, 3, H, W) in −1 … 1; other arguments and errors as in `open_mp4`."""
    with open_mp4(path, fps, scale) as write:
        write(video)


@contextmanager
def open_mp4(path: Path, fps: int = 8, scale: int = 8) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that appends frames (F, 3, H, W) in −1 … 1 to an H.264 file.

    All frames have the same size. Parent folders are created. The file replaces an older one in
    one step when it is complete.

    Args:
        path: The mp4.
        fps: Frames per second.
        scale: Side of the square that one pixel becomes.

    Raises:
        MissingExtraError: PyAV is not installed.
        OutputError: The file cannot be written.
    """
    _require("av", "video files")
    import av

    with _complete_or_absent(path) as partial, _container(path, partial) as file:
        # mbtree=0, because x264's macroblock tree reads uninitialised memory: with it, equal frames
        # do not always give equal bytes.
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
    """Write one frame (3, H, W) in −1 … 1; other arguments and errors as in `open_mp4`."""
    _require("PIL", "pictures")
    from PIL import Image

    pixels = _to_bytes(frame[None], scale)[0].numpy()
    with _complete_or_absent(path) as partial, _writing(path):
        Image.fromarray(pixels).save(partial, format="PNG")


def read_frames(path: Path) -> Iterator[Tensor]:
    """Yield every frame (3, H, W) of a video in −1 … 1, upright; errors as in `check_playable`."""
    with _playable(path) as file:
        for frame in file.decode(video=0):
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            # Phones store pixels as the sensor sees them, and the rotation beside the pixels.
            yield torch.rot90(pixels, frame.rotation // 90, (1, 2)).float() / 127.5 - 1


def check_playable(path: Path) -> None:
    """Open a video without decoding it.

    Raises:
        MissingExtraError: PyAV is not installed.
        ConfigError: The file holds no video, or its header is damaged.
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
    """Write one PNG with evenly spaced frames of several clips, one clip in each row.

    Args:
        path: Replaced in one step when the file is complete.
        rows: Label and clip (F, 3, H, W) in −1 … 1, from top to bottom, all of one shape.
        columns: Most frames shown of each clip, among them the first and the last.
        scale: Side of the square that one pixel becomes.
        group: Number of rows that stand close together, such as dense and converted.

    Raises:
        MissingExtraError: Pillow is not installed.
        OutputError: The file cannot be written.
    """
    _require("PIL", "contact sheets")
    from PIL import Image, ImageDraw, ImageFont

    font, small = (ImageFont.load_default(size) for size in (LABEL_SIZE, NUMBER_SIZE))
    frames = len(rows[0][1])
    numbers = torch.linspace(0, frames - 1, min(columns, frames)).round().long().tolist()
    strips = [_to_bytes(clip[numbers], scale).numpy() for _, clip in rows]
    height, width = strips[0].shape[1] + CELL_GAP, strips[0].shape[2] + CELL_GAP
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widest = max(ruler.multiline_textbbox((0, 0), label, font)[2] for label, _ in rows)
    left = MARGIN + round(widest) + LABEL_GAP
    tops = [
        MARGIN + (NUMBER_LINE + GROUP_GAP) * (row // group) + NUMBER_LINE + height * row
        for row in range(len(rows))
    ]
    size = (left + width * len(numbers) - CELL_GAP + MARGIN, tops[-1] + height - CELL_GAP + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, ((label, _), strip, top) in enumerate(zip(rows, strips, tops, strict=True)):
        middle = top + (height - CELL_GAP) / 2
        draw.multiline_text((MARGIN, middle), label, INK, font, anchor="lm")
        for column, (number, cell) in enumerate(zip(numbers, strip, strict=True)):
            x = left + width * column
            sheet.paste(Image.fromarray(cell), (x, top))
            if row % group == 0:
                centre = (x + (width - CELL_GAP) / 2, top - 4)
                draw.text(centre, str(number), GREY, small, anchor="ms")
        if row % group == 0:
            draw.text((left - LABEL_GAP, top - 4), "frame", GREY, small, anchor="rs")
    with _complete_or_absent(path) as partial, _writing(path):
        sheet.save(partial, format="PNG", optimize=True)


def side_by_side(left: Tensor, right: Tensor, gap: int = 2) -> Tensor:
    """Join two clips (F, 3, H, W) in −1 … 1 to one (F, 3, H, W + gap + W)."""
    between = left.new_full((*left.shape[:3], gap), GAP_LEVEL)
    return torch.cat([left, between, right], dim=3)


def _require(package: str, what: str) -> None:
    try:
        import_module(package)
    except ImportError as error:
        raise MissingExtraError(what, "video") from error


def _to_bytes(video: Tensor, scale: int) -> Tensor:
    """Convert (F, 3, H, W) in −1 … 1 to bytes (F, scale·H, scale·W, 3)."""
    levels = ((video.detach().float().cpu().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5).round()
    large = levels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return large.byte().permute(0, 2, 3, 1).contiguous()


def _pad_to_even(pixels: Tensor) -> Tensor:
    """Repeat the last row or column of (F, H, W, 3) to make sizes even, as yuv420p needs."""
    height, width = pixels.shape[1:3]
    pixels = torch.cat([pixels, pixels[:, height - height % 2 :]], dim=1)
    return torch.cat([pixels, pixels[:, :, width - width % 2 :]], dim=2)


@contextmanager
def _playable(path: Path) -> Iterator[InputContainer]:
    """Open a file that holds a video."""
    _require("av", "video files")
    import av
    from av.error import FFmpegError

    hint = "give another, or encode it again"
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise ConfigError(f"{path} holds no video", hint)
            yield file
    except FFmpegError as error:
        raise ConfigError(f"{path} cannot be played: {error.strerror}", hint) from error


def partial_path(path: Path) -> Path:
    """Return the file that collects the video until it is complete; a killed run leaves it."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """Yield a sibling to write into, which replaces `path` at the end or disappears on an error."""
    partial = partial_path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        with _writing(path):
            partial.replace(path)
    finally:
        # An unwritable folder has raised its own error already.
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def _container(path: Path, partial: Path) -> Iterator[OutputContainer]:
    """Open `partial` for writing; error messages name `path`."""
    import av

    with _writing(path):
        file = av.open(str(partial), "w", format="mp4")
    try:
        yield file
        with _writing(path):
            file.close()
    finally:
        # Closing writes. After an earlier error, that first error is the one to report.
        with suppress(OSError):
            file.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the body into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
