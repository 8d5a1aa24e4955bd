"""A stream that was paused on disk continues bit for bit, and only with its own model."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import Vmla, refused
from conftest import noise, tiny_config, tiny_mla, tiny_model
from safetensors.torch import load_file, save_file
from tiny_wan import PROMPT
from torch import Tensor

from vmla_convert.config import (
    CachePolicy,
    CodecConfig,
    ModelConfig,
    RuntimeConfig,
    Sizes,
    SourceConfig,
)
from vmla_convert.errors import ConfigError
from vmla_convert.generating.generate import Switch, generate, resume
from vmla_convert.generating.stream import DECODER_FRAMES
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.media.wan import WanMedia

pytest_plugins = ["checkpoints", "tiny_wan"]

WINDOW = CachePolicy(window_frames=8, sink_frames=2, frame_positions="relative")
CODEC = CodecConfig(40, Sizes(rank=20))
INT4 = RuntimeConfig(cache_dtype="int4")
CASES: dict[str, tuple[ModelConfig, RuntimeConfig]] = {
    "dense": (tiny_config(cache=WINDOW), RuntimeConfig()),
    "int4": (tiny_config(cache=WINDOW), INT4),
    "codec": (tiny_config(cache=WINDOW, codec=CODEC), RuntimeConfig()),
    "codec and dense frames": (
        tiny_config(cache=replace(WINDOW, dense_recent_frames=2), codec=CODEC),
        RuntimeConfig(),
    ),
    "mla": (tiny_config(cache=WINDOW, mla=tiny_mla()), RuntimeConfig()),
}
FRAMES = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of several threads differ in the last bit from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Text:
    """Prompts of numbers, each its own context."""

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        return torch.cat([noise(1, 3, 5, seed=int(prompt)) for prompt in prompts])


TEXT = Text()


def whole(model: CausalWanModel, runtime: RuntimeConfig, frames: int = FRAMES) -> Tensor:
    return torch.cat(list(generate(model, ["1", "2"], frames, 3, runtime, text=TEXT)), 1)


@pytest.mark.parametrize("paused", [4, 7, 14])  # in the sink, within a chunk, after evictions
@pytest.mark.parametrize("name", CASES)
def test_a_paused_stream_continues_bit_for_bit(name: str, paused: int, tmp_path: Path) -> None:
    config, runtime = CASES[name]
    model, file = tiny_model(config).eval(), tmp_path / "a.stream"
    stream = generate(model, ["1", "2"], paused, 3, runtime, text=TEXT)
    first = torch.cat(list(stream), 1)
    stream.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["a.stream"]
    rest = torch.cat(list(resume(model, file, FRAMES, runtime)), 1)
    assert torch.equal(torch.cat([first, rest], 1), whole(model, runtime))


def test_a_stream_branches_into_other_prompts(tmp_path: Path) -> None:
    model, file = tiny_model(tiny_config(cache=WINDOW, codec=CODEC)).eval(), tmp_path / "a.stream"
    stream = generate(model, "1", 8, text=TEXT)
    list(stream)
    stream.save(file)
    plain, other = (
        torch.cat(list(resume(model, file, FRAMES, switches=switches, text=TEXT)), 1)
        for switches in ((), (Switch(8, ["5"]),))
    )
    switched = list(generate(model, "1", FRAMES, switches=[Switch(8, ["5"])], text=TEXT))
    assert torch.equal(other, torch.cat(switched, 1)[:, 8:])
    assert not torch.equal(plain, other)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def without_a_layer(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        table = stored.metadata()
    tensors = load_file(file)
    del tensors["cache.1.0"]
    save_file(tensors, file, table)


def something_else(file: Path) -> None:
    save_file({"a": torch.zeros(1)}, file)


@pytest.mark.parametrize("damage", [cut_short, without_a_layer, something_else, Path.unlink])
def test_a_damaged_stream_is_refused(damage: Callable[[Path], object], tmp_path: Path) -> None:
    model, file = tiny_model(tiny_config(cache=WINDOW)).eval(), tmp_path / "a.stream"
    stream = generate(model, "1", 4, text=TEXT)
    list(stream)
    stream.save(file)
    damage(file)
    with pytest.raises(ConfigError, match=r"a\.stream"):
        resume(model, file, FRAMES)


def test_a_stream_belongs_to_its_model_and_runtime(tmp_path: Path) -> None:
    model, file = tiny_model(tiny_config(cache=WINDOW)).eval(), tmp_path / "a.stream"
    stream = generate(model, "1", 4, text=TEXT)
    list(stream)
    stream.save(file)
    with pytest.raises(ConfigError, match="weights"):
        resume(tiny_model(model.config, seed=1), file, FRAMES)
    with pytest.raises(ConfigError, match="cache_dtype"):
        resume(model, file, FRAMES, INT4)
    with pytest.raises(ConfigError, match="window_frames"):
        other = replace(model.config, cache=replace(WINDOW, window_frames=10))
        resume(tiny_model(other), file, FRAMES)
    with pytest.raises(ConfigError, match="frames 4"):
        resume(model, file, 4)


def test_eight_streams_at_once_equal_single_ones() -> None:
    """Mixed prompts, sizes and precisions; streams of one kind share a model."""
    models = {name: tiny_model(config).eval() for name, (config, _) in CASES.items()}
    half = {
        name: tiny_model(CASES[name][0]).eval().bfloat16() for name in ("dense", "codec", "mla")
    }
    jobs = [(model, CASES[name][1]) for group in (models, half) for name, model in group.items()]
    assert len(jobs) == 8
    single = [whole(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: whole(*job), jobs))
    assert all(torch.equal(a, b) for a, b in zip(single, together, strict=True))


@pytest.mark.slow
def test_two_thousand_frames_take_no_more_memory_than_a_hundred() -> None:
    """Positions pass 1,024, the end of Wan's tables; relative ones start again at the sink."""
    model = tiny_model(tiny_config(cache=WINDOW, codec=CODEC)).eval()
    stream, peaks = generate(model, "1", 2000, text=TEXT), dict[int, int]()
    for chunk in stream:
        assert chunk.isfinite().all()
        if stream.frames in (100, 2000):
            peaks[stream.frames] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peaks[2000] - peaks[100] < 10_000  # KiB


