"""Files and settings cannot ask for more than a model has, or than memory holds."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODEL
from conftest import tiny_config, tiny_model

from vmla_convert.checkpoint.settings import converted_config, read_config
from vmla_convert.checkpoint.source import open_source
from vmla_convert.config import CachePolicy, DataConfig, ModelConfig
from vmla_convert.errors import CheckpointError, ConfigError, VmlaError
from vmla_convert.generating.generate import generate
from vmla_convert.media.base import TextEncoder
from vmla_convert.media.clips import open_clips
from vmla_convert.storage import limits
from vmla_convert.tables import from_dict, parse_json, parse_toml, set_key

EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def write_header(file: Path, header: dict[str, Any]) -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    return file


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A file that is all header."""
    words = {"__metadata__": {"note": "x" * limits.HEADER_BYTES}, "latents": EMPTY}
    return write_header(tmp_path / "wide.safetensors", words)


def test_a_large_header_is_refused_before_it_is_parsed(wide: Path) -> None:
    with pytest.raises(CheckpointError, match=r"wide\.safetensors .*8,388,"):
        open_source(wide)
    with pytest.raises(ConfigError, match=r"wide\.safetensors .*8,388,"):
        open_clips(DataConfig(str(wide)))


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    many = {f"t{i}": EMPTY for i in range(limits.TENSORS + 1)}
    with pytest.raises(CheckpointError, match="20,001"):
        open_source(write_header(tmp_path / "many.safetensors", many))


def test_a_pickle_cannot_declare_more_numbers_than_it_stores(tmp_path: Path) -> None:
    file = tmp_path / "view.pt"
    torch.save({"w": torch.zeros(1).expand(10**9)}, file)
    with pytest.raises(CheckpointError, match="4,000,000,000 bytes for w"):
        open_source(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("geometry.patch_size", [1, 0, 2]),
        ("geometry.patch_size", [1, 2, 10**9]),
        ("geometry.dim", 0),
        ("geometry.dim", 10**9),
        ("geometry.num_layers", 10**9),
        ("geometry.text_len", 10**9),
        ("geometry.eps", 1e9),
        ("latent_size", [10**9, 10**9]),
        ("chunk_frames", 10**9),
        ("sampler.shift", 1e999),
        ("mla.rope_pairs", [[0], [10**9]]),
        ("mla.kv_lora_rank", [8, 10**9]),
    ],
)
def test_a_config_cannot_ask_for_sizes_that_no_model_has(key: str, value: Any) -> None:
    mla = {"kv_lora_rank": [8, 8], "rope_pairs": [[0], [1]], "init": "random"}
    table = converted_config(MODEL)["model"] | {"mla": mla}
    from_dict(ModelConfig, table)
    set_key(table, key, value)
    with pytest.raises(ConfigError, match=key.rpartition(".")[2].removesuffix("s")):
        from_dict(ModelConfig, table)


class NoText(TextEncoder):
    """Prompts of zeros."""

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        return torch.zeros(len(prompts), 3, 5)


def test_a_short_video_takes_memory_for_its_own_frames_only() -> None:
    wide = tiny_model(tiny_config(cache=CachePolicy(window_frames=10**6)))
    exact = tiny_model(tiny_config(cache=CachePolicy(window_frames=8)))
    made = [list(generate(model, "", 8, text=NoText())) for model in (wide, exact)]
    assert torch.equal(torch.cat(made[0], 1), torch.cat(made[1], 1))


def test_a_cache_beyond_memory_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(tiny_config())
    monkeypatch.setattr(limits, "free_memory", lambda _: model.cache_bytes(1))
    with pytest.raises(ConfigError, match="64 frames"):
        model.new_cache(1)
    model.new_cache(1, frames=32)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a": NaN}', "[-Infinity]", "{"])
def test_json_that_python_alone_accepts_or_cannot_hold_is_no_json(
    text: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(VmlaError, match=r"config\.json"):
        read_config(tmp_path / "config.json")


def test_deep_toml_is_no_toml() -> None:
    with pytest.raises(ValueError):
        parse_toml("a = " + "[" * 10**5)


def test_a_huge_table_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(file)


def test_the_limits_leave_room_for_real_models() -> None:
    big = replace(
        MODEL.geometry, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096
    )
    replace(MODEL, geometry=replace(big, text_len=512), latent_size=(90, 160))
