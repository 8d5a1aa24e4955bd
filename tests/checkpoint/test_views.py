"""A fused projection is read as its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import noise
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from vmla_convert.checkpoint.source import TensorSpec, open_source
from vmla_convert.checkpoint.views import FUSED, unfuse
from vmla_convert.errors import CheckpointError

LAYERS = {
    "model.blocks.0.self_attn.to_qkv": "model.blocks.0.self_attn.{}",
    "blocks.12.attn1.to_qkv": "blocks.12.attn1.to_{}",
    "blocks.3.attn2.to_kv": "blocks.3.attn2.to_{}",
}


def parts_of(name: str) -> list[str]:
    return [LAYERS[name].format(part) for part in name.rpartition("_")[2]]


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "x.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_the_rows_of_the_whole_in_order(dtype: torch.dtype, tmp_path: Path) -> None:
    parts = {
        f"{part}.{kind}": noise(*((4, 3) if kind == "weight" else (4,)), seed=seed).to(dtype)
        for seed, part in enumerate(part for name in LAYERS for part in parts_of(name))
        for kind in ("weight", "bias")
    }
    whole = {
        f"{name}.{kind}": torch.cat([parts[f"{part}.{kind}"] for part in parts_of(name)])
        for name in LAYERS
        for kind in ("weight", "bias")
    }
    rest = {"blocks.0.self_attn.o.weight": noise(4, 4, seed=9).to(dtype)}
    source = open_source(saved(tmp_path, whole | rest))
    view = unfuse(source)
    assert view.specs() == {n: TensorSpec(tuple(t.shape), dtype) for n, t in (parts | rest).items()}
    assert all(torch.equal(view.read(name), tensor) for name, tensor in (parts | rest).items())
    assert (view.path, view.key) == (source.path, source.key)


def test_parts_share_their_memory_with_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, {"blocks.0.attn1.to_qkv.weight": noise(6, 3)})
    part = unfuse(open_source(path)).read("blocks.0.attn1.to_k.weight")
    assert part.is_contiguous()
    assert part.untyped_storage().nbytes() == part.nbytes


def test_a_source_without_fused_layers_is_itself(tmp_path: Path) -> None:
    names = ("blocks.0.cross_attn.to_qkv.weight", "blocks.0.attn1.to_qkv.weight_scale", "to_kv")
    source = open_source(saved(tmp_path, {name: torch.ones(6) for name in names}))
    assert unfuse(source) is source


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.0.attn1.to_qkv.weight", (7, 3)),
        ("blocks.0.attn2.to_kv.bias", (5,)),
        ("blocks.0.self_attn.to_qkv.bias", ()),
    ],
)
def test_what_does_not_divide_is_refused_by_name(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    source = open_source(saved(tmp_path, {name: torch.ones(shape)}))
    with pytest.raises(CheckpointError, match=name) as caught:
        unfuse(source)
    assert caught.value.hint


@given(layer=st.sampled_from(list(LAYERS)), place=st.integers(0, 1))
def test_a_part_beside_its_whole_is_refused(
    layer: str, place: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    part = parts_of(layer)[place]
    tensors = {f"{layer}.weight": torch.ones(6, 2), f"{part}.weight": torch.ones(2, 2)}
    source = open_source(saved(tmp_path_factory.mktemp("f"), tensors))
    with pytest.raises(CheckpointError, match=f"'{part}.weight' and, fused, '{layer}.weight'"):
        unfuse(source)


def test_every_fused_layer_is_tried_here() -> None:
    assert sum(name.endswith(whole) for name in LAYERS for whole, _ in FUSED) == len(FUSED)
