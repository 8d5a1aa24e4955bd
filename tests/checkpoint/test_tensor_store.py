"""Shelves: memory and a folder behave alike; the folder is found again by the same work alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vmla_convert.checkpoint.tensor_store import FolderStore, MemoryStore, TensorStore
from vmla_convert.errors import OutputError

ONE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1, dtype=torch.float64)}
OTHER = {"a": torch.zeros(2, dtype=torch.bfloat16)}
IDENTITY = ["0.1", {"source": {"sha256": "x"}, "clips": None}]


@pytest.fixture(params=["memory", "folder"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> TensorStore:
    return MemoryStore() if request.param == "memory" else FolderStore(tmp_path / "s", IDENTITY)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def test_a_group_comes_back_as_it_was_until_it_is_dropped(shelf: TensorStore) -> None:
    assert not shelf.has("one")
    shelf.put("one", ONE)
    shelf.put("other", OTHER)
    assert shelf.has("one") and shelf.has("other")
    assert same(shelf.get("one"), ONE) and same(shelf.get("other"), OTHER)
    shelf.drop("one")
    assert not shelf.has("one") and shelf.has("other")
    shelf.drop("one")


def test_a_second_group_of_a_name_takes_the_place_of_the_first(shelf: TensorStore) -> None:
    shelf.put("one", ONE)
    shelf.put("one", OTHER)
    assert same(shelf.get("one"), OTHER)


def test_a_group_that_is_not_there_is_not_given(shelf: TensorStore) -> None:
    with pytest.raises((KeyError, FileNotFoundError)):
        shelf.get("one")


def test_views_and_transposes_are_kept_by_value(shelf: TensorStore) -> None:
    wide = torch.arange(12.0).view(3, 4)
    shelf.put("one", {"a": wide.mT, "b": wide[:, 1], "c": wide[1:]})
    got = shelf.get("one")
    assert torch.equal(got["a"], wide.mT)
    assert torch.equal(got["b"], wide[:, 1])
    assert torch.equal(got["c"], wide[1:])


def test_the_folder_is_made_for_the_first_group_and_found_by_the_same_work(tmp_path: Path) -> None:
    shelf = FolderStore(tmp_path / "deep" / "s", IDENTITY)
    assert not list(tmp_path.iterdir())
    assert not shelf.has("one")
    shelf.put("one", ONE)
    # However the identity was put together.
    again = FolderStore(tmp_path / "deep" / "s", ("0.1", dict(reversed(IDENTITY[1].items()))))
    assert same(again.get("one"), ONE)


@pytest.mark.parametrize("other", [None, [], ["0.2", IDENTITY[1]], ["0.1", {"clips": "y"}]])
def test_what_another_work_left_is_neither_used_nor_lost(other: Any, tmp_path: Path) -> None:
    FolderStore(tmp_path / "s", IDENTITY).put("one", ONE)
    with pytest.raises(OutputError, match="in the way") as caught:
        FolderStore(tmp_path / "s", other)
    assert caught.value.hint
    assert same(FolderStore(tmp_path / "s", IDENTITY).get("one"), ONE)


@pytest.mark.parametrize("told", [None, "", '["0.1"'])
def test_groups_that_nobody_vouches_for_are_not_used(told: str | None, tmp_path: Path) -> None:
    FolderStore(tmp_path / "s", IDENTITY).put("one", ONE)
    (tmp_path / "s" / "identity.json").unlink()
    if told is not None:
        (tmp_path / "s" / "identity.json").write_text(told)
    with pytest.raises(OutputError, match="in the way"):
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
    shelf = FolderStore(tmp_path / "s", IDENTITY)
    shelf.put("one", ONE)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        for name in ("one", "two"):
            with pytest.raises(KeyboardInterrupt):
                shelf.put(name, OTHER)
    shelf = FolderStore(tmp_path / "s", IDENTITY)
    assert same(shelf.get("one"), ONE)
    assert not shelf.has("two")
    shelf.put("two", OTHER)
    assert same(shelf.get("two"), OTHER)


def test_removing_a_folder_leaves_nothing(tmp_path: Path) -> None:
    shelf = FolderStore(tmp_path / "s", IDENTITY)
    shelf.remove()
    shelf.put("one", ONE)
    shelf.remove()
    assert not list(tmp_path.iterdir())
    assert not shelf.has("one")
