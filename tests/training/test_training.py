"""The one loop: it learns, it leaves frozen parameters alone, and it resumes bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from conftest import noise, tiny_clip, tiny_config, tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn

from vmla_convert.config import TrainingConfig
from vmla_convert.demo.world import Split
from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.media.clips import Batch, ClipSource, seeded
from vmla_convert.progress import Silent
from vmla_convert.training.loop import (
    Examples,
    Outcome,
    clip_examples,
    learning_rate_factor,
    train,
)
from vmla_convert.training.losses import (
    Example,
    flow_matching,
    make_example,
    predicted_velocity,
)
from vmla_convert.training.optimisers import (
    LONGER_RUN,
    PROBED_RATES,
    _Probe,  # pyright: ignore[reportPrivateUsage]
    find_learning_rate,
    unscaled,
)

T = TypeVar("T")
Curve = list[tuple[int, float]]
MODEL = tiny_config()
FRAMES = 4
LOSS = flow_matching(MODEL)


class NumberedClips:
    """Endless random clips."""

    def batch(self, index: int, size: int, split: Split = "train") -> Batch:
        seed = 2 * index + (split == "held_out")
        return Batch(*tiny_clip(MODEL, FRAMES, size, seed=1000 + 2 * seed))


class Openings:
    """Endless random clips of one chunk."""

    def batch(self, index: int, size: int, split: Split = "train") -> Batch:  # noqa: ARG002
        return Batch(*tiny_clip(MODEL, MODEL.chunk_frames, size, seed=5000 + index))


class OneClip:
    """The same clip again and again, easy to learn."""

    def batch(self, index: int, size: int, split: Split = "train") -> Batch:  # noqa: ARG002
        latents, context = tiny_clip(MODEL, FRAMES, 1)
        return Batch(latents.expand(size, -1, -1, -1, -1), context.expand(size, -1, -1))


class PowerCutError(Exception):
    """The machine went away."""


class PowerCut(Silent):
    """Goes away after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:  # noqa: ARG002
        for done, item in enumerate(items):
            if done == self.after:
                raise PowerCutError
            yield item


@torch.no_grad()
def held_out_error(model: nn.Module, _step: int = 0) -> float:
    clips = OneClip().batch(0, 8)
    return LOSS(model, make_example(clips, 2, seeded(9, 0, "eval"))).item()


def examples(clips: ClipSource, config: TrainingConfig) -> Examples:
    return clip_examples(clips, MODEL.chunk_frames, config, Openings())


def run(
    config: TrainingConfig,
    checkpoints: Path | None = None,
    cut_after: int | None = None,
    seed: int = 0,
) -> tuple[CausalWanModel, Curve]:
    """Train; the weights at the end and the held-out error at the steps where it was asked for."""
    model, curve = tiny_model(MODEL, seed), Curve()
    progress = None if cut_after is None else PowerCut(cut_after)

    def record(evaluated: nn.Module, step: int) -> float:
        curve.append((step, held_out_error(evaluated)))
        return curve[-1][1]

    train(model, LOSS, examples(NumberedClips(), config), config, record, checkpoints, progress)
    return model, curve


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[0.0, 0.7], ids=["plain", "ema"])
def config(request: pytest.FixtureRequest) -> TrainingConfig:
    return TrainingConfig(
        steps=6,
        batch_size=2,
        lr=1e-2,
        warmup_steps=2,
        weight_decay=0.1,
        ema=request.param,
        context_noise=0.2,
        eval_every=2,
        checkpoint_every=2,
        seed=4,
    )


@pytest.mark.parametrize("cut_after", [1, 2, 3, 5])
def test_a_resumed_run_equals_one_that_never_stopped(
    config: TrainingConfig, cut_after: int, tmp_path: Path
) -> None:
    whole, whole_curve = run(config)
    with pytest.raises(PowerCutError):
        run(config, tmp_path, cut_after)
    torch.manual_seed(cut_after)  # global noise is no part of the state
    saved = cut_after // 2 * 2
    # A model with other weights: everything comes from the saved state.
    resumed, curve = run(config, tmp_path, seed=1)
    assert same_weights(whole, resumed)
    assert curve == [point for point in whole_curve if point[0] > saved]
    assert curve[-1][0] == config.steps


