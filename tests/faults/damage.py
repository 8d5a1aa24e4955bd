"""Damaged inputs of every kind: each is refused in a sentence, or does no harm.

PYTEST_DONT_REWRITE, because the runner imports this module without pytest.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch
from checkpoints import MODEL
from conftest import noise
from safetensors.torch import save_file

from vmla_convert.checkpoint.lora import open_lora
from vmla_convert.config import DataConfig
from vmla_convert.errors import VmlaError
from vmla_convert.generating.generate import generate, resume
from vmla_convert.generating.prefix import read_prefix
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load, open_named
from vmla_convert.loading.verify import verify
from vmla_convert.media.clips import open_clips
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.prompts import read_prompts
from vmla_convert.media.video import write_mp4, write_png
from vmla_convert.recipe.read import read_recipe
from vmla_convert.results import Metric, Row, put_rows, read_rows

# Values that a settings file may hold in place of a number.
NUMBERS = (b"0", b"-1", b"1000000000", b"1e999", b"NaN", b"null", b'"a"', b"[]", b"{}", b"0.5")


def flip_bit(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def zero_page(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def scramble(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start : start + 64] = draw.randbytes(len(data[start : start + 64]))


def grow(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start:start] = draw.randbytes(draw.randrange(1, 4096))


def other_number(data: bytearray, draw: random.Random) -> None:
    """Replace one number of a text by something else."""
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if not places:
        return
    start = stop = draw.choice(places)
    while start and chr(data[start - 1]).isdigit():
        start -= 1
    while stop < len(data) and chr(data[stop]).isdigit():
        stop += 1
    data[start:stop] = draw.choice(NUMBERS)


BINARY = (flip_bit, zero_page, cut, scramble, grow)
TEXT = (*BINARY, other_number, other_number, other_number)


@dataclass
class Outcome:
    """Counts of one kind of input.

    Attributes:
        ended: How often inputs were refused, accepted, or crashed.
        crashes: Type and message of each crash.
        slowest: Seconds of the slowest input.
    """

    ended: Counter[str] = field(default_factory=Counter[str])
    crashes: list[str] = field(default_factory=list[str])
    slowest: float = 0.0


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        file: The file that is damaged, in the folder of inputs.
        use: Reads the input, given the folder.
        damages: Changes that are made to the file.
        must_refuse: Every damage must be noticed, because a hash covers the file.
    """

    file: str
    use: Callable[[Path], object]
    damages: tuple[Callable[[bytearray, random.Random], None], ...] = BINARY
    must_refuse: bool = False


class Text:
    """Prompts of noise."""

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        geometry = MODEL.geometry
        return noise(len(prompts), geometry.text_len, geometry.text_dim)