def test_the_command_pauses_and_continues(vmla: Vmla, tmp_path: Path) -> None:
    file, video = tmp_path / "a.stream", ["-o", tmp_path / "a.mp4"]
    made = vmla("generate", "demo", "--prompt", "7", *video, "--frames", "4", "--save-stream", file)
    assert made.code == 0 and file.is_file()
    again = ["generate", "demo", "--resume-stream", file, "-o"]
    assert vmla(*again, tmp_path / "b.mp4", "--frames", "8").code == 0
    assert (tmp_path / "b.mp4").is_file()
    assert refused(vmla(*again, tmp_path / "c.mp4", "--frames", "4"))
    assert refused(vmla(*again, tmp_path / "c.mp4", "--frames", "8", "--prompt", "7"))
    assert refused(vmla("generate", "demo", "-o", tmp_path / "c.mp4"))


def test_pixels_continue_bit_for_bit(
    wan_source: SourceConfig, wan_media: WanMedia, tmp_path: Path
) -> None:
    """Wan's VAE remembers features of frames long past; the pause is in the middle of a chunk."""
    model, file, total = load(wan_source), tmp_path / "a.stream", 54
    paused = generate(model, PROMPT, 45, text=wan_media)
    list(paused)
    paused.save(file)
    decoder = wan_media.decoder()
    whole = [decoder.decode(chunk) for chunk in generate(model, PROMPT, total, text=wan_media)]
    resumed, decoder = resume(model, file, total), wan_media.decoder()
    assert resumed.past is not None and resumed.past.shape[1] == DECODER_FRAMES
    decoder.decode(resumed.past)
    rest = torch.cat([decoder.decode(chunk) for chunk in resumed], 1)
    assert rest.shape[1] == 4 * (total - 45)
    assert torch.equal(rest, torch.cat(whole, 1)[:, -rest.shape[1] :])
