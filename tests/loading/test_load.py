"""A checkpoint of any form opens as a running model; a damaged one is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from checkpoints import MODEL
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.config import ConvertConfig, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.fitting.convert import convert
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.loading import load as module
from vmla_convert.loading.load import (
    build,
    load,
    locate,
    open_named,
    read_provenance,
)
from vmla_convert.loading.teacher import as_teacher

pytest_plugins = ["checkpoints"]

SPECTRAL = ConvertConfig("mla", init="spectral")


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    """A conversion to damage."""
    return shutil.copytree(converted, tmp_path / "copied")


def test_a_dense_checkpoint_loads_with_its_own_numbers(teacher: Path) -> None:
    model, source = load(teacher), tiny_model(MODEL).state_dict()
    assert model.config == MODEL
    assert model.state_dict().keys() == source.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, source[name].bfloat16().float())


@pytest.fixture(params=["converted", "budgeted"])
def latent(request: pytest.FixtureRequest) -> Path:
    """A conversion with chosen ranks, and one with a budget."""
    return request.getfixturevalue(request.param)


def test_a_converted_folder_loads_with_all_its_tensors_frozen(latent: Path) -> None:
    model = load(latent)
    assert all(isinstance(layer, LatentSelfAttention) for layer in model.self_attentions())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    low = load(latent, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    opened, state = open_checkpoint(latent), model.state_dict()
    assert state.keys() == opened.names.keys()
    assert all(torch.equal(tensor, opened.read(n).float()) for n, tensor in state.items())


def test_demo_is_the_checkpoint_that_ships() -> None:
    path, how = locate("demo")
    assert path.parts[-3:] == ("vmla_convert", "demo", "checkpoint")
    assert how == SourceConfig("demo")
    assert locate("demo/")[0] != path
    assert open_named("demo").config.media == "demo"


def test_a_path_is_itself_or_a_file_in_it(teacher: Path) -> None:
    how = SourceConfig(str(teacher), model="longlive", overrides={"chunk_frames": 1})
    assert locate(teacher) == (teacher, SourceConfig(str(teacher)))
    assert locate(str(teacher))[0] == teacher
    assert locate(how) == (teacher, how)
    inside = replace(how, file="model.pt")
    assert locate(inside) == (teacher / "model.pt", inside)


def test_settings_reach_the_model(teacher: Path) -> None:
    source = SourceConfig(str(teacher), overrides={"cache": {"window_frames": 8}})
    opened = open_named(source)
    assert opened.config == replace(MODEL, cache=replace(MODEL.cache, window_frames=8))
    assert load(source).config == build(opened).config == opened.config


@dataclass
class FakeHub:
    """Returns one path for any repository, and records the requests."""

    path: Path
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def fetch(self, repo: str, file: str | None = None) -> Path:
        self.asked.append((repo, file))
        return self.path


@pytest.fixture
def hub(teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    fake = FakeHub(teacher)
    monkeypatch.setattr(module, "fetch", fake.fetch)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.mark.parametrize(
    ("source", "file", "model"),
    [
        (SourceConfig("gdhe17/Self-Forcing"), None, "self-forcing"),
        (SourceConfig("gdhe17/Self-Forcing@main"), None, "self-forcing"),
        (SourceConfig("gdhe17/Self-Forcing", "checkpoints/ode_init.pt"), "=", "self-forcing"),
        (SourceConfig("gdhe17/Self-Forcing", "other.pt"), "=", None),
        (SourceConfig("someone/fork"), None, None),
        (SourceConfig("someone/fork", model="longlive"), None, "longlive"),
        (
            SourceConfig("zhuhz22/Causal-Forcing", model="causal-forcing-framewise"),
            "framewise/causal_forcing.pt",
            "causal-forcing-framewise",
        ),
        (SourceConfig("zhuhz22/Causal-Forcing"), None, "causal-forcing"),
    ],
)
def test_a_hub_id_is_fetched_and_known(
    source: SourceConfig, file: str | None, model: str | None, hub: FakeHub
) -> None:
    source = replace(source, overrides={"licence": "other"})
    path, how = locate(source)
    assert path == hub.path
    assert hub.asked == [(source.checkpoint, source.file if file == "=" else file)]
    repo = source.checkpoint.partition("@")[0]
    assert how == replace(source, model=model, overrides={"base_model": repo, "licence": "other"})
    if model is None:
        config = open_named(source).config
        assert (config.base_model, config.licence) == (repo, "other")


def test_the_user_names_the_base_model_last(hub: FakeHub) -> None:
    source = SourceConfig("someone/fork", overrides={"base_model": "someone/else"})
    assert open_named(source).config.base_model == "someone/else"
    assert hub.asked


def test_a_folder_of_that_name_comes_before_the_hub(
    teacher: Path, hub: FakeHub, tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "someone" / "fork")
    assert open_named("someone/fork").config == MODEL
    assert not hub.asked


def test_a_converted_folder_may_lie_on_the_hub(latent: Path, hub: FakeHub) -> None:
    hub.path = latent
    assert load("someone/converted").config == load(latent).config
    with pytest.raises(ConfigError, match="converted already"):
        load(SourceConfig("someone/converted", overrides={"licence": "other"}))


def test_a_converted_folder_may_be_run_in_another_window(latent: Path) -> None:
    made = load(latent)
    settings = {"cache": {"window_frames": 6, "sink_frames": 1}, "sampler": {"shift": 3}}
    set_ = load(SourceConfig(str(latent), overrides=settings))
    assert (set_.config.cache.window_frames, set_.config.cache.sink_frames) == (6, 1)
    assert set_.config.cache.frame_positions == made.config.cache.frame_positions
    assert set_.config.sampler.shift == 3.0
    assert set_.config.mla == made.config.mla
    weights = made.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in set_.state_dict().items())
    with pytest.raises(ConfigError, match=r"unknown key 'cache\.window'"):
        load(SourceConfig(str(latent), overrides={"cache": {"window": 6}}))
    with pytest.raises(ConfigError, match="a window of 2 frames with a sink of"):
        load(SourceConfig(str(latent), overrides={"cache": {"window_frames": 2, "sink_frames": 1}}))


def other_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "blocks.1.self_attn.kv_a_proj.weight"
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / "model.safetensors")


def lost_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["blocks.0.self_attn.q_rope_map"]
    save_file(weights, folder / "model.safetensors")


def set_mla(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["model"]["mla"][key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (other_shape, "blocks.1.self_attn.kv_a_proj.weight"),
        (lost_tensor, "q_rope_map"),
        (set_mla("kv_lora_rank", [8, 9]), "blocks.1"),
        (set_mla("latent", "split"), "config.json"),
        (set_mla("latents", "joint"), "'latent'"),
    ],
)
def test_damage_to_a_converted_folder_is_named(
    damage: Callable[[Path], None], named: str, copied: Path
) -> None:
    damage(copied)
    with pytest.raises(CheckpointError) as caught:
        load(copied)
    assert named in f"{caught.value.message} ({caught.value.hint})"
    assert caught.value.hint


def test_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load(tmp_path / "nothing")


def test_a_teacher_gets_the_settings_of_its_conversion(teacher: Path, tmp_path: Path) -> None:
    asked = SourceConfig(str(teacher), key="generator_ema", overrides={"chunk_frames": 1})
    convert(asked, tmp_path / "out", SPECTRAL)
    for converted in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        assert as_teacher(str(teacher), converted) == asked
        assert open_named(as_teacher(str(teacher), converted)).config.chunk_frames == 1
    assert as_teacher(asked, tmp_path / "nowhere") == asked
    # Other bytes, such as another form of the model, are read without the key and the LoRAs.
    save_file(dict(load(teacher).state_dict()), tmp_path / "native.safetensors")
    (tmp_path / "config.json").write_bytes((teacher / "config.json").read_bytes())
    other = as_teacher(tmp_path / "native.safetensors", tmp_path / "out")
    assert (other.key, other.loras, other.overrides) == (None, (), {"chunk_frames": 1})
    assert open_named(other).config.chunk_frames == 1


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"source": 3}', '{"source": {"asked": {"foo": 1}}}']
)
def test_a_damaged_record_is_named(record: str, teacher: Path, copied: Path) -> None:
    assert read_provenance(copied)["source"]["family"] == "self_forcing"
    assert read_provenance(teacher) == {}
    (copied / "conversion.json").write_text(record)
    with pytest.raises(CheckpointError, match=r"conversion\.json") as caught:
        read_provenance(copied)
    assert caught.value.hint
