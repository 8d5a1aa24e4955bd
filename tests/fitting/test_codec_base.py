"""A codec's base model: found, recognised by hash, and replaced by nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODEL, Vmla, refused
from codec_files import (
    CODEC,
    DIM,
    LAYERS,
    NAMES,
    QUICK,
    Pair,
    codec_state,
    edit_record,
    near,
    velocity,
)
from conftest import tiny_model
from family_files import FORMS, GEOMETRY, Form, with_frame_rate, with_lora
from hub_stub import Hub
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmla_convert.checkpoint.base import base_tensors, tensor_hash
from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.config import Sizes, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.fitting.convert import convert
from vmla_convert.loading.load import load
from vmla_convert.loading.teacher import teacher_of
from vmla_convert.training.pretrain import save_self_forcing

pytest_plugins = ["checkpoints", "codec_files", "hub_stub"]

FAMILIES = (
    "Wan in shards",
    "Wan 2.2, high noise",
    "diffusers, fused",
    "SkyReels",
    "Self-Forcing",
    "LongLive with its LoRA",
    "ComfyUI",
)
WINDOW = {"window_frames": 6, "sink_frames": 1}
SETTINGS = {"latent_size": [4, 6], "chunk_frames": 2, "cache": WINDOW}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A native model of the families' geometry."""
    geometry = replace(MODEL, geometry=GEOMETRY, latent_size=(4, 6))
    return dict(tiny_model(geometry).state_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_a_base(name: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    form: Form = FORMS[name]
    path = form.write(tmp_path / "dense", dict(tensors))
    loras = (str(path.parent / form.lora),) if form.lora else ()
    source = SourceConfig(str(path), key=form.key, overrides=SETTINGS, loras=loras)
    convert(source, tmp_path / "kv", replace(QUICK, channels=128))
    assert {p.name for p in (tmp_path / "kv").iterdir()} == NAMES
    model, dense = load(tmp_path / "kv", cut=0.5), load(source)
    expected, state = form.is_equal_to(tensors), model.state_dict()
    assert state.keys() - codec_state(model).keys() == expected.keys()
    merged = form.is_equal_to in (with_lora, with_frame_rate)
    same: Callable[[Tensor, Tensor], bool] = near if merged else torch.equal
    assert all(same(state[name], tensor) for name, tensor in expected.items())
    assert replace(model.config, codec=None) == dense.config
    assert 1e-6 < (velocity(model) - velocity(dense)).norm() / velocity(dense).norm() < 0.5
    moved = (tmp_path / "dense").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        load(tmp_path / "kv")
    base = moved / path.relative_to(tmp_path / "dense")
    how = SourceConfig(
        str(tmp_path / "kv"),
        base_model=str(base),
        loras=tuple(str(base.parent / Path(lora).name) for lora in loras),
    )
    model.resize(Sizes(cut=0.95))
    assert torch.equal(velocity(load(how)), velocity(model))


def test_a_base_in_a_folder_of_a_folder_is_found_again(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "models" / "inner")
    convert(SourceConfig(str(tmp_path / "models"), file="inner"), tmp_path / "kv", QUICK)
    assert load(tmp_path / "kv").config.codec
    (tmp_path / "models").rename(tmp_path / "moved")
    for base in (tmp_path / "moved", tmp_path / "moved" / "inner"):
        assert load(tmp_path / "kv", base_model=base).config.codec
    shutil.move(tmp_path / "moved" / "inner", tmp_path / "inner")
    assert load(tmp_path / "kv").config.codec


def as_recorded(pair: Pair) -> Path:
    return pair.codec


def a_renamed_codec(pair: Pair) -> Path:
    return pair.codec.rename(pair.codec.parent / "renamed")


def base_inside_the_codec(pair: Pair) -> Path:
    pair.base.rename(pair.codec / pair.base.name)
    return pair.codec


def base_beside_the_codec(pair: Pair) -> Path:
    pair.base.rename(pair.codec.parent / pair.base.name)
    return pair.codec


@pytest.mark.parametrize(
    "place", [as_recorded, a_renamed_codec, base_inside_the_codec, base_beside_the_codec]
)
def test_the_base_is_found_where_it_was_or_near_the_codec(
    place: Callable[[Pair], Path], pair: Pair, codec: Path
) -> None:
    assert torch.equal(velocity(load(place(pair))), velocity(load(codec)))


@pytest.mark.parametrize("kind", ["model.pt", "model.safetensors"])
def test_the_base_can_be_a_file_in_the_codecs_folder(
    kind: str, teacher: Path, tmp_path: Path
) -> None:
    source = tmp_path / "dense" / kind
    source.parent.mkdir()
    if kind == "model.pt":
        shutil.copy(teacher / kind, source)
    else:
        save_file(dict(tiny_model(MODEL).state_dict()), source)
    shutil.copy(teacher / "config.json", source.parent)
    convert(source, tmp_path / "kv", QUICK)
    before = velocity(load(tmp_path / "kv"))
    source.rename(tmp_path / "kv" / kind)
    assert torch.equal(velocity(load(tmp_path / "kv")), before)


def test_a_missing_base_is_refused_until_its_path_is_given(
    pair: Pair, codec: Path, tmp_path: Path, vmla: Vmla
) -> None:
    elsewhere = pair.base.rename(tmp_path / "far")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        load(pair.codec)
    assert "--base-model" in caught.value.hint
    for words in (
        ("generate", pair.codec, "--prompt", "7", "-o", tmp_path / "a.mp4"),
        ("recover", pair.codec, "-o", tmp_path / "out"),
        ("export", pair.codec, "-o", tmp_path / "whole"),
    ):
        assert refused(vmla(*words)), words
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.equal(velocity(load(pair.codec, base_model=elsewhere)), velocity(load(codec)))
    how = SourceConfig(str(pair.codec), base_model=str(elsewhere / "model.pt"))
    assert torch.equal(velocity(load(how)), velocity(load(codec)))


@pytest.mark.parametrize("name", base_tensors(LAYERS))
def test_every_tensor_of_keys_and_values_identifies_the_base(name: str, pair: Pair) -> None:
    pair.change_base(lambda state: state[name].view(-1)[-1:].add_(1))
    with pytest.raises(CheckpointError, match=name):
        load(pair.codec)


@pytest.mark.parametrize("name", ["blocks.0.self_attn.q.weight", "head.head.bias"])
def test_a_finetune_with_the_same_keys_and_values_is_a_base(
    name: str, pair: Pair, codec: Path
) -> None:
    pair.change_base(lambda state: state[name].add_(0.5))
    assert not near(velocity(load(pair.codec)), velocity(load(codec)), 1e-3)


def test_a_copy_in_another_precision_is_a_base(pair: Pair, codec: Path) -> None:
    pair.change_base(lambda state: state.update({n: t.float() for n, t in state.items()}))
    assert torch.equal(velocity(load(pair.codec)), velocity(load(codec)))


def test_hashes_of_stored_tensors_in_older_records_still_count(pair: Pair) -> None:
    file = pair.codec / "conversion.json"
    record, state = json.loads(file.read_text()), load(pair.codec).state_dict()
    del record["base"]["precision"]
    names = record["base"]["tensors"]
    stored = open_checkpoint(pair.base)
    record["base"]["tensors"] = {name: tensor_hash(stored.read(name), None) for name in names}
    file.write_text(json.dumps(record))
    assert load(pair.codec).state_dict().keys() == state.keys()
    pair.change_base(lambda state: state.update({n: t.double() for n, t in state.items()}))
    with pytest.raises(CheckpointError):
        load(pair.codec)


def test_another_model_is_no_base(
    pair: Pair, codec: Path, teacher: Path, converted: Path, tmp_path: Path
) -> None:
    larger = replace(MODEL, geometry=replace(MODEL.geometry, num_layers=3))
    save_self_forcing(tiny_model(larger).state_dict(), larger, tmp_path / "larger")
    for base in (tmp_path / "larger", codec):
        with pytest.raises(CheckpointError):
            load(pair.codec, base_model=base)
    pair.change_base(lambda state: state.update({n: 1.01 * t for n, t in state.items()}))
    with pytest.raises(CheckpointError):
        load(pair.codec)
    for folder in (teacher, converted):
        with pytest.raises(ConfigError):
            load(folder, base_model=teacher)


LORAS = {"blocks.0.self_attn.k.weight", "blocks.1.self_attn.v.weight"}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Changes of a key and a value weight, exact in bfloat16."""
    names = (name.removesuffix(".weight") for name in LORAS)
    file = tmp_path / "lora.safetensors"
    save_file({f"{name}.diff": torch.eye(DIM) / 4 for name in names}, file)
    return file


def test_a_lora_at_load_time_changes_the_base_alone(codec: Path, lora: Path) -> None:
    plain = load(codec).state_dict()
    changed = load(SourceConfig(str(codec), loras=(f"{lora}:2",))).state_dict()
    assert {n for n, t in changed.items() if not torch.equal(t, plain[n])} == LORAS
    for name in LORAS:
        expected = (plain[name] + torch.eye(DIM) / 2).bfloat16().float()
        assert torch.equal(changed[name], expected)


def test_a_lora_of_the_conversion_is_merged_again(
    teacher: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_lora(how: SourceConfig | Path) -> bool:
        state = load(how).state_dict()
        return all(torch.equal(state[name], tensor) for name, tensor in dense.items())

    monkeypatch.chdir(tmp_path)
    kv = tmp_path / "kv"
    convert(SourceConfig(str(teacher), loras=("lora.safetensors:0.5",)), kv, QUICK)
    convert(teacher, tmp_path / "plain", QUICK)
    monkeypatch.chdir("/")
    dense = load(SourceConfig(str(teacher), loras=(f"{lora}:0.5",))).state_dict()
    assert has_lora(kv) and not has_lora(teacher)
    assert teacher_of(str(kv)).loras == (f"{lora}:0.5",)
    # The LoRA is found beside the codec too, and a given LoRA replaces the recorded one.
    lora.rename(kv / lora.name)
    assert has_lora(kv)
    assert not has_lora(SourceConfig(str(kv), loras=(f"{kv / lora.name}:0.25",)))
    # Hashes are those of the stored tensors, without the LoRA.
    plain, merged = (
        json.loads((tmp_path / name / "conversion.json").read_text())["base"]["tensors"]
        for name in ("plain", "kv")
    )
    assert plain == merged
    assert plain.keys() == set(base_tensors(LAYERS))
    one, other = (load_file(tmp_path / name / CODEC) for name in ("plain", "kv"))
    assert not torch.equal(one["blocks.0.codec.encode"], other["blocks.0.codec.encode"])


Damage = Callable[[Path], object]


def cut_short(folder: Path) -> None:
    content = (folder / CODEC).read_bytes()
    (folder / CODEC).write_bytes(content[:-7])


def without_header(folder: Path) -> None:
    (folder / CODEC).write_bytes(b"\xff" * 64)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / CODEC)
    change(state)
    save_file(state, folder / CODEC)


def another_shape(folder: Path) -> None:
    name = "blocks.1.codec.encode"
    change_tensors(folder, lambda state: state.update({name: state[name][:, :-1].contiguous()}))


def one_less(folder: Path) -> None:
    change_tensors(folder, lambda state: state.pop("blocks.1.codec.tables"))


def one_more(folder: Path) -> None:
    change_tensors(folder, lambda state: state.update({"blocks.1.codec.bias": torch.ones(2)}))


def without_hashes(folder: Path) -> None:
    edit_record(folder, lambda record: record["base"].pop("tensors"))


def without_base(folder: Path) -> None:
    edit_record(folder, lambda record: record.pop("base"))


def without_record(folder: Path) -> None:
    (folder / "conversion.json").unlink()


def a_bad_record(folder: Path) -> None:
    (folder / "conversion.json").write_text("[")


def another_rank(folder: Path) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["model"]["codec"]["rank"] = 7
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE: list[Damage] = [
    cut_short,
    without_header,
    another_shape,
    one_less,
    one_more,
    without_hashes,
    without_base,
    without_record,
    a_bad_record,
    another_rank,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_codec_is_refused_and_not_pushed(
    damage: Damage, pair: Pair, stub: Hub, vmla: Vmla
) -> None:
    damage(pair.codec)
    with pytest.raises(CheckpointError) as caught:
        load(pair.codec)
    assert caught.value.hint
    # A push does not look for the base model.
    if damage not in (without_hashes, without_base):
        assert refused(vmla("push", pair.codec, "user/tiny-codec"))
        assert stub.repos == {}
