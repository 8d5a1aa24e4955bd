"""Pretraining leaves a checkpoint in Self-Forcing's form, and resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import MODEL, PowerCut, PowerCutError

from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.config import DataConfig, TeacherConfig, TrainingConfig
from vmla_convert.errors import OutputError
from vmla_convert.loading.load import load
from vmla_convert.results import read_rows
from vmla_convert.training.pretrain import pretrain

pytest_plugins = ["checkpoints"]

CONFIG = TeacherConfig(
    MODEL,
    TrainingConfig(steps=4, batch_size=2, lr=1e-2, ema=0.5, eval_every=2, checkpoint_every=2),
    DataConfig("demo", frames=4),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("pretrained")
    pretrain(CONFIG, out)
    return out


def test_the_checkpoint_opens_as_self_forcing(trained: Path) -> None:
    opened = open_checkpoint(trained / "checkpoint")
    assert (opened.family, opened.source.key) == ("self_forcing", "generator_ema")
    assert opened.config == MODEL
    assert {spec.dtype for spec in opened.specs().values()} == {torch.bfloat16}


def test_names_and_config_are_those_of_self_forcing(trained: Path) -> None:
    saved = torch.load(trained / "checkpoint" / "model.pt", weights_only=True)
    assert list(saved) == ["generator_ema"]
    assert "model.blocks.0.self_attn.k.weight" in saved["generator_ema"]
    config = json.loads((trained / "checkpoint" / "config.json").read_text())
    assert (config["_class_name"], config["dim"], config["num_heads"]) == ("WanModel", 48, 2)


def test_it_learns_from_the_first_steps(trained: Path) -> None:
    curve = {row.step: row.value for row in read_rows(trained / "rows.jsonl")}
    assert list(curve) == [0, 2, 4]
    assert curve[4] < curve[0]
    assert load(trained / "checkpoint").head.head.weight.any()


@pytest.mark.parametrize("before", [1, 3])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    before: int, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(PowerCutError):
        pretrain(CONFIG, tmp_path, PowerCut("pretraining", before))
    assert not (tmp_path / "checkpoint").exists()
    pretrain(CONFIG, tmp_path)
    whole, resumed = (load(out / "checkpoint").state_dict() for out in (trained, tmp_path))
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
    # A resumed run may measure a step again, but finds the same.
    curve = set(read_rows(tmp_path / "rows.jsonl"))
    assert curve == set(read_rows(trained / "rows.jsonl"))


def test_a_finished_run_is_refused_and_kept(trained: Path) -> None:
    file = trained / "checkpoint" / "model.pt"
    before = file.read_bytes(), (trained / "rows.jsonl").read_bytes()
    with pytest.raises(OutputError) as caught:
        pretrain(CONFIG, trained)
    assert caught.value.hint
    assert before == (file.read_bytes(), (trained / "rows.jsonl").read_bytes())
