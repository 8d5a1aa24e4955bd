"""Write tiny checkpoints in the file form of each family's own programs.

A writer takes native tensors, and returns the path that a user would give. Sources: the loaders and
trainers that `vmla_convert.checkpoint.known` names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conftest import noise
from safetensors.torch import save_file

from vmla_convert.checkpoint.keymap import DIFFUSERS_RULES, FPS, invert, to_native
from vmla_convert.config import Geometry

Tensors = dict[str, torch.Tensor]

# The head width is Wan's, so that files without a config.json can be read.
GEOMETRY = Geometry(
    dim=128,
    ffn_dim=96,
    num_heads=1,
    num_layers=2,
    in_dim=16,
    out_dim=16,
    freq_dim=32,
    text_dim=24,
)
WEIGHTS = "diffusion_pytorch_model"


def native_config(geometry: Geometry = GEOMETRY, **changes: object) -> dict[str, Any]:
    """Wan's config.json, which leaves out patch_size, text_dim, qk_norm and cross_attn_norm."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "model_type": "t2v",
        "text_len": geometry.text_len,
        "in_dim": geometry.in_dim,
        "dim": geometry.dim,
        "ffn_dim": geometry.ffn_dim,
        "freq_dim": geometry.freq_dim,
        "out_dim": geometry.out_dim,
        "num_heads": geometry.num_heads,
        "num_layers": geometry.num_layers,
        "eps": geometry.eps,
        **changes,
    }


def diffusers_config(geometry: Geometry = GEOMETRY, **changes: object) -> dict[str, Any]:
    """The config.json of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.36.0",
        "added_kv_proj_dim": None,
        "attention_head_dim": geometry.head_dim,
        "cross_attn_norm": True,
        "eps": geometry.eps,
        "ffn_dim": geometry.ffn_dim,
        "freq_dim": geometry.freq_dim,
        "image_dim": None,
        "in_channels": geometry.in_dim,
        "num_attention_heads": geometry.num_heads,
        "num_layers": geometry.num_layers,
        "out_channels": geometry.out_dim,
        "patch_size": list(geometry.patch_size),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": geometry.text_dim,
        **changes,
    }


def to_diffusers(tensors: Tensors) -> Tensors:
    """Native tensors under diffusers' names."""
    names = to_native(tensors, invert(DIFFUSERS_RULES + FPS))
    return {foreign: tensors[native] for foreign, native in names.items()}


def fused(tensors: Tensors, whole: str, parts: tuple[str, ...]) -> Tensors:
    """Stack the rows of some layers into one layer."""
    rest = dict(tensors)
    for name in tensors:
        stem, found, kind = name.rpartition(f".{parts[0]}.")
        if found:
            stacked = [rest.pop(f"{stem}.{part}.{kind}") for part in parts]
            rest[f"{stem}.{whole}.{kind}"] = torch.cat(stacked)
    return rest


def write_json(file: Path, table: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(table))


def write_weights(folder: Path, tensors: Tensors, name: str = WEIGHTS, shards: int = 1) -> Path:
    """Write one safetensors file, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / f"{name}.safetensors")
        return folder
    files = [f"{name}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {tensor: files[i % shards] for i, tensor in enumerate(tensors)}
    for file in files:
        save_file({t: tensors[t] for t in tensors if weight_map[t] == file}, folder / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{name}.safetensors.index.json", index)
    return folder


def write_pickle(file: Path, content: Mapping[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(content), file)
    return file


def write_header(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """Write a sparse safetensors file of zeros, which takes no disk space at any size."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * 2
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / f"{WEIGHTS}.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def wrap(tensors: Tensors, prefix: str, inside: Mapping[str, str] | None = None) -> Tensors:
    """Put a prefix before all names, and wrappers after some parts of the names."""
    wrapped = tensors
    for part, infix in (inside or {}).items():
        wrapped = {name.replace(part, part + infix): t for name, t in wrapped.items()}
    return {prefix + name: tensor for name, tensor in wrapped.items()}


def other(tensors: Tensors) -> Tensors:
    """Another model of the same shapes, as a critic, an expert or weights before averaging."""
    return {name: tensor.neg() for name, tensor in tensors.items()}


def write_wan(folder: Path, tensors: Tensors, config: object = None, shards: int = 1) -> Path:
    """Write a folder like Wan's own repositories, with text encoder and VAE beside the model."""
    write_json(folder / "config.json", native_config() if config is None else config)
    for file in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        (folder / file).write_bytes(b"not read")
    return write_weights(folder, tensors, shards=shards)


