"""Translate tensor names between other layouts and native Wan names, by tables of rules.

Tensors are not permuted: both layouts interleave the rotary pairs. Source of the names: diffusers,
`scripts/convert_wan_to_diffusers.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from vmla_convert.errors import CheckpointError

# From ComfyUI, trainers' model classes and DistributedDataParallel.
WRAPPER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")
WRAPPER_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

SHOWN = 5


@dataclass(frozen=True)
class Rule:
    """A tensor's full name in both layouts; `{i}` stands for the block number."""

    native: str
    foreign: str


_WEIGHT_AND_BIAS = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("blocks.{i}.self_attn.q", "blocks.{i}.attn1.to_q"),
    ("blocks.{i}.self_attn.k", "blocks.{i}.attn1.to_k"),
    ("blocks.{i}.self_attn.v", "blocks.{i}.attn1.to_v"),
    ("blocks.{i}.self_attn.o", "blocks.{i}.attn1.to_out.0"),
    ("blocks.{i}.cross_attn.q", "blocks.{i}.attn2.to_q"),
    ("blocks.{i}.cross_attn.k", "blocks.{i}.attn2.to_k"),
    ("blocks.{i}.cross_attn.v", "blocks.{i}.attn2.to_v"),
    ("blocks.{i}.cross_attn.o", "blocks.{i}.attn2.to_out.0"),
    ("blocks.{i}.norm3", "blocks.{i}.norm2"),
    ("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj"),
    ("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2"),
    ("head.head", "proj_out"),
)
_SINGLE = (
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    ("blocks.{i}.self_attn.norm_q.weight", "blocks.{i}.attn1.norm_q.weight"),
    ("blocks.{i}.self_attn.norm_k.weight", "blocks.{i}.attn1.norm_k.weight"),
    ("blocks.{i}.cross_attn.norm_q.weight", "blocks.{i}.attn2.norm_q.weight"),
    ("blocks.{i}.cross_attn.norm_k.weight", "blocks.{i}.attn2.norm_k.weight"),
    ("head.modulation", "scale_shift_table"),
)
# Tensors of a conversion, and their names in a converted folder of diffusers' layout.
_LATENT_WEIGHT_AND_BIAS = tuple(
    (f"blocks.{{i}}.self_attn.{part}", f"blocks.{{i}}.attn1.{part}")
    for part in (
        "kv_a_proj",
        "kv_b_proj_k",
        "kv_b_proj_v",
        "k_rope_proj",
        "k_norm_proj",
    )
)
_LATENT_SINGLE = (("blocks.{i}.self_attn.q_rope_map", "blocks.{i}.attn1.q_rope_map"),)
_CODEC_SINGLE = tuple(
    (f"blocks.{{i}}.codec.{part}", f"blocks.{{i}}.codec.{part}")
    for part in ("encode", "decode", "mean", "energies", "tables", "distortions")
)
_IMAGE_WEIGHT_AND_BIAS = (
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("blocks.{i}.cross_attn.k_img", "blocks.{i}.attn2.add_k_proj"),
    ("blocks.{i}.cross_attn.v_img", "blocks.{i}.attn2.add_v_proj"),
)
_IMAGE_SINGLE = (
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("blocks.{i}.cross_attn.norm_k_img.weight", "blocks.{i}.attn2.norm_added_k.weight"),
)


