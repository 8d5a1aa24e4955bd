"""Our models as diffusers' users meet them: loaded, called, saved and adapted by its verbs."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MLA, noise, tiny_config, tiny_mla, tiny_model
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from hub_stub import Hub
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_wan import SETTINGS
from torch import Tensor, nn

import vmla_convert as vmla
from vmla_convert.checkpoint.lora import open_lora
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.config import ConvertConfig, MLAConfig, RuntimeConfig, Sizes, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError, MissingExtraError
from vmla_convert.fitting.convert import convert
from vmla_convert.interop import pipeline as module
from vmla_convert.interop.adapters import find_lora
from vmla_convert.interop.pipeline import VMLAPipeline
from vmla_convert.interop.steps import evenly_spaced
from vmla_convert.interop.transformer import VMLATransformer
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading import load as loading
from vmla_convert.loading.export import export
from vmla_convert.loading.load import load
from vmla_convert.media.open import open_media

pytest_plugins = ["checkpoints", "hub_stub", "tiny_wan"]

PROMPT = "a cat walks on a red roof"


def seeded_with(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipe: VMLAPipeline) -> Any:
    """Without bars; Any, as what a call returns depends on `return_dict`."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", autouse=True)
def no_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@pytest.fixture(scope="module")
def wan_source(wan_folder: Path) -> SourceConfig:
    """The tiny Wan pipeline, as a causal model of two latent frames a chunk."""
    return SourceConfig(str(wan_folder), overrides=SETTINGS)


