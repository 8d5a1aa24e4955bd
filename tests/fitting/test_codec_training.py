"""Codecs after conversion: exported to whole checkpoints, and recovered."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checkpoints import EVALUATE, RECOVER, PowerCut, PowerCutError, Vmla, refused
from codec_files import CODEC, LAYERS, NAMES, TRAINED, Pair, near, velocity
from safetensors.torch import load_file

from vmla_convert.checkpoint.base import base_tensors
from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.config import RecoverConfig, TrainingConfig
from vmla_convert.errors import VmlaError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.export import EXPORT_LAYOUTS, export
from vmla_convert.loading.load import is_codec, load, locate
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.recovery.recover import recover
from vmla_convert.results import Metric, Row

pytest_plugins = ["checkpoints", "codec_files"]

TRAINING = TrainingConfig(steps=4, batch_size=2, lr=1e-3, eval_every=1, checkpoint_every=2)
LEARNS = replace(RECOVER, layerwise_lr=3e-3, training=TRAINING)
NESTED = replace(LEARNS, nested=(0.95, 0.9, 0.8))


@pytest.mark.parametrize("layout", EXPORT_LAYOUTS)
def test_an_export_is_whole_and_needs_no_base(layout: str, pair: Pair, tmp_path: Path) -> None:
    before = load(pair.codec, bytes_per_token=16)
    expected, dense = velocity(before), velocity(load(pair.base))
    moved = pair.base.rename(tmp_path / "moved")
    with pytest.raises(VmlaError):
        export(pair.codec, tmp_path / "whole", layout)
    shutil.move(moved, pair.base)
    export(pair.codec, tmp_path / "whole", layout)
    shutil.rmtree(pair.base)
    shutil.rmtree(pair.codec)
    assert not is_codec(locate(str(tmp_path / "whole"))[0])
    model = load(tmp_path / "whole", bytes_per_token=16)
    assert model.config == before.config
    assert torch.equal(velocity(model), expected)
    assert not near(velocity(model), dense, 1e-4)
    for other in EXPORT_LAYOUTS:
        export(tmp_path / "whole", tmp_path / other, other)
        assert torch.equal(velocity(load(tmp_path / other, bytes_per_token=16)), expected)


def test_the_command_exports_a_codec_with_a_given_base(
    pair: Pair, codec: Path, tmp_path: Path, vmla: Vmla
) -> None:
    moved, out = pair.base.rename(tmp_path / "moved"), tmp_path / "whole"
    ran = vmla("export", pair.codec, "-o", out, "--layout", "native", "--base-model", moved)
    assert ran.code == 0
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == load(codec).state_dict().keys()
    assert {t.dtype for n, t in stored.items() if ".codec." not in n} == {torch.bfloat16}
    assert torch.equal(velocity(load(out)), velocity(load(codec)))


class Recovered(NamedTuple):
    """A recovered codec, the settings of the recovery, and the rows."""

    folder: Path
    config: RecoverConfig
    rows: list[Row]


@pytest.fixture(scope="module", params=[LEARNS, NESTED], ids=["one size", "nested"])
def recovered(
    request: pytest.FixtureRequest, codec: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recovered:
    out = tmp_path_factory.mktemp("recovered") / "kv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmla_convert.recovery.layerwise.CLIPS", 4)
        patch.setattr("vmla_convert.recovery.layerwise.HELD_CLIPS", 2)
        rows = recover(codec, None, out, request.param, EVALUATE)
    return Recovered(out, request.param, rows)


def test_recovery_trains_encode_and_decode_alone(
    recovered: Recovered, codec: Path, dense: CausalWanModel
) -> None:
    out = recovered.folder
    assert {path.name for path in out.iterdir()} == NAMES
    assert (out / CODEC).stat().st_size == (codec / CODEC).stat().st_size
    before, after = load_file(codec / CODEC), load_file(out / CODEC)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    was, now = load(codec).state_dict(), load(out).state_dict()
    assert {n for n in was if not torch.equal(was[n], now[n])} == TRAINED
    curve = {r.step: r.value for r in recovered.rows if r.metric == Metric.VELOCITY_ERROR}
    assert curve[max(map(int, filter(None, curve)))] < curve[0]
    assert {row.run for row in recovered.rows} == {"dense", "codec"}
    # Every size that was trained is better, and every other size still loads.
    held_out = HeldOut(dense, EVALUATE)
    for cut in recovered.config.nested or (0.95,):
        errors = [held_out.measure(load(f, cut=cut)).velocity_error for f in (codec, out)]
        assert errors[1] < errors[0]
    least, most = (
        held_out.measure(load(out, bytes_per_token=nbytes)).velocity_error for nbytes in (1, 80)
    )
    assert 0 < most < least


@pytest.mark.slow
@pytest.mark.usefixtures("few_layerwise_clips")
@pytest.mark.parametrize(
    ("label", "before"), [("layer by layer", 1), ("distilling", 1), ("distilling", 3)]
)
def test_an_interrupted_recovery_resumes_to_the_same_bytes(
    label: str, before: int, recovered: Recovered, codec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "kv"
    with pytest.raises(PowerCutError):
        recover(codec, None, out, recovered.config, EVALUATE, PowerCut(label, before))
    assert not out.exists()
    recover(codec, None, out, recovered.config, EVALUATE)
    assert (out / CODEC).read_bytes() == (recovered.folder / CODEC).read_bytes()


@pytest.mark.usefixtures("few_layerwise_clips")
def test_a_recovery_without_gain_keeps_the_bytes(codec: Path, tmp_path: Path) -> None:
    ruinous = replace(TRAINING, lr=10.0, warmup_steps=0)
    config = replace(LEARNS, layerwise_steps=0, training=ruinous)
    recover(codec, None, tmp_path / "kv", config, EVALUATE)
    assert (tmp_path / "kv" / CODEC).read_bytes() == (codec / CODEC).read_bytes()
    record = json.loads((tmp_path / "kv" / "conversion.json").read_text())
    assert record["recovered"]["kept_steps"] == {"distilling": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"train": "attention"},
        {"train": "all"},
        {"lora_rank": 2},
        # 40 channels are 80 of 192 bytes.
        {"nested": (0.95, 0.5)},
    ],
    ids=["attention", "all", "adapters", "too large"],
)
def test_settings_that_a_codec_cannot_recover_with_are_refused(
    change: dict[str, object], codec: Path, tmp_path: Path
) -> None:
    with pytest.raises(VmlaError) as caught:
        recover(codec, None, tmp_path / "out", replace(RECOVER, **change), EVALUATE)
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_mla_layers_have_no_nested_sizes(teacher: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(VmlaError):
        recover(converted, teacher, tmp_path / "out", NESTED, EVALUATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few_layerwise_clips")
def test_a_whole_checkpoint_trains_the_attention_too(
    teacher: Path, codec: Path, tmp_path: Path
) -> None:
    export(codec, tmp_path / "whole", "native")
    config = replace(LEARNS, train="attention")
    recover(tmp_path / "whole", teacher, tmp_path / "out", config, EVALUATE)
    before, after = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "out")
    changed = {
        name
        for name in before.names
        if not torch.equal(before.read(name), after.read(name).to(before.read(name).dtype))
    }
    assert changed >= TRAINED
    assert "blocks.0.self_attn.q.weight" in changed
    assert not changed & set(base_tensors(LAYERS))


@pytest.mark.slow
@pytest.mark.usefixtures("few_layerwise_clips")
def test_the_command_recovers_a_codec_again(pair: Pair, tmp_path: Path, vmla: Vmla) -> None:
    words = (
        "--steps",
        "1",
        "--set",
        "recover.layerwise_steps=1",
        "--batch-size",
        "1",
        "--lr",
        "1e-3",
    )
    assert vmla("recover", pair.codec, "-o", tmp_path / "out", *words).code == 0
    assert refused(vmla("recover", tmp_path / "no", "-o", tmp_path / "more", *words))
    assert vmla("recover", tmp_path / "out", "-o", tmp_path / "more", *words).code == 0
    assert load(tmp_path / "more").config == load(pair.codec).config