def native_twin(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules that map each native name to itself."""
    return tuple(Rule(rule.native, rule.native) for rule in rules)


def _expand(
    with_bias: tuple[tuple[str, str], ...], single: tuple[tuple[str, str], ...]
) -> tuple[Rule, ...]:
    pairs = [
        Rule(f"{native}.{part}", f"{foreign}.{part}")
        for native, foreign in with_bias
        for part in ("weight", "bias")
    ]
    return (*pairs, *(Rule(native, foreign) for native, foreign in single))


TEXT_TO_VIDEO = _expand(_WEIGHT_AND_BIAS, _SINGLE)
IMAGE_TO_VIDEO = _expand(_IMAGE_WEIGHT_AND_BIAS, _IMAGE_SINGLE)
DIFFUSERS_RULES = TEXT_TO_VIDEO + IMAGE_TO_VIDEO
CONVERTED_DIFFUSERS_RULES = TEXT_TO_VIDEO + _expand(
    _LATENT_WEIGHT_AND_BIAS, _LATENT_SINGLE + _CODEC_SINGLE
)
# SkyReels-V2's embedding of the frame rate.
FPS = tuple(
    Rule(native, foreign)
    for native, foreign in (
        ("fps_embedding.weight", "fps_embedding.weight"),
        *(
            (f"fps_projection.{native}.{part}", f"fps_projection.{foreign}.{part}")
            for native, foreign in (("0", "net.0.proj"), ("2", "net.2"))
            for part in ("weight", "bias")
        ),
    )
)
NATIVE_RULES = native_twin(DIFFUSERS_RULES)
NATIVE_FPS = native_twin(FPS)


def invert(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules for the opposite direction, for `to_native`."""
    return tuple(Rule(rule.foreign, rule.native) for rule in rules)


def strip_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Remove the prefixes and infixes of trainers, FSDP, checkpointing and compile.

    A prefix is removed only when every name has it.

    Returns:
        Clean name to source name.

    Raises:
        CheckpointError: Two names become equal.
    """
    sources = list(names)
    clean: list[str] = [_without_infixes(name) for name in sources]
    while prefix := _common_prefix(clean):
        clean = [name.removeprefix(prefix) for name in clean]
    return _unique(zip(clean, sources, strict=True))


def to_native(names: Iterable[str], rules: tuple[Rule, ...]) -> dict[str, str]:
    """Native name to source name; every name, without wrappers, must fit a rule.

    Raises:
        CheckpointError: A name fits no rule, or two names get the same native name.
    """
    named, leftovers = match_native(names, rules)
    if leftovers:
        raise CheckpointError(
            f"{len(leftovers)} tensors are not part of a Wan model: {listed(leftovers)}",
            "merge LoRA weights and drop tensors of other modules before converting",
        )
    return named


def match_native(names: Iterable[str], rules: tuple[Rule, ...]) -> tuple[dict[str, str], list[str]]:
    """Native name to source name, and the names that fit no rule."""
    pairs: list[tuple[str, str]] = []
    leftovers: list[str] = []
    for name in names:
        native = _apply(name, rules)
        if native is None:
            leftovers.append(name)
        else:
            pairs.append((native, name))
    return _unique(pairs), leftovers


def fill(template: str, block: int | str) -> str:
    """The name that a template gives for one block."""
    return template.replace("{i}", str(block))


def listed(names: Iterable[str]) -> str:
    """The first few names in alphabetical order, for messages."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def _common_prefix(names: list[str]) -> str | None:
    """The first wrapper prefix that all names share."""
    prefixes = (p for p in WRAPPER_PREFIXES if names and all(n.startswith(p) for n in names))
    return next(prefixes, None)


def _without_infixes(name: str) -> str:
    for infix in WRAPPER_INFIXES:
        name = name.replace(infix, "")
    return name


def _apply(name: str, rules: tuple[Rule, ...]) -> str | None:
    for rule in rules:
        if match := _pattern(rule.foreign).fullmatch(name):
            return fill(rule.native, match[1]) if match.lastindex else rule.native
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    # No leading zeros, so that the inverse rule gives the same name.
    return re.compile(r"(0|[1-9][0-9]*)".join(map(re.escape, template.split("{i}"))))


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    named: dict[str, str] = {}
    for target, source in pairs:
        if target in named:
            raise CheckpointError(
                f"'{named[target]}' and '{source}' are both '{target}'",
                "drop one of the two copies from the checkpoint",
            )
        named[target] = source
    return named