def write_inputs(folder: Path, teacher: Path, codec: Path) -> dict[str, Kind]:
    """Write a sound input of every kind."""
    folder.mkdir()
    dense, kv = shutil.copytree(teacher, folder / "dense"), shutil.copytree(codec, folder / "kv")
    model = load(dense)
    geometry = MODEL.geometry
    save_file(
        {
            "latents": noise(4, 6, geometry.in_dim, *MODEL.latent_size),
            "context": noise(4, geometry.text_len, geometry.text_dim),
        },
        folder / "clips.safetensors",
    )
    down, up = noise(2, geometry.dim), noise(geometry.dim, 2)
    name = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, folder / "lora.safetensors"
    )
    (folder / "recipe.toml").write_text(
        '[recipe]\nname = "a"\ndescription = "b"\n[convert]\nsize = { cut = 0.95 }\n'
        "calibration_clips = 4\n[recover]\nnested = [0.9, 0.95]\n[recover.training]\nsteps = 5\n"
        "lr = 0.001\n[sweep]\nsizes = [{ cut = 0.9 }]\nseeds = [0, 1]\n"
    )
    (folder / "prompts.txt").write_text("a seven\n# a remark\na three\n")
    pixels = noise(6, 3, 12, 12).clamp(-1, 1)
    write_png(folder / "image.png", pixels[0], 4)
    write_mp4(folder / "video.mp4", pixels)
    put_rows(folder / "rows.jsonl", [Row(Metric.DRIFT, 1.0, "s", "a", step=i) for i in range(9)])
    stream = generate(model, "7", 4, text=Text())
    list(stream)
    stream.save(folder / "a.stream")
    specs = open_named(dense).specs()
    return {
        "dense checkpoint (.pt)": Kind("dense/model.pt", lambda at: load(at / "dense")),
        "its config.json": Kind("dense/config.json", lambda at: load(at / "dense"), TEXT),
        "codec": Kind(f"kv/{_codec(kv)}", lambda at: load(at / "kv"), must_refuse=True),
        "codec, not verified": Kind(
            f"kv/{_codec(kv)}", lambda at: load(at / "kv", verify=False).config
        ),
        "its config.json, codec": Kind("kv/config.json", lambda at: load(at / "kv"), TEXT),
        "its record": Kind("kv/conversion.json", lambda at: verify(at / "kv"), TEXT),
        "clips": Kind("clips.safetensors", _read_clips),
        "LoRA": Kind("lora.safetensors", lambda at: open_lora(at / "lora.safetensors", 1.0, specs)),
        "recipe": Kind("recipe.toml", lambda at: read_recipe(at / "recipe.toml"), TEXT),
        "prompts": Kind("prompts.txt", lambda at: read_prompts(at / "prompts.txt"), TEXT),
        "image": Kind("image.png", lambda at: _read_media(at / "image.png")),
        "video": Kind("video.mp4", lambda at: _read_media(at / "video.mp4")),
        "rows": Kind("rows.jsonl", lambda at: read_rows(at / "rows.jsonl"), TEXT),
        "saved stream": Kind("a.stream", lambda at: _continue(model, at / "a.stream")),
    }


def _codec(folder: Path) -> str:
    return next(file.name for file in folder.glob("*.safetensors"))


def _read_clips(folder: Path) -> object:
    return open_clips(DataConfig(str(folder / "clips.safetensors"), frames=6)).batch(0, 2)


def _read_media(file: Path) -> object:
    return read_prefix(file, DemoMedia(), MODEL.latent_size, 20)


def _continue(model: CausalWanModel, file: Path) -> object:
    return list(islice(resume(model, file, 8), 1))


def run_damage(
    kinds: dict[str, Kind], folder: Path, count: int, seed: int = 0
) -> dict[str, Outcome]:
    """Damage every kind of input `count` times, and count what each ended in."""
    found: dict[str, Outcome] = {}
    for name, kind in kinds.items():
        draw, outcome = random.Random(f"{seed} {name}"), Outcome()
        file = folder / kind.file
        sound = file.read_bytes()
        for _ in range(count):
            data = bytearray(sound)
            draw.choice(kind.damages)(data, draw)
            file.write_bytes(data)
            changed = bytes(data) != sound
            _use(kind, folder, changed, outcome)
        file.write_bytes(sound)
        found[name] = outcome
    return found


def _use(kind: Kind, folder: Path, changed: bool, outcome: Outcome) -> None:
    started = perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.use(folder)
        unnoticed = kind.must_refuse and changed
        outcome.ended["crashed" if unnoticed else "accepted"] += 1
        if unnoticed:
            outcome.crashes.append("damage was not noticed")
    except VmlaError:
        outcome.ended["refused"] += 1
    except Exception as error:
        outcome.ended["crashed"] += 1
        outcome.crashes.append(f"{type(error).__name__}: {error}"[:300])
    outcome.slowest = max(outcome.slowest, perf_counter() - started)


class Canary:
    """Creates a file when it is unpickled by a loader that runs code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


@contextmanager
def poisoned(folder: Path) -> Iterator[list[Path]]:
    """Pickles that would run code, with every ending; the code must not have run afterwards."""
    canary, files = folder / "canary", list[Path]()
    for ending in (".pt", ".pth", ".bin", ".ckpt"):
        for wrapped in (True, False):
            file = folder / f"poison-{wrapped}{ending}"
            if wrapped:
                torch.save({"model": {"a": torch.zeros(1), "b": Canary(canary)}}, file)
            else:
                file.write_bytes(pickle.dumps(Canary(canary)))
            files.append(file)
    yield files
    assert not canary.exists(), "code of a checkpoint has run"
