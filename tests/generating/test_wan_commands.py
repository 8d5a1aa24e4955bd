"""Commands on a tiny Wan pipeline: generate, compare, and recover from the model's own samples."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Vmla, refused
from conftest import noise
from safetensors.torch import load_file, save_file
from tiny_wan import PROMPT, SET, TEXT_DIM, wan_latents

from vmla_convert.config import ConvertConfig, DataConfig, MediaConfig, Sizes, SourceConfig
from vmla_convert.fitting.convert import convert
from vmla_convert.generating import write_video
from vmla_convert.generating.clip_sets import clip_sets
from vmla_convert.generating.make_clips import Need, ready_clips
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import open_named
from vmla_convert.media.open import open_media
from vmla_convert.media.video import read_frames, write_mp4, write_png

pytest_plugins = ["checkpoints", "tiny_wan"]


@pytest.fixture(scope="module")
def codec(wan_source: SourceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan_codec") / "codec"
    convert(wan_source, folder, ConvertConfig(calibrate=False, size=Sizes(cut=0.5)))
    return folder


def frames_of(film: Path) -> int:
    return len(list(read_frames(film)))


def test_the_same_command_writes_the_same_film(
    codec: Path, wan_folder: Path, tmp_path: Path, vmla: Vmla
) -> None:
    common = ("generate", codec, "--prompt", PROMPT, "--seconds", "1", "--prompt-at", "0.5s:a dog")
    films = [tmp_path / f"{name}.mp4" for name in "abc"]
    for film, seed in zip(films, "001", strict=True):
        ran = vmla(*common, "-o", film, "--seed", seed)
        assert ran.code == 0, ran.err
    assert films[0].read_bytes() == films[1].read_bytes() != films[2].read_bytes()
    assert frames_of(films[0]) == 13
    dense = tmp_path / "dense.mp4"
    ran = vmla("generate", wan_folder, "--prompt", PROMPT, "--frames", "3", *SET,
               "-o", dense, "--set", "media.vae_tiling=true",
               "--set", "media.cpu_offload=true")  # fmt: skip
    assert ran.code == 0, ran.err
    assert frames_of(dense) == 9


def test_a_film_continues_an_image(codec: Path, tmp_path: Path, vmla: Vmla) -> None:
    write_png(tmp_path / "cat.png", noise(3, 32, 48).clamp(-1, 1))
    ran = vmla("generate", codec, "--prompt", PROMPT, "--frames", "4",
               "--image", tmp_path / "cat.png", "-o", tmp_path / "a.mp4")  # fmt: skip
    assert ran.code == 0, ran.err
    assert frames_of(tmp_path / "a.mp4") == 13


def test_a_comparison_holds_one_model_at_a_time(
    codec: Path, wan_folder: Path, tmp_path: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[CausalWanModel]] = []
    real = write_video.build

    def build(*args: Any) -> CausalWanModel:
        gc.collect()
        assert [model() for model in held] == [None] * len(held)
        held.append(weakref.ref(model := real(*args)))
        return model

    monkeypatch.setattr(write_video, "build", build)
    film = tmp_path / "a.mp4"
    words = ("generate", codec, "--prompt", PROMPT, "--frames", "3", "-o", film, "--compare")
    # The dense checkpoint needs the settings of the conversion.
    ran = vmla(*words, wan_folder)
    assert refused(ran)
    assert "latent_size" in ran.err and not held
    ran = vmla(*words, wan_folder, *SET)
    assert ran.code == 0, ran.err
    frames = list(read_frames(film))
    assert (len(frames), frames[0].shape[-1], len(held)) == (9, 98, 2)
    assert film.with_suffix(".png").is_file()


def test_models_of_two_worlds_are_not_compared(
    wan_folder: Path, teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    common = ("--prompt", "7", "--frames", "4", "-o", tmp_path / "out.mp4")
    ran = vmla("generate", teacher, *common, "--compare", wan_folder)
    assert refused(ran)
    assert "media" in ran.err and not list(tmp_path.iterdir())


def test_a_model_without_known_components_asks_for_a_base(
    wan_source: SourceConfig, tmp_path: Path, vmla: Vmla
) -> None:
    mla = tmp_path / "mla"
    convert(wan_source, mla, ConvertConfig(product="mla", calibrate=False, size=Sizes(cut=0.5)))
    ran = vmla("generate", mla, "--prompt", PROMPT, "-o", tmp_path / "a.mp4")
    assert refused(ran)
    assert "media.base" in ran.err
    assert list(tmp_path.iterdir()) == [mla]


def test_clips_of_videos_begin_with_one_pixel_frame(
    wan_source: SourceConfig, tmp_path: Path, wan_folder: Path
) -> None:
    videos, dense = tmp_path / "videos", open_named(wan_source)
    write_mp4(videos / "a.mp4", noise(27, 3, 32, 48).clamp(-1, 1), scale=1)
    data = DataConfig(str(videos), frames=4, prompts=(PROMPT,))
    settings = MediaConfig(str(wan_folder), clips_dir=str(tmp_path / "clips"))
    [ready] = ready_clips(dense, [Need(data, "train", 2)], settings)
    (file,) = Path(ready.source).glob("*.safetensors")
    stored, pixels = load_file(file), torch.stack(list(read_frames(videos / "a.mp4")))
    media = open_media(dense.config, checkpoint=wan_folder)
    # 27 frames are two clips of 13 = 1 + 3 * 4, and one frame is left over.
    for clip, start in zip(stored["latents"], (0, 13), strict=True):
        assert torch.equal(clip, media.encode(pixels[None, start : start + 13])[0])
    assert torch.equal(stored["context"], media.encode_prompts([PROMPT, PROMPT]))


SHORT = [word for table in ("convert", "recover", "evaluate")
         for word in ("--set", f"{table}.data.frames=4")]  # fmt: skip


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, list[Any]]:
    """Clips of each kind as options of a command; one film makes two clips."""
    for name in "abc":
        write_mp4(tmp_path / "films" / f"{name}.mp4", noise(26, 3, 32, 48).clamp(-1, 1), scale=1)
        (tmp_path / "films" / f"{name}.txt").write_text(PROMPT)
    latents, context = wan_latents(4, 6), noise(6, 8, TEXT_DIM)
    save_file({"latents": latents, "context": context}, tmp_path / "clips.safetensors")
    return {
        "self": [],
        "videos": ["--data", tmp_path / "films"],
        "latents": ["--data", tmp_path / "clips.safetensors"],
    }


@pytest.mark.parametrize("kind", ["self", "videos", "latents"])
def test_every_command_takes_clips_of_every_kind(
    kind: str, sources: dict[str, list[Any]], tmp_path: Path, vmla: Vmla, wan_folder: Path
) -> None:
    clips = [*sources[kind], "--clips-dir", tmp_path / "made"]
    codec, better = tmp_path / "codec", tmp_path / "better"
    ran = vmla("convert", wan_folder, "-o", codec, *SET, *clips, *SHORT[:2], "--cut", "0.5",
               "--set", "convert.calibration_clips=2")  # fmt: skip
    assert ran.code == 0, ran.err
    ran = vmla("recover", codec, "-o", better, *clips, *SHORT[2:], "--steps", "2", "--batch-size",
               "2", "--lr", "0.001", "--set", "recover.layerwise_steps=0", "--set",
               "recover.data.clips=2", "--set", "evaluate.clips=2")  # fmt: skip
    assert ran.code == 0, ran.err
    ran = vmla("eval", better, *clips, *SHORT[4:], "--clips", "2", "--json")
    assert ran.code == 0 and "velocity_error" in ran.out, ran.err
    made = list(clip_sets(tmp_path / "made"))
    expected = {"self": [2, 3], "videos": [2, 6], "latents": []}
    assert sorted(each.clips for each in made) == expected[kind]


def test_a_recipe_names_components_too(wan_folder: Path, tmp_path: Path, vmla: Vmla) -> None:
    shutil.copytree(wan_folder / "transformer", tmp_path / "alone")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        f"""
        [recipe]
        name = "tiny"
        description = "A pipeline's transformer alone"
        [source]
        checkpoint = "{tmp_path / "alone"}"
        [model]
        latent_size = [4, 6]
        chunk_frames = 2
        cache = {{ window_frames = 6, sink_frames = 2, frame_positions = "relative" }}
        sampler = {{ denoising_step_list = [1000, 500] }}
        [convert]
        calibrate = false
        size = {{ cut = 0.5 }}
        [generate]
        prompts = ["{PROMPT}"]
        frames = 3
        """
    )
    ran = vmla("run", recipe, "-o", tmp_path / "out")
    assert refused(ran)
    assert "media.base" in ran.err
    base = json.dumps(f"media.base={wan_folder}")[1:-1]
    assert vmla("run", recipe, "-o", tmp_path / "out", "--set", base).code == 0
    assert (tmp_path / "out" / "compare.png").is_file()
