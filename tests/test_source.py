"""Every container gives the same tensors; every bad file gives one sentence and a hint."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vmla_convert.checkpoint.source import TensorSpec, fingerprint, open_source
from vmla_convert.errors import CheckpointError

STATE = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
}


def shards(folder: Path) -> Path:
    folder.mkdir()
    files = {name: f"part-{i}.safetensors" for i, name in enumerate(STATE)}
    for name, file in files.items():
        save_file({name: STATE[name]}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_safetensors(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file(STATE, path)
    return path


def save_pickle(path: Path, payload: object = STATE) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save(payload, path)
    return path


CONTAINERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda tmp: save_safetensors(tmp / "x.safetensors"),
    "folder of one safetensors": lambda tmp: save_safetensors(tmp / "f" / "x.safetensors").parent,
    "folder with an index": lambda tmp: shards(tmp / "f"),
    "index": lambda tmp: shards(tmp / "f") / "x.safetensors.index.json",
    **{
        f"folder of one {end}": lambda tmp, end=end: save_pickle(tmp / "f" / f"x{end}").parent
        for end in (".pt", ".pth", ".bin", ".ckpt")
    },
    **{
        f"flat {end}": lambda tmp, end=end: save_pickle(tmp / f"x{end}")
        for end in (".pt", ".pth", ".bin", ".ckpt")
    },
    "nested": lambda tmp: save_pickle(tmp / "x.pt", {"generator": STATE, "step": 3}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_tensors(name: str, tmp_path: Path) -> None:
    path = CONTAINERS[name](tmp_path)
    source = open_source(path)
    assert source.path == path
    assert source.specs() == {k: TensorSpec(tuple(t.shape), t.dtype) for k, t in STATE.items()}
    for key, tensor in STATE.items():
        assert torch.equal(source.read(key), tensor)
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.wieght'") as caught:
        source.read("a.wieght")
    assert "a.weight" in caught.value.hint


def test_nested_states_are_picked_in_order_of_what_is_meant_for_use(tmp_path: Path) -> None:
    order = ["generator_ema", "generator", "model", "ema"]
    payload = {key: {"x": torch.tensor([float(i)])} for i, key in enumerate(order)}
    payload = {"critic": {"x": torch.tensor([9.0])}, **dict(reversed(payload.items()))}
    for i, key in enumerate(order):
        source = open_source(save_pickle(tmp_path / "x.pt", payload))
        assert source.key == key
        assert source.read("x").item() == i
        asked = open_source(tmp_path / "x.pt", key="critic")
        assert (asked.key, asked.read("x").item()) == ("critic", 9.0)
        # An average that has not begun is saved empty or as None: the next one is taken.
        payload[key] = {}


def test_requested_key_that_is_absent_names_those_there(tmp_path: Path) -> None:
    path = save_pickle(tmp_path / "x.pt", {"generator": STATE, "critic": STATE, "step": 1})
    with pytest.raises(CheckpointError, match="no 'generator_ema'") as caught:
        open_source(path, key="generator_ema")
    assert caught.value.hint == "it holds: generator, critic"
    for flat in (save_pickle(tmp_path / "flat.pt"), save_safetensors(tmp_path / "x.safetensors")):
        with pytest.raises(CheckpointError, match="no 'generator'") as caught:
            open_source(flat, key="generator")
        assert "leave the key out" in caught.value.hint


def test_unknown_nesting_names_what_is_inside(tmp_path: Path) -> None:
    path = save_pickle(tmp_path / "x.pt", {"state_dict": STATE, "step": 1})
    with pytest.raises(CheckpointError, match="not tensors: state_dict, step") as caught:
        open_source(path)
    assert caught.value.hint == "save one of these alone with torch.save: state_dict"
    assert open_source(path, key="state_dict").specs().keys() == STATE.keys()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def write_index(folder: Path, content: object) -> Path:
    return write(folder / "x.safetensors.index.json", json.dumps(content).encode())


def outside(tmp: Path, shard: str) -> Path:
    save_file(STATE, tmp / "secret.safetensors")
    return write_index(tmp / "f", {"weight_map": {"a.weight": shard}})


def without_shard(tmp: Path) -> Path:
    folder = shards(tmp / "f")
    (folder / "part-1.safetensors").unlink()
    return folder


def without_tensor(tmp: Path) -> Path:
    folder = shards(tmp / "f")
    save_file({"other": torch.ones(1)}, folder / "part-1.safetensors")
    return folder


def truncated(file: Path) -> Path:
    return write(file, file.read_bytes()[:-3])


def zip_of_text(tmp: Path) -> Path:
    with zipfile.ZipFile(tmp / "x.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    return tmp / "x.pt"


def two_files(tmp: Path) -> Path:
    save_pickle(tmp / "f" / "one.pt")
    return save_pickle(tmp / "f" / "two.pth").parent


def diffusers_pipeline(tmp: Path) -> Path:
    save_safetensors(tmp / "f" / "x.safetensors").unlink()
    (tmp / "f" / "transformer").mkdir()
    return tmp / "f"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda tmp: tmp / "nowhere.pt", "no checkpoint at"),
    "unknown ending": (lambda tmp: write(tmp / "x.txt", b"hi"), "not a checkpoint"),
    "garbage .pt": (lambda tmp: write(tmp / "x.pt", b"\x00garbage" * 9), "not a whole torch"),
    "empty .pt": (lambda tmp: write(tmp / "x.pt", b""), "not a whole torch"),
    "plain pickle": (lambda tmp: write(tmp / "x.pt", pickle.dumps({})), "not a whole torch"),
    "truncated .pt": (lambda tmp: truncated(save_pickle(tmp / "x.pt")), "not a whole torch"),
    "zip of something else": (zip_of_text, "not a torch checkpoint"),
    "objects": (lambda tmp: save_pickle(tmp / "x.pt", {"o": Fraction(1)}), r"fractions\.Fraction"),
    "a bare tensor": (lambda tmp: save_pickle(tmp / "x.pt", torch.ones(1)), "no state dict"),
    "an empty dict": (lambda tmp: save_pickle(tmp / "x.pt", {}), "is empty"),
    "garbage safetensors": (lambda tmp: write(tmp / "x.safetensors", b"garbage" * 9), "not a who"),
    "empty safetensors": (lambda tmp: write(tmp / "x.safetensors", b""), "not a whole"),
    "truncated safetensors": (
        lambda tmp: truncated(save_safetensors(tmp / "x.safetensors")),
        "not a whole",
    ),
    "no tensors": (
        lambda tmp: write(tmp / "x.safetensors", (2).to_bytes(8, "little") + b"{}"),
        "no tensors",
    ),
    "index above": (lambda tmp: outside(tmp, "../secret.safetensors"), "outside its folder"),
    "index absolute": (
        lambda tmp: outside(tmp, str(tmp / "secret.safetensors")),
        "outside its folder",
    ),
    "index to a lost shard": (without_shard, r"part-1\.safetensors, which is not there"),
    "index to a lost tensor": (without_tensor, r"b\.weight"),
    "index of nothing": (lambda tmp: write_index(tmp / "f", {"weight_map": {}}), "no tensors"),
    "index without a map": (lambda tmp: write_index(tmp / "f", {}), "not a safetensors index"),
    "index that is a list": (lambda tmp: write_index(tmp / "f", []), "not a safetensors index"),
    "index map that is a list": (
        lambda tmp: write_index(tmp / "f", {"weight_map": [1]}),
        "not a safetensors index",
    ),
    "index of numbers": (
        lambda tmp: write_index(tmp / "f", {"weight_map": {"a": 1}}),
        "not a safetensors index",
    ),
    "index of garbage": (
        lambda tmp: write(tmp / "x.safetensors.index.json", b"\xff{"),
        "not a safetensors index",
    ),
    "two candidates": (two_files, "holds 2 checkpoints"),
    "empty folder": (lambda tmp: tmp, "nothing that can be loaded"),
    "a pipeline's root": (diffusers_pipeline, "nothing that can be loaded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_sentence_with_a_hint(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(make(tmp_path))
    assert caught.value.hint
    assert not caught.value.message.endswith(".")


def test_a_pipelines_root_hints_at_its_transformer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(diffusers_pipeline(tmp_path))
    assert caught.value.hint == f"try {tmp_path / 'f' / 'transformer'}"


def test_links_into_the_hub_cache_are_followed(tmp_path: Path) -> None:
    folder = shards(tmp_path / "f")
    blob = (folder / "part-0.safetensors").rename(tmp_path / "blob")
    (folder / "part-0.safetensors").symlink_to(blob)
    assert torch.equal(open_source(folder).read("a.weight"), STATE["a.weight"])


def test_fingerprint_is_of_the_weights_only(tmp_path: Path) -> None:
    file = save_safetensors(tmp_path / "f" / "x.safetensors")
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "f" / "README.md").write_text("card")
    assert fingerprint(file) == fingerprint(file.parent) == expected

    folder = shards(tmp_path / "g")
    whole = b"".join((folder / f"part-{i}.safetensors").read_bytes() for i in (0, 1))
    assert fingerprint(folder) == hashlib.sha256(whole).hexdigest()
    save_file({"b.weight": STATE["b.weight"] + 1}, folder / "part-1.safetensors")
    assert fingerprint(folder) != hashlib.sha256(whole).hexdigest()
