"""The transformer under diffusers' methods: the same numbers, saved and loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MLA, noise, tiny_config, tiny_mla, tiny_model
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from safetensors.torch import load_file

from vmla_convert.config import MLAConfig, SourceConfig
from vmla_convert.errors import ConfigError
from vmla_convert.interop.pipeline import VMLAPipeline
from vmla_convert.interop.transformer import VMLATransformer
from vmla_convert.loading import load as loading
from vmla_convert.loading.export import export
from vmla_convert.loading.load import load

pytest_plugins = ["tiny_wan"]


def test_one_chunk_is_diffusers_transformer(wan_folder: Path) -> None:
    """In one chunk every frame attends to every other, as in diffusers, masked or streamed."""
    theirs = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    ours = VMLATransformer.from_pretrained(wan_folder, subfolder="transformer")
    latents, context = noise(2, 16, 3, 4, 6), noise(2, 9, 32, seed=1)
    timestep = torch.tensor([900.0, 30.0])
    ours.wan.config = replace(ours.wan.config, latent_size=(4, 6))
    cache = ours.wan.new_cache(2)
    cache.open_chunk(3)
    with torch.no_grad():
        wanted = theirs(latents, timestep, context).sample
        found = ours(latents, timestep, context).sample
        (plain,) = ours(latents, timestep, context, return_dict=False)
        prompt, times = ours.wan.project_prompt(context), timestep[:, None].expand(2, 3)
        streamed = ours.wan.stream(latents.transpose(1, 2), times, prompt, cache)
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-5  # 1.0e-6
    assert (streamed.transpose(1, 2) - wanted).abs().max() < 1e-5
    assert torch.equal(found, plain)


@pytest.mark.parametrize("mla", [None, TINY_MLA, tiny_mla("split")])
def test_a_saved_transformer_is_the_same(mla: MLAConfig | None, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(mla=mla)).eval()
    wrapped = VMLATransformer.wrap(model)
    wrapped.save_pretrained(tmp_path / "out")
    again = VMLATransformer.from_pretrained(tmp_path / "out")
    assert again.wan.config == load(tmp_path / "out").config == model.config
    state = again.wan.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert not again.training
    assert VMLATransformer(wrapped.config["model"]).wan.config == model.config


def test_a_converted_pipeline_holds_the_transformer(wan_converted: Path) -> None:
    half = torch.bfloat16
    model = VMLATransformer.from_pretrained(
        str(wan_converted), subfolder="transformer", torch_dtype=half
    )
    assert model.dtype == half
    wanted = load(wan_converted, dtype=half).state_dict()
    assert all(torch.equal(model.wan.state_dict()[name], t) for name, t in wanted.items())
    weights = load_file(wan_converted / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {"blocks.1.attn1.to_q.weight", "blocks.1.attn1.kv_a_proj.weight"} <= weights.keys()


def test_a_hub_id_takes_revision_and_subfolder(
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


@pytest.mark.parametrize(
    ("loader", "options", "named"),
    [
        (VMLATransformer, {"quantization_config": object()}, "quantization_config"),
        (VMLATransformer, {"device_map": "balanced"}, "balanced"),
        (VMLATransformer, {"device_map": {"blocks.0": 0, "blocks.1": 1}}, "device_map"),
        (VMLATransformer, {"torch_dtype": "auto"}, "torch_dtype 'auto'"),
        (VMLATransformer, {"torch_dtype": {"vae": torch.float32}}, "torch_dtype"),
        (VMLAPipeline, {"revison": "main"}, "revison"),
    ],
)
def test_options_without_effect_are_refused(
    loader: Any, options: dict[str, Any], named: str, wan_folder: Path
) -> None:
    with pytest.raises(ConfigError, match=named):
        loader.from_pretrained(wan_folder, **options)


def test_options_that_only_change_how_files_are_read_are_accepted(wan_folder: Path) -> None:
    how: dict[str, Any] = {"low_cpu_mem_usage": True, "variant": None}
    model = VMLATransformer.from_pretrained(
        wan_folder, device_map={"": "cpu"}, revision="main", torch_dtype="float32", **how
    )
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    half = torch.bfloat16
    pipe: Any = VMLAPipeline.from_pretrained(wan_folder, dtype=half, use_safetensors=True, **how)
    assert {m.dtype for m in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {half}


@pytest.mark.filterwarnings("ignore")
def test_a_dense_export_loads_in_diffusers(
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