def write_a14b(folder: Path, tensors: Tensors) -> Path:
    """Write Wan 2.2's two experts; the tensors are those of the expert for high noise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Wan2.1_VAE.pth").write_bytes(b"not read")
    for name, weights in (("high_noise_model", tensors), ("low_noise_model", other(tensors))):
        write_json(folder / name / "config.json", native_config())
        write_weights(folder / name, weights, shards=2)
    return folder


def write_diffusers(folder: Path, tensors: Tensors, config: object = None, shards: int = 1) -> Path:
    """Write a diffusers pipeline."""
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline"})
    write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKLWan"})
    inner = folder / "transformer"
    write_json(inner / "config.json", diffusers_config() if config is None else config)
    write_weights(inner, to_diffusers(tensors), shards=shards)
    return folder


def write_fused_diffusers(folder: Path, tensors: Tensors) -> Path:
    write_json(folder / "config.json", diffusers_config())
    named = to_diffusers(tensors)
    named = fused(named, "attn1.to_qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"))
    return write_weights(folder, fused(named, "attn2.to_kv", ("attn2.to_k", "attn2.to_v")))


def frame_rate_tensors(dim: int = GEOMETRY.dim) -> Tensors:
    """SkyReels' embedding of the frame rate, under native names."""
    shapes = {
        "fps_embedding.weight": (2, dim),
        "fps_projection.0.weight": (dim, dim),
        "fps_projection.0.bias": (dim,),
        "fps_projection.2.weight": (6 * dim, dim),
        "fps_projection.2.bias": (6 * dim,),
    }
    return {
        name: noise(*shape, seed=70 + i) * (dim**-0.5 if len(shape) == 2 else 0.4)
        for i, (name, shape) in enumerate(shapes.items())
    }


def with_frame_rate(tensors: Tensors) -> Tensors:
    """The native model that equals a SkyReels model at its 24 frames per second."""
    rate = frame_rate_tensors()
    hidden = F.silu(
        rate["fps_projection.0.weight"] @ rate["fps_embedding.weight"][1]
        + rate["fps_projection.0.bias"]
    )
    shift = rate["fps_projection.2.weight"] @ hidden + rate["fps_projection.2.bias"]
    name = "time_projection.1.bias"
    return {**tensors, name: tensors[name] + shift}


def write_skyreels(folder: Path, tensors: Tensors) -> Path:
    config = native_config(_class_name="WanModel", inject_sample_info=True)
    write_json(folder / "config.json", config)
    return write_weights(folder, tensors | frame_rate_tensors(), "model", shards=2)


def write_skyreels_diffusers(folder: Path, tensors: Tensors) -> Path:
    config = diffusers_config(
        _class_name="SkyReelsV2Transformer3DModel", inject_sample_info=True, num_frame_per_block=1
    )
    return write_diffusers(folder, tensors | frame_rate_tensors(), config)


def write_self_forcing(folder: Path, tensors: Tensors) -> Path:
    file = folder / "checkpoints" / "self_forcing_dmd.pt"
    return write_pickle(file, {"generator_ema": wrap(tensors, "model.")})


def write_rolling_forcing(folder: Path, tensors: Tensors) -> Path:
    content = {
        "generator": wrap(other(tensors), "model."),
        "generator_ema": wrap(
            tensors,
            "model._fsdp_wrapped_module.",
            {"blocks.1.": "_fsdp_wrapped_module.", "ffn.": "_checkpoint_wrapped_module."},
        ),
    }
    return write_pickle(folder / "checkpoints" / "rolling_forcing_dmd.pt", content)


def write_causal_forcing(folder: Path, tensors: Tensors) -> Path:
    content = {
        "generator": wrap(tensors, "model._fsdp_wrapped_module."),
        "generator_ema": wrap(other(tensors), "_orig_mod.model.", {"self_attn.": "_orig_mod."}),
    }
    return write_pickle(folder / "framewise" / "causal_forcing.pt", content)


def write_causvid(folder: Path, tensors: Tensors) -> Path:
    content = {
        "critic": wrap(other(tensors), "model."),
        "generator": wrap(tensors, "model."),
    }
    return write_pickle(folder / "autoregressive_checkpoint" / "model.pt", content)


