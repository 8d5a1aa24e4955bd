"""Rules match whole names, one to one and reversibly; other names are reported."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmla_convert.checkpoint.keymap import (
    DIFFUSERS_RULES,
    FPS,
    IMAGE_TO_VIDEO,
    NATIVE_FPS,
    NATIVE_RULES,
    TEXT_TO_VIDEO,
    Rule,
    fill,
    invert,
    listed,
    match_native,
    native_twin,
    strip_wrappers,
    to_native,
)
from vmla_convert.errors import CheckpointError

TABLES = pytest.mark.parametrize(
    "rules",
    [
        DIFFUSERS_RULES,
        NATIVE_RULES,
        TEXT_TO_VIDEO,
        IMAGE_TO_VIDEO,
        DIFFUSERS_RULES + FPS,
        NATIVE_RULES + NATIVE_FPS,
    ],
    ids=["diffusers", "native", "text", "image", "skyreels diffusers", "skyreels"],
)


@TABLES
def test_tables_are_one_to_one(rules: tuple[Rule, ...]) -> None:
    assert len({rule.native for rule in rules}) == len(rules)
    assert len({rule.foreign for rule in rules}) == len(rules)
    assert all(("{i}" in rule.native) == ("{i}" in rule.foreign) for rule in rules)
    assert invert(invert(rules)) == rules
    assert invert(native_twin(rules)) == native_twin(rules)


@TABLES
@given(blocks=st.sets(st.integers(0, 120), min_size=1, max_size=4))
def test_there_and_back_is_the_identity(rules: tuple[Rule, ...], blocks: set[int]) -> None:
    names = {fill(rule.foreign, block) for rule in rules for block in blocks}
    native = to_native(names, rules)
    back = to_native(native, invert(rules))
    assert len(native) == len(names)
    assert {foreign: native[name] for foreign, name in back.items()} == {n: n for n in names}


@TABLES
@given(data=st.data())
def test_a_name_matches_one_rule_only(rules: tuple[Rule, ...], data: st.DataObject) -> None:
    """The order of a table does not matter."""
    rule = data.draw(st.sampled_from(rules))
    name = fill(rule.foreign, data.draw(st.integers(0, 10**6)))
    others = tuple(other for other in rules if other != rule)
    assert match_native([name], others) == ({}, [name])
    assert len(match_native([name], rules)[0]) == 1


@given(
    known=st.sets(st.sampled_from(DIFFUSERS_RULES + FPS), max_size=5),
    unknown=st.sets(st.text(max_size=8), max_size=5),
)
def test_every_name_is_matched_or_left_over(known: set[Rule], unknown: set[str]) -> None:
    names = {fill(rule.foreign, 3): fill(rule.native, 3) for rule in known}
    found, leftovers = match_native([*names, *unknown], DIFFUSERS_RULES + FPS)
    assert found == {native: foreign for foreign, native in names.items()}
    assert set(leftovers) == unknown


def test_norm_names_swap_as_diffusers_swaps_them() -> None:
    names = [
        "blocks.7.norm2.weight",
        "condition_embedder.image_embedder.norm2.weight",
        "blocks.12.attn2.norm_added_k.weight",
        "scale_shift_table",
        "blocks.0.scale_shift_table",
    ]
    assert list(to_native(names, DIFFUSERS_RULES)) == [
        "blocks.7.norm3.weight",
        "img_emb.proj.4.weight",
        "blocks.12.cross_attn.norm_k_img.weight",
        "head.modulation",
        "blocks.0.modulation",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn1.to_q.weight.extra",
        "x.blocks.0.attn1.to_q.weight",
        "blocks.00.attn1.to_q.weight",
        "blocks.-1.attn1.to_q.weight",
        "blocks.٣.attn1.to_q.weight",
        "blocks.{i}.attn1.to_q.weight",
        "blocks.0xattn1.to_q.weight",
        "blocks.0.attn1.to_qkv.weight",
        "",
    ],
)
def test_names_that_only_look_alike_are_left_over(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        to_native(["proj_out.weight", name], DIFFUSERS_RULES)
    assert name in caught.value.message
    assert "proj_out" not in caught.value.message


def test_two_names_for_one_tensor_are_refused() -> None:
    rules = (*DIFFUSERS_RULES, Rule("head.modulation", "other_table"))
    with pytest.raises(CheckpointError, match=r"head\.modulation") as caught:
        to_native(["scale_shift_table", "other_table"], rules)
    assert "other_table" in caught.value.message


@pytest.mark.parametrize(
    "wrapped",
    [
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.ffn.0.bias",
        "_fsdp_wrapped_module.model.blocks.0._checkpoint_wrapped_module.ffn.0.bias",
        "model._orig_mod.blocks.0.ffn.0.bias",
        "_orig_mod.blocks.0.ffn.0.bias",
        "module.model.blocks.0.ffn.0.bias",
        "module._orig_mod.model._fsdp_wrapped_module.blocks.0.ffn.0.bias",
        "model.diffusion_model.blocks.0.ffn.0.bias",
        "diffusion_model.blocks.0.ffn.0.bias",
        "blocks.0.ffn.0.bias",
    ],
)
def test_wrappers_come_off_wherever_they_are(wrapped: str) -> None:
    assert strip_wrappers([wrapped]) == {"blocks.0.ffn.0.bias": wrapped}


def test_a_prefix_is_removed_only_when_all_names_have_it() -> None:
    assert strip_wrappers(["model.a", "model.b"]) == {"a": "model.a", "b": "model.b"}
    assert strip_wrappers(["model.a", "b"]) == {"model.a": "model.a", "b": "b"}


def test_names_that_become_equal_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"both 'a\.b'"):
        strip_wrappers(["a.b", "a._orig_mod.b"])


def test_long_lists_are_cut_short() -> None:
    assert listed("cab") == "a, b, c"
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"