def test_a_run_that_is_interrupted_twice_still_arrives(
    config: TrainingConfig, tmp_path: Path
) -> None:
    for cut_after in (3, 3):  # at step 3, then, from step 2 on, at step 5
        with pytest.raises(PowerCutError):
            run(config, tmp_path, cut_after)
    assert same_weights(run(config, tmp_path)[0], run(config)[0])


def test_a_finished_run_is_not_run_again(config: TrainingConfig, tmp_path: Path) -> None:
    whole, _ = run(config, tmp_path)
    again, curve = run(config, tmp_path, cut_after=0, seed=1)
    assert same_weights(whole, again)
    assert curve == []


def test_training_without_checkpoints_equals_training_with_them(
    config: TrainingConfig, tmp_path: Path
) -> None:
    assert same_weights(run(config)[0], run(config, tmp_path)[0])


def test_only_the_newest_state_is_kept(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(PowerCutError):
        run(config, tmp_path, cut_after=5)
    assert states(tmp_path) == ["step-00000004"]
    run(config, tmp_path)
    assert states(tmp_path) == ["step-00000006"]


def test_a_half_written_state_is_ignored(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(PowerCutError):
        run(config, tmp_path, cut_after=3)
    for step in (4, 99):  # one that is written again, one that is not
        partial = tmp_path / f"step-{step:08d}.partial"
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"half")
    resumed, _ = run(config, tmp_path)
    assert same_weights(resumed, run(config)[0])


def test_the_error_is_measured_at_the_start_regularly_and_at_the_end() -> None:
    config = TrainingConfig(steps=5, batch_size=1, lr=1e-3, eval_every=2)
    _, curve = run(config)
    assert [step for step, _ in curve] == [0, 2, 4, 5]
    assert curve[0][1] == held_out_error(tiny_model(MODEL))


def test_training_ends_with_the_average_when_there_is_one() -> None:
    plain = TrainingConfig(steps=3, batch_size=1, lr=1e-2, warmup_steps=1)
    averaged = TrainingConfig(steps=3, batch_size=1, lr=1e-2, warmup_steps=1, ema=0.6)
    path: list[dict[str, Tensor]] = []

    def recorded_loss(model: nn.Module, example: Example) -> Tensor:
        path.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return LOSS(model, example)

    model = tiny_model(MODEL)
    train(model, recorded_loss, examples(NumberedClips(), plain), plain, held_out_error)
    final, (result, curve) = dict(model.named_parameters()), run(averaged)
    visited = [*path[1:], {n: p.detach() for n, p in final.items()}]
    for name, parameter in result.named_parameters():
        # torch's average starts at the first weights it is shown, those after one step.
        expected = visited[0][name]
        for after in visited[1:]:
            expected = 0.6 * expected + 0.4 * after[name]
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)
    assert curve[-1][1] == held_out_error(result)


def test_frozen_parameters_stay_frozen() -> None:
    model, before = tiny_model(MODEL), tiny_model(MODEL)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "self_attn" in name
    config = TrainingConfig(steps=2, batch_size=1, lr=1e-2, weight_decay=0.5, ema=0.5)
    train(model, LOSS, examples(NumberedClips(), config), config, held_out_error)
    old = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, old[name]) == ("self_attn" not in name), name


def test_the_error_falls_on_an_easy_problem() -> None:
    model = tiny_model(MODEL)
    before = held_out_error(model)
    config = TrainingConfig(steps=40, batch_size=4, lr=5e-3, warmup_steps=5, eval_every=40)
    train(model, LOSS, examples(OneClip(), config), config, held_out_error)
    assert held_out_error(model) < 0.6 * before


def test_the_learning_rate_warms_up_then_falls_to_zero() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10)
    factors = [learning_rate_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5 * 0.96)
    assert factors[10] == pytest.approx(0.9)
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == 0
    assert max(factors) == factors[9]
    assert learning_rate_factor(0, TrainingConfig(steps=10, warmup_steps=0)) == 1


