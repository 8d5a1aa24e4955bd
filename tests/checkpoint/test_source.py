"""Every container gives the same tensors; every bad file gives one sentence and a hint."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch._utils import _rebuild_tensor_v2

from vmla_convert.checkpoint.source import TensorSpec, fingerprint, located, open_source
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


def pipeline(folder: Path, *models: str) -> Path:
    """A folder of folders, each with one model."""
    folder.mkdir()
    for model in models:
        save_safetensors(folder / model / "x.safetensors")
    return folder


def repacked(
    file: Path, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED
) -> Path:
    """The same zip with some records changed, or left out where the change is None."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    records |= {f"{file.stem}/{name}": content for name, content in change.items()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            if content is not None:
                archive.writestr(name, content)
    return file


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
    "of an older torch": lambda tmp: repacked(
        save_pickle(tmp / "x.pt"), {".format_version": None, "byteorder": None}
    ),
    "repacked by another program": lambda tmp: repacked(
        save_pickle(tmp / "x.pt"), {"other": bytes(99)}
    ),
    "a pipeline of one model": lambda tmp: pipeline(tmp / "f", "transformer"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_tensors(name: str, tmp_path: Path) -> None:
    path = CONTAINERS[name](tmp_path)
    source = open_source(path)
    assert source.path == path
    weights = sorted(
        file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".json"
    )
    assert located(path) in [*weights, tmp_path / "f" / "x.safetensors.index.json"]
    whole = b"".join(file.read_bytes() for file in weights)
    assert fingerprint(path) == hashlib.sha256(whole).hexdigest()
    assert source.specs() == {k: TensorSpec(tuple(t.shape), t.dtype) for k, t in STATE.items()}
    for key, tensor in STATE.items():
        assert torch.equal(source.read(key), tensor)
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.wieght'") as caught:
        source.read("a.wieght")
    assert "a.weight" in caught.value.hint


def test_nested_states_are_picked_in_order_of_what_is_meant_for_use(tmp_path: Path) -> None:
    order = ["generator_ema", "generator", "model", "ema", "state_dict"]
    payload = {key: {"x": torch.tensor([float(i)])} for i, key in enumerate(order)}
    others = {"critic": {"x": torch.tensor([9.0])}, "generator_lora": {"x": torch.zeros(1)}}
    payload: dict[str, object] = {**others, **dict(reversed(payload.items()))}
    for i, key in enumerate(order):
        source = open_source(save_pickle(tmp_path / "x.pt", payload))
        assert source.key == key
        assert source.read("x").item() == i
        asked = open_source(tmp_path / "x.pt", key="critic")
        assert (asked.key, asked.read("x").item()) == ("critic", 9.0)
        # An average that has not begun is saved empty, with its settings alone, or as None: the
        # next one is taken.
        payload[key] = {"decay": 0.99, "shadow": {}} if i % 2 else {}


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
    path = save_pickle(tmp_path / "x.pt", {"weights": STATE, "step": 1})
    with pytest.raises(CheckpointError, match="not tensors: weights, step") as caught:
        open_source(path)
    assert caught.value.hint == "save one of these alone with torch.save: weights"
    assert open_source(path, key="weights").specs().keys() == STATE.keys()


def test_a_lora_is_no_model_unless_asked_for(tmp_path: Path) -> None:
    path = save_pickle(tmp_path / "x.pt", {"generator_lora": STATE})
    with pytest.raises(CheckpointError, match="not tensors: generator_lora") as caught:
        open_source(path)
    assert "LoRA" in caught.value.hint
    assert open_source(path, key="generator_lora").specs().keys() == STATE.keys()


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_plain_dtype_keeps_its_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"x": torch.arange(6).to(dtype).reshape(2, 3)}
    save_file(state, tmp_path / "x.safetensors")
    for path in (save_pickle(tmp_path / "x.pt", state), tmp_path / "x.safetensors"):
        source = open_source(path)
        assert source.specs() == {"x": TensorSpec((2, 3), dtype)}
        assert source.read("x").dtype == dtype
        assert torch.equal(source.read("x"), state["x"])


