"""An MLA conversion appears complete, reloads bit for bit, and loses less with more room."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import pytest
import torch
from checkpoints import BUDGETED, CLIPS, CONVERT, EVALUATE, MODEL, Vmla, refused
from conftest import chunk_timesteps, tiny_clip
from reference.masks import block_causal_mask
from safetensors.torch import save_file
from torch import Tensor

import vmla_convert
from vmla_convert.checkpoint.families import OpenCheckpoint, open_checkpoint
from vmla_convert.config import ConvertConfig, DataConfig, RankPlan, Sizes
from vmla_convert.errors import CheckpointError, ConfigError, OutputError, VmlaError
from vmla_convert.fitting import convert as pipeline
from vmla_convert.fitting.calibrate import (
    Statistics,
    calibrate,
    deployed_phases,
    model_blocks,
)
from vmla_convert.fitting.convert import convert, read_plan
from vmla_convert.fitting.mla import convert_model, factor_layer, layer_evidence, layer_inputs
from vmla_convert.fitting.weights import layer_weights
from vmla_convert.generating.generate import generate
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.maths.factor import INITS
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.media.clips import open_clips
from vmla_convert.tables import to_dict
from vmla_convert.training.pretrain import save_self_forcing

pytest_plugins = ["checkpoints"]

FRAMES = 6
WEIGHTS = "model.safetensors"
HEADS, LAYERS = MODEL.geometry.num_heads, range(MODEL.geometry.num_layers)
CODEC = ConvertConfig(channels=8, calibration_clips=2, data=CLIPS)
SPECTRAL = replace(CONVERT, init="spectral")


class Made(NamedTuple):
    """A conversion of the checkpoint, and its config."""

    folder: Path
    config: ConvertConfig


@pytest.fixture(scope="module", params=["joint", "split"])
def made(
    request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """The checkpoint's conversion to either latent."""
    folder = tmp_path_factory.mktemp("made") / "out"
    config = replace(BUDGETED, latent=request.param)
    convert(teacher, folder, config)
    return Made(folder, config)


