"""Rollouts of a dense model and a conversion: equal models agree, worse caches agree less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vmla_convert.config import EvaluateConfig, RuntimeConfig, SourceConfig
from vmla_convert.errors import ConfigError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.measuring.against_dense import measure_against_dense
from vmla_convert.measuring.rollouts import rollout_agreement
from vmla_convert.media.demo import DemoMedia
from vmla_convert.progress import Silent
from vmla_convert.results import Metric, Row

pytest_plugins = ["checkpoints"]

FRAMES = 5
"""Cut to whole chunks upwards."""


@pytest.fixture
def context() -> Tensor:
    return DemoMedia().encode_prompts(["3", "7"])


def rolled(
    dense: CausalWanModel, other: CausalWanModel, context: Tensor, **runtime: object
) -> list[Row]:
    how = RuntimeConfig(**runtime) if runtime else None  # pyright: ignore
    return rollout_agreement(dense, other, context, FRAMES, DemoMedia(), Silent(), how)


def values(rows: list[Row], metric: Metric, run: str) -> list[float]:
    return [row.value for row in rows if row.metric == metric and row.run == run]


def test_equal_models_agree_in_every_frame(dense: CausalWanModel, context: Tensor) -> None:
    rows = rolled(dense, dense, context)
    (agreeing,) = values(rows, Metric.AGREEING_FRAMES, "dense")
    assert agreeing == 6
    assert set(values(rows, Metric.LAYER_ERROR, "dense")) == {0.0}
    steps = len(dense.config.sampler.denoising_step_list)
    assert values(rows, Metric.VELOCITY_ERROR, "dense") == [0.0] * steps


def test_a_coarser_cache_agrees_less(dense: CausalWanModel, context: Tensor) -> None:
    fine, coarse = (rolled(dense, dense, context, cache_dtype=d) for d in ("int8", "int2"))
    for rows, run in ((fine, "dense int8"), (coarse, "dense int2")):
        assert len(values(rows, Metric.LAYER_ERROR, run)) == dense.config.geometry.num_layers
    errors = [
        values(rows, Metric.VELOCITY_ERROR, run)
        for rows, run in ((fine, "dense int8"), (coarse, "dense int2"))
    ]
    assert all(0 < a < b for a, b in zip(*errors, strict=True))
    psnr = [
        values(rows, Metric.FRAME_PSNR, run)
        for rows, run in ((fine, "dense int8"), (coarse, "dense int2"))
    ]
    assert sum(psnr[0]) > sum(psnr[1])


def test_both_videos_are_measured_and_no_hook_stays(
    dense: CausalWanModel, converted: Path, context: Tensor
) -> None:
    latent = load(converted)
    rows = rolled(dense, latent, context)
    runs = {row.run for row in rows if row.metric == Metric.SHARPNESS}
    assert len(runs) == 2 and "dense" in runs
    assert all(row.low is not None and row.low <= row.value for row in rows if row.segment)
    modules = [*dense.modules(), *latent.modules()]
    assert not any(module._forward_hooks for module in modules)  # pyright: ignore


def test_a_group_of_clips_has_its_own_noise(
    dense: CausalWanModel, context: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmla_convert.measuring.rollouts.clips_at_once", lambda _: 1)
    rows = rolled(dense, dense, context[:1].expand(2, -1, -1))
    motion = [row for row in rows if row.metric == Metric.SHARPNESS]
    assert any(row.low != row.high for row in motion)
    assert torch.isfinite(torch.tensor([row.value for row in motion])).all()


def test_the_dense_model_alone_has_nothing_to_agree_with() -> None:
    demo = SourceConfig("demo")
    with pytest.raises(ConfigError, match="dense"):
        measure_against_dense(demo, demo, EvaluateConfig(clips=2, rollout_frames=4))
