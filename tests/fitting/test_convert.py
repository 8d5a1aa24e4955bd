"""A conversion appears whole, reloads bit for bit, loses less with more room, or is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import pytest
import torch
from checkpoints import BUDGETED, CLIPS, CONVERT, EVALUATE, MODEL, Vmla, evidence_of, refused
from conftest import chunk_timesteps, tiny_clip
from reference.masks import block_causal_mask
from safetensors.torch import save_file
from torch import Tensor

import vmla_convert
from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.config import ConvertConfig, DataConfig, RankPlan
from vmla_convert.errors import CheckpointError, ConfigError, OutputError, VmlaError
from vmla_convert.fitting import conversion_steps as conversion
from vmla_convert.fitting import convert as pipeline
from vmla_convert.fitting.calibrate import LayerReads, calibrate, model_blocks
from vmla_convert.fitting.convert import convert, read_plan
from vmla_convert.fitting.factors import convert_model, factor_layer
from vmla_convert.generating.generate import generate
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.maths.evidence import Evidence
from vmla_convert.maths.factor import INITS
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.media.clips import open_clips
from vmla_convert.tables import to_dict
from vmla_convert.training.pretrain import save_self_forcing

pytest_plugins = ["checkpoints"]

FRAMES = 6
WEIGHTS = "model.safetensors"


@pytest.fixture
def evidence(dense: CausalWanModel, measured: list[LayerReads]) -> list[Evidence]:
    return evidence_of(dense, measured)


class Made(NamedTuple):
    """A conversion of the checkpoint and what it was made with."""

    folder: Path
    config: ConvertConfig


@pytest.fixture(scope="module", params=["joint", "split"])
def made(
    request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """The checkpoint's conversion to either latent."""
    folder, config = (
        tmp_path_factory.mktemp("made") / "out",
        replace(BUDGETED, latent=request.param),
    )
    convert(teacher, folder, config)
    return Made(folder, config)


