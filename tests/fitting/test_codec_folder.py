"""A codec's folder: what is in it, how it finds its base model, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CLIPS,
    EVALUATE,
    MODEL,
    RECOVER,
    PowerCut,
    PowerCutError,
    Vmla,
    refused,
)
from conftest import chunk_timesteps, tiny_clip, tiny_model
from family_files import FORMS, GEOMETRY, Form, with_frame_rate, with_lora
from hub_stub import Hub
from huggingface_hub import ModelCard
from reference.masks import block_causal_mask
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmla_convert.checkpoint.base import base_tensors
from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    Product,
    RuntimeConfig,
    Sizes,
    SourceConfig,
    TrainingConfig,
)
from vmla_convert.errors import CheckpointError, ConfigError, OutputError
from vmla_convert.fitting.convert import convert
from vmla_convert.generating.generate import generate
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.export import LAYOUTS, export
from vmla_convert.loading.load import is_codec, load, locate, open_named, teacher_of
from vmla_convert.loading.publish import push
from vmla_convert.maths.quantise import TABLE_SIZE, WHOLE_BITS, WIDTHS
from vmla_convert.maths.rates import Rate
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.recovery.recover import recover
from vmla_convert.results import Row
from vmla_convert.training.pretrain import save_self_forcing

pytest_plugins = ["checkpoints", "hub_stub"]

# That huggingface-hub 2.4 uploads in a way that its HTTP library calls old is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CODEC = "codec.safetensors"
NAMES = {CODEC, "config.json", "conversion.json", "README.md"}
MADE = ConvertConfig(channels=40, calibration_clips=4, data=CLIPS)
QUICK = replace(MADE, calibrate=False)
FRAMES = 6
REPO, DENSE_REPO = "user/tiny-codec", "someone/dense"
LAYERS, DIM = MODEL.geometry.num_layers, MODEL.geometry.dim
TRAINED = {f"blocks.{i}.codec.{part}" for i in range(LAYERS) for part in ("encode", "decode")}


def velocity(model: CausalWanModel) -> Tensor:
    """What a model makes of one fixed clip, each chunk with its past."""
    config = replace(model.config, latent_size=(4, 6))
    latents, context = tiny_clip(config, FRAMES)
    mask = block_causal_mask(FRAMES, config.chunk_frames, config.tokens_per_frame, config.cache)
    timestep = chunk_timesteps(config, FRAMES)
    with torch.no_grad():
        return model(latents, timestep, context, torch.arange(FRAMES), mask)


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


def codec_state(model: CausalWanModel) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if ".codec." in name}


def tell(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a folder's record."""
    file = folder / "conversion.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


