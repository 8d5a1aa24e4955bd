"""Configs: round trips, and what is refused, with the key and the next thing to try."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmla_convert import config
from vmla_convert.config import (
    CachePolicy,
    CodecConfig,
    ConvertConfig,
    DataConfig,
    DMDConfig,
    EvaluateConfig,
    GenerateConfig,
    Geometry,
    MediaConfig,
    MLAConfig,
    ModelConfig,
    RankPlan,
    Recipe,
    RecipeInfo,
    RecoverConfig,
    ReportConfig,
    RuntimeConfig,
    SamplerConfig,
    Sizes,
    SourceConfig,
    SweepConfig,
    TeacherConfig,
    TrainingConfig,
)
from vmla_convert.errors import ConfigError
from vmla_convert.tables import first_difference, from_dict, override, to_dict

GEOMETRY = Geometry(dim=48, ffn_dim=96, num_heads=4, num_layers=2, in_dim=4, out_dim=4)
DENSE = ModelConfig(
    geometry=GEOMETRY,
    latent_size=(8, 12),
    chunk_frames=2,
    cache=CachePolicy(window_frames=8, sink_frames=2, frame_positions="relative"),
    sampler=SamplerConfig(),
)
CONVERTED = dataclasses.replace(
    DENSE, mla=MLAConfig(kv_lora_rank=(8, 10), rope_pairs=((0, 1, 1), (2,)), init="spectral")
)
SPLIT = MLAConfig(
    kv_lora_rank=(8, 10),
    rope_pairs=((0,), (1,)),
    init="calibrated",
    latent="split",
    key_ranks=(3, 6),
)
# Two layers of one head with two pairs each.
FOLDED = MLAConfig(
    kv_lora_rank=(8, 10),
    rope_pairs=((1,), (0,)),
    init="calibrated",
    phases=((((0.5, 1.0), (-3.1, 0.25)),), (((0.0, 0.0), (1.5, 0.125)),)),
)

EVERY_CONFIG: list[Any] = [
    GEOMETRY,
    DENSE.cache,
    SamplerConfig(denoising_step_list=(1000, 500), shift=3.0, renoise=False),
    Sizes(cut=0.95),
    RuntimeConfig(Sizes(rank=3), "model", offload=True),
    RuntimeConfig(backend="absorbed", tile_mib=16),
    CodecConfig(48, Sizes(bytes_per_token=12.5), calibrated=False),
    MediaConfig("a/b", vae_tiling=True, cpu_offload=True),
    CONVERTED.mla,
    SPLIT,
    FOLDED,
    RankPlan((8, 10), (3, 1)),
    RankPlan((8, 10), (1, 1), (3, 6)),
    DENSE,
    CONVERTED,
    dataclasses.replace(DENSE, mla=SPLIT),
    dataclasses.replace(DENSE, codec=CodecConfig(48, Sizes(cut=0.95))),
    DataConfig(source="clips.safetensors", sink_gap=3),
    ConvertConfig(),
    ConvertConfig(channels=64, size=Sizes(40.5)),
    ConvertConfig("mla", Sizes(kv_lora_rank=16, qk_rope_head_dim=8)),
    ConvertConfig("mla", Sizes(plan=RankPlan((8, 10), (3, 1), (3, 6))), latent="split"),
    TrainingConfig(mixed_precision="bf16"),
    RecoverConfig(training=TrainingConfig(steps=7)),
    DMDConfig(steps=3),
    TeacherConfig(model=DENSE, training=TrainingConfig()),
    EvaluateConfig(clips=3),
    GenerateConfig(prompts=("1",)),
    ReportConfig(loss_bound=0.1),
    SweepConfig(products=("mla",), mla_sizes=(Sizes(kv_lora_rank=8), Sizes(cut=0.9))),
    Recipe(RecipeInfo("x", "y"), model={"cache": {"window_frames": 4}}, recover=RecoverConfig()),
    RecipeInfo("x", "y"),
    SourceConfig(),
    SourceConfig("a/b@c", "m.pt", "generator", "longlive", {"chunk_frames": 1}, ("l.pt:0.5",)),
]


def as_dict(value: Any, **changes: Any) -> dict[str, Any]:
    return {**to_dict(value), **changes}


def test_every_config_class_is_in_the_list_above() -> None:
    classes = {
        value
        for value in vars(config).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    }
    assert classes
    assert {type(value) for value in EVERY_CONFIG} == classes


@pytest.mark.parametrize("value", EVERY_CONFIG, ids=lambda value: type(value).__name__)
def test_round_trip_through_json(value: Any) -> None:
    data = json.loads(json.dumps(to_dict(value)))
    assert from_dict(type(value), data) == value


@given(
    heads=st.integers(1, 16),
    half_head=st.integers(3, 64),
    patch=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    eps=st.floats(1e-9, 1e-3),
)
def test_any_good_geometry_survives(
    heads: int, half_head: int, patch: tuple[int, int, int], eps: float
) -> None:
    geometry = dataclasses.replace(
        GEOMETRY, dim=2 * half_head * heads, num_heads=heads, patch_size=patch, eps=eps
    )
    assert geometry.head_dim == 2 * half_head
    assert from_dict(Geometry, json.loads(json.dumps(to_dict(geometry)))) == geometry


@given(
    ranks=st.lists(st.integers(1, 4096), min_size=1, max_size=40).map(tuple),
    pairs=st.lists(st.lists(st.integers(0, 63), min_size=1).map(tuple), min_size=1).map(tuple),
)
def test_any_ranks_and_pairs_survive(
    ranks: tuple[int, ...], pairs: tuple[tuple[int, ...], ...]
) -> None:
    mla = MLAConfig(kv_lora_rank=ranks, rope_pairs=pairs, init="calibrated")
    assert from_dict(MLAConfig, json.loads(json.dumps(to_dict(mla)))) == mla


def test_none_is_left_out_and_comes_back() -> None:
    assert "mla" not in to_dict(DENSE)
    assert "channels" not in to_dict(ConvertConfig())
    assert from_dict(ConvertConfig, {"channels": None}) == ConvertConfig()


def test_an_int_is_a_float_but_not_the_other_way() -> None:
    lr = from_dict(TrainingConfig, {"lr": 1}).lr
    assert type(lr) is float
    with pytest.raises(ConfigError, match=r"'steps' must be int, not 1\.5"):
        from_dict(TrainingConfig, {"steps": 1.5})


def test_a_misspelt_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown key 'stepz'") as caught:
        from_dict(TrainingConfig, {"stepz": 3})
    assert caught.value.hint == "did you mean 'steps'?"


def test_a_key_like_no_other_lists_all() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(EvaluateConfig, {"xyzzy": 3})
    assert caught.value.hint == "known: clips, data, features, rollout_clips, rollout_frames"


def test_nested_keys_are_named_with_their_path() -> None:
    data = as_dict(RecoverConfig(), training={"batchsize": 2})
    with pytest.raises(ConfigError, match=r"unknown key 'recover\.training\.batchsize'") as caught:
        from_dict(RecoverConfig, data, "recover")
    assert caught.value.hint == "did you mean 'batch_size'?"


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (TrainingConfig, {"steps": "3"}, r"'steps' must be int, not '3'"),
        (TrainingConfig, {"steps": True}, r"'steps' must be int, not True"),
        (SamplerConfig, {"renoise": 1}, r"'renoise' must be bool, not 1"),
        (TrainingConfig, {"lr": "fast"}, r"'lr' must be float, not 'fast'"),
        (ConvertConfig, {"channels": "8"}, r"'channels' must be int, not '8'"),
        (ConvertConfig, {"data": 3}, r"'data' must be a table, not 3"),
        (ConvertConfig, {"init": None}, r"'init' must be str, not None"),
        (GenerateConfig, {"prompts": "3"}, r"'prompts' must be a list, not '3'"),
        (GenerateConfig, {"prompts": ["3", 7]}, r"'prompts\[1\]' must be str, not 7"),
        (DataConfig, [], r"'DataConfig' must be a table, not \[\]"),
    ],
)
def test_wrong_types_are_named(cls: type[Any], data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(cls, data)


@pytest.mark.parametrize("size", [[8], [8, 12, 3], []])
def test_a_tuple_of_fixed_length_keeps_it(size: list[int]) -> None:
    with pytest.raises(ConfigError, match=f"'latent_size' must have 2 items, not {len(size)}"):
        from_dict(ModelConfig, as_dict(DENSE, latent_size=size))


def test_an_item_deep_in_nested_tuples_is_named() -> None:
    data = as_dict(CONVERTED.mla, rope_pairs=[[0, 1], [2, "x"]])
    with pytest.raises(ConfigError, match=r"'mla\.rope_pairs\[1\]\[1\]' must be int, not 'x'"):
        from_dict(ModelConfig, as_dict(DENSE, mla=data))


@pytest.mark.parametrize("key", ["dim", "in_dim"])
def test_a_missing_key_is_named(key: str) -> None:
    data = to_dict(GEOMETRY)
    del data[key]
    with pytest.raises(ConfigError, match=rf"missing key 'geometry\.{key}'"):
        from_dict(ModelConfig, as_dict(DENSE, geometry=data))


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("chunk_frames=3", ["chunk_frames"], 3),
        ("cache.window_frames=12", ["cache", "window_frames"], 12),
        (
            "sampler.denoising_step_list=[1000, 500]",
            ["sampler", "denoising_step_list"],
            [1000, 500],
        ),
        ("sampler.shift=1e-1", ["sampler", "shift"], 0.1),
        ("sampler.renoise=false", ["sampler", "renoise"], False),
        ("licence=apache-2.0", ["licence"], "apache-2.0"),
        ("base_model=owner/name", ["base_model"], "owner/name"),
        ('licence="2"', ["licence"], "2"),
        ("licence=a=b", ["licence"], "a=b"),
        ("licence=", ["licence"], ""),
    ],
)
def test_an_override_is_toml_or_a_bare_word(text: str, key: list[str], value: Any) -> None:
    table: dict[str, Any] = {"cache": {"sink_frames": 1}}
    override(table, text)
    found: Any = table
    for part in key:
        found = found[part]
    assert found == value
    assert type(found) is type(value)
    assert table["cache"]["sink_frames"] == 1


@given(
    path=st.lists(st.sampled_from("abc"), min_size=1, max_size=3),
    number=st.integers(-(10**9), 10**9),
    before=st.dictionaries(st.sampled_from("xyz"), st.integers(), max_size=3),
)
def test_an_override_sets_its_key_and_no_other(
    path: list[str], number: int, before: dict[str, int]
) -> None:
    table: dict[str, Any] = dict(before)
    override(table, f"{'.'.join(path)}={number}")
    override(table, f"{'.'.join(path)}={number + 1}")
    expected: Any = number + 1
    for part in reversed(path):
        expected = {part: expected}
    assert table == {**before, **expected}


@pytest.mark.parametrize("text", ["", "a", "=1", "a b=1", "a-b=1", "[a]=1"])
def test_an_override_that_is_none_is_refused(text: str) -> None:
    table: dict[str, Any] = {}
    with pytest.raises(ConfigError, match="is not key=value") as caught:
        override(table, text)
    assert "--set" in caught.value.hint
    assert not table


def test_an_override_goes_through_no_value() -> None:
    table: dict[str, Any] = {"chunk_frames": 3}
    with pytest.raises(ConfigError, match=r"'chunk_frames\.x' cannot be set") as caught:
        override(table, "chunk_frames.x=1")
    assert "'chunk_frames' is a value" in caught.value.hint
    assert table == {"chunk_frames": 3}


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ({"a": 1, "b": {"c": [1]}}, {"b": {"c": [1]}, "a": 1}, None),
        ({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "d": 5}, ("a.c", 2, 4)),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, ("a[1].b", 2, 3)),
        ({"a": [1]}, {"a": [1, 2]}, ("a[1]", None, 2)),
        ({"a": 1}, {}, ("a", 1, None)),
        ({}, {"a": {"b": 1}}, ("a", None, {"b": 1})),
        ({"a": None}, {}, None),
    ],
)
def test_the_first_difference_of_two_tables_is_found(one: Any, other: Any, found: Any) -> None:
    assert first_difference(one, other) == found


def test_a_choice_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'frame_positions' is 'relativ'") as caught:
        from_dict(CachePolicy, {"window_frames": 4, "frame_positions": "relativ"})
    assert caught.value.hint == "did you mean 'relative'?"


@pytest.mark.parametrize(
    ("dim", "heads", "message"),
    [
        (50, 4, "does not split into 4 heads"),
        (20, 4, "heads of even width"),
        (16, 4, "too small for 3D RoPE"),
    ],
)
def test_a_geometry_that_cannot_be(dim: int, heads: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(GEOMETRY, dim=dim, num_heads=heads)


@pytest.mark.parametrize(("window", "sink"), [(4, 4), (4, 5), (4, -1), (0, 0)])
def test_a_sink_must_fit_its_window(window: int, sink: int) -> None:
    with pytest.raises(ConfigError, match="does not fit a window"):
        CachePolicy(window_frames=window, sink_frames=sink)


def test_a_window_must_hold_a_chunk_beside_its_sink() -> None:
    with pytest.raises(ConfigError, match="has no room for a chunk of 3"):
        dataclasses.replace(DENSE, chunk_frames=3, cache=CachePolicy(4, sink_frames=2))


def test_cache_sizes_by_hand() -> None:
    # dense: a key and a value of 48; layer 0: 8 + 2·3 + 1 = 15, layer 1: 10 + 2·1 + 1 = 13
    assert DENSE.cache_bytes_per_token() == 2 * 96
    assert CONVERTED.cache_bytes_per_token() == 2 * 14
    assert DENSE.cache_cut() == 0
    assert CONVERTED.cache_cut() == pytest.approx(1 - 14 / 96)
    # 8×12 latents in 2×2 patches are 24 tokens; two layers, two bytes
    assert CONVERTED.tokens_per_frame == 24
    assert CONVERTED.cache_bytes(frames=5, batch=3) == 3 * 5 * 24 * (15 + 13) * 2


def test_parts_of_a_split_latent_add_up_and_a_joint_one_is_read_whole() -> None:
    assert [SPLIT.latent_parts(layer) for layer in (0, 1)] == [(3, 5), (6, 4)]
    assert [FOLDED.latent_parts(layer) for layer in (0, 1)] == [(8, 8), (10, 10)]


@pytest.mark.parametrize(
    ("latent", "pairs", "key_ranks", "message"),
    [
        ("joint", ((), ()), (), "without a rope key"),
        ("joint", ((0,), ()), (), "without a rope key"),
        ("split", ((0,), (1,)), (), "key_ranks do not fit a split latent"),
        ("split", ((0,), (1,)), (3,), "key_ranks do not fit a split latent"),
        ("joint", ((0,), (1,)), (3, 6), "key_ranks do not fit a joint latent"),
    ],
)
def test_an_mla_that_cannot_be(
    latent: Literal["joint", "split"],
    pairs: tuple[tuple[int, ...], ...],
    key_ranks: tuple[int, ...],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        MLAConfig((8, 10), pairs, "calibrated", latent, key_ranks)


@pytest.mark.parametrize(("ranks", "pairs"), [((8,), ((0,),)), ((8, 10, 8), ((0,), (0,), (0,)))])
def test_an_mla_names_every_layer(
    ranks: tuple[int, ...], pairs: tuple[tuple[int, ...], ...]
) -> None:
    with pytest.raises(ConfigError, match="ranks and pairs for 2 layers"):
        dataclasses.replace(DENSE, mla=MLAConfig(ranks, pairs, "calibrated"))


def test_configs_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GEOMETRY.dim = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk_frames": 0},
        {"latent_size": (0, 0)},
        {"latent_size": (7, 9)},
        {"latent_size": (-8, 8)},
        {"licence": ""},
        {"cache": CachePolicy(21, dense_recent_frames=19)},
    ],
)
def test_a_model_that_cannot_run_is_refused(settings: dict[str, Any]) -> None:
    fitting = ModelConfig(GEOMETRY, (60, 104), 3, CachePolicy(21), SamplerConfig())
    with pytest.raises(ConfigError):
        dataclasses.replace(fitting, **settings)


@pytest.mark.parametrize("steps", [(), (1, 5, 9000), (1000, 0), (500, 500)])
def test_steps_that_do_not_descend_from_1000_to_1_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="denoising_step_list"):
        SamplerConfig(steps)
    with pytest.raises(ConfigError, match="shift"):
        SamplerConfig(shift=0.0)


def test_dense_recent_frames_need_a_layer_that_has_dense_keys() -> None:
    policy = CachePolicy(8, 2, dense_recent_frames=2)
    dataclasses.replace(DENSE, cache=policy)
    with pytest.raises(ConfigError, match="dense keys and values"):
        dataclasses.replace(DENSE, cache=policy, mla=SPLIT)
    with pytest.raises(ConfigError, match="-1 must be at least 0"):
        CachePolicy(8, dense_recent_frames=-1)
    with pytest.raises(ConfigError, match="tile_mib"):
        RuntimeConfig(tile_mib=0)