def views() -> dict[str, torch.Tensor]:
    """Every way in which names can share one storage, and tensors with none."""
    base = torch.arange(60.0)
    return {
        "slice": base[10:20],
        "whole": base,
        "again": base,
        "transposed": base.reshape(6, 10).t(),
        "columns": base.reshape(6, 10)[:, 3:5],
        "steps": base[5::7],
        "expanded": base[7].expand(2, 3),
        "scalar": base[59],
        "empty": base[60:],
        "without elements": torch.empty(3, 0, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(base[:4]),
    }


def test_views_of_a_shared_storage_read_as_tensors_of_their_own(tmp_path: Path) -> None:
    source = open_source(save_pickle(tmp_path / "x.pt", views()))
    for name, expected in views().items():
        tensor = source.read(name)
        assert torch.equal(tensor, expected)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == expected.numel() * expected.element_size()
        tensor.detach().fill_(-1)
    assert torch.equal(source.read("whole"), views()["whole"])


@pytest.mark.parametrize("name", ["flat .pt", "safetensors"])
@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_a_file_that_changed_is_no_longer_read(name: str, change: str, tmp_path: Path) -> None:
    path = CONTAINERS[name](tmp_path)
    source = open_source(path)
    assert torch.equal(source.read("a.weight"), STATE["a.weight"])
    if change == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(CheckpointError, match="can no longer be read") as caught:
        for tensor in source.specs():
            source.read(tensor)
    assert caught.value.hint


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux knows the peak")
@pytest.mark.parametrize("container", ["pt", "safetensors"])
def test_what_was_read_leaves_memory(container: str, tmp_path: Path) -> None:
    state = {f"t{i}": torch.ones(25_000_000, dtype=torch.uint8) for i in range(16)}
    path = tmp_path / f"x.{container}"
    torch.save(state, path) if container == "pt" else save_file(state, path)
    del state
    code = """
import sys
from pathlib import Path
from vmla_convert.checkpoint.source import open_source

def peak():  # getrusage would count the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

source = open_source(Path(sys.argv[1]))
before = peak()
for name in source.specs():
    source.read(name)
print(peak() - before)
"""
    # Without the limit, glibc keeps some of what is freed.
    limits = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    grown = int(subprocess.check_output([sys.executable, "-c", code, str(path)], env=limits))
    assert 25_000_000 < grown < 110_000_000  # all are 400_000_000


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


def with_tensor(tmp: Path, name: str) -> Path:
    folder = shards(tmp / "f")
    save_file({"a.weight": STATE["a.weight"], name: torch.ones(1)}, folder / "part-0.safetensors")
    return folder


def safetensors(tmp: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    return write(tmp / "x.safetensors", len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def of_dtype(tmp: Path, dtype: str, size: int) -> Path:
    return safetensors(tmp, {"w": entry(dtype, [4], 0, size)}, bytes(size))


class View:
    """Pickles as a view of thirteen floats of a storage of twelve."""

    def __reduce__(self) -> tuple[object, ...]:
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.arange(12.0).untyped_storage(), dtype=torch.float32, _internal=True
        )
        return _rebuild_tensor_v2, (storage, 0, (13,), (1,), False, OrderedDict())


def odd_tensors(tmp: Path, make: Callable[[], torch.Tensor]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are prototypes
        return save_pickle(tmp / "x.pt", {"w": make()})


def truncated(file: Path) -> Path:
    return write(file, file.read_bytes()[:-3])


def zip_of_text(tmp: Path) -> Path:
    with zipfile.ZipFile(tmp / "x.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    return tmp / "x.pt"


def two_files(tmp: Path) -> Path:
    save_pickle(tmp / "f" / "one.pt")
    return save_pickle(tmp / "f" / "two.pth").parent


def empty_pipeline(tmp: Path) -> Path:
    (tmp / "f" / "transformer").mkdir(parents=True)
    return tmp / "f"


def wan_a14b(tmp: Path) -> Path:
    folder = pipeline(tmp / "f", "high_noise_model", "low_noise_model")
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        save_pickle(folder / name)
    return folder


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2)]),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "meta": lambda: torch.empty(2, device="meta"),
}

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
    "a pipeline's root": (empty_pipeline, "nothing that can be loaded"),
    "Wan's experts": (wan_a14b, "experts of a mixture: high_noise_model, low_noise_model"),
    "diffusers' experts": (
        lambda tmp: pipeline(tmp / "f", "transformer", "transformer_2"),
        "experts of a mixture: transformer, transformer_2",
    ),
    "one expert of two": (
        lambda tmp: pipeline(tmp / "f", "low_noise_model"),
        "experts of a mixture: low_noise_model",
    ),
    "a shard's own tensor": (
        lambda tmp: with_tensor(tmp, "c.weight"),
        r"does not list .* hold: c\.weight in part-0\.safetensors",
    ),
    "a tensor in two shards": (
        lambda tmp: with_tensor(tmp, "b.weight"),
        r"does not list .* hold: b\.weight in part-0\.safetensors",
    ),
    **{
        f"dtype {dtype}": (
            lambda tmp, dtype=dtype, size=size: of_dtype(tmp, dtype, size),
            f"quantised: w is stored as {dtype}",
        )
        for dtype, size in {"F8_E4M3": 4, "F8_E5M2": 4, "F8_E8M0": 4, "F4": 2}.items()
    },
    "dtype float8 in a .pt": (
        lambda tmp: save_pickle(tmp / "x.pt", {"w": torch.ones(2).to(torch.float8_e4m3fn)}),
        "quantised: w is stored as float8_e4m3fn",
    ),
    **{
        f"{name} .pt": (
            lambda tmp, make=make: odd_tensors(tmp, make),
            "does not hold w as plain numbers",
        )
        for name, make in ODD.items()
    },
    "compressed .pt": (
        lambda tmp: repacked(save_pickle(tmp / "x.pt"), {}, zipfile.ZIP_DEFLATED),
        r"is compressed: x/data\.pkl",
    ),
    "lost storage": (
        lambda tmp: repacked(save_pickle(tmp / "x.pt"), {".format_version": None, "data/1": None}),
        "not a torch checkpoint, or is damaged",
    ),
    "view past its storage": (
        lambda tmp: save_pickle(tmp / "x.pt", {"v": View()}),
        "damaged",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_sentence_with_a_hint(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(make(tmp_path))
    assert caught.value.hint
    assert not caught.value.message.endswith(".")


def test_experts_are_named_by_their_paths(tmp_path: Path) -> None:
    folder = wan_a14b(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    for expert in (folder / "high_noise_model", folder / "low_noise_model"):
        assert str(expert) in caught.value.hint
        assert open_source(expert).specs().keys() == STATE.keys()


def test_links_into_the_hub_cache_are_followed(tmp_path: Path) -> None:
    folder = shards(tmp_path / "f")
    blob = (folder / "part-0.safetensors").rename(tmp_path / "blob")
    (folder / "part-0.safetensors").symlink_to(blob)
    assert torch.equal(open_source(folder).read("a.weight"), STATE["a.weight"])


def test_a_fingerprint_ignores_other_files(tmp_path: Path) -> None:
    folder = shards(tmp_path / "f")
    before = fingerprint(folder)
    (folder / "README.md").write_text("card")
    assert fingerprint(folder) == before
    save_file({"b.weight": STATE["b.weight"] + 1}, folder / "part-1.safetensors")
    assert fingerprint(folder) != before


def test_names_come_in_order(tmp_path: Path) -> None:
    state = {f"blocks.{i}.w": torch.zeros(i + 1) for i in range(12)}
    save_file(state, tmp_path / "x.safetensors")
    assert list(open_source(tmp_path).specs()) == sorted(state)


def test_a_pickle_that_is_too_large_to_map_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = CONTAINERS["flat .pt"](tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"unable to mmap 28600000000 bytes from file <{path}>")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match="GB") as caught:
        open_source(path)
    assert "vm.overcommit_memory" in caught.value.hint
