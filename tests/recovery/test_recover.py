"""Recovery learns, trains only what the conversion made, resumes bit for bit, or is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from checkpoints import (
    CLIPS,
    EVALUATE,
    MODEL,
    RECOVER,
    PowerCut,
    PowerCutError,
    Vmla,
    refused,
    untimed,
)
from conftest import tiny_model

from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.config import (
    DataConfig,
    EvaluateConfig,
    MediaConfig,
    RecoverConfig,
    TrainingConfig,
)
from vmla_convert.errors import CheckpointError, OutputError, VmlaError
from vmla_convert.fitting.calibrate import model_blocks
from vmla_convert.generating import make_clips
from vmla_convert.layers.block import masked_attention
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.measuring.rows import Errors
from vmla_convert.media.clips import open_clips, seeded
from vmla_convert.progress import Silent
from vmla_convert.recovery.layerwise import fit_layers
from vmla_convert.recovery.recover import recover
from vmla_convert.recovery.stages import recover_model
from vmla_convert.results import Metric, Row
from vmla_convert.tables import to_dict
from vmla_convert.training.losses import make_example, teacher_forcing_inputs
from vmla_convert.training.pretrain import save_self_forcing

pytest_plugins = ["checkpoints"]
pytestmark = pytest.mark.usefixtures("few_layerwise_clips")

# By full name, so that `k_norm_proj`, which recovery must leave alone, is none of them.
TRAINED = {
    f"blocks.{layer}.self_attn.{name}"
    for layer in range(MODEL.geometry.num_layers)
    for name in (
        *(
            f"{module}.{kind}"
            for module in ("kv_a_proj", "kv_b_proj_k", "kv_b_proj_v", "k_rope_proj")
            for kind in ("weight", "bias")
        ),
        "q_rope_map",
    )
}
# Every step is measured, so that a resumed run meets rows which the interrupted one wrote.
CONFIG = replace(RECOVER, training=replace(RECOVER.training, eval_every=1))


@pytest.fixture(scope="module")
def recovered(
    teacher: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Row]]:
    """An uninterrupted run: the folder and its rows."""
    out = tmp_path_factory.mktemp("run") / "recovered"
    return out, recover(converted, teacher, out, CONFIG, EVALUATE)


def layer_errors(student: CausalWanModel, dense: CausalWanModel) -> list[float]:
    """Relative squared error of each layer's output on the dense model's own held-out inputs."""
    clips = open_clips(EVALUATE.data).batch(0, 4, "held_out")
    example = make_example(clips, MODEL.chunk_frames, seeded(0, 0, "layers"))
    positions, mask = teacher_forcing_inputs(MODEL, example)
    errors: list[float] = []
    attend = masked_attention(dense.rotary(positions, example.latents), mask)
    with torch.no_grad():
        x, _, modulation = dense.embed(example.latents, example.timestep)
        text = dense.text_embedding(example.context)
        for latent, block in zip(student.all_blocks(), dense.all_blocks(), strict=True):
            entering = block.attention_input(x, modulation)
            target = attend(block, entering)
            error = (attend(latent, entering) - target).square().sum() / target.square().sum()
            errors.append(error.item())
            x = block.after_attention(x, target, modulation, text)
    return errors


def fit_alone(student: CausalWanModel, dense: CausalWanModel, config: RecoverConfig) -> None:
    """The layer-wise stage on models in memory."""
    fit_layers(student, dense, model_blocks(dense), config, None, Silent())


@pytest.mark.slow
def test_recovery_takes_most_of_the_error_away(
    student: CausalWanModel, dense: CausalWanModel
) -> None:
    curve: dict[int, Errors] = {}
    training = TrainingConfig(steps=16, batch_size=4, lr=3e-3, eval_every=16)
    config = RecoverConfig(16, 3e-3, training=training, data=CLIPS)
    recover_model(student, dense, config, HeldOut(dense, EVALUATE), curve.__setitem__)
    errors = [curve[step].velocity_error for step in (0, 16, 32)]
    assert list(curve) == [0, 16, 32]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.6 * errors[0]


def test_the_layerwise_stage_alone_mends_every_layer(
    student: CausalWanModel, dense: CausalWanModel
) -> None:
    before = layer_errors(student, dense)
    fit_alone(student, dense, RecoverConfig(20, 3e-3, data=CLIPS))
    after = layer_errors(student, dense)
    assert all(now < 0.7 * was for now, was in zip(after, before, strict=True))
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_only_what_the_conversion_made_is_trained(
    converted: Path, recovered: tuple[Path, list[Row]]
) -> None:
    before, after = open_checkpoint(converted), open_checkpoint(recovered[0])
    assert before.specs() == after.specs()
    changed = {n for n in before.names if not torch.equal(before.read(n), after.read(n))}
    assert changed == TRAINED


def test_the_recovered_folder_is_a_converted_one_that_says_how(
    converted: Path, recovered: tuple[Path, list[Row]]
) -> None:
    out, rows = recovered
    assert (out / "config.json").read_bytes() == (converted / "config.json").read_bytes()
    was, now = (json.loads((f / "conversion.json").read_text()) for f in (converted, out))
    record = now.pop("recovered")
    assert was.pop("weights") != now.pop("weights")
    assert now == was | {"recover": to_dict(CONFIG)}
    assert record["kept_steps"].keys() == {"layer by layer", "distilling"}
    assert record["skipped_steps"] == {"distilling": 0}
    assert record["learning_rate"] == CONFIG.training.lr
    assert record["clips"] == open_clips(CLIPS).record()
    measured = {(row.metric, row.step): row.value for row in rows}
    for point, step in (("first", 0), ("last", 6)):
        assert record["errors"][point] == {
            "step": step,
            "velocity_error": measured[Metric.VELOCITY_ERROR, step],
            "flow_loss": measured[Metric.FLOW_LOSS, step],
        }
    assert record["errors"]["dense_flow_loss"] == measured[Metric.FLOW_LOSS, None]
    assert record["errors"]["clips"] == EVALUATE.clips
    assert f"{measured[Metric.VELOCITY_ERROR, 6]:.3g}" in (out / "README.md").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["recovered"]


def test_the_rows_tell_the_whole_curve(
    dense: CausalWanModel, converted: Path, recovered: tuple[Path, list[Row]]
) -> None:
    out, rows = recovered
    curve = {row.step: row.value for row in rows if row.metric == "velocity_error"}
    assert list(curve) == [0, 2, 3, 4, 5, 6]
    held_out = HeldOut(dense, EVALUATE)
    assert curve[0] == held_out.measure(load(converted)).velocity_error
    assert curve[6] == held_out.measure(load(out)).velocity_error
    assert {row.run for row in rows} == {"dense", "mla-calibrated-8+4-joint"}
    metrics = [row.metric for row in rows if row.step is None and row.run != "dense"]
    assert sorted(metrics) == [
        "cache_bytes_per_token",
        "cache_cut",
        "learning_rate",
        "recover_seconds",
    ]


@pytest.mark.parametrize(("label", "before"), [("layer by layer", 1), ("distilling", 3)])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    label: str,
    before: int,
    teacher: Path,
    converted: Path,
    recovered: tuple[Path, list[Row]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(PowerCutError):
        recover(converted, teacher, out, CONFIG, EVALUATE, PowerCut(label, before))
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]
    rows = recover(converted, teacher, out, CONFIG, EVALUATE)
    assert untimed(rows) == untimed(recovered[1])
    weights = [folder / "model.safetensors" for folder in (out, recovered[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_run_of_other_settings_is_refused_and_kept(
    teacher: Path, converted: Path, tmp_path: Path
) -> None:
    out, state = tmp_path / "out", tmp_path / "out.state"
    with pytest.raises(PowerCutError):
        recover(converted, teacher, out, CONFIG, EVALUATE, PowerCut("distilling", 3))
    files = sorted(path.name for path in state.iterdir())
    steps, clips = CONFIG.layerwise_steps, EVALUATE.clips
    others = {
        f"recover.layerwise_steps is {steps} there and {steps + 1} here": (
            replace(CONFIG, layerwise_steps=steps + 1),
            EVALUATE,
        ),
        f"evaluation.clips is {clips} there and 8 here": (CONFIG, replace(EVALUATE, clips=8)),
    }
    for difference, (config, evaluation) in others.items():
        with pytest.raises(OutputError) as caught:
            recover(converted, teacher, out, config, evaluation)
        assert difference in caught.value.message
    assert sorted(path.name for path in state.iterdir()) == files


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("converted", "other"),
        ("converted", "converted"),
        ("teacher", "teacher"),
        ("nothing", "teacher"),
        ("converted", "nothing"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(
    first: str, second: str, teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    config = replace(MODEL, geometry=replace(MODEL.geometry, ffn_dim=32))
    save_self_forcing(tiny_model(config).state_dict(), config, tmp_path / "other")
    places = {"teacher": teacher, "converted": converted}
    one, two = (places.get(name, tmp_path / name) for name in (first, second))
    with pytest.raises(CheckpointError) as caught:
        recover(one, two, tmp_path / "out", CONFIG, EVALUATE)
    assert caught.value.hint
    assert refused(ran := vmla("recover", one, "--teacher", two, "-o", tmp_path / "out"))
    assert caught.value.message in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_taken_place_is_refused_and_kept(teacher: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError) as caught:
        recover(converted, teacher, tmp_path / "out", CONFIG, EVALUATE)
    assert caught.value.hint
    assert (tmp_path / "out").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Clips of the model's own, and what a dry run tells


def test_the_dense_models_own_samples_are_made_once(
    teacher: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig("self", frames=6, clips=6)
    config, evaluation = replace(CONFIG, data=data), EvaluateConfig(4, replace(data, seed=1))
    out, media = tmp_path / "out", MediaConfig(clips_dir=str(tmp_path / "clips"))
    rows = recover(converted, teacher, out, config, evaluation, media=media)
    record = json.loads((out / "conversion.json").read_text())
    assert record["recover"] == to_dict(config)
    clips, held_out = record["recovered"]["clips"], record["recovered"]["errors"]["held_out"]
    assert (clips["train"], clips["held_out"]) == ([0, 6], [6, 7])
    assert set(clips["prompts"]).isdisjoint(held_out["prompts"])
    shutil.rmtree(out)
    monkeypatch.delattr(make_clips, "build")
    again = recover(converted, teacher, out, config, evaluation, media=media)
    assert untimed(again) == untimed(rows)


def test_a_dry_run_tells_and_writes_nothing(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    out = tmp_path / "out"
    command = ["recover", converted, "--teacher", teacher, "-o", out, "--dry-run", "--json"]
    planned = json.loads(vmla(*command, "--set", "recover.on_policy_steps=7").out)
    state = load(converted).state_dict()
    assert planned["trains"] == sum(state[name].numel() for name in TRAINED)
    assert planned["of"] == sum(tensor.numel() for tensor in state.values())
    assert planned["nbytes"] == sum(
        spec.nbytes for spec in open_checkpoint(converted).specs().values()
    )
    assert list(planned["steps"].values()) == [40, 100, 7, 0]
    assert planned["work"]["clips_to_sample"] == 0
    planned = json.loads(vmla(*command, "--set", "recover.train=all", "--data", "self").out)
    assert planned["trains"] == planned["of"]
    # 128 clips and a tenth to train on, 24 to measure on.
    assert planned["work"]["clips_to_sample"] == 128 + 13 + 24
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--batch-size", "3", "--set", "recover.training.accumulate=2"], "batch_size 3"),
        (["--lr", "0"], "lr 0"),
        (["--data", "nowhere"], "nowhere"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--set", "recover.train=all", "--set", "recover.lora_rank=2"], "lora_rank"),
        (["--shard"], "shard"),
        (["--shard", "--set", "recover.lora_rank=2"], "lora_rank"),
        (["--shard", "--set", "recover.dmd.steps=1"], "dmd.steps"),
        (["--shard", "--set", "recover.training.mixed_precision=fp16"], "fp16"),
        (["--set", "recover.training.emma=1"], "training.emma"),
        (["--set", "recover.training.tracker=paper"], "paper"),
        (["--set", "recover.data.frames=3"], "frames"),
        (["--set", "recover.lora_rank=2"], "vmla-convert[lora]"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(
    options: list[str],
    word: str,
    teacher: Path,
    converted: Path,
    tmp_path: Path,
    vmla: Vmla,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    # No weights are read, which takes minutes for large models.
    monkeypatch.delattr("vmla_convert.recovery.recover.build")
    command = ["recover", converted, "--teacher", teacher, "-o", tmp_path / "out", *options]
    for dry in ([], ["--dry-run"]):
        assert refused(ran := vmla(*command, *dry))
        assert word in ran.err
    assert list(tmp_path.iterdir()) == []


def test_what_trained_is_written_as_it_was_measured(
    dense: CausalWanModel, teacher: Path, converted: Path, tmp_path: Path
) -> None:
    """The source is in two bytes, which small steps do not reach."""
    out = tmp_path / "out"
    training = replace(RECOVER.training, lr=1e-5)
    config = replace(CONFIG, layerwise_steps=0, train="attention", training=training)
    rows = recover(converted, teacher, out, config, EVALUATE)
    curve = [row.value for row in rows if row.metric == "velocity_error"]
    assert HeldOut(dense, EVALUATE).measure(load(out)).velocity_error == curve[-1]
    dtypes = {name: spec.dtype for name, spec in open_checkpoint(out).specs().items()}
    assert dtypes["blocks.0.self_attn.q.weight"] == torch.float32
    assert dtypes["blocks.0.ffn.0.weight"] == torch.bfloat16


def test_a_run_that_did_nothing_is_in_no_ones_way(
    teacher: Path, converted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    data = DataConfig("self", frames=6, clips=2, prompts=("no digit", "3"))
    with pytest.raises(VmlaError, match="no digit"):
        recover(converted, teacher, out, replace(CONFIG, data=data), EVALUATE)
    assert list(tmp_path.iterdir()) == []


def press(*_: object, **__: object) -> NoReturn:
    """Ctrl-C."""
    raise KeyboardInterrupt


def test_ctrl_c_says_that_the_same_command_goes_on(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["recover", converted, "--teacher", teacher, "-o", tmp_path / "out", "--steps", "1"]
    words += ["--set", "recover.layerwise_steps=1", "--set", "recover.data.frames=4"]
    words += ["--batch-size", "1", "--lr", "0.001"]
    with monkeypatch.context() as patch:
        patch.setattr("vmla_convert.recovery.layerwise.fit_share", press)
        ran = vmla(*words)
    assert (ran.code, ran.out) == (130, "")
    assert "the same command" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]
    assert refused(ran := vmla(*words, "--set", "recover.train=attention"))
    assert "recover.train" in ran.err
    assert vmla(*words).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_before_anything_is_done_leaves_nothing_and_says_so(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmla_convert.recovery.recover.build", press)
    ran = vmla("recover", converted, "--teacher", teacher, "-o", tmp_path / "out")
    assert (ran.code, ran.out) == (130, "")
    assert "the same command" not in ran.err
    assert list(tmp_path.iterdir()) == []
