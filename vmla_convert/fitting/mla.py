"""MLA layers from dense weights: one layer at a time, or a whole model in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import ConvertConfig, MLAConfig, ModelConfig, RankPlan
from vmla_convert.fitting.calibrate import Statistics, deployed_phases
from vmla_convert.fitting.layer_statistics import LayerStatistics
from vmla_convert.fitting.rank_plan import LayerInputs, check_sizes, plan_ranks
from vmla_convert.fitting.weights import Read, layer_weights, with_tensors
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.evidence import Evidence, assume_evidence, join_evidence
from vmla_convert.maths.factor import DATA_INITS, INITS
from vmla_convert.maths.moments import as_channels
from vmla_convert.maths.projections import Factors, KVWeights, LayerShape
from vmla_convert.media.clips import seeded


def convert_model(
    dense: CausalWanModel, config: ConvertConfig, statistics: Statistics | None = None
) -> CausalWanModel:
    """Convert a model in memory to MLA layers.

    Args:
        dense: The dense model.
        config: The conversion.
        statistics: Calibration of every layer; None for inits and conversions that need none.
    """
    check_sizes(dense.config, config)
    inputs = layer_inputs(dense.state_dict().__getitem__, dense.config, config, statistics)
    ranks = plan_ranks(dense.config, config, inputs)
    planned = planned_config(dense.config, config, ranks)
    rope: list[LayerRope] = []
    tensors: dict[str, Tensor] = {}
    for layer in range(planned.geometry.num_layers):
        weights, evidence = inputs(layer)
        factors = factor_layer(weights, evidence, ranks, config, layer)
        rope.append(LayerRope.of(factors))
        tensors |= latent_tensors(factors, weights, layer)
    return with_tensors(dense, with_rope(planned, rope), tensors)


def layer_inputs(
    read: Read, dense: ModelConfig, config: ConvertConfig, statistics: Statistics | None
) -> LayerInputs:
    """Give weights and evidence of a layer, each tensor read once.

    Args:
        read: Reads a tensor of the dense model by native name.
        dense: Config of the dense model.
        config: The conversion.
        statistics: Calibration of every layer; None assumes evidence for inits that need it.
    """
    phases = deployed_phases(dense)

    def inputs(layer: int) -> tuple[KVWeights, Evidence | None]:
        weights = layer_weights(read, layer, dense.geometry.num_heads)
        if config.init not in DATA_INITS:
            return weights, None
        if statistics is None:
            return weights, assume_evidence(weights, phases)
        return weights, layer_evidence(statistics(layer), weights, phases)

    return inputs


def layer_evidence(measured: LayerStatistics, weights: KVWeights, phases: Tensor) -> Evidence:
    """Join the statistics of past and own chunk: an MLA layer compresses the keys of both.

    Args:
        measured: Statistics of the layer.
        weights: Weights of the dense layer.
        phases: Expected phases, from `deployed_phases`.
    """
    return join_evidence([measured.past, *measured.own], weights, phases)


def factor_layer(
    weights: KVWeights,
    evidence: Evidence | None,
    ranks: RankPlan,
    config: ConvertConfig,
    layer: int,
) -> Factors:
    """Factor one layer to the sizes in a plan."""
    shape = LayerShape(
        config.latent,
        ranks.kv_lora_rank[layer],
        ranks.rope_pairs[layer],
        ranks.key_ranks[layer] if ranks.key_ranks else None,
    )
    return INITS[config.init](weights, shape, evidence, seeded(config.seed, layer, "init"))


def latent_tensors(factors: Factors, weights: KVWeights, layer: int) -> dict[str, Tensor]:
    """New parameters of one layer by full name, float32."""
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
        "k_norm_proj.weight": weights.raw_key,
        "k_norm_proj.bias": weights.raw_key_bias,
    }
    prefix = f"blocks.{layer}.self_attn."
    return {prefix + name: tensor.float().contiguous() for name, tensor in tensors.items()}


def planned_config(dense: ModelConfig, config: ConvertConfig, ranks: RankPlan) -> ModelConfig:
    """Config of the converted model, with placeholders for the rope pairs."""
    pairs = tuple((0,) * count for count in ranks.rope_pairs)
    mla = MLAConfig(ranks.kv_lora_rank, pairs, config.init, config.latent, ranks.key_ranks)
    return replace(dense, mla=mla)


class LayerRope(NamedTuple):
    """Rope pairs that a factored layer chose, and phases folded into the layer's content.

    Attributes:
        pairs: Rope pairs.
        phases: Angle and length by head and pair, to four digits; a record, not an input. None when
            no phase was folded.
    """

    pairs: tuple[int, ...]
    phases: tuple[tuple[tuple[float, float], ...], ...] | None

    @classmethod
    def of(cls, factors: Factors) -> LayerRope:
        """Take pairs and phases from a factored layer."""
        pairs, phases = tuple(factors.rope.pairs.tolist()), factors.phases
        if phases is None:
            return cls(pairs, None)
        polar = torch.stack([phases.angle(), phases.abs()], -1).tolist()
        return cls(pairs, _tuples(polar))

    @classmethod
    def from_json(
        cls, pairs: list[int], phases: list[list[tuple[float, float]]] | None
    ) -> LayerRope:
        """Rebuild from a record that JSON kept as lists."""
        return cls(tuple(pairs), None if phases is None else _tuples(phases))


def with_rope(planned: ModelConfig, rope: list[LayerRope]) -> ModelConfig:
    """Fill the rope pairs and phases of all layers into a planned config."""
    assert planned.mla is not None
    pairs = tuple(layer.pairs for layer in rope)
    phases = tuple(layer.phases for layer in rope if layer.phases is not None)
    return replace(planned, mla=replace(planned.mla, rope_pairs=pairs, phases=phases))


def _tuples(
    phases: list[list[tuple[float, float]]],
) -> tuple[tuple[tuple[float, float], ...], ...]:
    return tuple(tuple((round(a, 4), round(r, 4)) for a, r in head) for head in phases)
