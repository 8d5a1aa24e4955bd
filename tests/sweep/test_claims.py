"""The paper's claims on a tiny model: each has its figure, and the figure decides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CLIPS, EVALUATE, MODEL, RECOVER, Vmla

from vmla_convert.config import ConvertConfig, MediaConfig, Sizes, SourceConfig
from vmla_convert.errors import CheckpointError
from vmla_convert.loading.load import load
from vmla_convert.maths.spectra import effective_rank, weight_spectrum
from vmla_convert.sweep import claims as claims_module
from vmla_convert.sweep.claims import Claim, measure_claims, plan_claims

pytest_plugins = ["checkpoints"]

CONVERT = ConvertConfig(calibration_clips=4, data=CLIPS)
SHORT = replace(RECOVER, layerwise_steps=1, training=replace(RECOVER.training, steps=1))


@pytest.fixture(scope="module")
def found(teacher: Path) -> list[Claim]:
    return measure_claims(SourceConfig(str(teacher)), CONVERT, SHORT, EVALUATE)


def test_random_weights_fill_their_rank(found: list[Claim]) -> None:
    before, after = (each for each in found if each.claim.startswith("the bottleneck"))
    assert before.holds == (min(before.value, before.our_value) >= before.bound)
    assert 0 < before.value <= 1 and 0 < after.our_value <= 1


def test_the_rank_of_the_weights_is_that_of_their_spectrum(
    found: list[Claim], teacher: Path
) -> None:
    attentions = load(teacher).self_attentions()
    weights = [torch.cat([each.k.weight, each.v.weight]).double() for each in attentions]  # pyright: ignore
    least = min(effective_rank(weight_spectrum(weight)) for weight in weights)
    # The package scales keys by the gains of their norm, which are random here.
    assert found[0].value == pytest.approx(least, abs=2)
    assert found[0].holds == (found[0].value > found[0].bound)


def test_the_cut_is_that_of_the_papers_layer_and_the_loss_decides(found: list[Claim]) -> None:
    last, geometry = found[-1], MODEL.geometry
    cut = 1 - Sizes.default_mla(geometry).token_bytes(geometry) / geometry.dense_token_bytes
    assert last.claim.startswith(f"{100 * cut:.1f} %")
    assert last.holds == (last.value <= last.bound)


def test_the_plan_counts_both_recoveries(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, media = SourceConfig(str(teacher)), MediaConfig()
    monkeypatch.setattr("vmla_convert.generating.clip_cost.flops_per_second", lambda _: 1e9)
    short, long = (
        plan_claims(source, CONVERT, each, EVALUATE, media)
        for each in (SHORT, replace(SHORT, training=replace(SHORT.training, steps=100)))
    )
    assert long.operations > 10 * short.operations


def test_a_conversion_makes_no_claims(converted: Path) -> None:
    with pytest.raises(CheckpointError):
        measure_claims(SourceConfig(str(converted)), CONVERT, SHORT, EVALUATE)


def test_the_command_prints_every_claim_as_json(
    found: list[Claim], teacher: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "measure_claims", lambda *_: found)
    printed = json.loads(vmla("claims", teacher, "--json").out)
    assert [each["holds"] for each in printed] == [each.holds for each in found]