def test_the_optimiser_follows_the_learning_rate() -> None:
    """With AdamW and one step, no weight moves by more than its learning rate."""
    moved: list[float] = []
    for warmup in (1, 4):
        model, before = tiny_model(MODEL), tiny_model(MODEL)
        config = TrainingConfig(steps=1, batch_size=1, lr=1e-2, warmup_steps=warmup)
        train(model, LOSS, examples(NumberedClips(), config), config, held_out_error)
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        moved.append(max((a - b).abs().max().item() for a, b in pairs))
    assert moved == pytest.approx([1e-2, 1e-2 / 4], rel=1e-2)


def test_the_seed_decides_the_noise() -> None:
    runs = [run(TrainingConfig(steps=2, batch_size=1, lr=1e-3, seed=seed))[0] for seed in (0, 0, 1)]
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])
    assert not torch.equal(noise(3, seed=0), noise(3, seed=1))


def test_muon_turns_the_matrices_and_adamw_the_rest() -> None:
    moved: dict[str, dict[str, Tensor]] = {}
    for optimizer in ("adamw", "muon"):
        model, before = tiny_model(MODEL), tiny_model(MODEL)
        config = TrainingConfig(steps=1, batch_size=1, optimizer=optimizer, lr=1e-2, warmup_steps=1)
        train(model, LOSS, examples(NumberedClips(), config), config, held_out_error)
        old = dict(before.named_parameters())
        moved[optimizer] = {n: p.detach() - old[n] for n, p in model.named_parameters()}
    for name, step in moved["muon"].items():
        assert torch.equal(step, moved["adamw"][name]) == (step.ndim != 2), name
    # Muon moves all directions of a matrix alike, AdamW mostly one: compare their stable ranks.
    name = "blocks.0.ffn.2.weight"
    muon, adamw = (torch.linalg.svdvals(moved[o][name]).square() for o in ("muon", "adamw"))
    assert muon.sum() / muon.max() > 3 * adamw.sum() / adamw.max()


def test_openings_are_seen_beside_the_long_clips() -> None:
    config = TrainingConfig(batch_size=2, opening_clips=3, context_noise=0.2)
    long, short = examples(NumberedClips(), config)(7)
    assert long.velocity.shape[:2] == (2, FRAMES)
    assert short.velocity.shape[:2] == (3, MODEL.chunk_frames)
    assert len(examples(NumberedClips(), TrainingConfig())(7)) == 1


def test_a_single_chunk_is_predicted_as_the_first_of_a_long_clip() -> None:
    (long,) = examples(OneClip(), TrainingConfig(batch_size=1))(0)
    first = MODEL.chunk_frames
    past, noisy = long.latents.chunk(2, dim=1)
    level = long.timestep.chunk(2, dim=1)[1][:, :first]
    short = Example(
        torch.cat([past[:, :first], noisy[:, :first]], dim=1),
        torch.cat([torch.zeros_like(level), level], dim=1),
        long.velocity[:, :first],
        long.context,
    )
    model = tiny_model(MODEL)
    torch.testing.assert_close(
        predicted_velocity(model, MODEL, short), predicted_velocity(model, MODEL, long)[:, :first]
    )


# What is kept


SHORT = TrainingConfig(steps=6, batch_size=2, lr=1e-2, warmup_steps=1, eval_every=1)


def scripted(
    figures: list[float], config: TrainingConfig, checkpoints: Path | None = None
) -> tuple[CausalWanModel, Outcome, dict[int, CausalWanModel]]:
    """A run that keeps its best, measured by a script; with the weights of every measurement."""
    model, met = tiny_model(MODEL), dict[int, CausalWanModel]()

    def measure(evaluated: nn.Module, step: int) -> float:
        met[step] = tiny_model(MODEL)
        met[step].load_state_dict(evaluated.state_dict())
        return figures[step]

    clips = examples(NumberedClips(), config)
    outcome = train(model, LOSS, clips, config, measure, checkpoints, keep_best=True)
    return model, outcome, met


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("best", [0, 2, 6])
def test_training_ends_with_the_weights_that_measured_lowest(best: int, ema: float) -> None:
    figures = [9.0, 8.0, 7.0, 9.0, 9.0, 9.0, 9.0]
    figures[best] = 1.0
    model, outcome, met = scripted(figures, replace(SHORT, ema=ema))
    assert outcome == Outcome(6, best)
    assert same_weights(model, met[best])
    assert best == 6 or not same_weights(model, met[6])


