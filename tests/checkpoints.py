"""A tiny dense checkpoint of the demo world, its conversion, and `vmla` to run on them.

Test files ask for these fixtures with `pytest_plugins = ["checkpoints"]` and import the constants.
PYTEST_DONT_REWRITE, because they do the latter before pytest sees the former.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn

from vmla_convert.__main__ import main
from vmla_convert.config import (
    CachePolicy,
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    Geometry,
    ModelConfig,
    RecoverConfig,
    SamplerConfig,
    Sizes,
    TrainingConfig,
)
from vmla_convert.console import out as console
from vmla_convert.fitting.calibrate import Statistics, calibrate, model_blocks
from vmla_convert.fitting.convert import convert
from vmla_convert.fitting.mla import convert_model
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.media.clips import open_clips
from vmla_convert.progress import Advance, Silent
from vmla_convert.recovery import layerwise
from vmla_convert.results import Row
from vmla_convert.training.pretrain import save_self_forcing

Weights = dict[str, Tensor]

MODEL = ModelConfig(
    Geometry(
        dim=48,
        ffn_dim=64,
        num_heads=2,
        num_layers=2,
        in_dim=12,
        out_dim=12,
        freq_dim=16,
        text_dim=10,
        text_len=1,
    ),
    latent_size=(12, 12),
    chunk_frames=2,
    cache=CachePolicy(window_frames=6, sink_frames=2, frame_positions="relative"),
    sampler=SamplerConfig((1000, 500), shift=2.0, renoise=False),
    media="demo",
    family="self_forcing",
    licence="apache-2.0",
    frames_per_second=8,
)
CLIPS = DataConfig("demo", frames=6)
# Explicit sizes, which rows can name.
CONVERT = ConvertConfig(
    product="mla", size=Sizes(kv_lora_rank=8, qk_rope_head_dim=4), calibration_clips=4, data=CLIPS
)
# The sizes of an MLA checkpoint where none are asked for: a budget.
BUDGETED = ConvertConfig(product="mla", calibration_clips=4, data=CLIPS)
RECOVER = RecoverConfig(
    layerwise_steps=2,
    training=TrainingConfig(steps=4, batch_size=2, lr=1e-3, eval_every=2, checkpoint_every=2),
    data=CLIPS,
)
EVALUATE = EvaluateConfig(clips=4, data=DataConfig("demo", frames=6, seed=1))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint in Self-Forcing's form, every parameter random."""
    folder = tmp_path_factory.mktemp("dense") / "checkpoint"
    save_self_forcing(tiny_model(MODEL).state_dict(), MODEL, folder)
    return folder


@pytest.fixture
def dense(teacher: Path) -> CausalWanModel:
    return load(teacher)


@pytest.fixture(scope="session")
def converted(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's conversion under `CONVERT`."""
    folder = tmp_path_factory.mktemp("latent") / "converted"
    convert(teacher, folder, CONVERT)
    return folder


@pytest.fixture(scope="session")
def budgeted(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's conversion under `BUDGETED`."""
    folder = tmp_path_factory.mktemp("latent") / "budgeted"
    convert(teacher, folder, BUDGETED)
    return folder


@pytest.fixture(scope="session")
def measured(teacher: Path) -> Statistics:
    """Statistics of the checkpoint's layers for MLA, on the clips of `CONVERT` and `BUDGETED`."""
    model = load(teacher)
    return calibrate(
        model, model_blocks(model), open_clips(CLIPS), CONVERT.calibration_clips, product="mla"
    )


@pytest.fixture
def student(dense: CausalWanModel) -> CausalWanModel:
    """A conversion with random weights."""
    return convert_model(dense, replace(CONVERT, init="random"), None)


@pytest.fixture
def calibrated(dense: CausalWanModel, measured: Statistics) -> CausalWanModel:
    """A conversion with most of the quality of the dense model."""
    return convert_model(
        dense, replace(CONVERT, size=Sizes(kv_lora_rank=24, qk_rope_head_dim=4)), measured
    )


def snapshot(model: nn.Module) -> Weights:
    """A copy of all weights of a model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: Weights) -> set[str]:
    """Names of the weights that differ from a snapshot."""
    return {name for name, now in model.state_dict().items() if not torch.equal(now, before[name])}


@pytest.fixture(scope="module")
def few_layerwise_clips() -> Iterator[None]:
    """For files that only look at how recoveries are run, not at how well they go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise, "CLIPS", 4)
        patch.setattr(layerwise, "HELD_CLIPS", 2)
        yield


class PowerCutError(Exception):
    """The machine went away."""


class PowerCut(Silent):
    """Raises an error before an item of the bar with a given label."""

    def __init__(self, label: str, before: int, error: type[BaseException] = PowerCutError) -> None:
        self.label, self.before, self.error = label, before, error

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if (label, done) == (self.label, self.before):
                raise self.error

        if total != 0:  # a bar of no items has no item to raise before
            advance(0)
        yield advance


@dataclass(frozen=True)
class Ran:
    """The text that a command left on the terminal."""

    code: int
    out: str
    err: str


Vmla = Callable[..., Ran]


@pytest.fixture
def vmla(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Vmla:
    """Run `vmla` with some arguments, in this process."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "VMLA_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(console, "json", False)

    def run(*args: str | Path) -> Ran:
        monkeypatch.setattr("sys.argv", ["vmla", *map(str, args)])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return run


def refused(ran: Ran) -> bool:
    """Whether a command ended with exit code 2, an error with a hint, and no traceback."""
    explained = "Error: " in ran.err and "hint: " in ran.err
    return ran.code == 2 and explained and "Traceback" not in ran.err and not ran.out


def untimed(rows: Iterable[Row]) -> list[Row]:
    """Rows without those that two runs cannot share."""
    return [row for row in rows if not row.metric.endswith("_seconds")]
