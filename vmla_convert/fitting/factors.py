"""One layer from dense weights to latent parameters, and a whole model of them in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import ConvertConfig, MLAConfig, ModelConfig, RankPlan
from vmla_convert.fitting.calibrate import LayerReads
from vmla_convert.fitting.rank_plan import ReadEvidence, check_sizes, plan_ranks
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.evidence import Evidence, join_evidence
from vmla_convert.maths.factor import DATA_INITS, factor
from vmla_convert.maths.moments import as_channels
from vmla_convert.maths.projections import Factors, KVWeights, LayerShape
from vmla_convert.media.clips import seeded

Read = Callable[[str], Tensor]


def convert_model(
    teacher: CausalWanModel,
    config: ConvertConfig,
    evidence: list[Evidence] | ReadEvidence | None,
) -> CausalWanModel:
    """A conversion to MLA layers in memory.

    Args:
        teacher: The dense model.
        config: The conversion.
        evidence: Evidence of every layer; None where the init looks at none.
    """
    check_sizes(teacher.config, config)
    state = teacher.state_dict()
    heads = teacher.config.geometry.num_heads
    known = evidence.__getitem__ if isinstance(evidence, list) else evidence
    ranks = plan_ranks(
        teacher.config,
        config,
        lambda layer: layer_weights(state.__getitem__, layer, heads),
        known,
    )
    planned = planned_config(teacher.config, config, ranks)
    branches: list[Branch] = []
    tensors: dict[str, Tensor] = {}
    for layer in range(planned.geometry.num_layers):
        factors = factor_layer(state.__getitem__, ranks, heads, config, layer, known)
        branches.append(branch_of(factors))
        tensors |= latent_tensors(factors, state.__getitem__, layer)
    return build_student(teacher, with_branches(planned, branches), tensors)


def build_student(
    teacher: CausalWanModel, config: ModelConfig, tensors: dict[str, Tensor]
) -> CausalWanModel:
    """A converted model in memory.

    Args:
        teacher: The dense model, whose other weights are copied.
        config: Of the converted model.
        tensors: Its new parameters, by full name.
    """
    with torch.device("meta"):
        model = CausalWanModel(config)
    expected, device = model.state_dict(), teacher.patch_embedding.weight.device
    kept = {name: t.clone() for name, t in teacher.state_dict().items() if name in expected}
    new = {name: tensor.to(device) for name, tensor in tensors.items()}
    model.load_state_dict(kept | new, assign=True)
    return model.eval().requires_grad_(False)


def factor_layer(
    read: Read,
    ranks: RankPlan,
    num_heads: int,
    config: ConvertConfig,
    layer: int,
    evidence: ReadEvidence | None,
) -> Factors:
    """Factor one layer to its sizes in a plan."""
    weights = layer_weights(read, layer, num_heads)
    known = evidence(layer) if evidence and config.init in DATA_INITS else None
    shape, draws = layer_shape(config, ranks, layer), seeded(config.seed, layer, "init")
    return factor(config.init, weights, shape, known, draws)


def layer_shape(config: ConvertConfig, ranks: RankPlan, layer: int) -> LayerShape:
    """One layer's sizes in a plan."""
    return LayerShape(
        config.latent,
        ranks.kv_lora_rank[layer],
        ranks.rope_pairs[layer],
        ranks.key_ranks[layer] if ranks.key_ranks else None,
    )


def layer_weights(read: Read, layer: int, num_heads: int) -> KVWeights:
    """Key and value weights of one dense layer, the norm's gain folded into the key; float64."""

    def tensor(name: str) -> Tensor:
        # Factoring is float64 on the CPU, wherever the model lives.
        return read(f"blocks.{layer}.self_attn.{name}").cpu().double()

    query_gain = tensor("norm_q.weight")
    return KVWeights(
        query=query_gain[:, None] * tensor("q.weight"),
        query_bias=query_gain * tensor("q.bias"),
        raw_key=tensor("k.weight"),
        raw_key_bias=tensor("k.bias"),
        key_gain=tensor("norm_k.weight"),
        value=tensor("v.weight"),
        value_bias=tensor("v.bias"),
        output=tensor("o.weight"),
        num_heads=num_heads,
    )


def latent_tensors(factors: Factors, read: Read, layer: int) -> dict[str, Tensor]:
    """The new parameters of one layer by full name, float32."""
    prefix = f"blocks.{layer}.self_attn."
    tensors = {
        "kv_a_proj.weight": factors.kv_a_proj,
        "kv_a_proj.bias": factors.kv_a_bias,
        "kv_b_proj_k.weight": factors.kv_b_proj_k,
        "kv_b_proj_k.bias": factors.kv_b_bias_k,
        "kv_b_proj_v.weight": factors.kv_b_proj_v,
        "kv_b_proj_v.bias": factors.kv_b_bias_v,
        "k_rope_proj.weight": as_channels(factors.rope.rows.mT).mT,
        "k_rope_proj.bias": as_channels(factors.rope.offsets),
        "q_rope_map": factors.rope.query_map,
        "k_norm_proj.weight": read(f"{prefix}k.weight"),
        "k_norm_proj.bias": read(f"{prefix}k.bias"),
    }
    return {prefix + name: tensor.float().contiguous() for name, tensor in tensors.items()}


def layer_evidence(measured: LayerReads, weights: KVWeights, phases: Tensor) -> Evidence:
    """Evidence for a layer that reads all its keys from latents, those of its own chunk too.

    Args:
        measured: Of this layer.
        weights: Of the dense layer.
        phases: From `deployed_phases`.
    """
    return join_evidence([measured.past, *measured.own], weights, phases)


def planned_config(dense: ModelConfig, config: ConvertConfig, ranks: RankPlan) -> ModelConfig:
    """The converted model's config, with placeholders for the rope pairs."""
    pairs = tuple(tuple(range(count)) for count in ranks.rope_pairs)
    mla = MLAConfig(ranks.kv_lora_rank, pairs, config.init, config.latent, ranks.key_ranks)
    return replace(dense, mla=mla)


class Branch(NamedTuple):
    """What a factored layer adds to the config and to the record of the conversion.

    Attributes:
        pairs: Its rope pairs.
        phases: Angle and length of what was folded for each head and pair, to four digits: a
            record, not an input. None when nothing was.
    """

    pairs: tuple[int, ...]
    phases: tuple[tuple[tuple[float, float], ...], ...] | None


def branch_of(factors: Factors) -> Branch:
    """The branch of a factored layer."""
    pairs = tuple(factors.rope.pairs.tolist())
    return Branch(pairs, None if factors.phases is None else _polar(factors.phases))


def branch_from(pairs: list[int], phases: list[list[list[float]]] | None) -> Branch:
    """A branch that JSON kept."""
    if phases is None:
        return Branch(tuple(pairs), None)
    return Branch(tuple(pairs), tuple(tuple((a, r) for a, r in head) for head in phases))


def with_branches(planned: ModelConfig, branches: list[Branch]) -> ModelConfig:
    """The planned config with the rope pairs and phases that the layers chose."""
    assert planned.mla is not None
    pairs = tuple(branch.pairs for branch in branches)
    phases = tuple(branch.phases for branch in branches if branch.phases is not None)
    return replace(planned, mla=replace(planned.mla, rope_pairs=pairs, phases=phases))


def _polar(phases: Tensor) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Angle and length of phases (H, D/2), to four digits."""
    return tuple(
        tuple((round(angle, 4), round(length, 4)) for angle, length in zip(a, b, strict=True))
        for a, b in zip(phases.angle().tolist(), phases.abs().tolist(), strict=True)
    )
