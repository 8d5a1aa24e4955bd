"""Convert a dense checkpoint: factor each layer's keys and values, write a folder that reloads.

Everything but self-attention keeps its bytes. `plan_conversion` refuses what cannot be done before
the first byte is written.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
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
from vmla_convert.config import ConvertConfig, Geometry, MLAConfig, ModelConfig, to_dict
from vmla_convert.errors import CheckpointError, ConfigError, OutputError, did_you_mean
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.factor import INITS, Budget, Evidence, Factors, KVWeights
from vmla_convert.pipelines.calibrate import calibrate
from vmla_convert.pipelines.codecs import require_demo_codec
from vmla_convert.pipelines.data import open_clips, seeded
from vmla_convert.pipelines.load import build, checkpoint_path, compute_device
from vmla_convert.pipelines.publish import model_card
from vmla_convert.progress import Progress, Silent

Read = Callable[[str], Tensor]

# The dense parameters that a converted layer no longer has.
_DROPPED = ("k.weight", "k.bias", "v.weight", "v.bias", "norm_k.weight")


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will do, known before any arithmetic.

    Attributes:
        config: Of the converted model; its rope pairs are placeholders until layers are factored.
        budget: Numbers per token, the same for every layer.
        kept: Names of tensors that keep their bytes.
        specs: Every tensor that will be written, in writing order.
    """

    config: ModelConfig
    budget: Budget
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
        config: Init, sizes and calibration; the defaults are an eighth of the width for R, a
            quarter of a head for the rope key, and calibration.
        progress: Where to draw.

    Raises:
        CheckpointError: The source cannot be read, is of no known layout, or is converted already.
        ConfigError: The init or a size does not fit the model.
        OutputError: `out` is taken.
    """
    started = perf_counter()
    config, progress = config or ConvertConfig(), progress or Silent()
    checkpoint = open_checkpoint(checkpoint_path(source))
    plan = plan_conversion(checkpoint, config)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise OutputError(f"{out} exists already", "choose another -o, or remove it")
    evidence = _gather_evidence(checkpoint, config, progress)
    pairs: list[tuple[int, ...]] = []
    factor_seconds = 0.0
    with CheckpointWriter(out, plan.specs) as writer:
        for name in plan.kept:
            writer.add(name, checkpoint.read(name))
        for layer in progress.track(range(plan.config.geometry.num_layers), "factoring"):
            factor_started = perf_counter()
            factors = factor_layer(checkpoint.read, plan, config, layer, evidence)
            factor_seconds += perf_counter() - factor_started
            pairs.append(factors.rope_pairs)
            for name, tensor in latent_tensors(factors, checkpoint.read, layer).items():
                writer.add(name, tensor)
        final = with_rope_pairs(plan.config, pairs)
        seconds, peak = perf_counter() - started, peak_rss_bytes()
        name = Path(source).name
        writer.write_json("config.json", converted_config(final))
        writer.write_json("conversion.json", _provenance(name, checkpoint, config, seconds, peak))
        writer.write_text("README.md", model_card(final, name))
    return Conversion(out, final, seconds, factor_seconds, peak)


def plan_conversion(checkpoint: OpenCheckpoint, config: ConvertConfig) -> ConversionPlan:
    """Check that a conversion can be done, and say what it will write.

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
    if config.init not in INITS:
        raise ConfigError(f"unknown init '{config.init}'", did_you_mean(config.init, INITS))
    if config.init == "calibrated" and config.data.source == "demo":
        require_demo_codec(dense, "calibration on the demo world")
    budget = layer_budget(dense.geometry, config)
    planned = planned_config(dense, config.init, budget)
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
    return ConversionPlan(planned, budget, kept, written)