def test_training_stops_when_nothing_better_comes() -> None:
    config = replace(SHORT, patience=2)
    _, outcome, met = scripted([5.0, 4.0, 3.0, 3.0, 3.5, 1.0, 1.0], config)
    assert outcome == Outcome(4, 2)
    assert list(met) == [0, 1, 2, 3, 4]


def test_a_run_that_stopped_early_is_not_gone_on_with(tmp_path: Path) -> None:
    figures, config = [5.0, 4.0, 3.0, 3.0, 3.5, 1.0, 1.0], replace(SHORT, patience=2)
    model, outcome, _ = scripted(figures, config, tmp_path)
    again, same, met = scripted(figures, config, tmp_path)
    assert met == {}
    assert same == outcome
    assert same_weights(model, again)


def test_the_best_is_remembered_across_an_interruption(tmp_path: Path) -> None:
    figures, config = [5.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0], replace(SHORT, checkpoint_every=1)
    whole, outcome, _ = scripted(figures, config)
    model = tiny_model(MODEL)
    with pytest.raises(PowerCutError):
        train(
            model,
            LOSS,
            examples(NumberedClips(), config),
            config,
            lambda _, step: figures[step],
            tmp_path,
            PowerCut(3),
            keep_best=True,
        )
    resumed, same, _ = scripted(figures, config, tmp_path)
    assert same == outcome
    assert same_weights(whole, resumed)


def test_a_state_holds_what_trains_and_nothing_frozen(tmp_path: Path) -> None:
    model = tiny_model(MODEL)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "self_attn.q" in name
    train(model, LOSS, examples(NumberedClips(), SHORT), SHORT, held_out_error, tmp_path)
    (state,) = tmp_path.iterdir()
    kept = load_file(state / "trained.safetensors")
    assert kept.keys() == {f"blocks.{i}.self_attn.q.{kind}" for i in (0, 1) for kind in KINDS}
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert sum(file.stat().st_size for file in state.iterdir()) < frozen


KINDS = ("weight", "bias")
KILLED = """
import os, signal, sys
from pathlib import Path
from accelerate import Accelerator
import test_training as t

save = Accelerator.save_state
def killed(self, folder):
    save(self, folder)
    if "00000004" in folder:
        os.kill(os.getpid(), signal.SIGKILL)
Accelerator.save_state = killed
t.run(t.LONG, Path(sys.argv[1]))
"""
LONG = replace(SHORT, eval_every=2, checkpoint_every=2)


def test_killed_while_a_state_is_written_the_one_before_it_is_taken(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    ran = subprocess.run(
        command, cwd=here, env=os.environ | {"PYTHONPATH": str(here.parent)}, check=False
    )
    assert ran.returncode == -signal.SIGKILL
    assert states(tmp_path) == ["step-00000002", "step-00000004.partial"]
    resumed, curve = run(LONG, tmp_path, seed=1)
    assert [step for step, _ in curve] == [4, 6]
    assert same_weights(resumed, run(LONG)[0])
    assert states(tmp_path) == ["step-00000006"]


# Batches and rates


@pytest.mark.parametrize("opening_clips", [0, 4])
def test_a_batch_in_parts_trains_as_the_whole_one(opening_clips: int) -> None:
    whole = replace(SHORT, batch_size=4, opening_clips=opening_clips, steps=2)
    models = [run(replace(whole, accumulate=parts))[0] for parts in (1, 2, 4)]
    for parts in models[1:]:
        pairs = zip(models[0].parameters(), parts.parameters(), strict=True)
        # The first steps of AdamW turn on the sign of the smallest gradients.
        far = [((a - b).abs() > 1e-4).float().mean() for a, b in pairs]
        assert sum(far) / len(far) < 1e-3


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size 2 does not divide") as caught:
        run(replace(SHORT, accumulate=4))
    assert "multiple of 4" in caught.value.hint


def test_training_without_a_learning_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="no learning rate"):
        run(replace(SHORT, lr=None))


