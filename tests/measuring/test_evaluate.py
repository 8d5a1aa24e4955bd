"""Measures: nothing lost is zero, the past counts, and rows carry the design's fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from checkpoints import CONVERT, EVALUATE, MODEL
from torch import Tensor

from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    Geometry,
    ModelConfig,
    RankPlan,
    Sizes,
)
from vmla_convert.demo.world import sample_clips
from vmla_convert.errors import ConfigError
from vmla_convert.fitting.calibrate import Statistics
from vmla_convert.fitting.convert import Conversion
from vmla_convert.fitting.mla import convert_model, planned_config
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.maths.spectra import effective_rank, weight_spectrum
from vmla_convert.measuring import evaluate as pipeline
from vmla_convert.measuring.evaluate import (
    HeldOut,
    dense_rows,
    learned_spectrum_rows,
    rollout_rows,
    spectrum_rows,
)
from vmla_convert.measuring.rows import (
    cache_rows,
    conversion_rows,
    error_rows,
    row_fields,
    run_name,
)
from vmla_convert.media import clip_checks as calibration
from vmla_convert.media.clip_checks import clips_at_once
from vmla_convert.media.clips import open_clips
from vmla_convert.results import Metric, Row
from vmla_convert.training.losses import Example

pytest_plugins = ["checkpoints"]

Latent = Literal["joint", "split"]

RUN = "mla-calibrated-8+4-joint"
LATENT_FIELDS = {
    "run": RUN,
    "product": "mla",
    "bytes_per_token": 26,
    "init": "calibrated",
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "latent": "joint",
}


@pytest.fixture
def held_out(dense: CausalWanModel) -> HeldOut:
    return HeldOut(dense, EVALUATE)


@pytest.fixture
def latent(converted: Path) -> CausalWanModel:
    return load(converted)


def has_fields(row: Row, fields: Mapping[str, object]) -> bool:
    return all(getattr(row, name) == value for name, value in fields.items())


@pytest.mark.parametrize("streamed", [False, True])
def test_only_the_dense_model_has_no_error(
    streamed: bool, dense: CausalWanModel, latent: CausalWanModel
) -> None:
    held_out = HeldOut(dense, EVALUATE, streamed)
    errors, converted = held_out.measure(dense), held_out.measure(latent)
    assert errors.velocity_error == 0
    assert errors.flow_loss > 0
    assert held_out.teacher_errors() == errors
    other = held_out.measure_other_past(dense)
    assert other.velocity_error > 0 and converted.velocity_error > 0
    assert len({errors.flow_loss, converted.flow_loss, other.flow_loss}) == 3
    assert HeldOut(dense, EVALUATE, streamed).measure(latent) == converted


def test_the_first_chunk_has_no_past_and_does_not_count(
    dense: CausalWanModel, held_out: HeldOut
) -> None:
    before = held_out.measure(dense)
    for target in held_out.targets:
        target[:, : MODEL.chunk_frames] += 1
    assert held_out.measure(dense) == before
    for target in held_out.targets:
        target[:, MODEL.chunk_frames] += 1
    assert held_out.measure(dense).velocity_error > 0


@pytest.mark.parametrize("streamed", [False, True])
def test_results_do_not_depend_on_the_batch_size(
    streamed: bool, dense: CausalWanModel, latent: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(EVALUATE, clips=9)

    def measured() -> tuple[list[float], set[int]]:
        sizes = set[int]()
        patch = dense.patch_embedding.register_forward_pre_hook(
            lambda _, given: sizes.add(len(given[0]))
        )
        held_out = HeldOut(dense, config, streamed)
        assert sum(len(example.velocity) for example in held_out.examples) == 9
        figures = [*held_out.measure(latent), held_out.measure_other_past(dense).flow_loss]
        patch.remove()
        return figures, sizes

    together, sizes = measured()
    monkeypatch.setattr(calibration, "TOKENS_AT_ONCE", 1)
    alone, one = measured()
    assert one < sizes
    assert alone == pytest.approx(together, rel=1e-4)


def test_as_many_clips_pass_together_as_their_size_allows() -> None:
    demo, wan = load("demo").config, Geometry(1536, 8960, 12, 30, 16, 16)
    assert clips_at_once(demo.geometry, torch.empty(1, 10, 12, *demo.latent_size)) == 8
    assert clips_at_once(wan, torch.empty(1, 21, 16, 60, 104)) == 1


def test_clips_are_held_out(held_out: HeldOut) -> None:
    trained = open_clips(EVALUATE.data).batch(0, EVALUATE.clips, "train")
    past = held_out.examples[0].latents[:, : EVALUATE.data.frames]
    assert past.shape == trained.latents.shape
    assert not torch.equal(past, trained.latents)


def test_rows_of_the_dense_model(dense: CausalWanModel, held_out: HeldOut) -> None:
    rows = {row.metric: row for row in dense_rows(dense, held_out)}
    assert rows.keys() == {
        "flow_loss",
        "flow_loss_other_past",
        "cache_bytes_per_token",
    }
    assert all(row.run == "dense" and row.init is None for row in rows.values())
    assert rows[Metric.CACHE_BYTES_PER_TOKEN].value == 192
    assert rows[Metric.FLOW_LOSS].value == held_out.measure(dense).flow_loss
    assert rows[Metric.FLOW_LOSS_OTHER_PAST].value == held_out.measure_other_past(dense).flow_loss


def test_rows_of_a_conversion(latent: CausalWanModel, held_out: HeldOut) -> None:
    errors = held_out.measure(latent)
    measured = error_rows(errors, latent.config, step=7, seed=3)
    assert {row.metric: row.value for row in measured} == errors._asdict()
    assert all(has_fields(row, {"step": 7, "seed": 3}) for row in measured)
    cache = cache_rows(latent.config)
    assert {row.metric: row.value for row in cache} == {
        Metric.CACHE_BYTES_PER_TOKEN: 26,
        Metric.CACHE_CUT: pytest.approx(1 - 13 / 96),
    }
    cost = conversion_rows(Conversion(Path("out"), latent.config, 3.0, 2.0, 1000))
    assert [(row.metric, row.value, row.unit) for row in cost] == [
        (Metric.CONVERT_SECONDS, 3.0, "s"),
        (Metric.FACTOR_SECONDS, 2.0, "s"),
        (Metric.PEAK_RSS_BYTES, 1000.0, "bytes"),
    ]
    assert all(has_fields(row, LATENT_FIELDS) for row in measured + cache + cost)
    assert run_name(latent.config) == RUN


def test_a_run_is_named_after_what_was_made(dense: CausalWanModel) -> None:
    def planned(latent: Latent, ranks: tuple[int, ...], pairs: tuple[int, ...]) -> ModelConfig:
        plan = RankPlan(ranks, pairs, (2, 2) if latent == "split" else ())
        config = ConvertConfig(product="mla", init="random", latent=latent, size=Sizes(plan=plan))
        return planned_config(MODEL, config, plan)

    def name(latent: Latent, ranks: tuple[int, ...], pairs: tuple[int, ...]) -> str:
        return run_name(planned(latent, ranks, pairs))

    assert run_name(dense.config) == "dense"
    assert row_fields(planned("joint", (8, 9), (2, 2)))["kv_lora_rank"] is None
    names = {
        "mla-random-9+4-joint": name("joint", (9, 9), (2, 2)),
        "mla-random-13.5-joint": name("joint", (8, 9), (2, 2)),
        "mla-random-14-split": name("split", (8, 10), (2, 2)),
        # Other shares of the same size are another setting too.
        "mla-random-13-joint": name("joint", (8, 6), (2, 3)),
    }
    assert list(names) == list(names.values())


def test_every_layer_has_spectra_of_weights_and_of_activations(
    dense: CausalWanModel, measured: Statistics
) -> None:
    rows = spectrum_rows(dense, map(measured, (0, 1)), rank=8)
    assert {(row.metric, row.run, row.layer) for row in rows} == {
        (metric, run, layer)
        for metric in ("effective_rank_99", "energy_at_rank")
        for run in ("weights", "weights_x_activations")
        for layer in range(MODEL.geometry.num_layers)
    }
    energy = [row for row in rows if row.metric == "energy_at_rank"]
    at_eight = [row.value for row in energy if row.kv_lora_rank == 8]
    assert len(at_eight) == 4
    assert all(0 < value < 1 for value in at_eight)
    drawn = [row.kv_lora_rank for row in energy if (row.run, row.layer) == ("weights", 0)]
    assert drawn == sorted(set(drawn), key=lambda rank: rank or 0)
    assert (drawn[0], drawn[-1]) == (1, MODEL.geometry.dim)
    ranks = [row.value for row in rows if row.metric == "effective_rank_99"]
    assert all(8 < rank <= MODEL.geometry.dim for rank in ranks)


@pytest.mark.parametrize("latent", ["joint", "split"])
@pytest.mark.parametrize("init", ["calibrated", "random"])
def test_every_mla_layer_has_an_effective_rank(
    init: str, latent: Latent, dense: CausalWanModel, measured: Statistics
) -> None:
    config = replace(CONVERT, init=init, latent=latent, size=Sizes(kv_lora_rank=8))
    model = convert_model(dense, config, measured)
    rows = learned_spectrum_rows(model, 5, seed=3)
    assert [row.layer for row in rows] == [0, 1]
    assert {row.metric for row in rows} == {"effective_rank_99"}
    told = {"run": run_name(model.config), "init": init, "seed": 3, "step": 5, "latent": latent}
    assert all(has_fields(row, told) and 0 < row.value <= 8 for row in rows)
    read = model.state_dict().__getitem__
    for row in rows:
        prefix = f"blocks.{row.layer}.self_attn."
        down = read(prefix + "kv_a_proj.weight")
        keys, values = (read(f"{prefix}kv_b_proj_{part}.weight") for part in "kv")
        operator = torch.cat(
            [keys @ down[: keys.shape[1]], values @ down[len(down) - values.shape[1] :]]
        )
        assert effective_rank(weight_spectrum(operator.double())) == row.value


def test_rollouts_are_scored_whole_and_by_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_half(video: Tensor) -> Tensor:
        """Reads the prompted 4 in the first half of the frames only."""
        answer = torch.full(video.shape[:2], 5)
        answer[:, : video.shape[1] // 2] = 4
        return answer

    monkeypatch.setattr(pipeline, "read_digits", first_half)
    video = sample_clips(2, 16, torch.Generator().manual_seed(0)).video
    rows = rollout_rows(video, ["a four", "4"], MODEL, seed=2)
    assert all(row.run == "dense" and row.seed == 2 and row.frames == 16 for row in rows)
    hits = {row.segment: row.value for row in rows if row.metric == "digit_accuracy"}
    assert hits == {None: 0.5, 0: 1, 1: 1, 2: 0, 3: 0}
    psnr = {row.segment: row.value for row in rows if row.metric == "background_psnr"}
    assert psnr.keys() == hits.keys()
    assert min(psnr.values()) > 30


def test_every_clip_is_given_the_past_of_another(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the ninth, which is alone in its batch of eight."""
    held_out = HeldOut(dense, replace(EVALUATE, clips=9))
    seen: list[Tensor] = []

    def note(_: object, example: Example, *__: object) -> Tensor:
        seen.append(example.latents)
        return example.velocity

    monkeypatch.setattr(held_out, "_velocity", note)
    held_out.measure_other_past(dense)
    own = torch.cat([example.latents for example in held_out.examples])
    own_past, own_noisy = own.chunk(2, dim=1)
    past, noisy = torch.cat(seen).chunk(2, dim=1)
    assert torch.equal(noisy, own_noisy)
    assert torch.equal(past, own_past.roll(1, dims=0))


def test_clips_without_a_past_are_refused(dense: CausalWanModel) -> None:
    with pytest.raises(ConfigError, match="no chunk with a past"):
        HeldOut(dense, EvaluateConfig(clips=2, data=DataConfig("demo", frames=3)))
