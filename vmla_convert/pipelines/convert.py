"""Convert a dense checkpoint: factor each layer's keys and values, write a folder that reloads.

Everything but self-attention keeps its bytes. `plan_conversion` refuses what cannot be done before
the first byte is written.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from vmla_convert import __version__
from vmla_convert.checkpoint.families import OpenCheckpoint, converted_config, open_checkpoint
from vmla_convert.checkpoint.source import TensorSpec, fingerprint
from vmla_convert.checkpoint.writer import CheckpointWriter
from vmla_convert.config import (
    PAPER_LAYER,
    ConvertConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    RankPlan,
    from_dict,
    to_dict,
)
from vmla_convert.errors import CheckpointError, ConfigError, OutputError, did_you_mean
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.factor import DATA_INITS, INITS, assume_evidence, join_evidence
from vmla_convert.maths.moments import as_channels
from vmla_convert.maths.projections import Evidence, Factors, KVWeights, LayerShape
from vmla_convert.pipelines.calibrate import LayerReads, calibrate, deployed_phases
from vmla_convert.pipelines.codecs import require_demo_codec
from vmla_convert.pipelines.data import open_clips, seeded
from vmla_convert.pipelines.load import build_shell, checkpoint_path, compute_device, read_block
from vmla_convert.pipelines.plan import check_sizes, plan_ranks, uniform_plan
from vmla_convert.pipelines.publish import model_card
from vmla_convert.progress import Progress, Silent

Read = Callable[[str], Tensor]


PRESETS = {"videomla": ConvertConfig(init="spectral", layer=PAPER_LAYER, ranks="uniform")}
"""The paper: its layer with the exact key norm, its init, its shares of 192 + 32 numbers."""


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will do, known before any arithmetic.

    Attributes:
        config: Of the converted model; its rope pairs and phases are placeholders until its layers
            are factored.
        ranks: Sizes of every layer.
        kept: Names of tensors that keep their bytes.
        specs: Every tensor that will be written, in writing order.
    """

    config: ModelConfig
    ranks: RankPlan
    kept: tuple[str, ...]
    specs: dict[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that will be written."""
        return sum(
            torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in self.specs.values()
        )


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        out: The folder.
        config: Of the converted model.
        convert_seconds: The whole command.
        factor_seconds: The part spent on factorisation.
        peak_rss_bytes: Largest resident size of the process so far.
    """

    out: Path
    config: ModelConfig
    convert_seconds: float
    factor_seconds: float
    peak_rss_bytes: int


def convert(
    source: str | Path,
    out: Path,
    config: ConvertConfig | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a dense checkpoint into a folder that `load` and `generate` take.

    Args:
        source: Checkpoint file or folder, or `demo`.
        out: Folder to write; it appears whole or not at all.
        config: Init, layer, sizes and calibration.
        progress: Where to draw.

    Raises:
        CheckpointError: The source cannot be read, is of no known layout, or is converted already.
        ConfigError: The init or a size does not fit the model.
        OutputError: `out` is taken.
    """
    started = perf_counter()
    config, progress = config or ConvertConfig(), progress or Silent()
    checkpoint = open_checkpoint(checkpoint_path(source))
    plan_conversion(checkpoint, config)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise OutputError(f"{out} exists already", "choose another -o, or remove it")
    evidence = gather_evidence(checkpoint, config, progress)
    factor_started = perf_counter()
    heads = checkpoint.config.geometry.num_heads
    ranks = plan_ranks(
        checkpoint.config,
        config,
        lambda layer: layer_weights(checkpoint.read, layer, heads),
        evidence,
        progress,
    )
    factor_seconds = perf_counter() - factor_started
    plan = plan_conversion(checkpoint, config, ranks)
    layers: list[Factors] = []
    with CheckpointWriter(out, plan.specs) as writer:
        for name in plan.kept:
            writer.add(name, checkpoint.read(name))
        for layer in progress.track(range(plan.config.geometry.num_layers), "factoring"):
            factor_started = perf_counter()
            factors = factor_layer(checkpoint.read, plan, config, layer, evidence)
            factor_seconds += perf_counter() - factor_started
            for name, tensor in latent_tensors(
                factors, checkpoint.read, plan.config, layer
            ).items():
                writer.add(name, tensor)
            layers.append(_without_weights(factors))
        final = with_branches(plan.config, layers)
        seconds, peak = perf_counter() - started, peak_rss_bytes()
        name = Path(source).name
        provenance = _provenance(name, checkpoint, config, ranks, seconds, peak)
        writer.write_json("config.json", converted_config(final))
        writer.write_json("conversion.json", provenance)
        writer.write_text("README.md", model_card(final, name))
    return Conversion(out, final, seconds, factor_seconds, peak)


def convert_config(
    preset: str | None,
    layer: Mapping[str, str | None],
    sizes: Mapping[str, Any],
    others: Mapping[str, Any],
) -> ConvertConfig:
    """A config from what a user typed; None means that it was left out.

    Args:
        preset: `videomla` starts from the paper's layer, init and shares.
        layer: Fields of `LayerConfig`.
        sizes: Cache sizes.
        others: Further fields of `ConvertConfig`.

    Raises:
        ConfigError: An unknown preset, or a value that its field cannot have.
    """
    if preset not in (None, *PRESETS):
        raise ConfigError(f"unknown preset '{preset}'", did_you_mean(str(preset), PRESETS))
    base = PRESETS[preset] if preset else ConvertConfig()
    typed = {name: value for name, value in {**sizes, **others}.items() if value is not None}
    plain = {name: to_dict(v) if name == "plan" else v for name, v in typed.items()}
    chosen = {name: value for name, value in layer.items() if value is not None}
    return from_dict(
        ConvertConfig, {**to_dict(base), **plain, "layer": {**to_dict(base.layer), **chosen}}
    )


def read_plan(path: Path) -> RankPlan:
    """The sizes that an earlier conversion chose, from its folder or its conversion.json.

    Raises:
        ConfigError: There is no plan.
    """
    file = path / "conversion.json" if path.is_dir() else path
    try:
        return from_dict(RankPlan, json.loads(file.read_text())["plan"], "plan")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no plan", "give the folder of a conversion, or its conversion.json"
        ) from error


def plan_conversion(
    checkpoint: OpenCheckpoint, config: ConvertConfig, ranks: RankPlan | None = None
) -> ConversionPlan:
    """Check that a conversion can be done, and say what it will write.

    Args:
        checkpoint: The dense model.
        config: The conversion.
        ranks: Sizes of every layer; by default the same for all, as long as no layer is measured.

    Raises:
        CheckpointError: The checkpoint is converted already.
        ConfigError: The init or a size does not fit the model.
    """
    dense = checkpoint.config
    if dense.mla is not None:
        raise CheckpointError(
            f"{checkpoint.source.path} is converted already",
            "convert the dense checkpoint that it came from",
        )
    check_sizes(dense, config)
    if _measures(config) and config.data.source == "demo":
        require_demo_codec(dense, "calibration on the demo world")
    ranks = ranks or uniform_plan(dense, config)
    planned = planned_config(dense, config, ranks)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in CausalWanModel(planned).state_dict().items()}
    specs = checkpoint.specs()
    kept = tuple(name for name in shapes if name in specs)
    # New projections stay in float32: they are small, and recovery trains them.
    written = {name: specs[name] for name in kept}
    written |= {
        name: TensorSpec(tuple(shape), torch.float32)
        for name, shape in shapes.items()
        if name not in specs
    }
    return ConversionPlan(planned, ranks, kept, written)


def planned_config(dense: ModelConfig, config: ConvertConfig, ranks: RankPlan) -> ModelConfig:
    """The converted model's config, with placeholders for the rope pairs."""
    pairs = tuple(tuple(range(count)) for count in ranks.rope_pairs)
    mla = MLAConfig(ranks.kv_lora_rank, pairs, config.init, config.layer, ranks.key_ranks)
    return replace(dense, mla=mla)


def with_branches(planned: ModelConfig, layers: list[Factors]) -> ModelConfig:
    """The planned config with the rope pairs and phases that the layers chose."""
    assert planned.mla is not None
    pairs = tuple(tuple(f.rope.pairs.tolist()) if f.rope else () for f in layers)
    phases = tuple(_polar(f.phases) for f in layers if f.phases is not None)
    return replace(planned, mla=replace(planned.mla, rope_pairs=pairs, phases=phases))


def convert_model(
    teacher: CausalWanModel, config: ConvertConfig, evidence: list[Evidence] | None
) -> CausalWanModel:
    """The same conversion in memory, for sweeps.

    Args:
        teacher: The dense model.
        config: The conversion.
        evidence: Of every layer, for the current chunk that the config has; None where the init
            looks at none.
    """
    check_sizes(teacher.config, config)
    state = teacher.state_dict()
    heads = teacher.config.geometry.num_heads
    ranks = plan_ranks(
        teacher.config,
        config,
        lambda layer: layer_weights(state.__getitem__, layer, heads),
        evidence,
    )
    planned = planned_config(teacher.config, config, ranks)
    with torch.device("meta"):
        expected = CausalWanModel(planned).state_dict()
    plan = ConversionPlan(planned, ranks, (), {})
    layers: list[Factors] = []
    tensors = {name: tensor.clone() for name, tensor in state.items() if name in expected}
    for layer in range(planned.geometry.num_layers):
        factors = factor_layer(state.__getitem__, plan, config, layer, evidence)
        layers.append(factors)
        tensors |= latent_tensors(factors, state.__getitem__, planned, layer)
    device = teacher.patch_embedding.weight.device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = CausalWanModel(with_branches(planned, layers))
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def factor_layer(
    read: Read,
    plan: ConversionPlan,
    config: ConvertConfig,
    layer: int,
    evidence: list[Evidence] | None,
) -> Factors:
    """Factor one layer under the plan."""
    ranks = plan.ranks
    shape = LayerShape(
        config.layer,
        ranks.kv_lora_rank[layer],
        ranks.rope_pairs[layer],
        ranks.key_ranks[layer] if ranks.key_ranks else None,
    )
    return INITS[config.init](
        layer_weights(read, layer, plan.config.geometry.num_heads),
        shape,
        evidence[layer] if evidence else None,
        seeded(config.seed, layer, "init"),
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


def latent_tensors(
    factors: Factors, read: Read, config: ModelConfig, layer: int
) -> dict[str, Tensor]:
    """The new parameters of one layer by full name, float32."""
    assert config.mla is not None
    prefix, choices = f"blocks.{layer}.self_attn.", config.mla.layer
    tensors = {
        "kv_a_proj.weight": factors.kv_a_proj,
        "kv_a_proj.bias": factors.kv_a_bias,
        "kv_b_proj_k.weight": factors.kv_b_proj_k,
        "kv_b_proj_k.bias": factors.kv_b_bias_k,
        "kv_b_proj_v.weight": factors.kv_b_proj_v,
        "kv_b_proj_v.bias": factors.kv_b_bias_v,
    }
    if factors.rope is not None:
        tensors |= {
            "k_rope_proj.weight": as_channels(factors.rope.rows.mT).mT,
            "k_rope_proj.bias": as_channels(factors.rope.offsets),
            "q_rope_map": factors.rope.query_map,
        }
    if factors.norm is not None:
        tensors["k_norm_floor"] = factors.norm.floor
    if factors.norm is not None and choices.k_norm == "latent":
        tensors |= {
            "k_norm_latent.weight": factors.norm.weight,
            "k_norm_latent.bias": factors.norm.bias,
        }
    if choices.current_chunk == "latent" and choices.k_norm == "stored":
        tensors |= {
            "k_norm_proj.weight": read(f"{prefix}k.weight"),
            "k_norm_proj.bias": read(f"{prefix}k.bias"),
        }
    return {prefix + name: tensor.float().contiguous() for name, tensor in tensors.items()}


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gather_evidence(
    checkpoint: OpenCheckpoint, config: ConvertConfig, progress: Progress
) -> list[Evidence] | None:
    """What the init needs to know of every layer; the dense model is read block by block."""
    model = checkpoint.config
    if config.init not in DATA_INITS:
        return None
    layers = range(model.geometry.num_layers)

    def weights(layer: int) -> KVWeights:
        return layer_weights(checkpoint.read, layer, model.geometry.num_heads)

    phases = deployed_phases(model)
    if not config.calibrate:
        return [assume_evidence(weights(layer), phases) for layer in layers]
    device = compute_device()
    measured = calibrate(
        build_shell(checkpoint, device),
        lambda layer: read_block(checkpoint, layer, device),
        open_clips(config.data, model.cache.sink_frames),
        config.calibration_clips,
        config.seed,
        progress,
    )
    return [
        layer_evidence(measured[layer], weights(layer), config.layer, phases) for layer in layers
    ]


def layer_evidence(
    measured: LayerReads, weights: KVWeights, layer: LayerConfig, phases: Tensor
) -> Evidence:
    """Evidence for a layer that reads its past from latents, or its own chunk too.

    Args:
        measured: Of this layer.
        weights: Of the dense layer.
        layer: What is made of it.
        phases: From `deployed_phases`.
    """
    own = measured.own if layer.current_chunk == "latent" else []
    return join_evidence([measured.past, *own], weights, phases)


def _measures(config: ConvertConfig) -> bool:
    return config.calibrate and config.init in DATA_INITS


def _without_weights(factors: Factors) -> Factors:
    """What the config wants of a layer whose tensors are written."""
    none = torch.empty(0)
    return Factors(none, none, none, none, none, none, factors.rope, None, factors.phases)


def _polar(phases: Tensor) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Angle and length of phases (H, D/2), to four digits: they are a record, not an input."""
    return tuple(
        tuple((round(angle, 4), round(length, 4)) for angle, length in zip(a, b, strict=True))
        for a, b in zip(phases.angle().tolist(), phases.abs().tolist(), strict=True)
    )


def _provenance(
    name: str,
    checkpoint: OpenCheckpoint,
    config: ConvertConfig,
    ranks: RankPlan,
    seconds: float,
    peak: int,
) -> dict[str, Any]:
    """What made the folder, for people and for later commands."""
    return {
        "source": {
            "name": name,
            "sha256": fingerprint(checkpoint.source.path),
            "state_key": checkpoint.source.key,
            "family": checkpoint.family,
        },
        "convert": to_dict(config),
        "plan": to_dict(ranks),
        "versions": {
            "vmla_convert": __version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "convert_seconds": seconds,
        "peak_rss_bytes": peak,
    }