@pytest.fixture(params=["converted", "budgeted"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A conversion to explicit sizes, and one to the default budget."""
    return request.getfixturevalue(request.param)


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


def velocity(model: CausalWanModel) -> Tensor:
    """Velocity of one fixed clip, each chunk with its past."""
    latents, context = tiny_clip(MODEL, FRAMES)
    mask = block_causal_mask(FRAMES, MODEL.chunk_frames, MODEL.tokens_per_frame, MODEL.cache)
    frames = torch.arange(FRAMES)
    return model(latents, chunk_timesteps(MODEL, FRAMES), context, frames, mask)


def test_the_folder_holds_weights_config_record_and_card_and_nothing_else(folder: Path) -> None:
    names = {"config.json", "conversion.json", "README.md", WEIGHTS}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_folder_reloads_as_the_model_that_is_made_in_memory(
    made: Made, dense: CausalWanModel, measured: Statistics
) -> None:
    here, loaded = convert_model(dense, made.config, measured), load(made.folder)
    assert loaded.config == here.config
    assert near(velocity(loaded), velocity(here))
    assert torch.equal(velocity(loaded), velocity(load(made.folder)))
    assert not near(velocity(loaded), velocity(dense))


def test_factors_land_under_the_names_of_the_layer(
    made: Made, dense: CausalWanModel, measured: Statistics
) -> None:
    read = dense.state_dict().__getitem__
    weights, evidence = layer_inputs(read, MODEL, made.config, measured)(1)
    factors = factor_layer(weights, evidence, read_plan(made.folder), made.config, 1)
    rows = torch.stack([factors.rope.rows.real, factors.rope.rows.imag], 1).flatten(0, 1)
    expected = {
        "kv_a_proj": (factors.kv_a_proj, factors.kv_a_bias),
        "kv_b_proj_k": (factors.kv_b_proj_k, factors.kv_b_bias_k),
        "kv_b_proj_v": (factors.kv_b_proj_v, factors.kv_b_bias_v),
        "k_rope_proj": (rows, torch.view_as_real(factors.rope.offsets).flatten()),
        "k_norm_proj": (weights.raw_key, weights.raw_key_bias),
    }
    attention = load(made.folder).self_attentions()[1]
    assert near(attention.get_parameter("q_rope_map").double(), factors.rope.query_map)
    for name, (weight, bias) in expected.items():
        assert near(attention.get_parameter(f"{name}.weight").double(), weight)
        assert near(attention.get_parameter(f"{name}.bias").double(), bias)


def test_evidence_includes_the_cost_of_the_current_chunk(
    dense: CausalWanModel, measured: Statistics
) -> None:
    phases, read = deployed_phases(MODEL), dense.state_dict().__getitem__
    for layer in LAYERS:
        statistics, weights = measured(layer), layer_weights(read, layer, HEADS)
        past, own = (
            layer_evidence(each, weights, phases)
            for each in (statistics._replace(own=[]), statistics)
        )
        assert near(past.mean, statistics.past[1].mean)
        assert not near(own.mean, past.mean, 0.01)
        of_own = sum(sums.query_square for sums, _ in statistics.own)
        assert near(own.key_metric - past.key_metric, of_own / statistics.past[0].queries)


def test_every_layer_streams_through_the_cache_that_the_config_promises(made: Made) -> None:
    model, latent = load(made.folder), made.config.latent
    mla = model.config.mla
    assert mla is not None and mla.latent == latent
    assert bool(mla.key_ranks) == (latent == "split")
    sizes = zip(mla.kv_lora_rank, mla.rope_pairs, strict=True)
    numbers = sum(rank + 2 * len(pairs) + 1 for rank, pairs in sizes)
    tokens = MODEL.cache.window_frames * MODEL.tokens_per_frame
    assert model.new_cache(3).nbytes == 3 * 4 * numbers * tokens
    assert model.config.cache_bytes(MODEL.cache.window_frames) == 2 * numbers * tokens
    frames = torch.cat(list(generate(model, ["1", "7"], 8)), dim=1)
    assert frames.shape[:2] == (2, 8)
    assert frames.isfinite().all()


def test_an_eighth_of_the_cache_loses_almost_nothing(made: Made, dense: CausalWanModel) -> None:
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


# Limits are reads of one weight by all phases together: hash or check, forward pass, backward pass,
# rank plan, and factor with write.
@pytest.mark.parametrize(
    ("config", "most"),
    [
        (CODEC, 3),
        (replace(CODEC, calibrate=False), 2),
        (BUDGETED, 4),
        (replace(BUDGETED, latent="split"), 4),
        (replace(BUDGETED, calibrate=False), 3),
        (SPECTRAL, 2),
    ],
    ids=["codec", "assumed codec", "mla", "split mla", "assumed mla", "spectral"],
)
def test_every_weight_is_read_once_per_phase(
    config: ConvertConfig,
    most: int,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads, read = Counter[str](), OpenCheckpoint.read

    def counted(checkpoint: OpenCheckpoint, native: str) -> Tensor:
        reads[native] += 1
        return read(checkpoint, native)

    monkeypatch.setattr(OpenCheckpoint, "read", counted)
    convert(teacher, tmp_path / "out", config)
    assert reads["blocks.1.self_attn.k.weight"] == max(reads.values()) == most


def test_all_but_self_attention_keeps_bytes_and_dtype(teacher: Path, folder: Path) -> None:
    before, after = open_checkpoint(teacher), open_checkpoint(folder)
    dropped = {name for name in before.names if name not in after.names}
    parts = ("k.weight", "k.bias", "v.weight", "v.bias", "norm_k.weight")
    assert dropped == {f"blocks.{layer}.self_attn.{part}" for layer in LAYERS for part in parts}
    for name in before.names.keys() - dropped:
        was, now = before.read(name), after.read(name)
        assert (was.dtype, now.dtype) == (torch.bfloat16, torch.bfloat16)
        assert torch.equal(was, now)
    new = [after.read(name) for name in after.names if name not in before.names]
    # Down and up to keys and values (6), rope keys and their query map (3), the norm's key (2).
    assert len(new) == 11 * len(LAYERS)
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in new)


def test_config_json_holds_sizes_phases_and_the_dense_config(
    converted: Path, dense: CausalWanModel, measured: Statistics
) -> None:
    stored = json.loads((converted / "config.json").read_text())["model"]
    mla = stored.pop("mla")
    assert stored == json.loads(json.dumps(to_dict(MODEL)))
    assert (mla["kv_lora_rank"], mla["init"], mla["latent"]) == ([8, 8], "calibrated", "joint")
    assert [len(pairs) for pairs in mla["rope_pairs"]] == [2, 2]
    recorded = torch.tensor(mla["phases"], dtype=torch.float64)
    inputs = layer_inputs(dense.state_dict().__getitem__, MODEL, CONVERT, measured)
    evidence = [inputs(layer)[1] for layer in LAYERS]
    folded = torch.stack([known.phases for known in evidence if known])
    torch.testing.assert_close(
        torch.polar(recorded[..., 1], recorded[..., 0]), folded, atol=2e-4, rtol=0
    )
    plain = convert_model(dense, SPECTRAL, None).config.mla
    assert plain and plain.phases == ()


def test_conversion_json_records_what_made_the_folder(teacher: Path, converted: Path) -> None:
    record = json.loads((converted / "conversion.json").read_text())
    assert record["source"] == {
        "name": "checkpoint",
        "sha256": hashlib.sha256((teacher / "model.pt").read_bytes()).hexdigest(),
        "state_key": "generator_ema",
        "family": "self_forcing",
        "known_model": None,
        "asked": {"overrides": {}, "loras": []},
        "loras": [],
    }
    assert record["convert"] == to_dict(CONVERT)
    assert record["plan"] == {"kv_lora_rank": [8, 8], "rope_pairs": [2, 2], "key_ranks": []}
    assert record["versions"]["vmla_convert"] == vmla_convert.__version__
    assert record["convert_seconds"] > 0
    assert record["peak_rss_bytes"] > 2**20


# Only `calibrated`: `spectral` bounds the error of weights, which may raise the error of velocity.
def test_more_rank_loses_less_and_calibration_beats_the_weights_alone(
    dense: CausalWanModel, measured: Statistics
) -> None:
    held_out = HeldOut(dense, EVALUATE)

    def errors(init: str, *ranks: int) -> list[float]:
        sizes = [Sizes(kv_lora_rank=rank, qk_rope_head_dim=4) for rank in ranks]
        models = [
            convert_model(dense, replace(CONVERT, init=init, size=size), measured) for size in sizes
        ]
        return [held_out.measure(model).velocity_error for model in models]

    calibrated, spectral = errors("calibrated", 2, 6, 16, 40), errors("spectral", 2, 6, 16)
    assert calibrated == sorted(calibrated, reverse=True)
    assert calibrated[-1] < 0.1 * calibrated[0]
    assert all(a < b for a, b in zip(calibrated, spectral, strict=False))


def test_full_rank_with_all_rope_pairs_loses_almost_nothing(
    teacher: Path, dense: CausalWanModel, tmp_path: Path
) -> None:
    geometry, layers = MODEL.geometry, len(LAYERS)
    pairs = geometry.num_heads * geometry.head_dim // 2
    plan = RankPlan((geometry.dim,) * layers, (pairs,) * layers)
    convert(teacher, tmp_path / "out", replace(BUDGETED, size=Sizes(plan=plan)))
    assert HeldOut(dense, EVALUATE).measure(load(tmp_path / "out")).velocity_error < 1e-6


@pytest.mark.parametrize("init", INITS)
def test_every_init_converts_and_reloads(
    init: str, teacher: Path, dense: CausalWanModel, measured: Statistics, tmp_path: Path
) -> None:
    config = replace(CONVERT, init=init)
    convert(teacher, tmp_path / "out", config)
    loaded, here = load(tmp_path / "out"), convert_model(dense, config, measured)
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
    for config in (CONVERT, CODEC):
        with pytest.raises(CheckpointError) as caught:
            convert(path, tmp_path / "out", config)
        assert caught.value.hint
    assert refused(vmla("convert", path, "-o", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_an_existing_output_is_refused_and_kept(
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
    """The same weights as a Wan model, for which the demo world has no clips."""
    save_self_forcing(dense.state_dict(), replace(MODEL, media="wan"), tmp_path / "wan")
    return tmp_path / "wan"


def test_a_wan_checkpoint_needs_clips_only_for_calibration(
    wan: Path, dense: CausalWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in (CONVERT, CODEC):
        with pytest.raises(VmlaError) as caught:
            convert(wan, tmp_path / "out", config)
        assert "--data" in caught.value.hint

    def refuse(*_: object) -> NoReturn:
        pytest.fail("calibration that was not asked for")

    monkeypatch.setattr(pipeline, "calibrate_checkpoint", refuse)
    convert(wan, tmp_path / "spectral", SPECTRAL)
    assumed = ConvertConfig("mla", calibrate=False, size=Sizes(cut=0.8))
    convert(wan, tmp_path / "out", assumed)
    model = load(tmp_path / "out")
    assert model.config.mla and model.config.mla.init == "calibrated"
    assert model.config.cache_cut() >= 0.8
    held_out = HeldOut(dense, EVALUATE)
    random = convert_model(dense, replace(assumed, init="random"), None)
    errors = [held_out.measure(each).velocity_error for each in (model, random)]
    assert errors[0] < errors[1]


def test_the_users_clips_calibrate_any_checkpoint(
    wan: Path, dense: CausalWanModel, converted: Path, tmp_path: Path
) -> None:
    latents, context = open_clips(DataConfig("demo", frames=6, seed=3)).batch(0, 6)
    save_file({"latents": latents, "context": context}, tmp_path / "clips.safetensors")
    data = DataConfig(str(tmp_path / "clips.safetensors"), frames=4)
    convert(wan, tmp_path / "out", replace(CONVERT, data=data))
    count = CONVERT.calibration_clips
    statistics = calibrate(dense, model_blocks(dense), open_clips(data), count, product="mla")
    here = velocity(convert_model(dense, CONVERT, statistics))
    assert near(velocity(load(tmp_path / "out")), here)
    assert not near(here, velocity(load(converted)), 1e-4)


DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BLOCK_WEIGHT, OUTSIDE = "blocks.1.ffn.2.weight", "patch_embedding.bias"


def edited(dense: CausalWanModel, folder: Path, dtype: torch.dtype, **numbers: float) -> Path:
    """The same model in a dtype, the last number of some tensors replaced."""
    state = {f"model.{name}": t.to(dtype, copy=True) for name, t in dense.state_dict().items()}
    for name, number in numbers.items():
        state[f"model.{name}"].view(-1)[-1] = number
    folder.mkdir()
    torch.save({"generator_ema": state}, folder / "model.pt")
    save_self_forcing(dense.state_dict(), MODEL, folder / "other")
    (folder / "other" / "config.json").rename(folder / "config.json")
    shutil.rmtree(folder / "other")
    return folder


@pytest.mark.parametrize(
    ("name", "number", "dtype"),
    [
        (BLOCK_WEIGHT, "nan", torch.bfloat16),
        (BLOCK_WEIGHT, "-inf", torch.float16),
        (BLOCK_WEIGHT, "inf", torch.float32),
        (OUTSIDE, "nan", torch.float32),
        ("blocks.1.self_attn.k.bias", "inf", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("config", [BUDGETED, SPECTRAL, CODEC], ids=["mla", "spectral", "codec"])
def test_a_number_that_is_not_finite_is_refused_and_no_file_is_left(
    config: ConvertConfig,
    name: str,
    number: str,
    dtype: torch.dtype,
    dense: CausalWanModel,
    tmp_path: Path,
) -> None:
    source = edited(dense, tmp_path / "source", dtype, **{name: float(number)})
    with pytest.raises(CheckpointError, match=f"'{name}'") as caught:
        convert(source, tmp_path / "out", config)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == [source]


def test_infinities_that_cancel_are_refused(dense: CausalWanModel, tmp_path: Path) -> None:
    with torch.no_grad():
        dense.get_parameter(BLOCK_WEIGHT).view(-1)[0] = float("-inf")
    source = edited(dense, tmp_path / "source", torch.float32, **{BLOCK_WEIGHT: float("inf")})
    with pytest.raises(CheckpointError, match=BLOCK_WEIGHT):
        convert(source, tmp_path / "out", SPECTRAL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_of_a_dtype_are_accepted(
    dtype: torch.dtype, dense: CausalWanModel, tmp_path: Path
) -> None:
    """The sum of two of the largest float32 or bfloat16 numbers overflows."""
    most = torch.finfo(dtype).max
    with torch.no_grad():
        dense.get_parameter(BLOCK_WEIGHT).view(-1)[:9] = most
    source = edited(dense, tmp_path / "source", dtype, **{BLOCK_WEIGHT: most})
    convert(source, tmp_path / "out", SPECTRAL)
    kept = open_checkpoint(tmp_path / "out").read(BLOCK_WEIGHT)
    assert (kept.flatten()[:9] == most).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_weight_is_written_in_the_requested_dtype(
    dtype: Literal["float32", "bfloat16", "float16"], teacher: Path, tmp_path: Path
) -> None:
    wanted: torch.dtype = getattr(torch, dtype)
    convert(teacher, tmp_path / "plain", SPECTRAL)
    convert(teacher, tmp_path / "out", replace(SPECTRAL, dtype=dtype))
    before, plain, after = map(open_checkpoint, (teacher, tmp_path / "plain", tmp_path / "out"))
    assert {spec.dtype for spec in after.specs().values()} == {wanted}
    assert {spec.dtype for spec in plain.specs().values()} == {torch.bfloat16, torch.float32}
    assert after.names.keys() == plain.names.keys()
    for name in after.names:
        # Numbers are rounded once, from what is stored or was computed.
        assert torch.equal(after.read(name), plain.read(name).to(wanted))
        if name in before.names:
            assert torch.equal(plain.read(name), before.read(name))
    assert near(velocity(load(tmp_path / "out")), velocity(load(tmp_path / "plain")), 0.1)


@pytest.mark.parametrize("name", [BLOCK_WEIGHT, OUTSIDE])
def test_numbers_beyond_float16_are_refused(
    name: str, dense: CausalWanModel, tmp_path: Path
) -> None:
    source = edited(dense, tmp_path / "source", torch.bfloat16, **{name: 1e5})
    with pytest.raises(ConfigError, match=f"'{name}' .* float16") as caught:
        convert(source, tmp_path / "out", replace(SPECTRAL, dtype="float16"))
    assert "bfloat16" in caught.value.hint
    assert list(tmp_path.iterdir()) == [source]


def test_bad_clips_are_refused_before_the_source_is_read(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        pytest.fail("weights that should not have been read")

    monkeypatch.setattr(pipeline, "fingerprint", refuse)
    monkeypatch.setattr(OpenCheckpoint, "read", refuse)
    save_file(
        {"latents": torch.ones(3, 6, 5, 12, 12), "context": torch.ones(3, 1, 10)},
        tmp_path / "clips",
    )
    for name in ("no.safetensors", str(tmp_path / "clips")):
        for config in (CONVERT, CODEC):
            with pytest.raises(ConfigError) as caught:
                convert(teacher, tmp_path / "out", replace(config, data=DataConfig(name)))
            assert caught.value.hint
    with pytest.raises(ConfigError, match="calibration_clips 0"):
        replace(CONVERT, calibration_clips=0)
    assert list(tmp_path.iterdir()) == [tmp_path / "clips"]