def layer_budget(geometry: Geometry, config: ConvertConfig) -> Budget:
    """Sizes asked for, or the paper's shares: an eighth of the width, a quarter of a head.

    Raises:
        ConfigError: A size is out of range for this geometry.
    """
    rank = geometry.dim // 8 if config.kv_lora_rank is None else config.kv_lora_rank
    rope = config.qk_rope_head_dim
    if rope is None:
        rope = 2 * (geometry.head_dim // 8)
    if not 1 <= rank <= geometry.dim:
        raise ConfigError(
            f"kv_lora_rank {rank} is not between 1 and the model's width {geometry.dim}",
            f"try --kv-lora-rank {geometry.dim // 8}",
        )
    if rope % 2 or not 2 <= rope <= geometry.head_dim:
        raise ConfigError(
            f"qk_rope_head_dim {rope} is not an even number between 2 and {geometry.head_dim}",
            f"try --qk-rope-head-dim {2 * (geometry.head_dim // 8)}",
        )
    return Budget(rank, rope // 2)


def planned_config(dense: ModelConfig, init: str, budget: Budget) -> ModelConfig:
    """The converted model's config, with placeholders for the rope pairs."""
    layers = dense.geometry.num_layers
    pairs = tuple(range(budget.rope_pairs))
    mla = MLAConfig((budget.kv_lora_rank,) * layers, (pairs,) * layers, init)
    return replace(dense, mla=mla)


def with_rope_pairs(planned: ModelConfig, pairs: list[tuple[int, ...]]) -> ModelConfig:
    """The planned config with the pairs that the layers chose."""
    assert planned.mla is not None
    return replace(planned, mla=replace(planned.mla, rope_pairs=tuple(pairs)))


def convert_model(
    teacher: CausalWanModel, config: ConvertConfig, evidence: list[Evidence] | None
) -> CausalWanModel:
    """The same conversion in memory, for sweeps; `evidence` is shared by all their points."""
    budget = layer_budget(teacher.config.geometry, config)
    planned = planned_config(teacher.config, config.init, budget)
    state = teacher.state_dict()
    plan = ConversionPlan(planned, budget, (), {})
    pairs: list[tuple[int, ...]] = []
    tensors = {
        name: tensor.clone()
        for name, tensor in state.items()
        if not (".self_attn." in name and name.endswith(_DROPPED))
    }
    for layer in range(planned.geometry.num_layers):
        factors = factor_layer(state.__getitem__, plan, config, layer, evidence)
        pairs.append(factors.rope_pairs)
        tensors |= latent_tensors(factors, state.__getitem__, layer)
    device = teacher.patch_embedding.weight.device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = CausalWanModel(with_rope_pairs(planned, pairs))
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
    return INITS[config.init](
        layer_weights(read, layer, plan.config.geometry.num_heads),
        plan.budget,
        evidence[layer] if evidence else None,
        seeded(config.seed, layer, "init"),
    )


def layer_weights(read: Read, layer: int, num_heads: int) -> KVWeights:
    """Key and value weights of one dense layer, the norm's gain folded into the key; float64."""

    def tensor(name: str) -> Tensor:
        # Factoring is float64 on the CPU, wherever the model lives.
        return read(f"blocks.{layer}.self_attn.{name}").cpu().double()

    gain = tensor("norm_k.weight")
    return KVWeights(
        key=gain[:, None] * tensor("k.weight"),
        key_bias=gain * tensor("k.bias"),
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
        "k_rope_proj.weight": factors.k_rope_proj,
        "k_rope_proj.bias": factors.k_rope_bias,
        "q_rope_map": factors.q_rope_map,
        "k_norm_proj.weight": read(f"{prefix}k.weight"),
        "k_norm_proj.bias": read(f"{prefix}k.bias"),
    }
    return {prefix + name: tensor.float().contiguous() for name, tensor in tensors.items()}


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gather_evidence(
    checkpoint: OpenCheckpoint, config: ConvertConfig, progress: Progress
) -> list[Evidence] | None:
    if config.init != "calibrated":
        return None
    clips = open_clips(config.data, checkpoint.config.cache.sink_frames)
    model = build(checkpoint, compute_device())
    return calibrate(model, clips, config.calibration_clips, config.seed, progress)


def _provenance(
    name: str, checkpoint: OpenCheckpoint, config: ConvertConfig, seconds: float, peak: int
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
        "versions": {
            "vmla_convert": __version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "convert_seconds": seconds,
        "peak_rss_bytes": peak,
    }
