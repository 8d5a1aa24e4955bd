"""Damaged inputs of every kind: each is refused in a sentence, or does no harm.

PYTEST_DONT_REWRITE, because the runner imports this module without pytest.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
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
from faults.drawn import binary_files, headers, json_files, text_files, toml_files
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from measured_peak import own_peak
from safetensors.torch import save_file

from vmla_convert.checkpoint.integrity import bytes_hash
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

MOST_SECONDS, MOST_BYTES = 60.0, 10**9
"""Time and memory of one input, beyond which it counts as crashed."""


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
        largest: Most bytes of memory that an input took.
    """

    ended: Counter[str] = field(default_factory=Counter[str])
    crashes: list[str] = field(default_factory=list[str])
    slowest: float = 0.0
    largest: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        file: The file that is damaged, in the folder of inputs.
        use: Reads the input, given the folder.
        drawn: Makes other contents by hypothesis, given the sound one.
        damages: Changes that are made to the file.
        is_hashed: `use` returns the same as for the sound file, or refuses.
    """

    file: str
    use: Callable[[Path], object]
    drawn: Callable[[bytes], SearchStrategy[bytes]]
    damages: tuple[Callable[[bytearray, random.Random], None], ...] = BINARY
    is_hashed: bool = False


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
    kv_file = f"kv/{_codec(kv)}"

    def read_codec(verify: bool) -> Callable[[Path], object]:
        return lambda at: _state(load(at / "kv", verify=verify))

    def read_lora(at: Path) -> object:
        return open_lora(at / "lora.safetensors", 1.0, specs)

    def read_dense(at: Path) -> object:
        return load(at / "dense")

    def read_config(at: Path) -> object:
        return load(at / "kv")

    def read_record(at: Path) -> object:
        return verify(at / "kv")

    return {
        "dense checkpoint (.pt)": Kind("dense/model.pt", read_dense, binary_files),
        "its config.json": Kind("dense/config.json", read_dense, json_files, TEXT),
        "codec": Kind(kv_file, read_codec(True), headers, is_hashed=True),
        "codec, not verified": Kind(kv_file, read_codec(False), headers),
        "its config.json, codec": Kind("kv/config.json", read_config, json_files, TEXT),
        "its record": Kind("kv/conversion.json", read_record, json_files, TEXT),
        "clips": Kind("clips.safetensors", _read_clips, headers),
        "LoRA": Kind("lora.safetensors", read_lora, headers),
        "recipe": Kind("recipe.toml", lambda at: read_recipe(at / "recipe.toml"), toml_files, TEXT),
        "prompts": Kind(
            "prompts.txt", lambda at: read_prompts(at / "prompts.txt"), text_files, TEXT
        ),
        "image": Kind("image.png", lambda at: _read_media(at / "image.png"), binary_files),
        "video": Kind("video.mp4", lambda at: _read_media(at / "video.mp4"), binary_files),
        "rows": Kind("rows.jsonl", lambda at: read_rows(at / "rows.jsonl"), text_files, TEXT),
        "saved stream": Kind("a.stream", lambda at: _continue(model, at / "a.stream"), headers),
    }


def _state(model: CausalWanModel) -> dict[str, str]:
    return {name: bytes_hash(tensor) for name, tensor in model.state_dict().items()}


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
    """Damage every kind of input, and count what each ended in.

    Args:
        kinds: Inputs, from `write_inputs`.
        folder: Folder of the inputs.
        count: Number of damaged files of each kind, and again of files that hypothesis draws.
        seed: Seed of the damage.
    """
    found: dict[str, Outcome] = {}
    for name, kind in kinds.items():
        draw, outcome = random.Random(f"{seed} {name}"), Outcome()
        file = folder / kind.file
        sound = file.read_bytes()
        expected = kind.use(folder) if kind.is_hashed else None

        def use(
            data: bytes, kind: Kind = kind, outcome: Outcome = outcome, expected: object = expected
        ) -> None:
            (folder / kind.file).write_bytes(data)
            _use(kind, folder, expected, outcome)

        for _ in range(count):
            data = bytearray(sound)
            draw.choice(kind.damages)(data, draw)
            use(bytes(data))
        _drawn(kind.drawn(sound), count, use)
        file.write_bytes(sound)
        found[name] = outcome
    return found


def _drawn(files: SearchStrategy[bytes], count: int, use: Callable[[bytes], None]) -> None:
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(files)
    def each(data: bytes) -> None:
        use(data)

    each()


def _use(kind: Kind, folder: Path, expected: object, outcome: Outcome) -> None:
    started = perf_counter()
    with own_peak() as peak:
        problem = _ends_badly(kind, folder, expected, outcome)
    seconds = perf_counter() - started
    outcome.slowest = max(outcome.slowest, seconds)
    outcome.largest = max(outcome.largest, peak.nbytes)
    if problem is None and peak.nbytes > MOST_BYTES:
        problem = f"took {peak.nbytes / 1e9:.1f} GB"
    if problem is not None:
        outcome.ended["crashed"] += 1
        outcome.crashes.append(problem)


def _ends_badly(kind: Kind, folder: Path, expected: object, outcome: Outcome) -> str | None:
    """Read an input and count a good end; return a description of a bad one."""
    try:
        with warnings.catch_warnings(), _limited_time():
            warnings.simplefilter("ignore")
            result = kind.use(folder)
    except VmlaError:
        outcome.ended["refused"] += 1
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    if kind.is_hashed and result != expected:
        return "damage was not noticed"
    outcome.ended["accepted"] += 1
    return None


@contextmanager
def _limited_time() -> Iterator[None]:
    def stop(_: int, __: object) -> None:
        raise TimeoutError(f"more than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Canary:
    """Creates a file when it is unpickled by a loader that runs code."""

    def __init__(self, call: Callable[[str], object], words: str) -> None:
        self.call, self.words = call, words

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return self.call, (self.words,)


@contextmanager
def poisoned(folder: Path) -> Iterator[list[Path]]:
    """Files that would run code, with every ending; the code must not have run afterwards."""
    canary, files = folder / "canary", list[Path]()
    payloads = (
        Canary(os.system, f"touch {canary}"),
        Canary(exec, f"open({str(canary)!r}, 'w')"),
    )
    for ending in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        for number, payload in enumerate(payloads):
            state = {"model": {"a": torch.zeros(1), "b": payload}}
            stem = folder / f"poison-{number}"
            for form in ("zip", "old", "plain"):
                file = stem.with_name(f"{stem.name}-{form}{ending}")
                if form == "plain":
                    file.write_bytes(pickle.dumps(payload))
                else:
                    torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
                files.append(file)
    yield files
    assert not canary.exists(), "code of a file has run"


def readers(teacher: Path) -> dict[str, Callable[[Path], object]]:
    """Everything that reads files which may hold pickled code."""
    model, specs = load(teacher), open_named(teacher).specs()
    return {
        "checkpoint": load,
        "verified checkpoint": verify,
        "LoRA": lambda file: open_lora(file, 1.0, specs),
        "clips": lambda file: open_clips(DataConfig(str(file), frames=6)).batch(0, 1),
        "stream": lambda file: _continue(model, file),
        "base model": lambda file: load(teacher, base_model=file),
        "image": lambda file: _read_media(file),
    }