@pytest.fixture(scope="module")
def codec(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint's codec."""
    folder = tmp_path_factory.mktemp("codec") / "kv"
    convert(teacher, folder, MADE)
    return folder


class Pair:
    """A dense checkpoint and its codec, both of which may be moved and changed.

    Attributes:
        base: Folder of the dense checkpoint.
        codec: Folder of its codec, in another folder than the base.
    """

    def __init__(self, place: Path, teacher: Path, codec: Path) -> None:
        self.base = shutil.copytree(teacher, place / "models" / "dense")
        self.codec = shutil.copytree(codec, place / "codecs" / "kv")
        tell(self.codec, self._here)

    def _here(self, record: dict[str, Any]) -> None:
        record["base"] |= {"path": str(self.base), "name": self.base.name}

    def change_base(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Edit the dense tensors by native name."""
        file = self.base / "model.pt"
        state = torch.load(file, weights_only=True)["generator_ema"]
        native = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        change(native)
        torch.save({"generator_ema": {f"model.{n}": t for n, t in native.items()}}, file)


@pytest.fixture
def pair(tmp_path: Path, teacher: Path, codec: Path) -> Pair:
    return Pair(tmp_path, teacher, codec)


# The folder


def test_the_folder_holds_the_codec_and_no_copy_of_the_base(teacher: Path, codec: Path) -> None:
    assert {path.name for path in codec.iterdir()} == NAMES
    stored = load_file(codec / CODEC)
    parts = ("encode", "decode", "mean", "energies", "tables", "distortions")
    assert stored.keys() == {f"blocks.{i}.codec.{p}" for i in range(LAYERS) for p in parts}
    assert not stored.keys() & open_checkpoint(teacher).names.keys()
    assert [path.name for path in codec.parent.iterdir()] == [codec.name]


@pytest.mark.parametrize(("dtype", "itemsize"), [(None, 2), ("float16", 2), ("float32", 4)])
def test_the_file_is_as_large_as_its_formula(
    dtype: Any, itemsize: int, teacher: Path, tmp_path: Path
) -> None:
    channels = 24
    convert(teacher, tmp_path / "kv", replace(QUICK, channels=channels, dtype=dtype))
    content = (tmp_path / "kv" / CODEC).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    maps = 2 * channels * 2 * DIM * itemsize
    rest = 4 * (2 * DIM + channels + TABLE_SIZE + len(WIDTHS))
    assert len(content) - header == LAYERS * (maps + rest)


def test_what_is_stored_is_what_runs(codec: Path) -> None:
    stored, running = load_file(codec / CODEC), codec_state(load(codec))
    assert stored.keys() == running.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.bfloat16 if name in TRAINED else torch.float32)
        assert torch.equal(running[name].to(tensor.dtype), tensor)
        assert tensor.isfinite().all() and tensor.any()


def test_tables_stay_float32_in_a_narrow_model(codec: Path) -> None:
    stored, running = load_file(codec / CODEC), codec_state(load(codec, dtype=torch.bfloat16))
    for name, tensor in stored.items():
        assert torch.equal(running[name], tensor)


def test_converting_twice_gives_the_same_bytes(teacher: Path, codec: Path, tmp_path: Path) -> None:
    convert(teacher, tmp_path / "again", MADE)
    for name in (CODEC, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (codec / name).read_bytes()
    convert(teacher, tmp_path / "other", replace(MADE, seed=1))
    assert (tmp_path / "other" / CODEC).read_bytes() != (codec / CODEC).read_bytes()


def test_the_source_keeps_its_bytes(teacher: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in teacher.iterdir()}
    convert(teacher, tmp_path / "kv", QUICK)
    assert {path: path.read_bytes() for path in teacher.iterdir()} == before


@pytest.mark.parametrize("before", range(LAYERS))
@pytest.mark.parametrize("label", ["calibrating", "weighing errors", "fitting codecs"])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    label: str, before: int, teacher: Path, codec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "kv"
    with pytest.raises(PowerCutError):
        convert(teacher, out, MADE, PowerCut(label, before))
    assert not out.exists()
    assert list(tmp_path.iterdir())
    convert(teacher, out, MADE, resume=True)
    assert (out / CODEC).read_bytes() == (codec / CODEC).read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_a_conversion_of_other_weights_is_not_gone_on_with(pair: Pair, tmp_path: Path) -> None:
    """Weights that make neither keys nor values decide what calibration saw."""
    out = tmp_path / "new"
    with pytest.raises(PowerCutError):
        convert(pair.base, out, MADE, PowerCut("fitting codecs", 1))
    pair.change_base(lambda state: state["blocks.0.ffn.0.bias"].add_(1))
    with pytest.raises(OutputError, match=r"in the way|another weights"):
        convert(pair.base, out, MADE, resume=True)


def test_without_calibration_the_loss_is_larger(
    teacher: Path, codec: Path, dense: CausalWanModel, tmp_path: Path
) -> None:
    convert(teacher, tmp_path / "kv", QUICK)
    held_out = HeldOut(dense, EVALUATE)
    measured, assumed = (
        held_out.measure(load(folder, bytes_per_token=8)).velocity_error
        for folder in (codec, tmp_path / "kv")
    )
    assert 0 < measured < assumed < 1
    config = load(tmp_path / "kv").config
    assert config.codec and not config.codec.calibrated


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (QUICK, Sizes(cut=0.95)),
        (replace(QUICK, size=Sizes(cut=0.8)), Sizes(cut=0.8)),
        (replace(QUICK, size=Sizes(12.5)), Sizes(bytes_per_token=12.5)),
        # A twentieth of the dense cache is more than two channels.
        (replace(QUICK, channels=2), Sizes(rank=2)),
    ],
    ids=["none", "cut", "bytes", "few channels"],
)
def test_the_default_size_is_the_one_asked_for_or_fits_the_file(
    config: ConvertConfig, size: Sizes, teacher: Path, tmp_path: Path
) -> None:
    convert(teacher, tmp_path / "kv", config)
    model = load(tmp_path / "kv")
    assert model.config.codec and model.config.codec.size == size
    tokens = MODEL.cache.window_frames * MODEL.tokens_per_frame
    asked = size.token_bytes(MODEL.geometry)
    assert asked * LAYERS - 2 < model.new_cache(1).nbytes / tokens <= asked * LAYERS


def test_the_size_may_be_chosen_when_a_codec_is_loaded(codec: Path) -> None:
    tokens = MODEL.cache.window_frames * MODEL.tokens_per_frame
    assert load(codec, bytes_per_token=20).new_cache(1).nbytes == 20 * LAYERS * tokens
    assert load(codec, cut=0.9).new_cache(1).nbytes == 19 * 2 * tokens
    model = load(codec)
    runtime = RuntimeConfig(Sizes(rank=5), "model")
    assert model.new_cache(1, runtime).nbytes == 5 * LAYERS * 4 * tokens
    assert model.cache_bytes(1, runtime) == model.new_cache(1, runtime).nbytes


@pytest.mark.parametrize("calibrate", [True, False])
def test_one_file_at_eight_sizes_is_eight_conversions(
    calibrate: bool, teacher: Path, tmp_path: Path
) -> None:
    config = replace(MADE, calibrate=calibrate, dtype="float32")
    convert(teacher, tmp_path / "whole", config)
    whole, seen = load(tmp_path / "whole"), list[Tensor]()
    runtime = RuntimeConfig(cache_dtype="model")
    for channels in (1, 2, 3, 5, 8, 13, 21, 34):
        out = tmp_path / str(channels)
        convert(teacher, out, replace(config, channels=channels))
        alone = load(out)
        alone.resize(Sizes(rank=channels), quantised=False)
        rate = Rate((WHOLE_BITS,) * channels, quantised=False)
        for part, block in zip(alone.all_blocks(), whole.all_blocks(), strict=True):
            assert part.codec and block.codec
            assert part.codec.rate == rate
            block.codec.rate = rate
            assert near(block.codec.encode[:channels], part.codec.encode)
            assert near(block.codec.decode[:, :channels], part.codec.decode)
        assert near(velocity(whole), velocity(alone))
        rolled = [torch.cat(list(generate(m, "7", 6, seed=1)), 1) for m in (whole, alone)]
        assert near(rolled[0], rolled[1], 1e-4)
        assert alone.cache_bytes(1, replace(runtime, size=Sizes(rank=channels))) == (
            alone.new_cache(1).nbytes
        )
        seen.append(velocity(alone))
    assert all(not near(a, b, 1e-4) for a, b in zip(seen[1:], seen[:-1], strict=True))


def test_a_larger_size_loses_less(codec: Path, dense: CausalWanModel) -> None:
    held_out = HeldOut(dense, EVALUATE)
    errors = [
        held_out.measure(load(codec, bytes_per_token=n)).velocity_error for n in (2, 6, 16, 40, 80)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


# The base model


FAMILIES = (
    "Wan",
    "Wan in shards",
    "Wan 2.2, high noise",
    "diffusers",
    "diffusers, fused",
    "SkyReels",
    "Self-Forcing",
    "Causal-Forcing",
    "LongLive with its LoRA",
    "ComfyUI",
)
SETTINGS = ("latent_size=[4, 6]", "chunk_frames=2", "cache.window_frames=6", "cache.sink_frames=1")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A native model of the families' geometry."""
    geometry = replace(MODEL, geometry=GEOMETRY, latent_size=(4, 6))
    return dict(tiny_model(geometry).state_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_a_base(name: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    form: Form = FORMS[name]
    path = form.write(tmp_path / "dense", dict(tensors))
    loras = (str(path.parent / form.lora),) if form.lora else ()
    source = SourceConfig(str(path), key=form.key, overrides=SETTINGS, loras=loras)
    convert(source, tmp_path / "kv", replace(QUICK, channels=128))
    assert {p.name for p in (tmp_path / "kv").iterdir()} == NAMES
    model, dense = load(tmp_path / "kv", cut=0.5), load(source)
    expected = form.is_equal_to(tensors)
    state = model.state_dict()
    assert state.keys() - codec_state(model).keys() == expected.keys()
    assert all(near(state[n], t) if form.is_equal_to in (with_lora, with_frame_rate)
               else torch.equal(state[n], t) for n, t in expected.items())  # fmt: skip
    assert replace(model.config, codec=None) == dense.config
    assert 1e-6 < (velocity(model) - velocity(dense)).norm() / velocity(dense).norm() < 0.5
    moved = (tmp_path / "dense").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="base model"):
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
    source = SourceConfig(str(tmp_path / "models"), file="inner")
    convert(source, tmp_path / "kv", QUICK)
    assert torch.equal(velocity(load(tmp_path / "kv")), velocity(load(tmp_path / "kv")))
    (tmp_path / "models").rename(tmp_path / "moved")
    for base in (tmp_path / "moved", tmp_path / "moved" / "inner"):
        assert load(tmp_path / "kv", base_model=base).config.codec
    shutil.move(tmp_path / "moved" / "inner", tmp_path / "inner")
    assert load(tmp_path / "kv").config.codec


def test_the_base_is_found_where_it_was(pair: Pair, codec: Path) -> None:
    assert torch.equal(velocity(load(pair.codec)), velocity(load(codec)))
    moved = pair.codec.rename(pair.codec.parent / "renamed")
    assert torch.equal(velocity(load(moved)), velocity(load(codec)))


@pytest.mark.parametrize("inside", [True, False])
def test_the_base_is_found_beside_the_codec(inside: bool, pair: Pair, codec: Path) -> None:
    place = pair.codec if inside else pair.codec.parent
    pair.base.rename(place / pair.base.name)
    assert torch.equal(velocity(load(pair.codec)), velocity(load(codec)))


@pytest.mark.parametrize("kind", ["model.pt", "model.safetensors"])
def test_the_base_may_be_a_file_in_the_codecs_folder(
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


def test_another_path_overrides_where_it_was(pair: Pair, codec: Path, tmp_path: Path) -> None:
    elsewhere = pair.base.rename(tmp_path / "far")
    with pytest.raises(CheckpointError) as caught:
        load(pair.codec)
    assert "--base-model" in caught.value.hint
    assert torch.equal(velocity(load(pair.codec, base_model=elsewhere)), velocity(load(codec)))
    how = SourceConfig(str(pair.codec), base_model=str(elsewhere / "model.pt"))
    assert torch.equal(velocity(load(how)), velocity(load(codec)))


def test_a_missing_base_is_told_and_nothing_is_written(
    pair: Pair, tmp_path: Path, vmla: Vmla
) -> None:
    shutil.rmtree(pair.base)
    (tmp_path / "here").mkdir()
    before = sorted(tmp_path.rglob("*"))
    here = tmp_path / "here"
    for words in (
        ("generate", pair.codec, "--prompt", "7", "-o", here / "a.mp4"),
        ("eval", pair.codec, "--clips", "2"),
        ("recover", pair.codec, "-o", here / "out"),
        ("export", pair.codec, "-o", here / "whole"),
    ):
        ran = vmla(*words)
        assert refused(ran)
        assert "--base-model" in ran.err
    assert sorted(tmp_path.rglob("*")) == before


def test_other_weights_are_refused_by_name(pair: Pair, vmla: Vmla, tmp_path: Path) -> None:
    name = "blocks.1.self_attn.v.bias"
    pair.change_base(lambda state: state[name].add_(1))
    with pytest.raises(CheckpointError, match=name) as caught:
        load(pair.codec)
    assert "1 of 10" in caught.value.message
    ran = vmla("generate", pair.codec, "--prompt", "7", "-o", tmp_path / "a.mp4")
    assert refused(ran)
    assert name in ran.err


@pytest.mark.parametrize("name", base_tensors(1))
def test_every_tensor_that_makes_keys_and_values_counts(name: str, pair: Pair) -> None:
    pair.change_base(lambda state: state[name].view(-1)[-1:].add_(1))
    with pytest.raises(CheckpointError, match=name):
        load(pair.codec)


@pytest.mark.parametrize(
    "name", ["blocks.0.self_attn.q.weight", "blocks.1.ffn.0.weight", "head.head.bias"]
)
def test_a_finetune_that_leaves_keys_and_values_alone_is_a_base(
    name: str, pair: Pair, codec: Path
) -> None:
    pair.change_base(lambda state: state[name].add_(0.5))
    assert not near(velocity(load(pair.codec)), velocity(load(codec)), 1e-3)


def test_a_base_of_another_dtype_is_refused(pair: Pair) -> None:
    def widen(state: dict[str, Tensor]) -> None:
        state.update({name: tensor.float() for name, tensor in state.items()})

    pair.change_base(widen)
    with pytest.raises(CheckpointError, match="10 of 10"):
        load(pair.codec)


def test_a_base_of_other_sizes_is_refused(pair: Pair, tmp_path: Path) -> None:
    larger = replace(MODEL, geometry=replace(MODEL.geometry, num_layers=3))
    save_self_forcing(tiny_model(larger).state_dict(), larger, tmp_path / "larger")
    with pytest.raises(CheckpointError, match="other sizes"):
        load(pair.codec, base_model=tmp_path / "larger")


def test_a_codec_is_no_base(pair: Pair, codec: Path, vmla: Vmla) -> None:
    with pytest.raises(CheckpointError):
        load(pair.codec, base_model=codec)
    assert refused(vmla("eval", pair.codec, "--base-model", codec, "--clips", "2"))


def test_what_is_no_codec_has_no_base(teacher: Path, converted: Path) -> None:
    for folder in (teacher, converted):
        with pytest.raises(ConfigError, match="no base model"):
            load(folder, base_model=teacher)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Differences of a key and a value, exact in bfloat16."""
    names = ("blocks.0.self_attn.k", "blocks.1.self_attn.v")
    change = torch.eye(DIM) / 4
    save_file({f"{name}.diff": change.clone() for name in names}, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


LORAS = {"blocks.0.self_attn.k.weight", "blocks.1.self_attn.v.weight"}


def test_a_lora_when_a_codec_is_loaded_changes_the_base_alone(codec: Path, lora: Path) -> None:
    plain = load(codec).state_dict()
    changed = load(SourceConfig(str(codec), loras=(f"{lora}:2",))).state_dict()
    assert {n for n, t in changed.items() if not torch.equal(t, plain[n])} == LORAS
    for name in LORAS:
        expected = (plain[name] + torch.eye(DIM) / 2).bfloat16().float()
        assert torch.equal(changed[name], expected)


def test_a_lora_of_the_conversion_is_merged_again(
    teacher: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(SourceConfig(str(teacher), loras=("lora.safetensors:0.5",)), tmp_path / "kv", MADE)
    monkeypatch.chdir("/")
    dense = load(SourceConfig(str(teacher), loras=(f"{lora}:0.5",))).state_dict()
    state = load(tmp_path / "kv").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.items())
    assert not torch.equal(dense[min(LORAS)], load(teacher).state_dict()[min(LORAS)])
    assert teacher_of(str(tmp_path / "kv")).loras == (f"{lora}:0.5",)
    # It is looked for beside the codec too, and one that is named takes its place.
    lora.rename(tmp_path / "kv" / lora.name)
    state = load(tmp_path / "kv").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.items())
    how = SourceConfig(str(tmp_path / "kv"), loras=(f"{tmp_path / 'kv' / lora.name}:0.25",))
    assert not torch.equal(load(how).state_dict()[min(LORAS)], dense[min(LORAS)])


def test_the_base_is_read_without_its_lora_to_be_known(
    teacher: Path, lora: Path, tmp_path: Path
) -> None:
    """A codec knows the base as it is stored: hashes are those of a codec without a LoRA."""
    for name, loras in (("plain", ()), ("merged", (str(lora),))):
        convert(SourceConfig(str(teacher), loras=loras), tmp_path / name, QUICK)
    plain, merged = (
        json.loads((tmp_path / name / "conversion.json").read_text())
        for name in ("plain", "merged")
    )
    assert plain["base"]["tensors"] == merged["base"]["tensors"]
    assert plain["base"]["tensors"].keys() == set(base_tensors(LAYERS))
    one, other = (load_file(tmp_path / name / CODEC) for name in ("plain", "merged"))
    assert not torch.equal(one["blocks.0.codec.encode"], other["blocks.0.codec.encode"])


# The Hub


@pytest.fixture
def on_hub(teacher: Path, stub: Hub, tmp_path: Path) -> Path:
    """A codec of a base model on the Hub, whose repository has moved on since."""
    files = {f"checkpoints/{file.name}": file.read_bytes() for file in teacher.iterdir()}
    stub.put(DENSE_REPO, {**files, "checkpoints/other.pt": b"another"})
    source = SourceConfig(DENSE_REPO, file="checkpoints/model.pt")
    convert(source, tmp_path / "kv", QUICK)
    stub.put(DENSE_REPO, {"checkpoints/model.pt": b"a newer one"})
    return tmp_path / "kv"


def forget(tmp_path: Path) -> None:
    """Empty the Hub's cache."""
    shutil.rmtree(tmp_path / "hf-home")


def test_a_base_on_the_hub_is_fetched_by_id_and_revision(
    on_hub: Path, stub: Hub, teacher: Path, tmp_path: Path
) -> None:
    record = json.loads((on_hub / "conversion.json").read_text())["base"]
    first = next(iter(stub.repos[DENSE_REPO].commits))
    assert record.keys() == {"name", "repo", "revision", "file", "tensors"}
    assert (record["repo"], record["revision"]) == (DENSE_REPO, first)
    forget(tmp_path)
    stub.asked.clear()
    model = load(on_hub)
    assert stub.calls("GET", f"/{DENSE_REPO}/resolve/{first}/checkpoints/model.pt") == 1
    dense = load(teacher).state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.items())
    forget(tmp_path)
    stub.asked.clear()
    load(on_hub, base_model=teacher)
    assert stub.asked == []


def test_a_base_beside_the_codec_is_not_fetched(
    on_hub: Path, stub: Hub, teacher: Path, tmp_path: Path
) -> None:
    forget(tmp_path)
    shutil.copytree(teacher, on_hub / "dense")
    stub.asked.clear()
    assert load(on_hub).config.codec
    assert stub.asked == []


def test_a_pushed_codec_fetches_itself_and_its_base(
    on_hub: Path, tmp_path: Path, vmla: Vmla
) -> None:
    here = velocity(load(on_hub))
    pushed = push(on_hub, REPO, tag="v1")
    assert set(pushed.uploaded) == NAMES
    assert push(on_hub, REPO).uploaded == {}
    shutil.rmtree(on_hub)
    forget(tmp_path)
    assert torch.equal(velocity(load(REPO)), here)
    assert torch.equal(velocity(load(f"{REPO}@v1", cut=0.95)), here)
    ran = vmla("inspect", REPO, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["model"]["codec"]["rank"] == QUICK.channels


def test_the_card_names_its_base_as_an_adapter_does(on_hub: Path, stub: Hub) -> None:
    push(on_hub, REPO)
    data = ModelCard(stub.repos[REPO].files["README.md"].content.decode()).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (DENSE_REPO, "adapter")
    assert data["license"] == MODEL.licence


def test_the_card_of_a_local_source_names_what_that_was_trained_from(
    teacher: Path, tmp_path: Path
) -> None:
    trained = "Wan-AI/Wan2.1-T2V-1.3B"
    products: tuple[Product, ...] = ("codec", "mla")
    for product, known in itertools.product(products, (False, True)):
        out = tmp_path / f"{product}-{known}"
        overrides = (f"base_model={trained}",) if known else ()
        convert(
            SourceConfig(str(teacher), overrides=overrides),
            out,
            ConvertConfig(product, calibrate=False),
        )
        data = ModelCard((out / "README.md").read_text()).data.to_dict()
        relation = {"base_model_relation": "adapter"} if product == "codec" else {}
        expected = {"base_model": trained, **relation} if known else {}
        assert {n: v for n, v in data.items() if n.startswith("base_model")} == expected


def test_no_local_path_goes_up(pair: Pair, stub: Hub, codec: Path, tmp_path: Path) -> None:
    assert str(tmp_path) in (pair.codec / "conversion.json").read_text()
    push(pair.codec, REPO)
    files = stub.repos[REPO].files
    assert not any(str(tmp_path).encode() in blob.content for blob in files.values())
    told = json.loads(files["conversion.json"].content)["base"]
    assert (told["path"], told["name"]) == ("dense", "dense")
    assert len(told["tensors"]) == 5 * LAYERS
    assert push(pair.codec, REPO).uploaded == {}
    with pytest.raises(CheckpointError, match="base model 'dense'"):
        load(REPO)
    assert torch.equal(velocity(load(REPO, base_model=pair.base)), velocity(load(codec)))


def test_a_name_without_its_folder_is_not_looked_for_where_a_program_runs(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tell(pair.codec, lambda record: record["base"].update(path="dense"))
    monkeypatch.chdir(pair.base.parent)
    with pytest.raises(CheckpointError, match="not where it was"):
        load(pair.codec)
    monkeypatch.chdir(tmp_path)


# Whole checkpoints


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_is_whole_and_needs_no_base(layout: str, pair: Pair, tmp_path: Path) -> None:
    before = load(pair.codec, bytes_per_token=16)
    expected, dense = velocity(before), velocity(load(pair.base))
    export(pair.codec, tmp_path / "whole", layout)
    shutil.rmtree(pair.base)
    shutil.rmtree(pair.codec)
    assert not is_codec(locate(str(tmp_path / "whole"))[0])
    model = load(tmp_path / "whole", bytes_per_token=16)
    assert model.config == before.config
    assert torch.equal(velocity(model), expected)
    assert not near(velocity(model), dense, 1e-4)
    for other in LAYOUTS:
        export(tmp_path / "whole", tmp_path / other, other)
        again = load(tmp_path / other, bytes_per_token=16)
        assert torch.equal(velocity(again), expected)


def test_the_command_exports_a_codec_with_a_base_that_is_named(
    pair: Pair, codec: Path, tmp_path: Path, vmla: Vmla
) -> None:
    moved = pair.base.rename(tmp_path / "moved")
    out = tmp_path / "whole"
    assert refused(vmla("export", pair.codec, "-o", out))
    ran = vmla("export", pair.codec, "-o", out, "--layout", "native", "--base-model", moved)
    assert ran.code == 0
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == load(codec).state_dict().keys()
    assert {t.dtype for n, t in stored.items() if ".codec." not in n} == {torch.bfloat16}
    assert torch.equal(velocity(load(out)), velocity(load(codec)))


@pytest.mark.usefixtures("stub")
def test_a_whole_checkpoint_may_be_pushed(codec: Path, tmp_path: Path) -> None:
    export(codec, tmp_path / "whole", "native")
    push(tmp_path / "whole", REPO)
    assert torch.equal(velocity(load(REPO)), velocity(load(codec)))


# Recovery


TRAINING = TrainingConfig(steps=4, batch_size=2, lr=1e-3, eval_every=1, checkpoint_every=2)
LEARNS = replace(RECOVER, layerwise_lr=3e-3, training=TRAINING)
NESTED = replace(LEARNS, nested=(0.95, 0.9, 0.8))


@pytest.fixture(scope="module", params=[LEARNS, NESTED], ids=["one size", "nested"])
def recovered(
    request: pytest.FixtureRequest, codec: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, list[Row]]:
    """A codec that was trained, how, and the curve."""
    out = tmp_path_factory.mktemp("recovered") / "kv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmla_convert.recovery.layerwise.CLIPS", 4)
        patch.setattr("vmla_convert.recovery.layerwise.HELD_CLIPS", 2)
        return out, request.param, recover(codec, None, out, request.param, EVALUATE)


def test_recovery_trains_encode_and_decode_alone(
    recovered: tuple[Path, Any, list[Row]], codec: Path
) -> None:
    out, _, rows = recovered
    assert {path.name for path in out.iterdir()} == NAMES
    assert (out / CODEC).stat().st_size == (codec / CODEC).stat().st_size
    before, after = load_file(codec / CODEC), load_file(out / CODEC)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    assert {n for n in before if not torch.equal(before[n], after[n])} == TRAINED
    was, now = load(codec).state_dict(), load(out).state_dict()
    assert {n for n in was if not torch.equal(was[n], now[n])} == TRAINED
    curve = {row.step: row.value for row in rows if row.metric == "velocity_error"}
    assert curve[max(map(int, filter(None, curve)))] < curve[0]
    assert {row.run for row in rows} == {"dense", "codec"}


def test_every_size_that_was_trained_is_better_and_every_other_loads(
    recovered: tuple[Path, Any, list[Row]], codec: Path, dense: CausalWanModel
) -> None:
    out, config, _ = recovered
    held_out = HeldOut(dense, EVALUATE)
    for cut in config.nested or (0.95,):
        was, now = (held_out.measure(load(f, cut=cut)).velocity_error for f in (codec, out))
        assert now < was
    least, most = (
        held_out.measure(load(out, bytes_per_token=nbytes)).velocity_error for nbytes in (1, 80)
    )
    assert 0 < most < least
    frames = torch.cat(list(generate(load(out, bytes_per_token=80), ["1", "7"], 8)), 1)
    assert frames.shape[:2] == (2, 8) and frames.isfinite().all()


@pytest.mark.usefixtures("few_layerwise_clips")
@pytest.mark.parametrize(
    ("label", "before"), [("layer by layer", 1), ("distilling", 1), ("distilling", 3)]
)
def test_an_interrupted_recovery_goes_on_to_the_same_bytes(
    label: str,
    before: int,
    recovered: tuple[Path, Any, list[Row]],
    codec: Path,
    tmp_path: Path,
) -> None:
    expected, config, _ = recovered
    out = tmp_path / "kv"
    with pytest.raises(PowerCutError):
        recover(codec, None, out, config, EVALUATE, PowerCut(label, before))
    assert not out.exists()
    recover(codec, None, out, config, EVALUATE)
    assert (out / CODEC).read_bytes() == (expected / CODEC).read_bytes()


@pytest.mark.usefixtures("few_layerwise_clips")
def test_a_recovery_that_brought_nothing_keeps_the_bytes(codec: Path, tmp_path: Path) -> None:
    ruinous = replace(
        LEARNS, layerwise_steps=0, training=replace(TRAINING, lr=10.0, warmup_steps=0)
    )
    recover(codec, None, tmp_path / "kv", ruinous, EVALUATE)
    assert (tmp_path / "kv" / CODEC).read_bytes() == (codec / CODEC).read_bytes()
    record = json.loads((tmp_path / "kv" / "conversion.json").read_text())
    assert record["recovered"]["kept_steps"] == {"distilling": 0}


@pytest.mark.usefixtures("few_layerwise_clips")
def test_a_codec_recovers_with_a_base_that_is_named(pair: Pair, tmp_path: Path, vmla: Vmla) -> None:
    out = tmp_path / "out"
    words = ("--steps", "1", "--layerwise-steps", "1", "--batch-size", "1", "--lr", "1e-3")
    assert vmla("recover", pair.codec, "-o", out, *words).code == 0
    # It is a codec of the same base.
    assert torch.equal(
        load(out).state_dict()["head.head.bias"], load(pair.base).state_dict()["head.head.bias"]
    )
    ran = vmla("recover", out, "-o", tmp_path / "more", *words, "--json")
    assert ran.code == 0
    assert load(tmp_path / "more").config == load(pair.codec).config


@pytest.mark.parametrize(
    "options",
    [("--train", "attention"), ("--train", "all"), ("--lora-rank", "2")],
    ids=["attention", "all", "adapters"],
)
def test_what_would_change_the_base_is_refused_and_export_is_named(
    options: tuple[str, ...], codec: Path, tmp_path: Path, vmla: Vmla
) -> None:
    for extra in ((), ("--dry-run",)):
        ran = vmla("recover", codec, "-o", tmp_path / "out", *options, *extra)
        assert refused(ran)
        assert "vmla export" in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few_layerwise_clips")
def test_a_whole_checkpoint_trains_its_attention_too(
    teacher: Path, codec: Path, tmp_path: Path
) -> None:
    export(codec, tmp_path / "whole", "native")
    config = replace(LEARNS, train="attention")
    recover(tmp_path / "whole", teacher, tmp_path / "out", config, EVALUATE)
    before, after = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "out")
    changed = {
        n
        for n in before.names
        if not torch.equal(before.read(n), after.read(n).to(before.read(n).dtype))
    }
    assert changed >= TRAINED
    assert "blocks.0.self_attn.q.weight" in changed
    assert not any(name in changed for name in base_tensors(LAYERS))


# Bad input


Damage = Callable[[Path], object]


def cut_short(folder: Path) -> None:
    content = (folder / CODEC).read_bytes()
    (folder / CODEC).write_bytes(content[:-7])


def without_header(folder: Path) -> None:
    (folder / CODEC).write_bytes(b"\xff" * 64)


def another_shape(folder: Path) -> None:
    state = load_file(folder / CODEC)
    state["blocks.1.codec.encode"] = state["blocks.1.codec.encode"][:, :-1].contiguous()
    save_file(state, folder / CODEC)


def one_less(folder: Path) -> None:
    state = load_file(folder / CODEC)
    del state["blocks.1.codec.tables"]
    save_file(state, folder / CODEC)


def one_more(folder: Path) -> None:
    save_file({**load_file(folder / CODEC), "blocks.1.codec.bias": torch.ones(2)}, folder / CODEC)


def without_hashes(folder: Path) -> None:
    tell(folder, lambda record: record["base"].pop("tensors"))


def without_base(folder: Path) -> None:
    tell(folder, lambda record: record.pop("base"))


def without_record(folder: Path) -> None:
    (folder / "conversion.json").unlink()


def a_bad_record(folder: Path) -> None:
    (folder / "conversion.json").write_text("[")


def another_rank(folder: Path) -> None:
    told = json.loads((folder / "config.json").read_text())
    told["model"]["codec"]["rank"] = 7
    (folder / "config.json").write_text(json.dumps(told))


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
def test_a_damaged_codec_is_refused(damage: Damage, pair: Pair, tmp_path: Path, vmla: Vmla) -> None:
    damage(pair.codec)
    with pytest.raises(CheckpointError) as caught:
        load(pair.codec)
    assert caught.value.hint
    here = tmp_path / "here"
    here.mkdir()
    for words in (
        ("generate", pair.codec, "--prompt", "7", "-o", here / "a.mp4", "--frames", "2"),
        ("eval", pair.codec, "--clips", "2"),
        ("recover", pair.codec, "-o", here / "out"),
        ("export", pair.codec, "-o", here / "whole"),
    ):
        assert refused(vmla(*words)), words
    assert not list(here.iterdir())


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d not in (without_hashes, without_base)])
def test_a_damaged_codec_is_not_pushed(damage: Damage, pair: Pair, stub: Hub, vmla: Vmla) -> None:
    damage(pair.codec)
    assert refused(vmla("push", pair.codec, REPO))
    assert stub.repos == {}


@pytest.mark.parametrize(
    "options",
    [
        ("--bytes-per-token", "0.5"),
        ("--bytes-per-token", "0"),
        ("--bytes-per-token", "81"),
        ("--rank", "41"),
        ("--cut", "0.1"),
        ("--cut", "1"),
        ("--cut", "0.9", "--rank", "3"),
        ("--cache-dtype", "int4"),
        ("--cache-dtype", "int5"),
        ("--cache-dtype", "model", "--bytes-per-token", "1"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_sizes_that_a_codec_cannot_have_are_refused(
    command: str, options: tuple[str, ...], codec: Path, tmp_path: Path, vmla: Vmla
) -> None:
    words = {
        "generate": ("--prompt", "7", "-o", tmp_path / "a.mp4", "--frames", "2"),
        "eval": ("--clips", "2"),
    }
    assert refused(vmla(command, codec, *words[command], *options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["teacher", "converted"])
def test_only_a_codec_has_a_size(
    kind: str, request: pytest.FixtureRequest, teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    folder = request.getfixturevalue(kind)
    for size in (("--bytes-per-token", "8"), ("--cut", "0.9"), ("--rank", "4")):
        words = ("--prompt", "7", "-o", tmp_path / "a.mp4", "--frames", "2")
        assert refused(vmla("generate", folder, *words, *size))
        assert refused(vmla("eval", folder, "--teacher", teacher, "--clips", "2", *size))
    with pytest.raises(ConfigError, match="no codec"):
        load(folder, cut=0.9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ("--bytes-per-token", "0.5"),
        ("--bytes-per-token", "97"),
        ("--cut", "0.4"),
        ("--cut", "0.9", "--bytes-per-token", "9"),
        ("--channels", "97"),
        ("--kv-lora-rank", "8"),
        ("--qk-rope-head-dim", "4"),
        ("--cache-scalars", "20"),
        ("--init", "spectral"),
        ("--latent", "split"),
        ("--layout", "diffusers"),
        ("--layout", "no"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("extra", [(), ("--dry-run",)], ids=["convert", "dry run"])
def test_settings_that_make_no_codec_are_refused(
    extra: tuple[str, ...], options: tuple[str, ...], teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    words = ("convert", teacher, "-o", tmp_path / "kv", "--no-calibration")
    assert refused(vmla(*words, *options, *extra))
    assert not list(tmp_path.iterdir())


def test_channels_are_a_codecs_alone(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    words = ("convert", teacher, "-o", tmp_path / "out", "--preset", "videomla")
    for option in (("--channels", "8"), ("--bytes-per-token", "8")):
        assert refused(vmla(*words, *option)), option
    assert not list(tmp_path.iterdir())


def test_only_a_codec_has_nested_sizes(
    converted: Path, teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    words = ("recover", converted, "--teacher", teacher, "-o", tmp_path / "out", "--nested")
    assert refused(vmla(*words))
    assert not list(tmp_path.iterdir())


def test_nested_sizes_that_the_file_does_not_hold_are_refused_before_any_training(
    codec: Path, tmp_path: Path, vmla: Vmla
) -> None:
    # 40 channels are 80 bytes of 192.
    words = ("recover", codec, "-o", tmp_path / "out", "--set", "nested=[0.95,0.5]")
    assert refused(vmla(*words))
    assert refused(vmla(*words, "--dry-run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["codec", "converted"])
def test_what_is_converted_is_not_converted_again(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, vmla: Vmla
) -> None:
    assert refused(vmla("convert", request.getfixturevalue(kind), "-o", tmp_path / "kv"))
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_not_finite_is_refused_before_anything_is_written(
    pair: Pair, tmp_path: Path
) -> None:
    name = "blocks.1.self_attn.k.bias"
    pair.change_base(lambda state: state[name].view(-1)[-1:].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=f"'{name}' .* NaN"):
        convert(pair.base, tmp_path / "new" / "kv", MADE)
    assert not (tmp_path / "new").exists()


# Commands


def test_convert_inspect_generate_and_eval_work_one_after_the_other(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    kv, video = tmp_path / "kv", tmp_path / "a.mp4"
    ran = vmla(
        "convert", teacher, "-o", kv, "--calibration-clips", "2", "--channels", "20", "--json"
    )
    assert ran.code == 0
    told, wrote = map(json.loads, ran.out.splitlines())
    assert told["bytes cached per token and layer"] == pytest.approx(9.6)
    assert told["cache cut"] == pytest.approx(0.95)
    assert wrote == {"wrote": str(kv)}
    told = json.loads(vmla("inspect", kv, "--json").out)
    assert told["converted"] == told["model"]
    assert told["parameters"] == sum(t.numel() for t in load_file(kv / CODEC).values())
    words = ("--prompt", "7", "--frames", "4", "-o", video, "--cut", "0.9", "--json")
    ran = vmla("generate", kv, *words)
    assert ran.code == 0
    assert video.is_file()
    tokens = MODEL.cache.window_frames * MODEL.tokens_per_frame
    assert json.loads(ran.out.splitlines()[0]) == {"cache of kv (bytes)": 38 * tokens}
    ran = vmla("eval", kv, "--clips", "2", "--json", "--bytes-per-token", "20")
    assert ran.code == 0
    told = {(row["run"], row["metric"]): row["value"] for row in json.loads(ran.out)}
    assert told["codec", "cache_bytes_per_token"] == pytest.approx(20)
    assert 0 < told["codec", "velocity_error"] < 1
    assert told["dense", "cache_bytes_per_token"] == 2 * 96


def test_a_dry_run_foretells_the_file(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    words = ("convert", teacher, "-o", tmp_path / "kv", "--channels", "20", "--no-calibration")
    told = json.loads(vmla(*words, "--dry-run", "--json").out)
    assert not list(tmp_path.iterdir())
    assert vmla(*words).code == 0
    assert told["files"] == {CODEC: (tmp_path / "kv" / CODEC).stat().st_size}
    assert told["cache_bytes_per_token"] == pytest.approx(9.6)


def test_a_codec_is_opened_with_clips_of_ones_own(teacher: Path, tmp_path: Path) -> None:
    shape = (MODEL.geometry.in_dim, *MODEL.latent_size)
    text = (MODEL.geometry.text_len, MODEL.geometry.text_dim)
    draws = torch.Generator().manual_seed(0)
    clips = {
        "latents": torch.randn(4, 6, *shape, generator=draws),
        "context": torch.randn(4, *text, generator=draws),
    }
    save_file(clips, tmp_path / "clips.safetensors")
    data = DataConfig(str(tmp_path / "clips.safetensors"), frames=6)
    convert(teacher, tmp_path / "kv", replace(MADE, data=data))
    assert open_named(tmp_path / "kv").config.codec
    demo = load_file(tmp_path / "kv" / CODEC)["blocks.0.codec.mean"]
    convert(teacher, tmp_path / "demo", MADE)
    assert not near(demo, load_file(tmp_path / "demo" / CODEC)["blocks.0.codec.mean"], 1e-2)
