"""A camera over photographs: real texture, and a smooth path that returns to what it has shown.

A clip looks at one photograph through a small frame. The camera pans along a closed curve, zooms a
little and turns, and comes back to the same place after one period. The prompt tells the motion
(direction, width, period, zoom, turn) and nothing of the photograph: what a revisited region looks
like is known from the past only. Photographs for training and for measuring are different files.

Some training clips glance: in two chunks the camera looks at a far place, the same one twice. A
model can thus be asked for a place that its motion does not lead to.

A latent position holds 2×2 pixels and tells, as waves, the place that it shows. The model generates
the places like the pixels. They let a small model learn in hours to look a place up in the past,
and they show in every generated frame where the model thinks that its camera is.

Shapes: B batch, F frames, N pixels on a side of a frame, n = N/2 latent positions on a side.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.media.clips import Batch, seeded

Split = Literal["train", "held_out"]

FRAME_SIZE = 32
PATCH = 2
"""Pixels on a side that one latent position holds."""
TEXT_LEN, TEXT_DIM = 2, 16
WAVELENGTHS = (160.0, 32.0)
"""Frame pixels per turn of the waves that tell a place: longer than any path, then finer."""
PIXEL_CHANNELS = 3 * PATCH**2
CHANNELS = PIXEL_CHANNELS + 4 * len(WAVELENGTHS)
"""Channels of a latent: pixels, then sine and cosine of x and y for each wavelength."""
SCALES = (1.6, 2.2, 3.0, 4.0)
"""Pixels of a photograph per pixel of a frame."""
MAX_SPEED = 8.0
"""Pixels per frame, at the fastest point of the path."""
MAX_WIDTH = 44.0
CHUNK_FRAMES = 3
"""Frames that the model generates together, and frames of a glance."""
GLANCE_SHARE, GLANCE_RADIUS, GLANCE_WIDTH = 0.2, 58.0, 20.0
"""Share of training clips that glance, how far away, and the widest path beside it."""
SHORTEST_PERIOD, LONGEST_PERIOD = 12.0, 96.0
"""Frames until a camera is back where it was."""
MAX_ZOOM, MAX_TURN = 0.15, 0.2
"""Logarithm of the zoom, and radians, to either side."""

# Photographs of scikit-image and scikit-learn, with the licences that those packages list.
PHOTOGRAPHS: dict[Split, dict[str, str]] = {
    "train": {
        "skimage/astronaut.png": "public domain (NASA)",
        "skimage/brick.png": "CC0 (CC0Textures)",
        "skimage/camera.png": "CC0 (Lav Varshney)",
        "skimage/chelsea.png": "CC0 (Stefan van der Walt)",
        "skimage/coins.png": "public domain (Brooklyn Museum)",
        "skimage/grass.png": "CC0 (Linolafett)",
        "skimage/gravel.png": "CC0 (CC0Textures)",
        "skimage/hubble_deep_field.jpg": "public domain (NASA)",
        "skimage/motorcycle_left.png": "CC0 (Middlebury stereo)",
        "sklearn/flower.jpg": "CC BY 2.0 (vultilion)",
    },
    "held_out": {
        "skimage/coffee.png": "CC0 (Rachel Michetti)",
        "skimage/rocket.jpg": "CC0 (SpaceX)",
        "sklearn/china.jpg": "CC BY 2.0 (danielbuechele)",
    },
}


class Path2D(NamedTuple):
    """Closed paths of B cameras; every quantity returns after `period` frames.

    Attributes:
        centre: (B, F, 2) x and y in frame pixels, relative to the middle of the path.
        zoom: (B, F) logarithm.
        angle: (B, F) radians.
    """

    centre: Tensor
    zoom: Tensor
    angle: Tensor


class Clips(NamedTuple):
    """A batch of clips with their truth.

    Attributes:
        video: (B, F, 3, N, N) in −1 … 1.
        prompt: (B, text_len, text_dim) the motion.
        path: Where the cameras are.
    """

    video: Tensor
    prompt: Tensor
    path: Path2D


class PhotographClips:
    """Training and held-out batches as `ClipSource` wants them, a function of (seed, index).

    Args:
        frames: Frames of a clip.
        seed: Seed of all clips.
        return_within: Longest period of a path, in frames; by default a little more than a clip.
    """

    def __init__(self, frames: int, seed: int = 0, return_within: float | None = None) -> None:
        self.frames, self.seed = frames, seed
        self.return_within = return_within or min(LONGEST_PERIOD, 1.4 * frames)

    def batch(self, start: int, size: int, split: Split = "train") -> Batch:
        """Latents and prompts of `size` clips from number `start` on."""
        clips = self.clips(start // size, size, split)
        return Batch(encode(clips.video, clips.path), clips.prompt)

    def clips(self, index: int, size: int, split: Split = "train") -> Clips:
        """The same with pixels and truth."""
        generator = seeded(self.seed, index, split)
        return sample_clips(size, self.frames, generator, split, self.return_within)


def encode(video: Tensor, path: Path2D) -> Tensor:
    """Pixels (B, F, 3, N, N) and their places to latents (B, F, CHANNELS, n, n)."""
    places = _places(path).unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).mean((3, 5))
    angles = torch.cat([places * (2 * math.pi / length) for length in WAVELENGTHS], dim=-1)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).movedim(-1, 2)
    return torch.cat([F.pixel_unshuffle(video, PATCH), waves], dim=2)


def decode(latents: Tensor) -> Tensor:
    """Latents (B, F, CHANNELS, n, n) to pixels (B, F, 3, N, N)."""
    return F.pixel_shuffle(latents[:, :, :PIXEL_CHANNELS], PATCH)


def read_places(latents: Tensor) -> Tensor:
    """Where each latent position says that it looks, (B, F, n, n, 2), in frame pixels."""
    sines, cosines = latents[:, :, PIXEL_CHANNELS:].movedim(2, -1).chunk(2, dim=-1)
    turns = (torch.atan2(sines, cosines) / (2 * math.pi)).unflatten(-1, (-1, 2))
    place = turns[..., 0, :] * WAVELENGTHS[0]
    for number, length in enumerate(WAVELENGTHS[1:], start=1):
        fine = turns[..., number, :] * length
        place = fine + ((place - fine) / length).round() * length
    return place


def sample_clips(
    batch: int,
    frames: int,
    generator: torch.Generator,
    split: Split,
    return_within: float,
) -> Clips:
    """Draw clips; training clips are mirrored, turned and recoloured at random.

    Args:
        batch: B.
        frames: F.
        generator: Decides everything.
        split: Which photographs.
        return_within: Longest period of a path, in frames.
    """
    paths, prompts, videos = [], [], []
    for _ in range(batch):
        chunks = _glance_chunks(frames, generator) if split == "train" else None
        path, prompt = _path(frames, return_within, generator, chunks)
        videos.append(_film(_photograph(split, generator), path, generator))
        paths.append(path)
        prompts.append(prompt)
    path = Path2D(*map(torch.stack, zip(*paths, strict=True)))
    return Clips(torch.stack(videos), torch.stack(prompts), path)


def glancing_path(
    frames: int, chunks: tuple[int, ...], return_within: float, generator: torch.Generator
) -> tuple[Path2D, Tensor]:
    """A path (F, …) that looks at one far place in some chunks, and its prompt."""
    return _path(frames, return_within, generator, chunks)


def film(split: Split, path: Path2D, generator: torch.Generator) -> Tensor:
    """Frames (F, 3, N, N) of a camera that takes a path (F, …) over a random photograph."""
    return _film(_photograph(split, generator), path, generator)


def with_places(latents: Tensor, places: Tensor) -> Tensor:
    """Latents whose place channels are those of other latents of the same shape."""
    return torch.cat([latents[:, :, :PIXEL_CHANNELS], places[:, :, PIXEL_CHANNELS:]], dim=2)


def ages(path: Path2D, chunk_frames: int = 1) -> Tensor:
    """Frames since each pixel's place was last inside the frame, (B, F, N, N); 0 for never.

    A place that was visible in the frame before has age 1. Frames of the pixel's own chunk do not
    count, because they are generated together.
    """
    frames = path.centre.shape[1]
    places = _places(path)
    found = torch.zeros(places.shape[:-1], dtype=torch.long)
    for frame in range(1, frames):
        for earlier in range(frame // chunk_frames * chunk_frames):
            inside = _inside(places[:, frame], path, earlier)
            found[:, frame][inside] = frame - earlier
    return found


def seen_before(path: Path2D, first: int) -> Tensor:
    """Whether frames before `first` showed the place of each later pixel, (B, F − first, N, N)."""
    places = _places(path)[:, first:]
    shown = torch.zeros(places.shape[:-1], dtype=torch.bool)
    for earlier in range(first):
        for frame in range(places.shape[1]):
            shown[:, frame] |= _inside(places[:, frame], path, earlier)
    return shown


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _glance_chunks(frames: int, generator: torch.Generator) -> tuple[int, ...] | None:
    """Two different chunks of a clip, or none."""
    chunks = frames // CHUNK_FRAMES
    if chunks < 3 or torch.rand((), generator=generator) >= GLANCE_SHARE:
        return None
    return tuple(torch.randperm(chunks, generator=generator)[:2].tolist())


def _path(
    frames: int,
    return_within: float,
    generator: torch.Generator,
    glances: tuple[int, ...] | None = None,
) -> tuple[Path2D, Tensor]:
    """One closed path, and the prompt that tells it; glances at a far place in some chunks."""
    longest = max(return_within, 1.5 * SHORTEST_PERIOD)
    period = math.exp(_uniform(generator, math.log(SHORTEST_PERIOD), math.log(longest)))
    omega = 2 * math.pi / period
    widest = MAX_WIDTH if glances is None else GLANCE_WIDTH
    width = min(widest, MAX_SPEED / omega) * _uniform(generator, 0.7, 1.0)
    bend = _uniform(generator, -0.4, 0.4)
    direction = _uniform(generator, 0, 2 * math.pi)
    zoom = _uniform(generator, -MAX_ZOOM, MAX_ZOOM)
    turn = _uniform(generator, -MAX_TURN, MAX_TURN)
    start = _uniform(generator, 0, 2 * math.pi)
    phase = omega * torch.arange(frames) + start
    along, across = width * phase.sin(), width * bend * (2 * phase).sin()
    cos, sin = math.cos(direction), math.sin(direction)
    centre = torch.stack([cos * along - sin * across, sin * along + cos * across], dim=-1)
    if glances is not None:
        away = _uniform(generator, 0, 2 * math.pi)
        place = GLANCE_RADIUS * torch.tensor([math.cos(away), math.sin(away)])
        for chunk in glances:
            centre[chunk * CHUNK_FRAMES : (chunk + 1) * CHUNK_FRAMES] = place
    path = Path2D(centre, zoom * phase.cos(), turn * phase.sin())
    prompt = torch.zeros(TEXT_LEN, TEXT_DIM)
    speed = [4 * omega, math.log(period) - 3, width / 20, bend, zoom / MAX_ZOOM, turn / MAX_TURN]
    prompt[0, :8] = torch.tensor([cos, sin, *speed])
    waves = [f(k * omega) for k in (1, 3, 6, 12) for f in (math.sin, math.cos)]
    prompt[1, :8] = torch.tensor(waves)
    prompt[1, 8:12] = torch.tensor([cos * width, sin * width, -sin * bend, cos * bend]) / 20
    return path, prompt


@cache
def _image(name: str) -> Tensor:
    """A photograph (3, height, width) in 0 … 1."""
    import numpy as np
    from PIL import Image

    package, file = name.split("/")
    if package == "skimage":
        import skimage

        folder = Path(skimage.__file__).parent / "data"
    else:
        import sklearn.datasets

        folder = Path(sklearn.datasets.__file__).parent / "images"
    with Image.open(folder / file) as image:
        pixels: Any = np.asarray(image.convert("RGB"))
    return torch.tensor(pixels).permute(2, 0, 1).float() / 255


@cache
def _scaled(name: str, scale: float) -> Tensor:
    """A photograph with `scale` of its pixels to a pixel, smoothed before it is thinned out."""
    image = _image(name)
    size = [round(side / scale) for side in image.shape[1:]]
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def _photograph(split: Split, generator: torch.Generator) -> Tensor:
    """A photograph in −1 … 1 at a random scale."""
    names = list(PHOTOGRAPHS[split])
    pick = int(torch.randint(len(names), (), generator=generator))
    room = FRAME_SIZE * 4
    fitting = [s for s in SCALES if min(_scaled(names[pick], s).shape[1:]) >= room]
    scale = fitting[int(torch.randint(max(1, len(fitting)), (), generator=generator))]
    image = _scaled(names[pick], scale)
    if split == "train":
        flips = torch.randint(2, (3,), generator=generator).tolist()
        image = image.transpose(1, 2) if flips[0] else image
        image = image.flip([axis for axis, flip in ((1, flips[1]), (2, flips[2])) if flip])
        image = image[torch.randperm(3, generator=generator)]
        image = 1 - image if torch.rand((), generator=generator) < 0.25 else image
    return 2 * image - 1


def _film(image: Tensor, path: Path2D, generator: torch.Generator) -> Tensor:
    """Render the frames (F, 3, N, N) of a camera at a random place in the photograph."""
    height, width = image.shape[1:]
    places = _places(Path2D(*(tensor[None] for tensor in path)))[0]
    low, high = places.amin((0, 1, 2)), places.amax((0, 1, 2))
    room = torch.tensor([width, height]) - 1 - (high - low)
    corner = torch.rand(2, generator=generator) * room.clamp(min=0) - low
    grid = (places + corner + 0.5) / torch.tensor([width, height]) * 2 - 1
    frames = len(grid)
    return F.grid_sample(
        image.expand(frames, -1, -1, -1), grid, padding_mode="reflection", align_corners=False
    )


def _places(path: Path2D) -> Tensor:
    """Where each pixel looks, (B, F, N, N, 2), in frame pixels."""
    offsets = torch.arange(FRAME_SIZE) - (FRAME_SIZE - 1) / 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    scale = path.zoom.exp()[..., None, None]
    cos, sin = path.angle.cos()[..., None, None], path.angle.sin()[..., None, None]
    turned = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1) * scale[..., None]
    return path.centre[:, :, None, None] + turned


def _inside(places: Tensor, path: Path2D, frame: int) -> Tensor:
    """Which places (B, N, N, 2) another frame of the same clip shows."""
    offset = places - path.centre[:, frame, None, None]
    cos, sin = (f(path.angle[:, frame, None, None]) for f in (torch.cos, torch.sin))
    x = cos * offset[..., 0] + sin * offset[..., 1]
    y = -sin * offset[..., 0] + cos * offset[..., 1]
    bound = path.zoom[:, frame, None, None].exp() * (FRAME_SIZE - 1) / 2
    return (x.abs() <= bound) & (y.abs() <= bound)
