"""Memory and a folder behave alike; only the same work finds the groups of a folder again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vmla_convert.errors import OutputError
from vmla_convert.storage.tensor_store import FolderStore, MemoryStore, TensorStore

ONE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1, dtype=torch.float64)}
OTHER = {"a": torch.zeros(2, dtype=torch.bfloat16)}
IDENTITY = ["0.1", {"source": {"sha256": "x"}, "clips": None}]


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TensorStore:
    return MemoryStore() if request.param == "memory" else FolderStore(tmp_path / "s", IDENTITY)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def test_a_group_comes_back_as_it_was_until_it_is_replaced_or_dropped(store: TensorStore) -> None:
    assert not store.has("one")
    store.put("one", ONE)
    store.put("other", OTHER)
    assert same(store.get("one"), ONE) and same(store.get("other"), OTHER)
    store.put("one", OTHER)
    assert same(store.get("one"), OTHER)
    for _ in range(2):
        store.drop("one")
        assert not store.has("one") and store.has("other")
    with pytest.raises((KeyError, FileNotFoundError)):
        store.get("one")


def test_views_and_transposes_are_kept_by_value(store: TensorStore) -> None:
    wide = torch.arange(12.0).view(3, 4)
    views = {"a": wide.mT, "b": wide[:, 1], "c": wide[1:], "d": wide}
    store.put("one", views)
    assert same(store.get("one"), views)


def test_the_folder_is_made_for_the_first_group_and_found_by_the_same_work(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "deep" / "s", IDENTITY)
    assert not store.has("one") and not list(tmp_path.iterdir())
    store.put("one", ONE)
    # However the identity was put together.
    again = FolderStore(tmp_path / "deep" / "s", ("0.1", dict(reversed(IDENTITY[1].items()))))
    assert same(again.get("one"), ONE)
    again.remove()
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize("other", [None, [], ["0.2", IDENTITY[1]], ["0.1", {"clips": "y"}]])
def test_groups_of_other_work_are_neither_used_nor_lost(other: Any, tmp_path: Path) -> None:
    FolderStore(tmp_path / "s", IDENTITY).put("one", ONE)
    with pytest.raises(OutputError, match=str(tmp_path)) as caught:
        FolderStore(tmp_path / "s", other)
    assert caught.value.hint
    assert same(FolderStore(tmp_path / "s", IDENTITY).get("one"), ONE)


@pytest.mark.parametrize("identity", [None, "", '["0.1"'])
def test_groups_without_an_identity_are_not_used(identity: str | None, tmp_path: Path) -> None:
    FolderStore(tmp_path / "s", IDENTITY).put("one", ONE)
    (tmp_path / "s" / "identity.json").unlink()
    if identity is not None:
        (tmp_path / "s" / "identity.json").write_text(identity)
    with pytest.raises(OutputError, match=str(tmp_path)):
        FolderStore(tmp_path / "s", IDENTITY)
    assert (tmp_path / "s" / "one.safetensors").exists()


def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written") as caught:
        FolderStore(tmp_path / "file" / "s", IDENTITY).put("one", ONE)
    assert caught.value.hint


def test_a_group_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "s", IDENTITY)
    store.put("one", ONE)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        for name in ("one", "two"):
            with pytest.raises(KeyboardInterrupt):
                store.put(name, OTHER)
    store = FolderStore(tmp_path / "s", IDENTITY)
    assert same(store.get("one"), ONE) and not store.has("two")
    store.put("two", OTHER)
    assert same(store.get("two"), OTHER)


@pytest.mark.parametrize("left", [[], ["identity.json.new"]])
def test_a_folder_that_a_kill_left_without_a_name_is_taken_over(
    left: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    for name in left:
        (folder / name).write_text("half")
    store = FolderStore(folder, IDENTITY)
    store.put("parts/one", ONE)
    assert same(FolderStore(folder, IDENTITY).get("parts/one"), ONE)