@pytest.fixture(scope="module")
def wan_converted(wan_source: SourceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its conversion, as a pipeline's folder."""
    folder = tmp_path_factory.mktemp("wan_converted") / "pipe"
    how = ConvertConfig("mla", init="spectral", size=Sizes(cut=0.5))
    convert(wan_source, folder, how, layout="diffusers")
    return folder


@pytest.fixture
def wan_pipe(wan_converted: Path) -> Any:
    return quiet(VMLAPipeline.from_pretrained(wan_converted))


@pytest.fixture
def demo_pipe(converted: Path) -> Any:
    return quiet(VMLAPipeline.from_pretrained(converted))


# The transformer


def test_the_dense_runtime_is_diffusers_own(wan_folder: Path) -> None:
    """All frames one chunk that sees itself, so that causality makes no difference."""
    theirs = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    ours = VMLATransformer.from_pretrained(wan_folder, subfolder="transformer")
    latents, context = noise(2, 16, 3, 4, 6), noise(2, 9, 32, seed=1)
    timestep = torch.tensor([900.0, 30.0])
    with torch.no_grad():
        wanted = theirs(latents, timestep, context).sample
        found = ours(latents, timestep, context).sample
        (plain,) = ours(latents, timestep, context, return_dict=False)
        causal = ours.wan.stream(
            latents.transpose(1, 2),
            timestep[:, None].expand(2, 3),
            ours.wan.project_prompt(context),
            opened(ours, 2, 3),
        )
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-5  # 1.0e-6
    assert (causal.transpose(1, 2) - wanted).abs().max() < 1e-5
    assert torch.equal(found, plain)


def opened(model: VMLATransformer, batch: int, frames: int) -> Any:
    """A cache of the clip's size with all of it open."""
    model.wan.config = replace(model.wan.config, latent_size=(4, 6))
    cache = model.wan.new_cache(batch)
    cache.open_chunk(frames)
    return cache


@pytest.mark.parametrize("mla", [None, TINY_MLA, tiny_mla("split")])
def test_a_saved_transformer_is_the_same(mla: MLAConfig | None, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(mla=mla)).eval()
    VMLATransformer.wrap(model).save_pretrained(tmp_path / "out")
    again = VMLATransformer.from_pretrained(tmp_path / "out")
    assert again.wan.config == load(tmp_path / "out").config == model.config
    state = again.wan.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert not again.training


def test_a_converted_pipeline_holds_the_transformer(wan_converted: Path) -> None:
    model = VMLATransformer.from_pretrained(
        str(wan_converted), subfolder="transformer", torch_dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    assert model.wan.config.mla is not None
    wanted = load(wan_converted, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(model.wan.state_dict()[name], t) for name, t in wanted.items())
    weights = load_file(wan_converted / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {"blocks.1.attn1.to_q.weight", "blocks.1.attn1.kv_a_proj.weight"} <= weights.keys()


def test_a_hub_id_has_its_revision_and_subfolder(
    wan_converted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(repo: str, file: str | None = None) -> Path:
        asked.append((repo, file))
        return wan_converted / "transformer"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "fetch", fetch)
    model = VMLATransformer.from_pretrained("someone/pipe", subfolder="transformer", revision="v1")
    assert asked == [("someone/pipe@v1", "transformer")]
    assert model.wan.config == load(wan_converted).config


def test_a_transformer_of_a_config_alone_is_random() -> None:
    config = tiny_config()
    model = VMLATransformer(VMLATransformer.wrap(tiny_model(config)).config["model"])
    assert model.wan.config == config


def test_options_that_would_do_nothing_are_refused(wan_folder: Path) -> None:
    with pytest.raises(ConfigError, match="quantization_config"):
        VMLATransformer.from_pretrained(wan_folder, quantization_config=object())
    with pytest.raises(ConfigError, match="device_map"):
        VMLATransformer.from_pretrained(wan_folder, device_map="balanced")
    with pytest.raises(ConfigError, match="device_map"):
        VMLATransformer.from_pretrained(wan_folder, device_map={"blocks.0": 0, "blocks.1": 1})
    for dtype in ("auto", {"vae": torch.float32}):
        with pytest.raises(ConfigError, match=r"torch_dtype .* is no dtype"):
            VMLATransformer.from_pretrained(wan_folder, torch_dtype=dtype)  # pyright: ignore[reportArgumentType]
    how: dict[str, Any] = {"low_cpu_mem_usage": True, "variant": None, "torch_dtype": "float32"}
    model = VMLATransformer.from_pretrained(
        wan_folder, device_map={"": "cpu"}, revision="main", **how
    )
    assert model.device == torch.device("cpu")
    with pytest.raises(ConfigError, match="'revison'"):
        VMLAPipeline.from_pretrained(wan_folder, revison="main")
    half = torch.bfloat16
    how.pop("torch_dtype")
    pipe: Any = VMLAPipeline.from_pretrained(wan_folder, dtype=half, use_safetensors=True, **how)
    assert {m.dtype for m in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {half}


def test_a_pipeline_is_of_a_revision(converted: Path, stub: Hub) -> None:
    repo = stub.put_folder("user/demo", converted)
    repo.tags["v1"] = repo.head
    stub.put("user/demo", {"model.safetensors": b"of another version"})
    pipe = VMLAPipeline.from_pretrained("user/demo", revision="v1")
    expected = load(converted).state_dict()
    found = pipe.transformer.wan.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore")
def test_a_dense_export_is_diffusers_own_pipeline(
    wan_source: SourceConfig, wan_folder: Path, tmp_path: Path
) -> None:
    export(wan_source, tmp_path / "out")
    theirs = WanPipeline.from_pretrained(tmp_path / "out")
    before = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    assert isinstance(theirs.transformer, WanTransformer3DModel)
    state = theirs.transformer.state_dict()
    assert all(torch.equal(state[name], t) for name, t in before.state_dict().items())
    ours = VMLAPipeline.from_pretrained(tmp_path / "out")
    assert ours.transformer.wan.config.chunk_frames == 2


# The pipeline


def test_the_whole_pipeline_is_diffusers_own(wan_folder: Path) -> None:
    """One chunk and one step: the same text, the same noise, the same model, the same VAE."""
    theirs: Any = WanPipeline.from_pretrained(wan_folder)
    theirs.set_progress_bar_config(disable=True)
    settings = ("latent_size=[4, 6]", "chunk_frames=3", "cache.window_frames=3")
    source = SourceConfig(str(wan_folder), overrides=settings)
    ours = quiet(VMLAPipeline.from_pretrained(source))
    start = noise(2, 16, 3, 4, 6)
    prompts = [PROMPT, "two &amp; more  dogs"]
    shared: dict[str, Any] = {"latents": start, "num_inference_steps": 1, "num_frames": 9}
    wanted = theirs(prompts, height=32, width=48, guidance_scale=1.0, **shared).frames
    sampler = replace(ours.transformer.wan.config.sampler, renoise=False)
    ours.transformer.wan.config = replace(ours.transformer.wan.config, sampler=sampler)
    found = ours(prompts, **shared).frames
    assert found.shape == wanted.shape == (2, 9, 32, 48, 3)
    assert wanted.std() > 0.01
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize("folder", ["teacher", "converted"])
def test_a_seed_gives_what_generate_gives(folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    pipe = quiet(VMLAPipeline.from_pretrained(path))
    wanted = torch.cat(list(vmla.generate(load(path), ["3", "7"], frames=9, seed=5)), dim=1)
    found = pipe(
        ["3", "7"], num_frames=9, generator=seeded_with(5), output_type="latent", return_dict=False
    )
    assert isinstance(found, tuple)
    assert torch.equal(found[0], wanted.transpose(1, 2))


def test_a_seed_and_a_prompt_give_what_generate_gives(wan_converted: Path, wan_pipe: Any) -> None:
    media = open_media(wan_pipe.transformer.wan.config, checkpoint=wan_converted)
    made = vmla.generate(load(wan_converted), PROMPT, frames=4, seed=2, text=media)
    latents = torch.cat(list(made), dim=1)
    shared: dict[str, Any] = {"num_frames": 13}
    found = wan_pipe(PROMPT, generator=seeded_with(2), output_type="latent", **shared).frames
    assert torch.equal(found, latents.transpose(1, 2))
    pixels = wan_pipe(PROMPT, generator=seeded_with(2), output_type="pt", **shared).frames
    assert torch.allclose(2 * pixels - 1, media.decode(latents), atol=1e-5)


def test_in_bfloat16_too(wan_converted: Path) -> None:
    """Rounded at the same places: prompts are read and latents scaled by the same functions."""
    half = torch.bfloat16
    pipe = quiet(VMLAPipeline.from_pretrained(wan_converted, torch_dtype=half))
    media = open_media(pipe.transformer.wan.config, checkpoint=wan_converted, dtype=half)
    model = load(wan_converted, dtype=half)
    latents = torch.cat(list(vmla.generate(model, PROMPT, frames=4, seed=2, text=media)), dim=1)
    shared: dict[str, Any] = {"num_frames": 13}
    found = pipe(PROMPT, generator=seeded_with(2), output_type="latent", **shared).frames
    assert found.dtype == half
    assert torch.equal(found, latents.transpose(1, 2))
    pixels = pipe(PROMPT, generator=seeded_with(2), output_type="pt", **shared).frames
    assert torch.equal(pixels, (media.decode(latents) / 2 + 0.5).clamp(0, 1))


def test_runtime_reaches_the_cache(demo_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, how, told = demo_pipe.transformer.wan, RuntimeConfig(backend="absorbed"), list[object]()
    new_cache = model.new_cache

    def noted(batch: int, runtime: RuntimeConfig) -> Any:
        told.append(runtime)
        return new_cache(batch, runtime)

    wanted = torch.cat(list(vmla.generate(model, "3", frames=6, seed=1, runtime=how)), dim=1)
    monkeypatch.setattr(model, "new_cache", noted)
    shared: dict[str, Any] = {"num_frames": 6, "output_type": "latent"}
    found = demo_pipe("3", generator=seeded_with(1), runtime=how, **shared).frames
    assert torch.equal(found, wanted.transpose(1, 2))
    assert told == [how]


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_frames_come_in_every_form(output_type: str, wan_pipe: Any) -> None:
    frames = wan_pipe(PROMPT, num_frames=9, output_type=output_type).frames
    if output_type == "pil":
        assert [[image.size for image in clip] for clip in frames] == [[(48, 32)] * 9]
        return
    shapes = {"np": (1, 9, 32, 48, 3), "pt": (1, 9, 3, 32, 48), "latent": (1, 16, 3, 4, 6)}
    assert tuple(frames.shape) == shapes[output_type]


def test_pixels_are_those_of_the_latents(demo_pipe: Any) -> None:
    latents = demo_pipe("3", num_frames=4, generator=seeded_with(0), output_type="latent").frames
    pixels = demo_pipe("3", num_frames=4, generator=seeded_with(0), output_type="pt").frames
    folded = torch.nn.functional.pixel_shuffle(latents.transpose(1, 2), 2)
    assert torch.allclose(pixels, (folded / 2 + 0.5).clamp(0, 1), atol=1e-6)


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


def test_even_steps_are_those_of_distilled_models() -> None:
    sampler = tiny_config().sampler
    assert evenly_spaced(sampler, 4) == replace(sampler, denoising_step_list=(1000, 750, 500, 250))
    assert evenly_spaced(sampler, 3).denoising_step_list == (1000, 667, 334)
    assert len(evenly_spaced(sampler, 1000).denoising_step_list) == 1000
    with pytest.raises(ConfigError, match="num_inference_steps 0"):
        evenly_spaced(sampler, 0)


def test_several_videos_of_a_prompt(demo_pipe: Any) -> None:
    shared: dict[str, Any] = {"num_frames": 4, "output_type": "latent"}
    pair = demo_pipe(["3", "4"], num_videos_per_prompt=2, generator=seeded_with(1), **shared).frames
    four = demo_pipe(["3", "3", "4", "4"], generator=seeded_with(1), **shared).frames
    assert torch.equal(pair, four)


def test_each_video_may_have_a_generator(demo_pipe: Any) -> None:
    shared: dict[str, Any] = {"num_frames": 4, "output_type": "latent"}
    both = demo_pipe(["3", "4"], generator=[seeded_with(1), seeded_with(2)], **shared).frames
    for row, (prompt, seed) in enumerate([("3", 1), ("4", 2)]):
        one = demo_pipe(prompt, generator=seeded_with(seed), **shared).frames
        assert torch.allclose(both[row], one[0], atol=1e-5)
    with pytest.raises(ConfigError, match="1 generators for 2 videos"):
        demo_pipe(["3", "4"], generator=[seeded_with(1)], **shared)


def test_a_used_generator_goes_on(demo_pipe: Any) -> None:
    shared: dict[str, Any] = {"num_frames": 2, "output_type": "latent"}

    def twice() -> list[Tensor]:
        generator = seeded_with(4)
        return [demo_pipe("3", generator=generator, **shared).frames for _ in range(2)]

    one, other = twice(), twice()
    assert not torch.equal(*one)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    torch.manual_seed(7)
    first = demo_pipe("3", **shared).frames
    torch.manual_seed(7)
    assert torch.equal(first, demo_pipe("3", **shared).frames)
    assert not torch.equal(first, demo_pipe("3", **shared).frames)


def test_noise_may_be_given(demo_pipe: Any) -> None:
    """An Euler sampler draws no more of it."""
    shared: dict[str, Any] = {"num_frames": 3, "output_type": "latent"}
    given = noise(1, 12, 3, 12, 12)
    one = demo_pipe("3", latents=given, generator=seeded_with(1), **shared).frames
    assert one.shape == given.shape
    other = demo_pipe("3", latents=given + 1, generator=seeded_with(1), **shared).frames
    assert not torch.equal(one, other)
    with pytest.raises(ConfigError, match=r"\(1, 12, 4, 12, 12\)"):
        demo_pipe("3", latents=noise(1, 12, 4, 12, 12), **shared)


def test_a_prompt_may_be_given_embedded(wan_pipe: Any) -> None:
    seen: list[Tensor] = []

    def look(_: Any, __: int, ___: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["prompt_embeds"])
        return {}

    shared: dict[str, Any] = {"num_frames": 5, "output_type": "latent"}
    how: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    by_words = wan_pipe(
        PROMPT, generator=seeded_with(1), callback_on_step_end=look, **how, **shared
    ).frames
    assert seen[0].shape == (1, 512, 32)
    bare = quiet(VMLAPipeline(wan_pipe.transformer))
    embedded = bare(prompt_embeds=seen[0], generator=seeded_with(1), **shared).frames
    assert torch.equal(by_words, embedded)
    with pytest.raises(ConfigError, match="no text encoder"):
        bare(PROMPT, **shared)
    with pytest.raises(ConfigError, match="no VAE"):
        bare(prompt_embeds=seen[0], num_frames=5)


# Callbacks


def test_a_callback_sees_every_step(demo_pipe: Any) -> None:
    calls: list[tuple[int, float, tuple[int, ...]]] = []

    def note(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        assert pipe is demo_pipe and pipe.num_timesteps == 2
        calls.append((step, round(timestep.item(), 3), tuple(tensors["latents"].shape)))
        return {}

    plain = demo_pipe("3", num_frames=4, generator=seeded_with(1), output_type="latent").frames
    watched = demo_pipe(
        "3",
        num_frames=4,
        generator=seeded_with(1),
        output_type="latent",
        callback_on_step_end=note,
    ).frames
    assert torch.equal(plain, watched)
    shape = (1, 12, 2, 12, 12)
    # Timesteps 1000 and 500 under a shift of 2.
    expected = [(0, 1000.0), (1, 666.667), (2, 1000.0), (3, 666.667)]
    assert calls == [(step, timestep, shape) for step, timestep in expected]


def test_after_a_callback_the_transformer_is_brought_back(
    wan_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preview takes the VAE, for which an offloaded transformer has to make room."""
    place, read = ["device"], list[str]()
    transformer = type(wan_pipe.transformer)

    def ready(self: Any) -> Any:
        place[0] = "device"
        return self.wan

    def preview(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.vae.decode(torch.zeros(1, 16, 1, 4, 6))
        place[0] = "host"
        return {}

    stream = CausalWanModel.stream

    def spied(self: CausalWanModel, *args: Any, **kwargs: Any) -> Any:
        read.append(place[0])
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(transformer, "ready", ready)
    monkeypatch.setattr(CausalWanModel, "stream", spied)
    wan_pipe(PROMPT, num_frames=9, callback_on_step_end=preview, output_type="latent")
    assert len(read) > 4
    assert set(read) == {"device"}


def test_a_callback_may_replace_latents_and_prompt(demo_pipe: Any) -> None:
    def steered(change: Callable[[int, dict[str, Tensor]], dict[str, Tensor]]) -> Tensor:
        return demo_pipe(
            "3",
            num_frames=4,
            generator=seeded_with(1),
            output_type="latent",
            callback_on_step_end=lambda _, step, __, tensors: change(step, tensors),
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        ).frames

    plain = steered(lambda _, tensors: tensors)
    zeroed = steered(lambda step, t: {"latents": 0 * t["latents"]} if step == 3 else {})
    assert torch.equal(zeroed[:, :, :2], plain[:, :, :2])
    assert not zeroed[:, :, 2:].any()
    moved = steered(
        lambda step, t: {"prompt_embeds": t["prompt_embeds"].flip(-1)} if step == 0 else {}
    )
    assert torch.equal(moved[:, :, :2], plain[:, :, :2])
    assert not torch.equal(moved[:, :, 2:], plain[:, :, 2:])


def test_a_callback_may_stop_it(demo_pipe: Any) -> None:
    def stop(pipe: Any, step: int, _: Tensor, __: dict[str, Tensor]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return {}

    frames = demo_pipe("3", num_frames=8, callback_on_step_end=stop, output_type="latent").frames
    assert frames.shape[2] == 4  # the whole first chunk, and the second as far as it came
    assert demo_pipe("3", num_frames=8, output_type="latent").frames.shape[2] == 8


def test_diffusers_own_callbacks_work(demo_pipe: Any) -> None:
    from diffusers.callbacks import PipelineCallback

    class Count(PipelineCallback):
        seen = 0

        @property
        def tensor_inputs(self) -> list[str]:
            return ["prompt_embeds"]

        def callback_fn(self, *told: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            *_, callback_kwargs = told
            assert callback_kwargs.keys() == {"prompt_embeds"}
            self.seen += 1
            return callback_kwargs

    counted = Count(cutoff_step_ratio=1.0)
    demo_pipe("3", num_frames=4, callback_on_step_end=counted)
    assert counted.seen == 4


# Loading, saving, offloading


def test_a_saved_pipeline_is_the_same(wan_pipe: Any, tmp_path: Path) -> None:
    wan_pipe.save_pretrained(tmp_path / "out")
    again = quiet(VMLAPipeline.from_pretrained(tmp_path / "out"))
    one, other = (
        p(PROMPT, num_frames=5, generator=seeded_with(2)).frames for p in (wan_pipe, again)
    )
    assert np.array_equal(one, other)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert load(tmp_path / "out").config == wan_pipe.transformer.wan.config
    source = wan_pipe.transformer.wan.config
    assert source.media == "wan"
    # What a conversion writes is what diffusers would have written.
    assert index["transformer"] == ["vmla_convert.interop.transformer", "VMLATransformer"]


def test_a_conversion_writes_the_index_that_diffusers_writes(
    wan_converted: Path, wan_pipe: Any, tmp_path: Path
) -> None:
    wan_pipe.save_pretrained(tmp_path / "out")
    ours, theirs = (
        json.loads((folder / "model_index.json").read_text())
        for folder in (wan_converted, tmp_path / "out")
    )
    theirs.pop("_diffusers_version")
    ours.pop("_diffusers_version", None)
    assert ours == theirs


def test_components_may_come_from_elsewhere(
    wan_source: SourceConfig, wan_folder: Path, wan_pipe: Any, tmp_path: Path
) -> None:
    convert(
        wan_source, tmp_path / "out", ConvertConfig("mla", init="spectral", size=Sizes(cut=0.5))
    )
    pipe = quiet(VMLAPipeline.from_pretrained(tmp_path / "out", base=str(wan_folder)))
    one, other = (
        p(PROMPT, num_frames=5, generator=seeded_with(2)).frames for p in (wan_pipe, pipe)
    )
    assert np.array_equal(one, other)
    given = VMLAPipeline.from_pretrained(
        tmp_path / "out", vae=wan_pipe.vae, text_encoder=None, tokenizer=None
    )
    assert given.vae is wan_pipe.vae and given.text_encoder is None
    mixed = VMLAPipeline.from_pretrained(wan_folder, transformer=pipe.transformer)
    assert mixed.transformer is pipe.transformer


def test_a_transformer_that_is_here_is_not_fetched(
    wan_pipe: Any, wan_folder: Path, stub: Hub
) -> None:
    stub.put_folder("user/wan", wan_folder)
    pipe = VMLAPipeline.from_pretrained("user/wan", transformer=wan_pipe.transformer)
    assert pipe.transformer is wan_pipe.transformer and pipe.vae is not None
    assert not stub.calls("GET", "*/transformer/*")


def test_offloading_brings_each_part_when_it_is_needed(
    wan_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where the hooks run but move nothing."""
    from accelerate.hooks import CpuOffload

    plain = wan_pipe(PROMPT, num_frames=9, generator=seeded_with(2)).frames
    brought: list[str] = []
    before = CpuOffload.pre_forward

    def pre_forward(self: CpuOffload, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        brought.append(type(module).__name__)
        return before(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    wan_pipe.enable_model_cpu_offload(device="cpu")
    offloaded = wan_pipe(PROMPT, num_frames=9, generator=seeded_with(2)).frames
    assert np.array_equal(plain, offloaded)
    order = list(dict.fromkeys(brought))
    assert order == ["UMT5EncoderModel", "VMLATransformer", "AutoencoderKLWan"]


def test_offloading_module_by_module_leaves_the_transformer_whole(wan_pipe: Any) -> None:
    """Not called: where the device is the CPU, accelerate fails on diffusers' own pipelines too."""
    wan_pipe.enable_sequential_cpu_offload(device="cpu")
    assert not any(hasattr(module, "_hf_hook") for module in wan_pipe.transformer.modules())
    assert wan_pipe.transformer.device == torch.device("cpu")
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "either a prompt"),
        ({"prompt": "3", "prompt_embeds": torch.zeros(1, 1, 10)}, "either a prompt"),
        ({"prompt": "3", "output_type": "mp4"}, "no output_type 'mp4'"),
        ({"prompt": "3", "num_frames": 0}, "num_frames 0"),
        ({"prompt": "3", "height": 25}, "multiples of 2"),
        ({"prompt": "3", "height": 26}, "not divided by patches"),
        ({"prompt": "3", "callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"prompt": "3", "guidance_scale": 5.0}, "guidance_scale 5 asks for guidance"),
        ({"prompt": "3", "max_sequence_length": 226}, "max_sequence_length 226"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(
    arguments: dict[str, Any], message: str, demo_pipe: Any
) -> None:
    before = demo_pipe.transformer.wan.config
    with pytest.raises(ConfigError, match=message):
        demo_pipe(**arguments)
    assert demo_pipe.transformer.wan.config == before


def test_arguments_of_wans_own_pipeline_that_change_nothing_are_taken(demo_pipe: Any) -> None:
    shared: dict[str, Any] = {"num_frames": 2, "output_type": "latent"}
    plain = demo_pipe("3", generator=seeded_with(1), **shared).frames
    usual: dict[str, Any] = {
        "guidance_scale": 1.0,
        "negative_prompt": "blurry",
        "max_sequence_length": 1,
    }
    assert torch.equal(demo_pipe("3", generator=seeded_with(1), **shared, **usual).frames, plain)


# LoRAs


def lora_file(
    path: Path, names: list[str], dim: int, ffn: int, extra: dict[str, Tensor] | None = None
) -> Path:
    """A LoRA of rank 3 and alpha 6 under native names."""
    state: dict[str, Tensor] = dict(extra or {})
    for index, name in enumerate(names):
        wide_in, wide_out = (ffn if name.endswith(end) else dim for end in ("ffn.2", "ffn.0"))
        prefix = f"diffusion_model.blocks.0.{name}"
        state[f"{prefix}.lora_down.weight"] = 0.1 * noise(3, wide_in, seed=index)
        state[f"{prefix}.lora_up.weight"] = 0.1 * noise(wide_out, 3, seed=50 + index)
        state[f"{prefix}.alpha"] = torch.tensor(6.0)
    save_file(state, path)
    return path


STAYS = ["self_attn.q", "self_attn.o", "cross_attn.k", "cross_attn.v", "ffn.0", "ffn.2"]


def test_a_lora_on_a_dense_model_is_the_merged_one(teacher: Path, tmp_path: Path) -> None:
    names = [*STAYS, "self_attn.k", "self_attn.v"]
    file = lora_file(tmp_path / "lora.safetensors", names, 48, 64)
    pipe = quiet(VMLAPipeline.from_pretrained(teacher))
    shared: dict[str, Any] = {"num_frames": 4, "output_type": "latent"}
    plain = pipe("3", generator=seeded_with(1), **shared).frames
    report = pipe.load_lora_weights(file)
    assert len(report.loaded) == 8 and not report.factored and not report.unlike
    adapted = pipe("3", generator=seeded_with(1), **shared).frames
    merged = VMLAPipeline.from_pretrained(SourceConfig(str(teacher), loras=(str(file),)))
    wanted = quiet(merged)("3", generator=seeded_with(1), **shared).frames
    # The merged weights were rounded to the checkpoint's bfloat16.
    assert (adapted - wanted).abs().max() < 0.2 * (plain - wanted).abs().max()
    pipe.fuse_lora()
    fused = pipe("3", generator=seeded_with(1), **shared).frames
    assert torch.allclose(fused, adapted, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    again = pipe("3", generator=seeded_with(1), **shared).frames
    # What was added and taken away left rounding behind.
    assert torch.allclose(again, plain, atol=1e-4)


def test_an_unloaded_lora_leaves_nothing_behind(teacher: Path, tmp_path: Path) -> None:
    file = lora_file(tmp_path / "lora.safetensors", STAYS, 48, 64)
    pipe = quiet(VMLAPipeline.from_pretrained(teacher))
    shared: dict[str, Any] = {"num_frames": 4, "output_type": "latent"}
    plain = pipe("3", generator=seeded_with(1), **shared).frames
    pipe.load_lora_weights(file)
    pipe.unload_lora_weights()
    assert torch.equal(pipe("3", generator=seeded_with(1), **shared).frames, plain)


def test_a_lora_on_a_converted_model_names_what_has_no_place(
    converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(64)}
    names = [*STAYS, "self_attn.k", "self_attn.v"]
    file = lora_file(tmp_path / "lora.safetensors", names, 48, 64, extra)
    pipe = quiet(VMLAPipeline.from_pretrained(converted))
    monkey = logging.getLogger(module.__name__)
    monkey.addHandler(caplog.handler)
    report = pipe.load_lora_weights(file, adapter_name="style")
    monkey.removeHandler(caplog.handler)
    assert set(report.loaded) == {f"blocks.0.{name}.weight" for name in STAYS}
    assert set(report.factored) == {f"blocks.0.self_attn.{kind}.weight" for kind in "kv"}
    assert report.unlike == ("blocks.0.ffn.0.bias",)
    for name in (*report.factored, *report.unlike):
        assert name in caplog.text
    shared: dict[str, Any] = {"num_frames": 4, "output_type": "latent"}
    adapted = pipe("3", generator=seeded_with(1), **shared).frames
    assert torch.allclose(adapted, merged_by_hand(converted, file, report.loaded), atol=1e-4)
    pipe.set_adapters("style", 0.0)
    plain = quiet(VMLAPipeline.from_pretrained(converted))
    wanted = plain("3", generator=seeded_with(1), **shared).frames
    assert not torch.allclose(adapted, wanted, atol=1e-3)
    assert torch.allclose(pipe("3", generator=seeded_with(1), **shared).frames, wanted, atol=1e-5)


def merged_by_hand(folder: Path, file: Path, names: tuple[str, ...]) -> Tensor:
    """What the model makes with the LoRA's loadable part added to its weights."""
    model = load(folder)
    state = model.state_dict()
    specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in state.items()}
    dense = {name.replace("kv_a", "k"): spec for name, spec in specs.items()}
    square = TensorSpec((48, 48), torch.float32)
    dense |= {f"blocks.0.self_attn.{kind}.weight": square for kind in "kv"}
    lora = open_lora(file, 1.0, dense)
    for name in names:
        state[name].copy_(lora.apply(name, state[name]))
    made = vmla.generate(model, "3", frames=4, seed=1)
    return torch.cat(list(made), dim=1).transpose(1, 2)


def test_a_lora_of_which_nothing_has_a_place_is_refused(converted: Path, tmp_path: Path) -> None:
    file = lora_file(tmp_path / "lora.safetensors", ["self_attn.k"], 48, 64)
    pipe = VMLAPipeline.from_pretrained(converted)
    with pytest.raises(CheckpointError, match=r"nothing of .*self_attn\.k"):
        pipe.load_lora_weights(tmp_path, weight_name=file.name)
    with pytest.raises(CheckpointError, match="may hold several files"):
        pipe.load_lora_weights("someone/lora")


# peft doubts that a second adapter is meant.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_two_loras_may_be_mixed(converted: Path, tmp_path: Path) -> None:
    pipe = quiet(VMLAPipeline.from_pretrained(converted))
    for name in ("one", "two"):
        file = lora_file(tmp_path / f"{name}.safetensors", ["self_attn.q", "ffn.0"], 48, 64)
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    shared: dict[str, Any] = {"num_frames": 2, "output_type": "latent"}
    halves = pipe("3", generator=seeded_with(1), **shared).frames
    pipe.set_adapters("one")
    whole = pipe("3", generator=seeded_with(1), **shared).frames
    assert torch.allclose(halves, whole, atol=1e-5)
    assert pipe.get_active_adapters() == ["one"]


def test_a_saved_conversion_keeps_its_record_and_can_be_pushed(
    converted: Path, stub: Hub, tmp_path: Path
) -> None:
    VMLAPipeline.from_pretrained(converted).save_pretrained(tmp_path / "pipe")
    assert loading.read_provenance(tmp_path / "pipe") == loading.read_provenance(converted)
    told = vmla.push(tmp_path / "pipe", "user/pipe", dry_run=True)
    assert "transformer/conversion.json" in told.uploaded
    assert stub.repos == {}


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(
    converted: Path, tmp_path: Path
) -> None:
    pipe = VMLAPipeline.from_pretrained(converted)
    file = lora_file(tmp_path / "lora.safetensors", ["self_attn.q"], 48, 64)
    pipe.load_lora_weights(file)
    with pytest.raises(CheckpointError, match="lora"):
        pipe.transformer.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_a_lora_from_the_hub_comes_with_its_settings(stub: Hub, tmp_path: Path) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)}, weights)
    settings = b'{"lora_alpha": 8, "r": 2}'
    stub.put("user/lora", {weights.name: weights.read_bytes(), "adapter_config.json": settings})
    path = find_lora("user/lora", weights.name)
    assert (path.parent / "adapter_config.json").read_bytes() == settings
