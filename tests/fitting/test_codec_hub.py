"""Codecs on the Hub: the base is fetched, the card names it, and no local path is uploaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import MODEL, Vmla
from codec_files import LAYERS, NAMES, QUICK, Pair, edit_record, velocity
from hub_stub import Hub
from huggingface_hub import ModelCard

from vmla_convert.config import ConvertConfig, Product, SourceConfig
from vmla_convert.errors import CheckpointError
from vmla_convert.fitting.convert import convert
from vmla_convert.loading.load import load
from vmla_convert.loading.publish import push

pytest_plugins = ["checkpoints", "codec_files", "hub_stub"]

# huggingface-hub 2.4 uploads in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO, DENSE_REPO = "user/tiny-codec", "someone/dense"


@pytest.fixture
def on_hub(teacher: Path, stub: Hub, tmp_path: Path) -> Path:
    """A codec whose base model is on the Hub, in a repository that has changed since."""
    files = {f"checkpoints/{file.name}": file.read_bytes() for file in teacher.iterdir()}
    stub.put(DENSE_REPO, {**files, "checkpoints/other.pt": b"another"})
    source = SourceConfig(DENSE_REPO, file="checkpoints/model.pt")
    convert(source, tmp_path / "kv", QUICK)
    stub.put(DENSE_REPO, {"checkpoints/model.pt": b"a newer one"})
    return tmp_path / "kv"


def empty_hub_cache(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "hf-home")


def test_a_base_on_the_hub_is_fetched_by_id_and_revision(
    on_hub: Path, stub: Hub, teacher: Path, tmp_path: Path
) -> None:
    record = json.loads((on_hub / "conversion.json").read_text())["base"]
    first = next(iter(stub.repos[DENSE_REPO].commits))
    assert record.keys() == {"name", "repo", "revision", "file", "precision", "tensors"}
    assert (record["repo"], record["revision"]) == (DENSE_REPO, first)
    empty_hub_cache(tmp_path)
    stub.asked.clear()
    state = load(on_hub).state_dict()
    assert stub.calls("GET", f"/{DENSE_REPO}/resolve/{first}/checkpoints/model.pt") == 1
    assert all(torch.equal(state[name], t) for name, t in load(teacher).state_dict().items())
    # A base model that is given, or lies beside the codec, is not fetched.
    empty_hub_cache(tmp_path)
    stub.asked.clear()
    load(on_hub, base_model=teacher)
    shutil.copytree(teacher, on_hub / "dense")
    load(on_hub)
    assert stub.asked == []


def test_a_pushed_codec_fetches_itself_and_its_base(
    on_hub: Path, stub: Hub, tmp_path: Path, vmla: Vmla
) -> None:
    here = velocity(load(on_hub))
    assert set(push(on_hub, REPO, tag="v1").uploaded) == NAMES
    assert push(on_hub, REPO).uploaded == {}
    data = ModelCard(stub.repos[REPO].files["README.md"].content.decode()).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (DENSE_REPO, "adapter")
    assert data["license"] == MODEL.licence
    shutil.rmtree(on_hub)
    empty_hub_cache(tmp_path)
    assert torch.equal(velocity(load(REPO)), here)
    assert torch.equal(velocity(load(f"{REPO}@v1", cut=0.95)), here)
    ran = vmla("inspect", REPO, "--json")
    assert json.loads(ran.out)["model"]["codec"]["rank"] == QUICK.channels


@pytest.mark.parametrize("product", ["codec", "mla"])
@pytest.mark.parametrize("known", [False, True])
def test_the_card_of_a_local_source_names_a_known_base_model(
    product: Product, known: bool, teacher: Path, tmp_path: Path
) -> None:
    trained = "Wan-AI/Wan2.1-T2V-1.3B"
    source = SourceConfig(str(teacher), overrides={"base_model": trained} if known else {})
    convert(source, tmp_path / "out", ConvertConfig(product, calibrate=False))
    data = ModelCard((tmp_path / "out" / "README.md").read_text()).data.to_dict()
    relation = {"base_model_relation": "adapter"} if product == "codec" else {}
    expected = {"base_model": trained, **relation} if known else {}
    assert {n: v for n, v in data.items() if n.startswith("base_model")} == expected
    assert data["license"] == MODEL.licence


def test_no_local_path_is_uploaded(pair: Pair, stub: Hub, codec: Path, tmp_path: Path) -> None:
    assert str(tmp_path) in (pair.codec / "conversion.json").read_text()
    push(pair.codec, REPO)
    files = stub.repos[REPO].files
    assert not any(str(tmp_path).encode() in blob.content for blob in files.values())
    base = json.loads(files["conversion.json"].content)["base"]
    assert (base["path"], base["name"]) == ("dense", "dense")
    assert len(base["tensors"]) == 5 * LAYERS
    with pytest.raises(CheckpointError):
        load(REPO)
    assert torch.equal(velocity(load(REPO, base_model=pair.base)), velocity(load(codec)))


def test_a_base_name_without_a_folder_is_not_looked_up_in_the_working_folder(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_record(pair.codec, lambda record: record["base"].update(path="dense"))
    monkeypatch.chdir(pair.base.parent)
    with pytest.raises(CheckpointError):
        load(pair.codec)