LORA_RANK = 4
# LongLive's LoRA changes every linear layer inside the blocks.
LORA_TARGETS = (
    *(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"),
    "ffn.0",
    "ffn.2",
)


def lora_factors(tensors: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(down, up) of every module; float32 holds their products without rounding."""
    modules = [f"blocks.{i}.{t}" for i in range(GEOMETRY.num_layers) for t in LORA_TARGETS]
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for seed, module in enumerate(modules):
        rows, columns = tensors[f"{module}.weight"].shape
        down, up = noise(LORA_RANK, columns, seed=seed), noise(rows, LORA_RANK, seed=seed + 500)
        factors[module] = down.round() / 8, up.round() / 8
    return factors


def with_lora(tensors: Tensors) -> Tensors:
    """Native tensors with the LoRA of `write_longlive` merged; alpha equals the rank."""
    changed = {
        f"{module}.weight": tensors[f"{module}.weight"] + up @ down
        for module, (down, up) in lora_factors(tensors).items()
    }
    return tensors | changed


def write_longlive(folder: Path, tensors: Tensors) -> Path:
    """Write the base model, and beside it `lora.pt` with PEFT's names."""
    lora: Tensors = {}
    for module, (down, up) in lora_factors(tensors).items():
        lora[f"base_model.model.{module}.lora_A.weight"] = down
        lora[f"base_model.model.{module}.lora_B.weight"] = up
    write_pickle(folder / "models" / "lora.pt", {"generator_lora": lora, "step": 3000})
    base = {"generator": wrap(tensors, "model.")}
    return write_pickle(folder / "models" / "longlive_base.pt", base)


def write_krea(folder: Path, tensors: Tensors) -> Path:
    """Write one file, and the same model under native names in `transformer/`."""
    inner = folder / "transformer"
    write_json(inner / "config.json", native_config())
    write_weights(inner, tensors, shards=3)
    (inner / "causal_model.py").write_text("raise SystemExit\n")
    write_weights(folder, wrap(tensors, "model."), "krea-realtime-video-14b")
    return folder / "krea-realtime-video-14b.safetensors"


_SELF_QKV = ("self_attn.q", "self_attn.k", "self_attn.v")


@dataclass(frozen=True)
class Form:
    """A file form of checkpoints.

    Attributes:
        family: Family that the form is recognised as.
        write: Writes the form from native tensors.
        is_equal_to: Computes the native tensors that the form equals.
        key: State dict that the user has to name.
        lora: File name of a LoRA beside the checkpoint.
    """

    family: str
    write: Callable[[Path, Tensors], Path]
    is_equal_to: Callable[[Tensors], Tensors] = dict
    key: str | None = None
    lora: str | None = None


FORMS = {
    "Wan": Form("wan", write_wan),
    "Wan in shards": Form("wan", lambda f, t: write_wan(f, t, shards=3)),
    "Wan 2.2, high noise": Form("wan", lambda f, t: write_a14b(f, t) / "high_noise_model"),
    "diffusers": Form("diffusers", write_diffusers),
    "diffusers, fused": Form("diffusers", write_fused_diffusers),
    "SkyReels": Form("skyreels", write_skyreels, with_frame_rate),
    "SkyReels, diffusers": Form("skyreels_diffusers", write_skyreels_diffusers, with_frame_rate),
    "Self-Forcing": Form("self_forcing", write_self_forcing),
    "Rolling Forcing": Form("self_forcing", write_rolling_forcing),
    "Rolling Forcing, not averaged": Form(
        "self_forcing", write_rolling_forcing, other, key="generator"
    ),
    "Causal-Forcing": Form("self_forcing", write_causal_forcing, key="generator"),
    "CausVid": Form("self_forcing", write_causvid),
    "LongLive": Form("self_forcing", write_longlive),
    "LongLive with its LoRA": Form("self_forcing", write_longlive, with_lora, lora="lora.pt"),
    "Reward-Forcing": Form(
        "self_forcing", lambda f, t: write_pickle(f / "rewardforcing.pt", wrap(t, "model."))
    ),
    "a trainer's DDP": Form(
        "self_forcing", lambda f, t: write_pickle(f / "m.pt", {"model": wrap(t, "module.model.")})
    ),
    "a flat pickle": Form("wan", lambda f, t: write_pickle(f / "m.pt", t)),
    "Krea": Form("self_forcing", write_krea),
    "Krea's folder": Form("wan", lambda f, t: write_krea(f, t).parent / "transformer"),
    "Krea, fused": Form(
        "self_forcing",
        lambda f, t: write_weights(f, wrap(fused(t, "self_attn.to_qkv", _SELF_QKV), "model.")),
    ),
    "ComfyUI": Form(
        "self_forcing", lambda f, t: write_weights(f, wrap(t, "model.diffusion_model."), "wan")
    ),
}