@pytest.fixture(params=["converted", "budgeted"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A conversion to sizes that were asked for, and one as nobody asked."""
    return request.getfixturevalue(request.param)


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


def every(measured: Callable[[int], LayerReads]) -> list[LayerReads]:
    return [measured(layer) for layer in range(MODEL.geometry.num_layers)]


def velocity(model: CausalWanModel) -> Tensor:
    """What a model makes of one fixed clip, each chunk with its past."""
    latents, context = tiny_clip(MODEL, FRAMES)
    mask = block_causal_mask(FRAMES, MODEL.chunk_frames, MODEL.tokens_per_frame, MODEL.cache)
    frames = torch.arange(FRAMES)
    return model(latents, chunk_timesteps(MODEL, FRAMES), context, frames, mask)


def test_the_folder_holds_weights_config_provenance_and_card_and_nothing_else(
    folder: Path,
) -> None:
    names = {"config.json", "conversion.json", "README.md", WEIGHTS}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_reloading_gives_the_model_that_is_made_in_memory(
    made: Made, dense: CausalWanModel, measured: list[LayerReads]
) -> None:
    evidence = evidence_of(dense, measured)
    here, loaded = convert_model(dense, made.config, evidence), load(made.folder)
    assert loaded.config == here.config
    assert near(velocity(loaded), velocity(here))
    assert torch.equal(velocity(loaded), velocity(load(made.folder)))
    assert not near(velocity(loaded), velocity(dense))


def test_the_factors_land_under_the_layers_own_names(
    made: Made, dense: CausalWanModel, measured: list[LayerReads]
) -> None:
    evidence = evidence_of(dense, measured)
    read, plan = dense.state_dict().__getitem__, read_plan(made.folder)
    heads = MODEL.geometry.num_heads
    factors = factor_layer(read, plan, heads, made.config, 1, evidence.__getitem__)
    expected = {
        "kv_a_proj": (factors.kv_a_proj, factors.kv_a_bias),
        "kv_b_proj_k": (factors.kv_b_proj_k, factors.kv_b_bias_k),
        "kv_b_proj_v": (factors.kv_b_proj_v, factors.kv_b_bias_v),
    }
    attention = load(made.folder).self_attentions()[1]
    # Two numbers for each complex one.
    rows = torch.stack([factors.rope.rows.real, factors.rope.rows.imag], 1).flatten(0, 1)
    expected["k_rope_proj"] = rows, torch.view_as_real(factors.rope.offsets).flatten()
    expected["k_norm_proj"] = (
        dense.state_dict()["blocks.1.self_attn.k.weight"].double(),
        dense.state_dict()["blocks.1.self_attn.k.bias"].double(),
    )
    assert near(attention.get_parameter("q_rope_map").double(), factors.rope.query_map)
    for name, (weight, bias) in expected.items():
        assert near(attention.get_parameter(f"{name}.weight").double(), weight)
        assert near(attention.get_parameter(f"{name}.bias").double(), bias)


def test_a_layer_weighs_what_its_own_tokens_cost(
    dense: CausalWanModel, measured: list[LayerReads]
) -> None:
    past_only = evidence_of(dense, [reads._replace(own=[]) for reads in measured])
    with_own = evidence_of(dense, measured)
    for past, own, reads in zip(past_only, with_own, measured, strict=True):
        assert near(past.mean, reads.past[1].mean)
        assert not near(own.mean, past.mean, 0.01)
        own_reads = sum(sums.query_square for sums, _ in reads.own)
        queries = reads.past[0].queries
        assert near(own.key_metric - past.key_metric, own_reads / queries)


def test_every_layer_streams_a_rollout_through_the_cache_that_it_promises(made: Made) -> None:
    model, latent = load(made.folder), made.config.latent
    mla = model.config.mla
    assert mla is not None and mla.latent == latent
    assert bool(mla.key_ranks) == (latent == "split")
    numbers = sum(
        rank + 2 * len(pairs) + 1
        for rank, pairs in zip(mla.kv_lora_rank, mla.rope_pairs, strict=True)
    )
    tokens = MODEL.cache.window_frames * MODEL.tokens_per_frame
    assert model.new_cache(3).nbytes == 3 * 4 * numbers * tokens
    assert model.config.cache_bytes(MODEL.cache.window_frames) == 2 * numbers * tokens
    frames = torch.cat(list(generate(model, ["1", "7"], 8)), dim=1)
    assert frames.shape[:2] == (2, 8)
    assert frames.isfinite().all()


def test_no_layer_costs_more_than_it_should(made: Made, dense: CausalWanModel) -> None:
    """An eighth of the cache holds what this model needs to almost all."""
    model = load(made.folder)
    assert model.config.cache_bytes_per_token() == 2 * 13
    assert HeldOut(dense, EVALUATE).measure(model).velocity_error < 0.01


@pytest.mark.parametrize("name", ["converted", "budgeted"])
def test_converting_again_gives_the_same_bytes(
    name: str, teacher: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before: Path = request.getfixturevalue(name)
    convert(teacher, tmp_path / "out", CONVERT if name == "converted" else BUDGETED)
    for file in (WEIGHTS, "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (before / file).read_bytes()


def test_all_but_self_attention_keeps_bytes_and_dtype(teacher: Path, folder: Path) -> None:
    before, after = open_checkpoint(teacher), open_checkpoint(folder)
    dropped = {name for name in before.names if name not in after.names}
    parts = ("k.weight", "k.bias", "v.weight", "v.bias", "norm_k.weight")
    assert dropped == {f"blocks.{layer}.self_attn.{part}" for layer in (0, 1) for part in parts}
    for name in before.names.keys() - dropped:
        was, now = before.read(name), after.read(name)
        assert (was.dtype, now.dtype) == (torch.bfloat16, torch.bfloat16)
        assert torch.equal(was, now)


def test_the_new_projections_are_float32_and_alive(teacher: Path, folder: Path) -> None:
    kept, opened = open_checkpoint(teacher).names, open_checkpoint(folder)
    new = [opened.read(name) for name in opened.names if name not in kept]
    # Down and up to keys and values; rope keys, what they meet, and the norm's key projection.
    assert len(new) == (6 + 3 + 2) * MODEL.geometry.num_layers
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in new)


def test_config_json_names_sizes_and_keeps_the_rest(converted: Path) -> None:
    told = json.loads((converted / "config.json").read_text())["model"]
    mla = told.pop("mla")
    assert told == json.loads(json.dumps(to_dict(MODEL)))
    assert (mla["kv_lora_rank"], mla["init"]) == ([8, 8], "calibrated")
    assert mla["latent"] == "joint"
    assert [len(pairs) for pairs in mla["rope_pairs"]] == [2, 2]


def test_config_json_records_the_phases_that_were_folded_into_the_content(
    converted: Path, evidence: list[Evidence]
) -> None:
    told = json.loads((converted / "config.json").read_text())["model"]["mla"]["phases"]
    recorded = torch.tensor(told, dtype=torch.float64)
    heads, pairs = MODEL.geometry.num_heads, MODEL.geometry.head_dim // 2
    assert recorded.shape == (MODEL.geometry.num_layers, heads, pairs, 2)
    known = torch.stack([layer.phases for layer in evidence])
    folded = torch.polar(recorded[..., 1], recorded[..., 0])
    torch.testing.assert_close(folded, known, atol=2e-4, rtol=0)


def test_where_nothing_is_folded_there_are_no_phases(dense: CausalWanModel) -> None:
    model = convert_model(dense, replace(CONVERT, init="spectral"), None)
    assert model.config.mla and model.config.mla.phases == ()


def test_conversion_json_says_what_made_the_folder(teacher: Path, converted: Path) -> None:
    told = json.loads((converted / "conversion.json").read_text())
    assert told["source"] == {
        "name": "checkpoint",
        "sha256": hashlib.sha256((teacher / "model.pt").read_bytes()).hexdigest(),
        "state_key": "generator_ema",
        "family": "self_forcing",
        "known_model": None,
        "asked": {"overrides": [], "loras": []},
        "loras": [],
    }
    assert told["convert"] == to_dict(CONVERT)
    assert told["plan"] == {"kv_lora_rank": [8, 8], "rope_pairs": [2, 2], "key_ranks": []}
    assert told["versions"]["vmla_convert"] == vmla_convert.__version__
    assert told["convert_seconds"] > 0
    assert told["peak_rss_bytes"] > 2**20


def test_the_card_inherits_the_licence_and_leaves_an_unknown_base_model_out(
    converted: Path,
) -> None:
    _, front, _ = (converted / "README.md").read_text().split("---\n", 2)
    assert "license: apache-2.0" in front
    assert "base_model" not in front


def test_the_card_says_which_latent_it_is_and_what_it_caches(folder: Path) -> None:
    card, model = (folder / "README.md").read_text(), load(folder)
    assert model.config.mla is not None
    assert "26 bytes per token and layer instead of 192 (86.5% less)" in card
    assert f"| latent | {model.config.mla.latent} |" in card


def test_the_card_names_a_known_base_model(tmp_path: Path, dense: CausalWanModel) -> None:
    config = replace(MODEL, base_model="Wan-AI/Wan2.1-T2V-1.3B")
    save_self_forcing(dense.state_dict(), config, tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out", replace(CONVERT, init="spectral"))
    _, front, _ = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert "base_model: Wan-AI/Wan2.1-T2V-1.3B" in front


# Of `calibrated` alone: `spectral` promises less error in the weights, which test_factor proves,
# and that may cost velocity.
@pytest.mark.parametrize("config", [CONVERT, BUDGETED], ids=["explicit", "budget"])
def test_more_rank_loses_less(
    config: ConvertConfig, dense: CausalWanModel, measured: list[LayerReads]
) -> None:
    held_out, evidence = HeldOut(dense, EVALUATE), evidence_of(dense, measured)
    sizes = [replace(config, kv_lora_rank=rank) for rank in (2, 6, 16, 32, 40)]
    errors = [held_out.measure(convert_model(dense, s, evidence)).velocity_error for s in sizes]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_at_full_rank_with_all_pairs_almost_nothing_is_lost(
    teacher: Path, dense: CausalWanModel, tmp_path: Path
) -> None:
    geometry = MODEL.geometry
    layers, pairs = geometry.num_layers, geometry.num_heads * geometry.head_dim // 2
    plan = RankPlan((geometry.dim,) * layers, (pairs,) * layers)
    convert(teacher, tmp_path / "out", replace(BUDGETED, plan=plan))
    errors = HeldOut(dense, EVALUATE).measure(load(tmp_path / "out"))
    assert errors.velocity_error < 1e-6


@pytest.mark.parametrize("rank", [2, 6, 16])
@pytest.mark.parametrize("config", [CONVERT, BUDGETED], ids=["explicit", "budget"])
def test_calibration_beats_the_weights_alone(
    config: ConvertConfig, rank: int, dense: CausalWanModel, measured: list[LayerReads]
) -> None:
    held_out, evidence = HeldOut(dense, EVALUATE), evidence_of(dense, measured)
    calibrated, spectral = (
        held_out.measure(
            convert_model(dense, replace(config, init=init, kv_lora_rank=rank), evidence)
        ).velocity_error
        for init in ("calibrated", "spectral")
    )
    assert calibrated < spectral


@pytest.mark.parametrize("init", INITS)
def test_every_init_converts_and_reloads(
    init: str, teacher: Path, dense: CausalWanModel, measured: list[LayerReads], tmp_path: Path
) -> None:
    config = replace(CONVERT, init=init)
    convert(teacher, tmp_path / "out", config)
    loaded, here = (
        load(tmp_path / "out"),
        convert_model(dense, config, evidence_of(dense, measured)),
    )
    assert loaded.config == here.config
    assert loaded.config.mla and loaded.config.mla.init == init
    assert near(velocity(loaded), velocity(here))


def test_the_seed_decides_random_projections(dense: CausalWanModel) -> None:
    first, again, other = (
        velocity(convert_model(dense, replace(CONVERT, init="random", seed=seed), None))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_dry_run_writes_nothing_and_foretells_the_size(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    sizes = ("--preset", "videomla", "--kv-lora-rank", "8", "--qk-rope-head-dim", "4")
    ran = vmla("convert", teacher, "-o", tmp_path / "out", "--dry-run", "--json", *sizes)
    assert ran.code == 0
    told = json.loads(ran.out)
    assert told["files"] == {WEIGHTS: (converted / WEIGHTS).stat().st_size}
    assert told["cache_bytes_per_token"] == 2 * 13
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_the_pipeline_writes(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    words = ("--preset", "videomla", "--latent", "split", "--cache-scalars", "20")
    ran = vmla("convert", teacher, "-o", tmp_path / "out", *words)
    assert ran.code == 0
    assert f"wrote: {tmp_path / 'out'}" in ran.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in converted.iterdir()
    }
    told = load(tmp_path / "out").config
    assert told.mla and told.mla.latent == "split"
    assert told.cache_bytes_per_token() == 2 * 20


def a_missing_file(folder: Path, _: Path) -> Path:
    return folder / "no.pt"


def a_garbage_pickle(folder: Path, _: Path) -> Path:
    (folder / "x.pt").write_bytes(b"\x80garbage" * 9)
    return folder / "x.pt"


def a_garbage_safetensors(folder: Path, _: Path) -> Path:
    (folder / "x.safetensors").write_bytes(b"\xffgarbage" * 9)
    return folder / "x.safetensors"


def an_unknown_layout(folder: Path, _: Path) -> Path:
    save_file({"encoder.weight": torch.ones(2, 2)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def an_empty_folder(folder: Path, _: Path) -> Path:
    return folder


def a_converted_folder(_: Path, converted: Path) -> Path:
    return converted


Source = Callable[[Path, Path], Path]
BAD_SOURCES: list[Source] = [
    a_missing_file,
    a_garbage_pickle,
    a_garbage_safetensors,
    an_unknown_layout,
    an_empty_folder,
    a_converted_folder,
]


@pytest.mark.parametrize("source", BAD_SOURCES)
def test_a_bad_source_is_refused(
    source: Source, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    path = source(tmp_path, converted)
    before = list(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "out", CONVERT)
    assert caught.value.hint
    assert refused(ran := vmla("convert", path, "-o", tmp_path / "out"))
    assert caught.value.message in ran.err
    assert list(tmp_path.iterdir()) == before


def test_clips_that_are_not_there_are_refused(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    with pytest.raises(ConfigError, match=r"no\.safetensors") as caught:
        convert(teacher, tmp_path / "out", replace(CONVERT, data=DataConfig("no.safetensors")))
    assert caught.value.hint
    ran = vmla("convert", teacher, "-o", tmp_path / "out", "--data", "no.safetensors")
    assert refused(ran)
    assert caught.value.message in ran.err
    assert not list(tmp_path.iterdir())


def test_calibration_without_clips_is_refused(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    with pytest.raises(ConfigError, match="calibration_clips 0"):
        convert(teacher, tmp_path / "out", replace(CONVERT, calibration_clips=0))
    ran = vmla("convert", teacher, "-o", tmp_path / "out", "--calibration-clips", "0")
    assert ran.code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_a_taken_place_is_refused_and_kept(
    taken: str, teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    out = tmp_path / "out"
    mine = out / "mine" if taken == "folder" else out
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(OutputError) as caught:
        convert(teacher, out, CONVERT)
    assert caught.value.hint
    assert refused(vmla("convert", teacher, "-o", out))
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture
def wan(dense: CausalWanModel, tmp_path: Path) -> Path:
    """The same weights, but nobody knows how to make clips for them."""
    save_self_forcing(dense.state_dict(), replace(MODEL, media="wan"), tmp_path / "wan")
    return tmp_path / "wan"


def test_a_wan_checkpoint_cannot_be_calibrated_on_the_demo_world(wan: Path, tmp_path: Path) -> None:
    with pytest.raises(VmlaError) as caught:
        convert(wan, tmp_path / "out", CONVERT)
    assert "--no-calibration" in caught.value.hint
    convert(wan, tmp_path / "out", replace(CONVERT, init="spectral"))
    assert (tmp_path / "out").is_dir()


def test_without_calibration_no_clips_are_needed(
    wan: Path,
    dense: CausalWanModel,
    tmp_path: Path,
    vmla: Vmla,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> NoReturn:
        pytest.fail("clips that should not have been opened")

    for work in ("open_measured", "calibrate"):
        monkeypatch.setattr(conversion, work, refuse)
    words = ("--preset", "videomla", "--init", "calibrated", "--no-calibration", "--cut", "0.8")
    ran = vmla("convert", wan, "-o", tmp_path / "out", *words)
    assert ran.code == 0
    model = load(tmp_path / "out")
    assert model.config.mla and model.config.mla.init == "calibrated"
    assert model.config.cache_cut() >= 0.8
    held_out = HeldOut(dense, EVALUATE)
    random = convert_model(dense, ConvertConfig("mla", init="random", cut=0.8), None)
    errors = [held_out.measure(m).velocity_error for m in (model, random)]
    assert errors[0] < errors[1]


def test_the_init_that_looks_at_data_does_without(wan: Path, tmp_path: Path) -> None:
    convert(wan, tmp_path / "out", ConvertConfig("mla", calibrate=False))
    assert velocity(load(tmp_path / "out")).isfinite().all()


def test_clips_of_ones_own_calibrate_any_checkpoint(
    wan: Path, dense: CausalWanModel, tmp_path: Path
) -> None:
    latents, context = open_clips(DataConfig(frames=6, seed=3)).batch(0, 6)
    save_file({"latents": latents, "context": context}, tmp_path / "clips.safetensors")
    data = DataConfig(str(tmp_path / "clips.safetensors"), frames=4)
    convert(wan, tmp_path / "out", replace(CONVERT, data=data))
    clips = open_clips(data)
    blocks, count = model_blocks(dense), CONVERT.calibration_clips
    measured = calibrate(dense, blocks, clips, count, product="mla")
    here = convert_model(dense, CONVERT, evidence_of(dense, every(measured)))
    assert near(velocity(load(tmp_path / "out")), velocity(here))
    assert not near(velocity(here), velocity(load(wan)))


def test_the_clips_decide_what_is_kept(converted: Path, dense: CausalWanModel) -> None:
    other = replace(CLIPS, seed=7)
    measured = calibrate(dense, model_blocks(dense), open_clips(other), 4, product="mla")
    here = convert_model(dense, CONVERT, evidence_of(dense, every(measured)))
    assert not near(velocity(load(converted)), velocity(here), 1e-4)


DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BLOCK_WEIGHT, OUTSIDE = "blocks.1.ffn.2.weight", "patch_embedding.bias"


def edited(dense: CausalWanModel, folder: Path, dtype: torch.dtype, **numbers: float) -> Path:
    """The same model in a dtype, the last number of some tensors replaced."""
    state = {f"model.{name}": t.to(dtype, copy=True) for name, t in dense.state_dict().items()}
    for name, number in numbers.items():
        state[f"model.{name}"].view(-1)[-1] = number
    folder.mkdir()
    torch.save({"generator_ema": state}, folder / "model.pt")
    save_self_forcing(dense.state_dict(), MODEL, folder / "told")
    (folder / "told" / "config.json").rename(folder / "config.json")
    shutil.rmtree(folder / "told")
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [BLOCK_WEIGHT, OUTSIDE])
def test_numbers_that_are_not_finite_are_refused_before_anything_is_written(
    name: str, number: float, dtype: torch.dtype, dense: CausalWanModel, tmp_path: Path
) -> None:
    source = edited(dense, tmp_path / "source", dtype, **{name: number})
    with pytest.raises(CheckpointError, match=f"'{name}' .* NaN or infinite") as caught:
        convert(source, tmp_path / "out", BUDGETED)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == [source]


def test_infinities_that_cancel_are_refused(dense: CausalWanModel, tmp_path: Path) -> None:
    with torch.no_grad():
        dense.get_parameter(BLOCK_WEIGHT).view(-1)[0] = float("-inf")
    source = edited(dense, tmp_path / "source", torch.float32, **{BLOCK_WEIGHT: float("inf")})
    with pytest.raises(CheckpointError, match=BLOCK_WEIGHT):
        convert(source, tmp_path / "out", replace(CONVERT, init="spectral"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_numbers_are_not_taken_for_infinite(
    dtype: torch.dtype, dense: CausalWanModel, tmp_path: Path
) -> None:
    """Of float32 and bfloat16 two of the largest overflow when they are added."""
    most = torch.finfo(dtype).max
    with torch.no_grad():
        dense.get_parameter(BLOCK_WEIGHT).view(-1)[:9] = most
    source = edited(dense, tmp_path / "source", dtype, **{BLOCK_WEIGHT: most})
    convert(source, tmp_path / "out", replace(CONVERT, init="spectral"))
    kept = open_checkpoint(tmp_path / "out").read(BLOCK_WEIGHT)
    assert (kept.flatten()[:9] == most).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_every_weight_is_written_in_the_dtype_that_was_asked_for(
    dtype: Literal["float32", "bfloat16", "float16"],
    stored: torch.dtype,
    dense: CausalWanModel,
    tmp_path: Path,
) -> None:
    source, config = edited(dense, tmp_path / "source", stored), replace(CONVERT, init="spectral")
    wanted: torch.dtype = getattr(torch, dtype)
    convert(source, tmp_path / "plain", config)
    convert(source, tmp_path / "out", replace(config, dtype=dtype))
    before, plain, after = map(open_checkpoint, (source, tmp_path / "plain", tmp_path / "out"))
    assert {spec.dtype for spec in after.specs().values()} == {wanted}
    assert {spec.dtype for spec in plain.specs().values()} == {stored, torch.float32}
    assert after.names.keys() == plain.names.keys()
    for name in after.names:
        # Rounded once, from what is stored or was computed.
        assert torch.equal(after.read(name), plain.read(name).to(wanted))
        if name in before.names:
            assert torch.equal(plain.read(name), before.read(name))
    loaded = load(tmp_path / "out")
    assert near(velocity(loaded), velocity(load(tmp_path / "plain")), 0.1)
    told = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert told["convert"]["dtype"] == dtype


def test_the_command_takes_a_dtype(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    words = ("--preset", "videomla", "--dtype")
    assert vmla("convert", teacher, "-o", tmp_path / "out", *words, "bfloat16").code == 0
    specs = open_checkpoint(tmp_path / "out").specs().values()
    assert {spec.dtype for spec in specs} == {torch.bfloat16}
    assert refused(vmla("convert", teacher, "-o", tmp_path / "no", *words, "bf16"))


@pytest.mark.parametrize("name", [BLOCK_WEIGHT, OUTSIDE])
def test_numbers_beyond_float16_are_refused(
    name: str, dense: CausalWanModel, tmp_path: Path
) -> None:
    source = edited(dense, tmp_path / "source", torch.bfloat16, **{name: 1e5})
    config = replace(CONVERT, init="spectral", dtype="float16")
    with pytest.raises(ConfigError, match=f"'{name}' .* float16") as caught:
        convert(source, tmp_path / "out", config)
    assert "bfloat16" in caught.value.hint
    assert list(tmp_path.iterdir()) == [source]


def test_clips_that_do_not_fit_are_refused_before_the_source_is_read(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        pytest.fail("weights that should not have been read")

    for work in ("fingerprint", "require_finite"):
        monkeypatch.setattr(pipeline, work, refuse)
    save_file(
        {"latents": torch.ones(3, 6, 5, 12, 12), "context": torch.ones(3, 1, 10)},
        tmp_path / "clips",
    )
    config = replace(CONVERT, data=DataConfig(str(tmp_path / "clips")))
    with pytest.raises(ConfigError, match=r"\[5, 12, 12\]"):
        convert(teacher, tmp_path / "out", config)