def test_parameters_may_have_a_part_of_the_learning_rate() -> None:
    model, before = tiny_model(MODEL), tiny_model(MODEL)
    config = replace(SHORT, steps=1)
    clips = examples(NumberedClips(), config)
    train(
        model,
        LOSS,
        clips,
        config,
        held_out_error,
        lr_scale=lambda name: 0.1 if "ffn" in name else 1.0,
    )
    old = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        moved = (parameter - old[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 if "ffn" in name else 1e-2, rel=0.02), name


def test_a_loss_that_is_not_finite_ends_training() -> None:
    def broken(model: nn.Module, example: Example) -> Tensor:
        return LOSS(model, example) * torch.nan

    config = replace(SHORT, steps=1)
    with pytest.raises(VmlaError, match="not finite at step 0") as caught:
        train(
            tiny_model(MODEL),
            broken,
            examples(NumberedClips(), config),
            config,
            lambda *_: 1.0,
        )
    assert "learning rate" in caught.value.hint


def test_what_is_kept_outlives_a_loss_that_is_not_finite() -> None:
    losses = iter([1.0, 1.0, torch.nan])

    def breaking(model: nn.Module, example: Example) -> Tensor:
        return LOSS(model, example) * next(losses)

    model, met = tiny_model(MODEL), dict[int, CausalWanModel]()

    def measure(evaluated: nn.Module, step: int) -> float:
        met[step] = tiny_model(MODEL)
        met[step].load_state_dict(evaluated.state_dict())
        return (3.0, 1.0, 2.0)[step]

    clips = examples(NumberedClips(), SHORT)
    outcome = train(model, breaking, clips, SHORT, measure, keep_best=True)
    assert outcome == Outcome(2, 1)
    assert same_weights(model, met[1])


def distance_to(target: CausalWanModel) -> Callable[[nn.Module, Example], Tensor]:
    """How far a model's weights are from those of another, whatever the example."""

    def loss(model: nn.Module, _: Example) -> Tensor:
        pairs = zip(model.parameters(), target.parameters(), strict=True)
        return torch.stack([(a - b.detach()).square().sum() for a, b in pairs]).sum()

    return loss


def test_a_near_perfect_start_gets_a_smaller_learning_rate() -> None:
    target, rates = tiny_model(MODEL), list[float]()
    for size in (1.0, 1e-2, 1e-3, 0.0):
        model = tiny_model(MODEL)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size * noise(*parameter.shape, seed=3)
        config = TrainingConfig(batch_size=1)
        clips = examples(NumberedClips(), config)
        rates.append(find_learning_rate(model, distance_to(target), clips, config))
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == LONGER_RUN * max(PROBED_RATES)
    assert rates[-1] == LONGER_RUN * min(PROBED_RATES)
    assert len({*rates}) >= 3


def test_the_probe_sees_no_gradient_that_was_there_before() -> None:
    config, left = TrainingConfig(batch_size=2), list[float]()
    model = tiny_model(MODEL)
    probe = _Probe(model, LOSS, examples(NumberedClips(), config), config, unscaled)
    for stale in (None, 100.0):
        for parameter in model.parameters():
            parameter.grad = None if stale is None else torch.full_like(parameter, stale)
        left.append(probe.left_after(1e-3))
    assert left[0] == left[1]


def test_the_probe_leaves_no_trace() -> None:
    model, config = tiny_model(MODEL), TrainingConfig(batch_size=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "ffn" in name
    rate = find_learning_rate(model, LOSS, examples(NumberedClips(), config), config)
    assert rate in [LONGER_RUN * probed for probed in PROBED_RATES]
    assert same_weights(model, tiny_model(MODEL))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    (example,) = examples(NumberedClips(), TrainingConfig(batch_size=1))(0)
    models = tiny_model(MODEL), tiny_model(MODEL)
    models[1].checkpoint_blocks()
    for model in models:
        LOSS(model, example).backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one.grad, other.grad)  # pyright: ignore[reportArgumentType]


def test_curves_go_to_a_tracker(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = replace(SHORT, steps=2, tracker="tensorboard")
    clips = examples(NumberedClips(), config)
    train(tiny_model(MODEL), LOSS, clips, config, held_out_error, logs=tmp_path, label="on policy")
    (events,) = tmp_path.rglob("events*")
    assert events.parent.name == "on-policy"
    text = events.read_bytes()
    assert b"loss" in text
    assert b"held_out" in text


def test_a_tracker_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(VmlaError, match="tracker 'wandb' is not installed") as caught:
        run(replace(SHORT, tracker="wandb"))
    assert caught.value.hint == "pip install wandb"
