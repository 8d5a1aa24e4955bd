"""Damaged weights of a conversion are noticed on every way that reads them, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import Vmla, refused
from codec_files import CODEC, Pair
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmla_convert.checkpoint.integrity import file_hash
from vmla_convert.config import SourceConfig
from vmla_convert.errors import CheckpointError
from vmla_convert.loading.export import export
from vmla_convert.loading.load import load
from vmla_convert.loading.verify import verify

pytest_plugins = ["checkpoints", "codec_files"]

NAME = "blocks.1.codec.decode"


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


def zero_page(file: Path) -> None:
    data = bytearray(file.read_bytes())
    start = len(data) - 8192
    data[start : start + 4096] = bytes(4096)
    file.write_bytes(data)


def poison(file: Path) -> None:
    tensors = load_file(file)
    tensors[NAME][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("damage", [flip_bit, zero_page, poison])
def test_damaged_weights_are_refused(
    damage: Callable[[Path], None], pair: Pair, tmp_path: Path
) -> None:
    assert verify(pair.codec).faults == ()
    damage(pair.codec / CODEC)
    for use in (load, lambda kv: export(kv, tmp_path / "whole"), verify_all):
        with pytest.raises(CheckpointError):
            use(pair.codec)
    assert not (tmp_path / "whole").exists()
    assert any(fault.place.startswith("blocks.") for fault in verify(pair.codec).faults)


def verify_all(path: Path) -> None:
    if faults := verify(path).faults:
        raise CheckpointError(faults[0].what)


def test_without_a_check_numbers_must_still_be_finite(pair: Pair) -> None:
    flip_bit(pair.codec / CODEC)
    assert load(pair.codec, verify=False).config.codec
    poison(pair.codec / CODEC)
    with pytest.raises(CheckpointError, match=NAME):
        load(pair.codec, verify=False)


def test_a_dense_model_that_is_not_finite_is_refused(pair: Pair) -> None:
    name = "head.head.bias"

    def change(state: dict[str, Tensor]) -> None:
        state[name][0] = torch.inf

    pair.change_base(change)
    with pytest.raises(CheckpointError, match=name):
        load(pair.base)
    faults = verify(pair.codec).faults
    assert [(fault.place, "1 of" in fault.what) for fault in faults] == [(f"model.{name}", True)]


def test_another_base_model_is_a_fault(pair: Pair) -> None:
    pair.change_base(lambda state: state["blocks.0.self_attn.k.weight"].add_(1))
    faults = verify(pair.codec).faults
    assert len(faults) == 1 and "blocks.0.self_attn.k.weight" in faults[0].what


def test_mla_checkpoints_and_whole_exports_are_sealed(
    converted: Path, pair: Pair, tmp_path: Path
) -> None:
    whole = export(pair.codec, tmp_path / "whole", "self_forcing")
    for folder in (converted, whole.parent):
        record = json.loads((folder / "conversion.json").read_text())
        [(name, text)] = record["weights"]["files"].items()
        assert file_hash(folder / name) == text
        found = verify(folder)
        assert found.faults == () and found.files == {name: "its record"}


def test_a_record_of_other_files_is_refused(pair: Pair) -> None:
    record = pair.codec / "conversion.json"
    record.write_text(record.read_text().replace(f'"{CODEC}"', '"other.safetensors"'))
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        load(pair.codec)


def test_verifying_is_no_setting_of_a_checkpoint() -> None:
    assert SourceConfig("a") == SourceConfig("a", verify=False)


def test_the_command_names_the_tensor_and_fails(pair: Pair, vmla: Vmla) -> None:
    assert vmla("verify", pair.codec).code == 0
    flip_bit(pair.codec / CODEC)
    ran = vmla("verify", pair.codec, "--json")
    assert ran.code == 2
    faults = json.loads(ran.out.splitlines()[-1])
    assert {fault["file or tensor"] for fault in faults} >= {str(pair.codec / CODEC)}
    assert refused(vmla("generate", pair.codec, "--prompt", "7", "-o", pair.codec / "a.mp4"))
