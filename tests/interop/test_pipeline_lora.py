"""LoRAs as adapters: the weights that fit are merged weights, the others are named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from conftest import noise
from hub_stub import Hub
from pipelines import latents_of, open_pipeline
from safetensors.torch import save_file
from torch import Tensor

import vmla_convert as vmla
from vmla_convert.checkpoint.lora import open_lora
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.config import SourceConfig
from vmla_convert.errors import CheckpointError
from vmla_convert.interop import pipeline as module
from vmla_convert.interop.adapters import find_lora
from vmla_convert.loading.load import load

pytest_plugins = ["checkpoints", "hub_stub", "pipelines", "tiny_wan"]

KEPT = ["self_attn.q", "self_attn.o", "cross_attn.k", "cross_attn.v", "ffn.0", "ffn.2"]
ALL = [*KEPT, "self_attn.k", "self_attn.v"]


def lora_file(path: Path, names: list[str], extra: dict[str, Tensor] | None = None) -> Path:
    """Write a LoRA of rank 3 and alpha 6 under native names."""
    state: dict[str, Tensor] = dict(extra or {})
    for index, name in enumerate(names):
        inner, outer = (64 if name.endswith(end) else 48 for end in ("ffn.2", "ffn.0"))
        prefix = f"diffusion_model.blocks.0.{name}"
        state[f"{prefix}.lora_down.weight"] = 0.1 * noise(3, inner, seed=index)
        state[f"{prefix}.lora_up.weight"] = 0.1 * noise(outer, 3, seed=50 + index)
        state[f"{prefix}.alpha"] = torch.tensor(6.0)
    save_file(state, path)
    return path


def test_on_a_dense_model_an_adapter_is_the_merged_lora(teacher: Path, tmp_path: Path) -> None:
    file = lora_file(tmp_path / "lora.safetensors", ALL)
    pipe = open_pipeline(teacher)
    plain = latents_of(pipe)
    report = pipe.load_lora_weights(file)
    assert len(report.loaded) == 8 and not report.factored and not report.unlike
    adapted = latents_of(pipe)
    merged = latents_of(open_pipeline(SourceConfig(str(teacher), loras=(str(file),))))
    # The merged weights were rounded to the checkpoint's bfloat16.
    assert (adapted - merged).abs().max() < 0.2 * (plain - merged).abs().max()
    pipe.fuse_lora()
    torch.testing.assert_close(latents_of(pipe), adapted, atol=1e-4, rtol=0)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(latents_of(pipe), plain, atol=1e-4, rtol=0)  # rounding stays
    pipe.transformer.wan.load_state_dict(load(teacher).state_dict())
    pipe.load_lora_weights(file)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)


def test_on_a_converted_model_replaced_weights_are_named(
    converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(64)}
    file = lora_file(tmp_path / "lora.safetensors", ALL, extra)
    pipe = open_pipeline(converted)
    logger = logging.getLogger(module.__name__)
    logger.addHandler(caplog.handler)
    report = pipe.load_lora_weights(file, adapter_name="style")
    logger.removeHandler(caplog.handler)
    assert set(report.loaded) == {f"blocks.0.{name}.weight" for name in KEPT}
    assert set(report.factored) == {f"blocks.0.self_attn.{kind}.weight" for kind in "kv"}
    assert report.unlike == ("blocks.0.ffn.0.bias",)
    for name in (*report.factored, *report.unlike):
        assert name in caplog.text
    adapted, plain = latents_of(pipe), latents_of(open_pipeline(converted))
    merged = merged_by_hand(converted, file, report.loaded)
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=0)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    pipe.set_adapters("style", 0.0)
    torch.testing.assert_close(latents_of(pipe), plain, atol=1e-5, rtol=0)


def merged_by_hand(folder: Path, file: Path, names: tuple[str, ...]) -> Tensor:
    """Sample from the model with the given weights of the LoRA merged."""
    model = load(folder)
    state = model.state_dict()
    specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in state.items()}
    dense = {name.replace("kv_a", "k"): spec for name, spec in specs.items()}
    square = TensorSpec((48, 48), torch.float32)
    dense |= {f"blocks.0.self_attn.{kind}.weight": square for kind in "kv"}
    lora = open_lora(file, 1.0, dense)
    for name in names:
        state[name].copy_(lora.apply(name, state[name]))
    return torch.cat(list(vmla.generate(model, "3", frames=4, seed=1)), dim=1).transpose(1, 2)


def test_a_lora_of_which_nothing_fits_is_refused(converted: Path, tmp_path: Path) -> None:
    file = lora_file(tmp_path / "lora.safetensors", ["self_attn.k"])
    pipe = open_pipeline(converted)
    with pytest.raises(CheckpointError, match=r"self_attn\.k"):
        pipe.load_lora_weights(tmp_path, weight_name=file.name)
    with pytest.raises(CheckpointError, match="someone/lora"):
        pipe.load_lora_weights("someone/lora")


# peft warns about a second adapter.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_two_loras_may_be_mixed(converted: Path, tmp_path: Path) -> None:
    pipe = open_pipeline(converted)
    file = lora_file(tmp_path / "lora.safetensors", ["self_attn.q", "ffn.0"])
    for name in ("one", "two"):
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    halves = latents_of(pipe)
    pipe.set_adapters("one")
    torch.testing.assert_close(halves, latents_of(pipe), atol=1e-5, rtol=0)
    assert pipe.get_active_adapters() == ["one"]


def test_a_model_with_adapters_is_not_saved(converted: Path, tmp_path: Path) -> None:
    pipe = open_pipeline(converted)
    pipe.load_lora_weights(lora_file(tmp_path / "lora.safetensors", ["self_attn.q"]))
    with pytest.raises(CheckpointError, match="lora"):
        pipe.transformer.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_from_the_hub_comes_with_its_settings(stub: Hub, tmp_path: Path) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)}, weights)
    settings = b'{"lora_alpha": 8, "r": 2}'
    stub.put("user/lora", {weights.name: weights.read_bytes(), "adapter_config.json": settings})
    path = find_lora("user/lora", weights.name)
    assert (path.parent / "adapter_config.json").read_bytes() == settings
