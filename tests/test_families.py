"""One model in every family's exact form reads back as the same native tensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vmla_convert.checkpoint.families import (
    FAMILIES,
    converted_config,
    native_shapes,
    open_checkpoint,
)
from vmla_convert.checkpoint.keymap import DIFFUSERS_RULES, TEXT_TO_VIDEO, fill, invert, to_native
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import CachePolicy, Geometry, MLAConfig, ModelConfig, SamplerConfig
from vmla_convert.errors import CheckpointError

GEOMETRY = Geometry(
    dim=48,
    ffn_dim=80,
    num_heads=2,
    num_layers=2,
    in_dim=4,
    out_dim=4,
    freq_dim=32,
    text_dim=24,
    text_len=8,
)
NATIVE_CONFIG = {
    "_class_name": "WanModel",
    "model_type": "t2v",
    "dim": 48,
    "ffn_dim": 80,
    "num_heads": 2,
    "num_layers": 2,
    "in_dim": 4,
    "out_dim": 4,
    "freq_dim": 32,
    "text_len": 8,
    "eps": 1e-06,
}
DIFFUSERS_CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "ffn_dim": 80,
    "freq_dim": 32,
    "text_dim": 24,
    "num_layers": 2,
    "patch_size": [1, 2, 2],
    "eps": 1e-06,
}
MODEL = ModelConfig(GEOMETRY, (8, 8), 2, CachePolicy(6, 1, "relative"), SamplerConfig(), "demo")

Tensors = dict[str, torch.Tensor]


def native(geometry: Geometry = GEOMETRY) -> Tensors:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in native_shapes(geometry).items()}


def write_config(folder: Path, config: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def write_wan(folder: Path, tensors: Tensors, config: object = NATIVE_CONFIG) -> Path:
    write_config(folder, config)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_pickle(
    folder: Path, tensors: Tensors, wrap: str = "model.", key: str | None = None
) -> Path:
    write_config(folder, NATIVE_CONFIG)
    state = {wrap + name: tensor for name, tensor in tensors.items()}
    torch.save({key: state} if key else state, folder / "m.pt")
    return folder / "m.pt"


def write_ema(folder: Path, tensors: Tensors) -> Path:
    inner = {
        n.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): t for n, t in tensors.items()
    }
    return write_pickle(folder, inner, "model._fsdp_wrapped_module.", "generator_ema")


def write_diffusers(folder: Path, tensors: Tensors) -> Path:
    write_config(folder, DIFFUSERS_CONFIG)
    names = to_native(tensors, invert(DIFFUSERS_RULES))
    foreign = {name: tensors[source] for name, source in names.items()}
    save_file(foreign, folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_vmla(folder: Path, tensors: Tensors, config: ModelConfig = MODEL) -> Path:
    write_checkpoint(folder, tensors, {"config.json": converted_config(config)}, shard_bytes=40_000)
    return folder


FORMS: dict[str, tuple[str, Callable[[Path, Tensors], Path]]] = {
    "native": ("wan", write_wan),
    "native pickle": ("wan", lambda f, t: write_pickle(f, t, "")),
    "generator": ("self_forcing", lambda f, t: write_pickle(f, t, "model.", "generator")),
    "wrapped average": ("self_forcing", write_ema),
    "prefix only": ("self_forcing", write_pickle),
    "key only": ("self_forcing", lambda f, t: write_pickle(f, t, "", "model")),
    "diffusers": ("diffusers", write_diffusers),
    "our own": ("vmla", write_vmla),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_back_as_the_same_native_tensors(form: str, tmp_path: Path) -> None:
    family, write = FORMS[form]
    tensors = native()
    opened = open_checkpoint(write(tmp_path / "f", tensors))
    assert opened.family == family
    assert opened.names.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(opened.read(name), tensor)
        assert opened.specs()[name].shape == tuple(tensor.shape)
    assert opened.parameters() == sum(tensor.numel() for tensor in tensors.values())
    told_text_len = form != "diffusers"
    geometry = GEOMETRY if told_text_len else dataclasses.replace(GEOMETRY, text_len=512)
    assert opened.config.geometry == geometry


def test_every_family_is_covered() -> None:
    assert {family for family, _ in FORMS.values()} == {family.name for family in FAMILIES}


def test_shapes_and_rules_speak_of_the_same_tensors() -> None:
    filled = {fill(rule.native, i) for rule in TEXT_TO_VIDEO for i in range(GEOMETRY.num_layers)}
    assert native_shapes(GEOMETRY).keys() == filled


@pytest.mark.parametrize(
    ("sizes", "tensors", "parameters"),
    [
        ((1536, 8960, 12, 30, 16, 16), 825, 1_418_996_800),
        ((5120, 13824, 40, 40, 16, 16), 1095, 14_288_491_584),
        ((3072, 14336, 24, 30, 48, 48), 825, 4_999_787_712),
    ],
)
def test_shapes_add_up_to_the_released_models(
    sizes: tuple[int, int, int, int, int, int], tensors: int, parameters: int
) -> None:
    shapes = native_shapes(Geometry(*sizes))
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


def test_without_a_table_the_rest_is_as_released(tmp_path: Path) -> None:
    config = open_checkpoint(write_wan(tmp_path / "f", native())).config
    assert config == ModelConfig(
        GEOMETRY, (60, 104), 3, CachePolicy(21), SamplerConfig(), family="wan"
    )


def test_a_table_in_config_json_gives_the_rest(tmp_path: Path) -> None:
    table = {
        "latent_size": [8, 8],
        "chunk_frames": 2,
        "cache": {"window_frames": 6, "sink_frames": 1, "positions": "relative"},
        "sampler": {"denoising_step_list": [1000, 500], "shift": 3, "renoise": False},
        "codec": "demo",
        "licence": "apache-2.0",
        "base_model": "Wan-AI/Wan2.1-T2V-1.3B",
    }
    config = open_checkpoint(
        write_wan(tmp_path / "f", native(), {**NATIVE_CONFIG, "vmla": table})
    ).config
    assert config == ModelConfig(
        GEOMETRY,
        (8, 8),
        2,
        CachePolicy(6, 1, "relative"),
        SamplerConfig((1000, 500), 3.0, False),
        "demo",
        "wan",
        "apache-2.0",
        "Wan-AI/Wan2.1-T2V-1.3B",
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"chunk_frame": 3}, r"vmla\.chunk_frame"),
        ({"geometry": {}}, r"vmla\.geometry"),
        ({"codec": "vae"}, "codec"),
        ({"chunk_frames": "3"}, "chunk_frames"),
        ({"cache": {"window_frames": 2}}, "no room"),
        ({"cache": {"sink_frames": 1}}, "window_frames"),
        ([1], "not a table"),
    ],
)
def test_a_bad_table_is_refused(table: object, message: str, tmp_path: Path) -> None:
    refused(write_wan(tmp_path / "f", native(), {**NATIVE_CONFIG, "vmla": table}), message)


def test_heads_follow_from_the_width_when_it_is_wans(tmp_path: Path) -> None:
    wide = dataclasses.replace(GEOMETRY, dim=256)
    file = write_wan(tmp_path / "f", native(wide)) / "config.json"
    file.unlink()
    assert open_checkpoint(file.parent).config.geometry.num_heads == 2


def test_heads_that_nobody_tells_are_asked_for(tmp_path: Path) -> None:
    folder = write_wan(tmp_path / "f", native())
    (folder / "config.json").unlink()
    assert "num_heads" in refused(folder, "how many heads").hint


def refused(path: Path, message: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert caught.value.hint
    assert not caught.value.message.endswith(".")
    return caught.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 64}, "dim 64"),
        ({"num_layers": 3}, "num_layers 3"),
        ({"patch_size": [1, 1, 1]}, "patch_size"),
        ({"num_heads": 5}, "5 heads"),
        ({"num_heads": 0}, "0 heads"),
        ({"num_heads": "2"}, "'2' heads"),
        ({"num_heads": 24}, "head dim 2"),
        ({"attention_head_dim": 12}, "width 12"),
        ({"eps": "small"}, "eps"),
        ({"text_len": 8.5}, "text_len"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(write_wan(tmp_path / "f", native(), {**NATIVE_CONFIG, **change}), message)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_config_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    folder = write_wan(tmp_path / "f", native())
    (folder / "config.json").write_text(text)
    refused(folder, "JSON")


WRITERS = {"wan": write_wan, "self_forcing": write_ema, "diffusers": write_diffusers}


@pytest.mark.parametrize("family", WRITERS)
def test_missing_tensors_are_named(family: str, tmp_path: Path) -> None:
    tensors = native()
    del tensors["blocks.1.self_attn.v.bias"], tensors["head.modulation"]
    refused(WRITERS[family](tmp_path / "f", tensors), r"2 tensors: blocks\.1\.self_attn\.v\.bias")


@pytest.mark.parametrize("name", native_shapes(dataclasses.replace(GEOMETRY, num_layers=1)))
def test_every_tensor_is_required(name: str, tmp_path: Path) -> None:
    tensors = native()
    del tensors[name]
    # Without the tensor that detection goes by, the family is unknown.
    message = "no known family" if name == "blocks.0.self_attn.k.weight" else name
    refused(write_wan(tmp_path / "f", tensors), message)


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    tensors = {n: t for n, t in native().items() if not n.startswith("blocks.1.")}
    refused(write_wan(tmp_path / "a", tensors), "num_layers 2")
    renamed = {n.replace("blocks.1.", "blocks.7."): t for n, t in native().items()}
    refused(write_wan(tmp_path / "b", renamed), r"lacks 27 tensors: blocks\.1\.")


@pytest.mark.parametrize("family", ["wan", "self_forcing"])
def test_extra_tensors_are_named(family: str, tmp_path: Path) -> None:
    tensors = {**native(), "fps_embedding.weight": torch.ones(2, 48)}
    refused(WRITERS[family](tmp_path / "f", tensors), r"fps_embedding\.weight")


def test_fused_diffusers_projections_are_named(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "f", native())
    fused = {"blocks.0.attn1.to_qkv.weight": torch.ones(144, 48)}
    source = open_checkpoint(folder).source
    tensors = {name: source.read(name) for name in source.specs()}
    save_file({**tensors, **fused}, folder / "diffusion_pytorch_model.safetensors")
    refused(folder, r"to_qkv\.weight")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.1.self_attn.k.weight", (48, 24)),
        ("blocks.0.norm3.bias", (1, 48)),
        ("head.head.weight", (17, 48)),
        ("patch_embedding.weight", (48, 4, 4)),
        ("patch_embedding.weight", (0, 4, 1, 2, 2)),
        ("time_embedding.0.weight", ()),
    ],
)
def test_misshapen_tensors_are_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    refused(write_wan(tmp_path / "f", {**native(), name: torch.ones(shape)}), name)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("blocks.0.ffn.0.weight", torch.ones(80, 48).to(torch.float8_e4m3fn)),
        ("blocks.0.ffn.0.weight", torch.ones(80, 48, dtype=torch.uint8)),
        ("blocks.0.ffn.0.quantized_weight_values", torch.ones(3)),
        ("blocks.0.ffn.0.weight_scale", torch.ones(1)),
        ("blocks.0.ffn.0.scale_weight", torch.ones(1)),
        ("scaled_fp8", torch.ones(1)),
    ],
)
def test_quantised_files_are_refused_by_name(
    name: str, tensor: torch.Tensor, tmp_path: Path
) -> None:
    refused(write_wan(tmp_path / "f", {**native(), name: tensor}), f"quantised: {name}")


@pytest.mark.parametrize("family", WRITERS)
def test_image_to_video_is_refused_as_such(family: str, tmp_path: Path) -> None:
    message = "image-to-video checkpoints are not supported yet"
    for name in ("img_emb.proj.0.weight", "blocks.1.cross_attn.k_img.bias"):
        tensors = {**native(), name: torch.ones(48)}
        refused(WRITERS[family](tmp_path / name, tensors), message)
    wide = native(dataclasses.replace(GEOMETRY, in_dim=9))
    refused(WRITERS[family](tmp_path / "wide", wide), message)


def test_other_models_are_of_no_known_family(tmp_path: Path) -> None:
    save_file({"encoder.conv.weight": torch.ones(3)}, tmp_path / "vae.safetensors")
    error = refused(tmp_path, r"no known family; it holds encoder\.conv\.weight")
    assert "self_forcing" in error.hint


MLA = dataclasses.replace(MODEL, mla=MLAConfig((6, 8), ((0, 5), (1, 2)), "calibrated"))


def converted() -> Tensors:
    kept = {n: t for n, t in native().items() if ".self_attn.v." not in n}
    latent = {f"blocks.{i}.self_attn.kv_a_proj.weight": torch.ones(6, 48) for i in (0, 1)}
    return {**kept, **latent}


def test_a_converted_folder_keeps_its_own_attention_tensors(tmp_path: Path) -> None:
    opened = open_checkpoint(write_vmla(tmp_path / "f", converted(), MLA))
    assert (opened.family, opened.config) == ("vmla", MLA)
    assert torch.equal(opened.read("blocks.1.self_attn.kv_a_proj.weight"), torch.ones(6, 48))
    with pytest.raises(
        CheckpointError, match=r"no tensor 'blocks\.0\.self_attn\.v\.weight'"
    ) as caught:
        opened.read("blocks.0.self_attn.v.weight")
    assert caught.value.hint


def test_a_converted_folder_is_checked_beside_its_attention(tmp_path: Path) -> None:
    missing = converted()
    del missing["blocks.1.ffn.2.bias"]
    refused(write_vmla(tmp_path / "a", missing, MLA), r"blocks\.1\.ffn\.2\.bias")
    extra = {**converted(), "blocks.9.self_attn.kv_a_proj.weight": torch.ones(1)}
    refused(write_vmla(tmp_path / "b", extra, MLA), r"blocks\.9\.self_attn")
    dense = {**native(), "blocks.0.self_attn.kv_a_proj.weight": torch.ones(6, 48)}
    refused(write_vmla(tmp_path / "c", dense, MODEL), "kv_a_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format version 2"),
        ({"model": None}, "must be a table"),
        ({"model": {"geometri": {}}}, "geometri"),
    ],
)
def test_a_converted_config_is_read_strictly(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_vmla(tmp_path / "f", converted(), MLA)
    write_config(folder, {**converted_config(MLA), **change})
    refused(folder, message)
