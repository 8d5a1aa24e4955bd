"""The diffusers pipeline: the same numbers as `generate` and as diffusers, called as diffusers'."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from hub_stub import Hub
from PIL import Image
from pipelines import latents_of, open_pipeline, seeded_with
from tiny_wan import PROMPT
from torch import Tensor, nn

import vmla_convert as vmla
from vmla_convert.config import ConvertConfig, RuntimeConfig, Sizes, SourceConfig
from vmla_convert.errors import ConfigError, MissingExtraError
from vmla_convert.fitting.convert import convert
from vmla_convert.interop.pipeline import VMLAPipeline
from vmla_convert.interop.transformer import VMLATransformer
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading import load as loading
from vmla_convert.loading.load import load
from vmla_convert.media.open import open_media

pytest_plugins = ["checkpoints", "hub_stub", "tiny_wan", "pipelines"]


def generated(model: CausalWanModel, prompt: Any, frames: int, seed: int, **how: Any) -> Tensor:
    return torch.cat(list(vmla.generate(model, prompt, frames, seed, **how)), 1).transpose(1, 2)


# Parity


def test_one_chunk_in_one_step_is_diffusers_pipeline(wan_folder: Path) -> None:
    theirs: Any = WanPipeline.from_pretrained(wan_folder)
    theirs.set_progress_bar_config(disable=True)
    settings = {
        "latent_size": [4, 6],
        "chunk_frames": 3,
        "cache": {"window_frames": 3},
        "sampler": {"renoise": False},
    }
    source = SourceConfig(str(wan_folder), overrides=settings)
    ours = open_pipeline(source)
    prompts = [PROMPT, "two &amp; more  dogs"]
    shared: dict[str, Any] = {
        "latents": noise(2, 16, 3, 4, 6),
        "num_inference_steps": 1,
        "num_frames": 9,
    }
    wanted = theirs(prompts, height=32, width=48, guidance_scale=1.0, **shared).frames
    found = ours(prompts, **shared).frames
    assert found.shape == wanted.shape == (2, 9, 32, 48, 3)
    assert wanted.std() > 0.01
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize("folder", ["teacher", "converted"])
def test_a_seed_gives_what_generate_gives(folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    pipe = open_pipeline(path)
    wanted = generated(load(path), ["3", "7"], 9, 5)
    assert torch.equal(latents_of(pipe, ["3", "7"], 9, 5), wanted)
    usual = {"guidance_scale": 1.0, "negative_prompt": "blurry", "max_sequence_length": 1}
    assert torch.equal(latents_of(pipe, ["3", "7"], 9, 5, **usual), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_of_wan_are_those_of_generate(dtype: torch.dtype, wan_converted: Path) -> None:
    pipe = open_pipeline(wan_converted, torch_dtype=dtype)
    media = open_media(pipe.transformer.wan.config, checkpoint=wan_converted, dtype=dtype)
    latents = generated(load(wan_converted, dtype=dtype), PROMPT, 4, 2, text=media)
    assert torch.equal(latents_of(pipe, PROMPT, 13, 2), latents)
    pixels = pipe(PROMPT, num_frames=13, generator=seeded_with(2), output_type="pt").frames
    expected = (media.decode(latents.transpose(1, 2)) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_runtime_reaches_the_cache(demo_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, how, given = demo_pipe.transformer.wan, RuntimeConfig(offload=True), list[object]()
    new_cache = model.new_cache

    def noted(batch: int, runtime: RuntimeConfig, *more: Any) -> Any:
        given.append(runtime)
        return new_cache(batch, runtime, *more)

    monkeypatch.setattr(model, "new_cache", noted)
    latents_of(demo_pipe, runtime=how)
    assert given == [how]


# Arguments


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_frames_come_in_every_form(output_type: str, wan_pipe: Any) -> None:
    (frames,) = wan_pipe(PROMPT, num_frames=9, output_type=output_type, return_dict=False)
    if output_type == "pil":
        assert [[image.size for image in clip] for clip in frames] == [[(48, 32)] * 9]
        return
    shapes = {"np": (1, 9, 32, 48, 3), "pt": (1, 9, 3, 32, 48), "latent": (1, 16, 3, 4, 6)}
    assert tuple(frames.shape) == shapes[output_type]


def test_a_size_and_a_number_of_steps_may_be_asked_for(wan_pipe: Any) -> None:
    steps: list[int] = []
    before = wan_pipe.transformer.wan.config
    frames = wan_pipe(
        PROMPT,
        height=64,
        width=32,
        num_frames=6,  # of which the VAE can make 5
        num_inference_steps=3,
        callback_on_step_end=lambda _, step, __, ___: steps.append(step),
    ).frames
    assert frames.shape == (1, 5, 64, 32, 3)
    assert steps == [0, 1, 2]
    assert wan_pipe.transformer.wan.config == before


def test_several_videos_share_or_have_generators(demo_pipe: Any) -> None:
    pair = latents_of(demo_pipe, ["3", "4"], num_videos_per_prompt=2)
    assert torch.equal(pair, latents_of(demo_pipe, ["3", "3", "4", "4"]))
    both = latents_of(demo_pipe, ["3", "4"], seed=[seeded_with(1), seeded_with(2)])
    for row, (prompt, seed) in enumerate([("3", 1), ("4", 2)]):
        one = latents_of(demo_pipe, prompt, seed=seed)
        torch.testing.assert_close(both[row], one[0], atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="1 generators for 2 videos"):
        latents_of(demo_pipe, ["3", "4"], seed=[seeded_with(1)])


def test_a_used_generator_continues(demo_pipe: Any) -> None:
    def twice(seed: Any) -> list[Tensor]:
        return [latents_of(demo_pipe, frames=2, seed=seed) for _ in range(2)]

    one, other = twice(seeded_with(4)), twice(seeded_with(4))
    assert not torch.equal(*one)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    torch.manual_seed(7)
    first, second = twice(None)
    torch.manual_seed(7)
    assert torch.equal(first, twice(None)[0]) and not torch.equal(first, second)


def test_noise_may_be_given(demo_pipe: Any) -> None:
    given = noise(1, 12, 3, 12, 12)
    one, other = (latents_of(demo_pipe, frames=3, latents=x) for x in (given, given + 1))
    assert one.shape == given.shape and not torch.equal(one, other)
    with pytest.raises(ConfigError, match=r"\(1, 12, 4, 12, 12\)"):
        latents_of(demo_pipe, frames=3, latents=noise(1, 12, 4, 12, 12))


def test_a_prompt_may_be_given_embedded(wan_pipe: Any) -> None:
    seen: list[Tensor] = []

    def look(_: Any, __: int, ___: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["prompt_embeds"])

    names = ["prompt_embeds"]
    by_words = latents_of(
        wan_pipe, PROMPT, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names
    )
    assert seen[0].shape == (1, 512, 32)
    bare: Any = VMLAPipeline(wan_pipe.transformer)
    bare.set_progress_bar_config(disable=True)
    assert torch.equal(by_words, latents_of(bare, None, prompt_embeds=seen[0]))
    with pytest.raises(ConfigError, match="no text encoder"):
        bare(PROMPT)
    with pytest.raises(ConfigError, match="no VAE"):
        bare(prompt_embeds=seen[0], num_frames=5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": None}, "prompt_embeds"),
        ({"prompt": "3", "prompt_embeds": torch.zeros(1, 1, 10)}, "prompt_embeds"),
        ({"prompt": "3", "output_type": "mp4"}, "'mp4'"),
        ({"prompt": "3", "num_frames": 0}, "num_frames 0"),
        ({"prompt": "3", "height": 25}, "25"),
        ({"prompt": "3", "height": 26}, "13"),
        ({"prompt": "3", "callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
        ({"prompt": "3", "guidance_scale": 5.0}, "guidance_scale 5"),
        ({"prompt": "3", "max_sequence_length": 226}, "max_sequence_length 226"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(
    arguments: dict[str, Any], named: str, demo_pipe: Any
) -> None:
    before = demo_pipe.transformer.wan.config
    with pytest.raises(ConfigError, match=named):
        demo_pipe(**arguments)
    assert demo_pipe.transformer.wan.config == before


# Loading, saving, offloading


def test_a_saved_pipeline_is_the_same(wan_pipe: Any, wan_converted: Path, tmp_path: Path) -> None:
    """A conversion writes what diffusers writes, record included."""
    wan_pipe.save_pretrained(tmp_path / "out")
    again = open_pipeline(tmp_path / "out")
    one, other = (p(PROMPT, num_frames=5, generator=seeded_with(2)) for p in (wan_pipe, again))
    assert np.array_equal(one.frames, other.frames)
    assert load(tmp_path / "out").config == wan_pipe.transformer.wan.config
    ours, theirs = (
        json.loads((folder / "model_index.json").read_text())
        for folder in (wan_converted, tmp_path / "out")
    )
    theirs.pop("_diffusers_version")
    ours.pop("_diffusers_version", None)
    assert ours == theirs
    assert ours["transformer"] == ["vmla_convert.interop.transformer", "VMLATransformer"]
    assert loading.read_provenance(tmp_path / "out") == loading.read_provenance(wan_converted)


def test_a_saved_pipeline_can_be_pushed(converted: Path, stub: Hub, tmp_path: Path) -> None:
    VMLAPipeline.from_pretrained(converted).save_pretrained(tmp_path / "pipe")
    report = vmla.push(tmp_path / "pipe", "user/pipe", dry_run=True)
    assert "transformer/conversion.json" in report.uploaded
    assert stub.repos == {}


def test_a_pipeline_is_of_a_revision(converted: Path, stub: Hub) -> None:
    repo = stub.put_folder("user/demo", converted)
    repo.tags["v1"] = repo.head
    stub.put("user/demo", {"model.safetensors": b"of another version"})
    pipe = VMLAPipeline.from_pretrained("user/demo", revision="v1")
    found = pipe.transformer.wan.state_dict()
    assert all(torch.equal(found[name], t) for name, t in load(converted).state_dict().items())


def test_components_may_come_from_elsewhere(
    wan_source: SourceConfig, wan_folder: Path, wan_pipe: Any, tmp_path: Path, stub: Hub
) -> None:
    convert(
        wan_source, tmp_path / "out", ConvertConfig("mla", init="spectral", size=Sizes(cut=0.5))
    )
    pipe = open_pipeline(tmp_path / "out", base=str(wan_folder))
    one, other = (p(PROMPT, num_frames=5, generator=seeded_with(2)) for p in (wan_pipe, pipe))
    assert np.array_equal(one.frames, other.frames)
    given: Any = VMLAPipeline.from_pretrained(
        tmp_path / "out", vae=wan_pipe.vae, text_encoder=None, tokenizer=None
    )
    assert given.vae is wan_pipe.vae and given.text_encoder is None
    stub.put_folder("user/wan", wan_folder)
    for source in (wan_folder, "user/wan"):
        mixed = VMLAPipeline.from_pretrained(source, transformer=pipe.transformer)
        assert mixed.transformer is pipe.transformer and mixed.vae is not None
    assert not stub.calls("GET", "*/transformer/*")


def test_offloading_moves_each_part_when_it_works(
    wan_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tested on the CPU, where the hooks run but move nothing."""
    from accelerate.hooks import CpuOffload

    plain = wan_pipe(PROMPT, num_frames=9, generator=seeded_with(2)).frames
    moved: list[str] = []
    before = CpuOffload.pre_forward

    def pre_forward(self: CpuOffload, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved.append(type(module).__name__)
        return before(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    wan_pipe.enable_model_cpu_offload(device="cpu")
    offloaded = wan_pipe(PROMPT, num_frames=9, generator=seeded_with(2)).frames
    assert np.array_equal(plain, offloaded)
    order = list(dict.fromkeys(moved))
    assert order == ["UMT5EncoderModel", "VMLATransformer", "AutoencoderKLWan"]


def test_offloading_module_by_module_leaves_the_transformer_whole(wan_pipe: Any) -> None:
    """Not called: where the device is the CPU, accelerate fails on diffusers' own pipelines too."""
    wan_pipe.enable_sequential_cpu_offload(device="cpu")
    assert not any(hasattr(module, "_hf_hook") for module in wan_pipe.transformer.modules())
    assert wan_pipe.vae.device == torch.device("meta")


def test_the_public_names_are_lazy() -> None:
    code = (
        "import sys, vmla_convert\n"
        "assert 'diffusers' not in sys.modules and 'torch' not in sys.modules\n"
        "assert {'VMLAPipeline', 'VMLATransformer'} <= set(dir(vmla_convert))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert vmla.VMLAPipeline is VMLAPipeline and vmla.VMLATransformer is VMLATransformer


@pytest.mark.parametrize("name", ["VMLAPipeline", "VMLATransformer"])
def test_without_diffusers_the_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in list(sys.modules):
        if loaded.startswith("vmla_convert.interop"):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "diffusers.configuration_utils", None)
    with pytest.raises(MissingExtraError) as caught:
        getattr(vmla, name)
    assert "vmla-convert[wan]" in caught.value.hint


def test_the_lines_of_the_readme_work(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (lines,) = (block for block in blocks if "VMLAPipeline" in block)
    monkeypatch.chdir(tmp_path)
    exec(lines.replace("runs/kv", str(converted)), {})
    with Image.open("seven.gif") as clip:
        assert clip.n_frames == 20  # pyright: ignore[reportAttributeAccessIssue]
