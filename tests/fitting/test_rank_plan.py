"""Sizes: a budget that is never exceeded, sizes that stay as given, plans that are replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from checkpoints import BUDGETED, MODEL, Vmla

from vmla_convert.config import (
    CachePolicy,
    ConvertConfig,
    Geometry,
    ModelConfig,
    RankPlan,
    SamplerConfig,
    Sizes,
)
from vmla_convert.errors import ConfigError
from vmla_convert.fitting.calibrate import Statistics
from vmla_convert.fitting.convert import PRESETS, convert, read_plan
from vmla_convert.fitting.mla import convert_model, layer_inputs, planned_config
from vmla_convert.fitting.rank_plan import (
    LayerInputs,
    check_sizes,
    plan_ranks,
    rank_step,
    total_numbers,
    uniform_plan,
)
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.maths.factor import INITS, predict_errors
from vmla_convert.tables import from_dict

pytest_plugins = ["checkpoints"]

Latent = Literal["joint", "split"]

MLA = ConvertConfig(product="mla")
WEIGHTS = "model.safetensors"
LATENTS: tuple[Latent, ...] = ("joint", "split")
either_latent = pytest.mark.parametrize("latent", LATENTS)
WAN = ModelConfig(
    Geometry(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16),
    latent_size=(60, 104),
    chunk_frames=3,
    cache=CachePolicy(21),
    sampler=SamplerConfig(),
)


def planned(dense: CausalWanModel, measured: Statistics, config: ConvertConfig) -> RankPlan:
    return plan_ranks(MODEL, config, inputs_of(dense, measured, config))


def inputs_of(dense: CausalWanModel, measured: Statistics, config: ConvertConfig) -> LayerInputs:
    return layer_inputs(dense.state_dict().__getitem__, MODEL, config, measured)


def sizes(plan: RankPlan) -> list[int]:
    """Numbers of each layer, norm aside."""
    return [r + 2 * p for r, p in zip(plan.kv_lora_rank, plan.rope_pairs, strict=True)]


@either_latent
@pytest.mark.parametrize("cut", [0.5, 0.8, 0.865, 0.93])
def test_all_of_a_budget_is_divided_and_no_more(
    cut: float,
    latent: Latent,
    dense: CausalWanModel,
    measured: Statistics,
) -> None:
    config = replace(MLA, latent=latent, size=Sizes(cut=cut))
    total, plan = total_numbers(MODEL, config), planned(dense, measured, config)
    assert total - rank_step(MODEL) * MODEL.geometry.num_layers < sum(sizes(plan)) <= total
    # The norm is paid for out of the same budget.
    assert planned_config(MODEL, config, plan).cache_cut() >= cut
    check_sizes(MODEL, replace(MLA, latent=latent, size=Sizes(plan=plan)))


@either_latent
def test_the_budget_is_divided_by_predicted_error(
    latent: Latent, dense: CausalWanModel, measured: Statistics
) -> None:
    config = replace(MLA, latent=latent, size=Sizes(cut=0.865))
    inputs = inputs_of(dense, measured, config)
    layers = [inputs(layer) for layer in (0, 1)]
    curves = [predict_errors(w, latent, evidence, 96).errors for w, evidence in layers]
    total = total_numbers(MODEL, config)
    divided = sizes(planned(dense, measured, config))
    assert len(set(divided)) == 2

    def error(division: list[int]) -> float:
        return sum(curve[size].item() for curve, size in zip(curves, division, strict=True))

    assert error(divided) < error([total // 2, total // 2])


@pytest.mark.parametrize("init", [init for init in INITS if init != "calibrated"])
def test_an_init_that_predicts_no_errors_gets_the_same_sizes_everywhere(
    init: str, dense: CausalWanModel, measured: Statistics
) -> None:
    for latent in LATENTS:
        config = replace(MLA, init=init, latent=latent, size=Sizes(cut=0.8))
        plan = planned(dense, measured, config)
        assert plan == uniform_plan(MODEL, config)
        assert len(set(zip(plan.kv_lora_rank, plan.rope_pairs, strict=True))) == 1
        assert planned_config(MODEL, config, plan).cache_cut() >= 0.8


@pytest.mark.parametrize("size", [Sizes(26), Sizes(cut=83 / 96), Sizes(cut=0.864)])
def test_a_cut_and_bytes_say_the_same(size: Sizes) -> None:
    # The norm takes one of 13 numbers.
    assert total_numbers(MODEL, replace(MLA, size=size)) == 2 * 12


def test_sizes_default_to_the_papers() -> None:
    model = planned_config(WAN, MLA, uniform_plan(WAN, MLA))
    assert model.cache_bytes_per_token() == 2 * (192 + 32 + 1)
    assert uniform_plan(MODEL, MLA) == RankPlan((10, 10), (1, 1))


def test_the_preset_is_the_papers_split() -> None:
    plan = uniform_plan(WAN, PRESETS["videomla"])
    assert plan == RankPlan((192,) * 30, (16,) * 30)


def test_rope_keys_have_no_more_pairs_than_a_head() -> None:
    """With many heads, a seventh of a large budget exceeds the number of pairs."""
    plan = uniform_plan(WAN, replace(PRESETS["videomla"], size=Sizes(cut=0.5)))
    assert set(plan.rope_pairs) == {64}
    assert sizes(plan) == [1535] * 30


def test_explicit_sizes_stay_as_given(dense: CausalWanModel, measured: Statistics) -> None:
    given = {
        Sizes(kv_lora_rank=9, qk_rope_head_dim=4): RankPlan((9, 9), (2, 2)),
        Sizes(kv_lora_rank=9): RankPlan((9, 9), (3, 3)),
    }
    for size, plan in given.items():
        assert planned(dense, measured, replace(MLA, size=size)) == plan


def test_of_explicit_sizes_only_a_split_latent_is_divided(
    dense: CausalWanModel, measured: Statistics
) -> None:
    config = replace(MLA, latent="split", size=Sizes(kv_lora_rank=9, qk_rope_head_dim=4))
    plan, halves = planned(dense, measured, config), uniform_plan(MODEL, config)
    assert plan.kv_lora_rank == halves.kv_lora_rank == (9, 9)
    assert plan.rope_pairs == halves.rope_pairs
    assert halves.key_ranks == (5, 5)
    assert all(1 <= keys <= 8 for keys in plan.key_ranks)
    assert plan != halves


@pytest.mark.parametrize("init", ["calibrated", "random"])
def test_a_plan_is_taken_as_it_is(init: str, dense: CausalWanModel, measured: Statistics) -> None:
    plan = RankPlan((4, 9), (3, 1), (3, 2))
    config = replace(BUDGETED, init=init, latent="split", size=Sizes(plan=plan))
    assert planned(dense, measured, config) == plan
    model = convert_model(dense, config, measured)
    assert model.config.mla is not None
    assert model.config.mla.kv_lora_rank == (4, 9)
    assert [model.config.mla.qk_rope_head_dim(layer) for layer in (0, 1)] == [6, 2]


def test_a_conversion_keeps_its_plan(budgeted: Path) -> None:
    mla, plan = load(budgeted).config.mla, read_plan(budgeted)
    assert mla is not None
    assert plan == RankPlan(mla.kv_lora_rank, tuple(map(len, mla.rope_pairs)))
    assert plan == read_plan(budgeted / "conversion.json")
    told = json.loads((budgeted / "conversion.json").read_text())["plan"]
    assert from_dict(RankPlan, told) == plan


@either_latent
def test_a_replayed_plan_gives_the_same_bytes(
    latent: Latent, teacher: Path, tmp_path: Path
) -> None:
    config = replace(BUDGETED, latent=latent, calibration_clips=1, size=Sizes(cut=0.8))
    convert(teacher, tmp_path / "a", config)
    plan = read_plan(tmp_path / "a")
    assert len(set(zip(plan.kv_lora_rank, plan.rope_pairs, strict=True))) == 2
    convert(teacher, tmp_path / "b", replace(config, size=Sizes(plan=plan)))
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read_plan(tmp_path / "b") == plan


@pytest.mark.slow
def test_the_command_replays_a_plan(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    clips = ("--preset", "videomla", "--set", "convert.calibration_clips=1", "--json")
    ours = ("--set", "convert.init=calibrated", *clips)
    first, again, third = (tmp_path / name for name in "abc")
    assert vmla("convert", teacher, "-o", first, "--cut", "0.8", *ours).code == 0
    assert vmla("convert", teacher, "-o", again, "--plan", first, *ours).code == 0
    assert (again / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    random = ("--plan", again / "conversion.json", "--set", "convert.init=random")
    assert vmla("convert", teacher, "-o", third, *random, *clips).code == 0
    assert read_plan(first) == read_plan(again) == read_plan(third)


def test_the_command_takes_the_preset_and_what_overrides_it(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    folders = tmp_path / "paper", tmp_path / "mine"
    mine = ("--cut", "0.8", "--set", "convert.latent=split")
    for folder, words in zip(folders, ((), mine), strict=True):
        ran = vmla("convert", teacher, "-o", folder, "--preset", "videomla", *words)
        assert ran.code == 0
    paper, other = (load(folder).config for folder in folders)
    assert paper.mla and other.mla
    assert (paper.mla.init, paper.mla.latent) == ("spectral", "joint")
    assert paper.cache_bytes_per_token() == 26
    assert (other.mla.init, other.mla.latent) == ("spectral", "split")
    assert other.cache_cut() >= 0.8


# A size that does not fit, and what the message or the hint must name.
REFUSED = {
    "rank over width": (Sizes(kv_lora_rank=49), "48"),
    "odd rope": (Sizes(kv_lora_rank=8, qk_rope_head_dim=5), "24"),
    "rope over head": (Sizes(kv_lora_rank=8, qk_rope_head_dim=26), "24"),
    "rope zero": (Sizes(kv_lora_rank=8, qk_rope_head_dim=0), "24"),
    "a size of codecs": (Sizes(rank=8), "codec"),
    "too large a budget": (Sizes(1000), "48"),
    "too small a budget": (Sizes(2), "between 1 and 48"),
    "a cut of nearly all": (Sizes(cut=0.99), "cut 0.99"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_written(
    name: str, teacher: Path, tmp_path: Path
) -> None:
    size, word = REFUSED[name]
    refuses(replace(MLA, size=size), word, teacher, tmp_path)


@pytest.mark.parametrize(("rank", "word"), [(97, "96"), (1, "2 and 96")])
def test_a_split_latent_has_room_for_both_parts(
    rank: int, word: str, teacher: Path, tmp_path: Path
) -> None:
    config = replace(MLA, latent="split", size=Sizes(kv_lora_rank=rank))
    refuses(config, word, teacher, tmp_path)


def refuses(config: ConvertConfig, word: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(teacher, tmp_path / "out", config)
    assert caught.value.hint
    assert word in caught.value.message + caught.value.hint
    assert not list(tmp_path.iterdir())


FITTING = RankPlan((4, 5), (1, 2))
SPLIT = replace(MLA, latent="split")
# A config, the plan that it is given, and what the message or the hint must name.
BAD_PLANS = {
    "another depth": (
        MLA,
        replace(FITTING, kv_lora_rank=(4, 5, 6), rope_pairs=(1, 1, 1)),
        "2 layers",
    ),
    "uneven": (MLA, replace(FITTING, rope_pairs=(1,)), "2 layers"),
    "another width": (MLA, replace(FITTING, kv_lora_rank=(4, 49)), "48"),
    "no rope key": (MLA, replace(FITTING, rope_pairs=(0, 1)), "rope"),
    "parts": (MLA, replace(FITTING, key_ranks=(2, 2)), "joint"),
    "no parts": (SPLIT, FITTING, "split"),
    "part of the parts": (SPLIT, replace(FITTING, key_ranks=(2,)), "split"),
    "an empty part": (SPLIT, replace(FITTING, key_ranks=(2, 5)), "split"),
    "more rope keys than there are": (MLA, replace(FITTING, rope_pairs=(2, 25)), "24"),
    "more rope keys than an init knows": (
        replace(MLA, init="spectral"),
        replace(FITTING, rope_pairs=(2, 13)),
        "12",
    ),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_a_plan_of_another_model_or_layer_is_refused(
    name: str, teacher: Path, tmp_path: Path
) -> None:
    config, plan, word = BAD_PLANS[name]
    refuses(replace(config, size=Sizes(plan=plan)), word, teacher, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": 3}', '{"plan": {"ranks": [3]}}'])
def test_a_file_without_a_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "conversion.json").write_text(text)
    for path in (tmp_path, tmp_path / "conversion.json"):
        with pytest.raises(ConfigError):
            read_plan(path)


@either_latent
def test_what_passes_before_calibration_does_not_fail_after_it(
    latent: Latent, dense: CausalWanModel, measured: Statistics
) -> None:
    passed = 0
    for numbers in (2, 3, 4, 5):
        config = replace(MLA, latent=latent, size=Sizes(2 * numbers))
        try:
            check_sizes(MODEL, config)
        except ConfigError:
            continue
        passed += 1
        assert 0 < sum(sizes(planned(dense, measured, config))) <= total_numbers(MODEL, config)
    assert passed


@pytest.mark.parametrize(("dim", "step"), [(48, 1), (1536, 16), (3072, 32), (5120, 48)])
def test_sizes_of_wide_models_are_multiples_of_16(dim: int, step: int) -> None:
    geometry = replace(MODEL.geometry, dim=dim, num_heads=2)
    assert rank_step(replace(MODEL, geometry=geometry)) == step
