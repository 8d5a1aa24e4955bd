"""Rollouts of a dense model and a conversion: equal models agree, worse caches agree less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vmla_convert.config import EvaluateConfig, RuntimeConfig, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError, VmlaError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.measuring.against_dense import measure_against_dense
from vmla_convert.measuring.features import open_features
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


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP with random weights, as a user's folder holds it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 300, "eos_token_id": 1, "bos_token_id": 0},
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}).save_pretrained(folder)
    letters = {chr(code): code for code in range(2, 256)}
    ends = {f"{chr(code)}</w>": 256 + code % 32 for code in range(97, 123)}
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, **letters, **ends}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return str(folder)


def test_features_agree_for_equal_models_and_differ_between_prompts(
    dense: CausalWanModel, context: Tensor, clip: str
) -> None:
    rows = rollout_agreement(
        dense, dense, context, FRAMES, DemoMedia(), Silent(),
        prompts=["a three", "a seven"], features=[clip],
    )  # fmt: skip
    found = {metric: values(rows, metric, "dense") for metric in Metric}
    assert found[Metric.FEATURE_AGREEMENT] == pytest.approx([1.0] * 3, abs=1e-5)
    assert found[Metric.FEATURE_CONSISTENCY][0] == pytest.approx(1.0, abs=1e-5)
    assert min(found[Metric.FEATURE_CONSISTENCY]) < 1
    assert all(-1 <= cosine <= 1 for cosine in found[Metric.PROMPT_AGREEMENT])
    assert found[Metric.PROMPT_AGREEMENT]


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        open_features(["/nowhere"])
    with pytest.raises(VmlaError, match="lpips"):
        open_features(["lpips"])
