"""Pushed pipelines and codecs, opened by diffusers' own loaders and by `VMLAPipeline`."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.auto_model import AutoModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from hub_stub import Hub
from huggingface_hub.hf_api import api
from pipelines import latents_of, open_pipeline, seeded_with
from tiny_wan import PROMPT, SETTINGS

import vmla_convert as vmla
from vmla_convert.config import ConvertConfig, SourceConfig
from vmla_convert.errors import CheckpointError, MissingExtraError
from vmla_convert.fitting.convert import convert
from vmla_convert.interop.pipeline import VMLAPipeline
from vmla_convert.interop.transformer import VMLATransformer
from vmla_convert.loading.load import load
from vmla_convert.loading.publish import push

pytest_plugins = ["checkpoints", "hub_stub", "tiny_wan", "pipelines"]
pytestmark = [
    # Warnings of huggingface-hub about its HTTP library, and about diffusers' `AutoModel`.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]

PIPE, CODEC, BASE = "user/pipe", "user/kv", "user/wan"


@pytest.fixture(scope="module")
def wan_codec(wan_source: SourceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec of the tiny pipeline, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wan_codec") / "kv"
    convert(wan_source, folder, ConvertConfig("codec", calibrate=False))
    return folder


@pytest.fixture
def hub(stub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub also for diffusers, which copies the code of repositories to a folder."""
    monkeypatch.setattr(api, "endpoint", stub.url)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return stub


def frames_of(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, num_frames=5, generator=seeded_with(2)).frames


# trust_remote_code


def test_diffusers_opens_a_pushed_pipeline(
    hub: Hub, wan_converted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push(wan_converted, PIPE)
    with caplog.at_level(logging.WARNING):
        pipe: Any = DiffusionPipeline.from_pretrained(PIPE, trust_remote_code=True)
    assert isinstance(pipe, VMLAPipeline)
    assert np.array_equal(frames_of(pipe), frames_of(open_pipeline(wan_converted)))
    assert np.array_equal(frames_of(pipe), frames_of(open_pipeline(PIPE)))
    assert not [record for record in caplog.records if "ignored" in record.getMessage()]
    assert hub.calls("GET", "*.py") == 2


@pytest.mark.usefixtures("hub")
def test_diffusers_opens_the_transformer_alone(wan_converted: Path) -> None:
    push(wan_converted, PIPE)
    how: dict[str, Any] = {"subfolder": "transformer", "trust_remote_code": True}
    model = AutoModel.from_pretrained(PIPE, torch_dtype=torch.bfloat16, **how)
    assert isinstance(model, VMLATransformer)
    here = load(wan_converted, dtype=torch.bfloat16).state_dict()
    there = model.wan.state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())


@pytest.mark.usefixtures("hub")
def test_code_is_not_run_without_trust(wan_converted: Path) -> None:
    push(wan_converted, PIPE)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(PIPE)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(PIPE, subfolder="transformer")


@pytest.mark.usefixtures("hub")
def test_a_saved_pipeline_gets_the_same_files(wan_pipe: Any, tmp_path: Path) -> None:
    """diffusers writes another index than a conversion."""
    wan_pipe.save_pretrained(tmp_path / "out")
    push(tmp_path / "out", PIPE)
    pipe = DiffusionPipeline.from_pretrained(PIPE, trust_remote_code=True)
    assert np.array_equal(frames_of(pipe), frames_of(wan_pipe))
    assert push(tmp_path / "out", PIPE).uploaded == {}


def test_a_prompt_without_ftfy_names_the_extra(
    wan_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' own Wan pipeline needs ftfy too, and loads without it."""
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(MissingExtraError) as caught:
        wan_pipe(PROMPT, num_frames=5)
    assert "vmla-convert[wan]" in caught.value.hint


# Codecs beside a WanPipeline


def test_a_codec_uses_the_components_of_its_base_model(wan_codec: Path, wan_folder: Path) -> None:
    pipe = open_pipeline(wan_codec)
    assert pipe.vae is not None and pipe.text_encoder is not None
    media = vmla.open_media(pipe.transformer.wan.config, vmla.MediaConfig(str(wan_folder)))
    chunks = vmla.generate(load(wan_codec), PROMPT, 4, 2, text=media)
    wanted = torch.cat(list(chunks), 1).transpose(1, 2)
    assert torch.equal(latents_of(pipe, PROMPT, 13, 2), wanted)
    assert frames_of(pipe).shape == (1, 5, 32, 48, 3)


def test_a_base_model_may_be_named(wan_codec: Path, wan_folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(wan_folder, tmp_path / "elsewhere")
    alone = shutil.copytree(wan_codec, tmp_path / "codecs" / "kv")
    pipe = open_pipeline(alone, base_model=moved)
    assert np.array_equal(frames_of(pipe), frames_of(open_pipeline(wan_codec)))
    model = VMLATransformer.from_pretrained(alone, base_model=moved)
    assert model.record == pipe.transformer.record != {}
    shutil.rmtree(moved / "transformer")
    with pytest.raises(CheckpointError, match="elsewhere"):
        open_pipeline(alone, base_model=moved)


def test_a_pushed_codec_brings_its_base_model_from_the_hub(
    hub: Hub, wan_folder: Path, tmp_path: Path
) -> None:
    hub.put_folder(BASE, wan_folder)
    source = SourceConfig(BASE, overrides=SETTINGS)
    convert(source, tmp_path / "kv", ConvertConfig("codec", calibrate=False))
    push(tmp_path / "kv", CODEC, tag="v1")
    pipe = open_pipeline(CODEC, revision="v1")
    assert np.array_equal(frames_of(pipe), frames_of(open_pipeline(tmp_path / "kv")))
