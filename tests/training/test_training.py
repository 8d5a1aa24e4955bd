"""The one loop: it learns, it leaves frozen parameters alone, and it resumes bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PowerCut, PowerCutError
from conftest import noise, tiny_clip, tiny_config, tiny_model
from torch import Tensor, nn

from vmla_convert.config import TrainingConfig
from vmla_convert.demo.world import Split
from vmla_convert.errors import VmlaError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.media.clips import Batch, ClipSource, seeded
from vmla_convert.training.loop import (
    SKIPPED_IN_A_ROW,
    Examples,
    clip_examples,
    learning_rate_factor,
    train,
)
from vmla_convert.training.losses import Example, flow_matching, make_example, predicted_velocity
from vmla_convert.training.optimisers import LONGER_RUN, PROBED_RATES, find_learning_rate

Curve = list[tuple[int, float]]
MODEL = tiny_config()
CHUNK = MODEL.chunk_frames
LOSS = flow_matching(MODEL)
SHORT = TrainingConfig(steps=6, batch_size=2, lr=1e-2, warmup_steps=1, eval_every=1)
ONE_STEP = replace(SHORT, steps=1, batch_size=1)


class Clips:
    """Endless random clips, or one clip again and again, which is easy to learn."""

    def __init__(self, frames: int = 4, seed: int | None = None) -> None:
        self.frames, self.seed = frames, seed

    def batch(self, start: int, size: int, split: Split = "train") -> Batch:
        if self.seed is None:
            seed = 1000 + 4 * (start // size) + 2 * (split == "held_out")
            return Batch(*tiny_clip(MODEL, self.frames, size, seed=seed))
        one = tiny_clip(MODEL, self.frames, 1, seed=self.seed)
        return Batch(*(tensor.expand(size, *tensor.shape[1:]) for tensor in one))


@torch.no_grad()
def held_out_error(model: nn.Module, _step: int = 0) -> float:
    clips = Clips(seed=0).batch(0, 2)
    return LOSS(model, make_example(clips, 2, seeded(9, 0, "eval"))).item()


def examples(config: TrainingConfig, clips: ClipSource | None = None) -> Examples:
    return clip_examples(clips or Clips(), CHUNK, config, Clips(CHUNK))


def run(
    config: TrainingConfig, state: Path | None = None, cut: int | None = None, seed: int = 0
) -> tuple[CausalWanModel, Curve]:
    """Train; return the final model and every held-out error."""
    model, curve = tiny_model(MODEL, seed), Curve()
    progress = None if cut is None else PowerCut("training", cut)

    def record(evaluated: nn.Module, step: int) -> float:
        curve.append((step, held_out_error(evaluated)))
        return curve[-1][1]

    train(model, LOSS, examples(config), config, record, state, progress)
    return model, curve


def moves(
    config: TrainingConfig, lr_scale: Callable[[str], float] = lambda _: 1.0
) -> dict[str, Tensor]:
    """How far each parameter moves in a run."""
    model, before = tiny_model(MODEL), tiny_model(MODEL).state_dict()
    train(model, LOSS, examples(config), config, held_out_error, lr_scale=lr_scale)
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# Resuming


@pytest.fixture(params=[{}, {"ema": 0.7, "optimizer": "muon"}], ids=["AdamW", "Muon and average"])
def config(request: pytest.FixtureRequest) -> TrainingConfig:
    return TrainingConfig(
        steps=6,
        batch_size=2,
        lr=1e-2,
        warmup_steps=2,
        weight_decay=0.1,
        context_noise=0.2,
        eval_every=2,
        checkpoint_every=2,
        seed=4,
        **request.param,
    )


@pytest.mark.parametrize("cuts", [(1,), (5,), (3, 3)])  # the last one at steps 3 and 5
def test_a_resumed_run_equals_one_that_never_stopped(
    config: TrainingConfig, cuts: tuple[int, ...], tmp_path: Path
) -> None:
    file, (whole, whole_curve) = tmp_path / "run" / "state.pt", run(config)
    for cut in cuts:
        with pytest.raises(PowerCutError):
            run(config, file, cut)
    torch.manual_seed(cuts[0])  # global noise is no part of the state
    # A model with other weights: everything comes from the saved state.
    resumed, curve = run(config, file, seed=1)
    assert same_weights(whole, resumed)
    saved = {(1,): 0, (5,): 4, (3, 3): 4}[cuts]
    assert curve == [point for point in whole_curve if point[0] > saved]
    assert [path.name for path in file.parent.iterdir()] == ["state.pt"]


def test_a_finished_run_is_not_run_again(config: TrainingConfig, tmp_path: Path) -> None:
    whole, _ = run(config, tmp_path / "state.pt")
    assert same_weights(whole, run(config)[0])
    again, curve = run(config, tmp_path / "state.pt", cut=0, seed=1)
    assert same_weights(whole, again)
    assert curve == []


def test_a_kill_while_a_state_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, file = replace(SHORT, checkpoint_every=2), tmp_path / "state.pt"
    save, steps = torch.save, list[int]()

    def killed(state: dict[str, Any], path: Path) -> None:
        steps.append(state["step"])
        if state["step"] == 4:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, file)
    assert steps == [0, 2, 4]
    resumed, curve = run(config, file, seed=1)
    assert [step for step, _ in curve] == [3, 4, 5, 6]
    assert same_weights(resumed, run(config)[0])


def test_a_state_holds_what_trains_and_nothing_frozen(tmp_path: Path) -> None:
    model, before = tiny_model(MODEL), tiny_model(MODEL).state_dict()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "self_attn.q" in name
    config, file = replace(SHORT, weight_decay=0.5, ema=0.5), tmp_path / "state.pt"
    train(model, LOSS, examples(config), config, held_out_error, file, keep_best=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    state = torch.load(file, weights_only=True)
    for group in ("trained", "average", "best_weights"):
        assert state[group].keys() == trained
    assert state["optimisers"]["state"].keys() == trained
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == trained


# Learning


def test_the_error_falls_on_an_easy_problem() -> None:
    model = tiny_model(MODEL)
    before = held_out_error(model)
    config = TrainingConfig(steps=30, batch_size=4, lr=5e-3, warmup_steps=5, eval_every=40)
    train(model, LOSS, examples(config, Clips(seed=0)), config, held_out_error)
    assert held_out_error(model) < 0.7 * before


def test_the_error_is_measured_at_the_start_regularly_and_at_the_end() -> None:
    _, curve = run(TrainingConfig(steps=5, batch_size=1, lr=1e-3, eval_every=2))
    assert [step for step, _ in curve] == [0, 2, 4, 5]
    assert curve[0][1] == held_out_error(tiny_model(MODEL))


def test_training_ends_with_the_average_if_there_is_one() -> None:
    plain, path = replace(SHORT, steps=3), list[dict[str, Tensor]]()

    def recorded_loss(model: nn.Module, example: Example) -> Tensor:
        path.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return LOSS(model, example)

    model = tiny_model(MODEL)
    train(model, recorded_loss, examples(plain), plain, held_out_error)
    result, curve = run(replace(plain, ema=0.6))
    path.append({n: p.detach() for n, p in model.named_parameters()})
    for name, parameter in result.named_parameters():
        # The average starts at the weights after one step.
        expected = path[1][name]
        for after in path[2:]:
            expected = 0.6 * expected + 0.4 * after[name]
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)
    assert curve[-1][1] == held_out_error(result)


def test_the_learning_rate_warms_up_then_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, 10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5 * 0.96)
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == 0
    assert max(factors) == factors[9]
    assert learning_rate_factor(0, 10, 0) == 1


@pytest.mark.parametrize("warmup", [1, 4])
def test_the_optimiser_follows_the_learning_rate_of_each_parameter(warmup: int) -> None:
    """With AdamW and one step, no weight moves by more than its learning rate."""
    config = replace(ONE_STEP, warmup_steps=warmup)
    moved = moves(config, lambda name: 0.1 if "ffn" in name else 1.0)
    for name, move in moved.items():
        rate = (1e-3 if "ffn" in name else 1e-2) / warmup
        assert move.abs().max().item() == pytest.approx(rate, rel=0.02), name


def test_muon_turns_the_matrices_and_adamw_the_rest() -> None:
    muon, adamw = moves(replace(ONE_STEP, optimizer="muon")), moves(ONE_STEP)
    for name, move in muon.items():
        assert torch.equal(move, adamw[name]) == (move.ndim != 2), name
    # Muon moves all directions of a matrix alike, AdamW mostly one: compare their stable ranks.
    name = "blocks.0.ffn.2.weight"
    turned, other = (torch.linalg.svdvals(moved[name]).square() for moved in (muon, adamw))
    assert turned.sum() / turned.max() > 3 * other.sum() / other.max()


def test_the_seed_decides_the_noise() -> None:
    runs = [moves(replace(ONE_STEP, seed=seed))["head.head.weight"] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_openings_are_seen_beside_the_long_clips() -> None:
    config = TrainingConfig(batch_size=2, opening_clips=3, context_noise=0.2)
    long, short = examples(config)(7)
    assert long.velocity.shape[:2] == (2, 4)
    assert short.velocity.shape[:2] == (3, CHUNK)
    assert len(examples(TrainingConfig())(7)) == 1


def test_a_single_chunk_is_predicted_as_the_first_of_a_long_clip() -> None:
    (long,) = examples(TrainingConfig(batch_size=1))(0)
    cut = (long.past, long.noisy, long.sigma, long.velocity)
    past, noisy, sigma, velocity = (tensor[:, :CHUNK] for tensor in cut)
    short = Example.build(past, noisy, sigma, velocity, long.context)
    model = tiny_model(MODEL)
    first = predicted_velocity(model, MODEL, long)[:, :CHUNK]
    torch.testing.assert_close(predicted_velocity(model, MODEL, short), first)


# The best weights


def scripted(
    figures: list[float],
    config: TrainingConfig,
    state: Path | None = None,
    cut: int | None = None,
    loss: Callable[[nn.Module, Example], Tensor] = LOSS,
) -> tuple[CausalWanModel, int, dict[int, CausalWanModel]]:
    """A run that keeps its best by scripted figures; with the model of every measurement."""
    model, met = tiny_model(MODEL), dict[int, CausalWanModel]()

    def measure(evaluated: nn.Module, step: int) -> float:
        met[step] = tiny_model(MODEL)
        met[step].load_state_dict(evaluated.state_dict())
        return figures[step]

    progress = None if cut is None else PowerCut("training", cut)
    how = train(model, loss, examples(config), config, measure, state, progress, keep_best=True)
    return model, how.step, met


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("best", [0, 2, 6])
def test_training_ends_with_the_weights_that_measured_lowest(best: int, ema: float) -> None:
    figures = [9.0, 8.0, 7.0, 9.0, 9.0, 9.0, 9.0]
    figures[best] = 1.0
    model, step, met = scripted(figures, replace(SHORT, ema=ema))
    assert step == best
    assert same_weights(model, met[best])
    assert best == 6 or not same_weights(model, met[6])


def test_training_stops_for_good_when_nothing_better_comes(tmp_path: Path) -> None:
    figures, config = [5.0, 4.0, 3.0, 3.0, 3.5, 1.0, 1.0], replace(SHORT, patience=2)
    model, step, met = scripted(figures, config, tmp_path / "state.pt")
    assert step == 2
    assert list(met) == [0, 1, 2, 3, 4]
    again, same, met = scripted(figures, config, tmp_path / "state.pt")
    assert met == {}
    assert same == step
    assert same_weights(model, again)


def test_the_best_is_remembered_across_an_interruption(tmp_path: Path) -> None:
    figures, config = [5.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0], replace(SHORT, checkpoint_every=1)
    whole, step, _ = scripted(figures, config)
    with pytest.raises(PowerCutError):
        scripted(figures, config, tmp_path / "state.pt", cut=3)
    resumed, same, _ = scripted(figures, config, tmp_path / "state.pt")
    assert same == step
    assert same_weights(whole, resumed)


def breaking(*factors: float) -> Callable[[nn.Module, Example], Tensor]:
    left = iter(factors)
    return lambda model, example: LOSS(model, example) * next(left)


def test_a_loss_that_is_not_finite_ends_training() -> None:
    loss = breaking(torch.nan)
    with pytest.raises(VmlaError) as caught:
        train(tiny_model(MODEL), loss, examples(ONE_STEP), ONE_STEP, held_out_error)
    assert "step 0" in caught.value.message
    assert "learning rate" in caught.value.hint


def test_the_best_weights_outlive_a_loss_that_is_not_finite() -> None:
    loss = breaking(1.0, 1.0, *[torch.nan] * SKIPPED_IN_A_ROW)
    model, step, met = scripted([3.0, 1.0, *[2.0] * SHORT.steps], SHORT, loss=loss)
    assert step == 1
    assert same_weights(model, met[1])


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(place: str, tmp_path: Path) -> None:
    state, config, calls = tmp_path / "state.pt", replace(SHORT, steps=3), list[int]()

    def loss(model: nn.Module, example: Example) -> Tensor:
        calls.append(len(calls))
        value = LOSS(model, example)
        if calls[-1] != 1:
            return value
        # The root of 0 is finite, and its gradient is not.
        return value * torch.nan if place == "loss" else value + (0 * value).sqrt()

    model = tiny_model(MODEL)
    how = train(model, loss, examples(config), config, held_out_error, state)
    assert how.skipped == 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.load(state, weights_only=True)["skipped"] == (1, 0)
    assert len(calls) == config.steps


# Batches, rates and trackers


@pytest.mark.parametrize("opening_clips", [0, 4])
def test_a_batch_in_parts_trains_as_the_whole_one(opening_clips: int) -> None:
    whole = replace(SHORT, batch_size=4, opening_clips=opening_clips, steps=2)
    models = [run(replace(whole, accumulate=parts))[0] for parts in (1, 2, 4)]
    for parts in models[1:]:
        pairs = zip(models[0].parameters(), parts.parameters(), strict=True)
        # The first steps of AdamW turn on the sign of the smallest gradients.
        far = [((a - b).abs() > 1e-4).float().mean() for a, b in pairs]
        assert sum(far) / len(far) < 1e-3


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"accumulate": 4}, "batch_size 2"),
        ({"lr": None}, "learning rate"),
        ({"tracker": "wandb"}, "wandb"),
    ],
)
def test_settings_that_cannot_train_are_refused(
    wrong: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(VmlaError, match=word):
        run(replace(SHORT, **wrong))


def test_bfloat16_computes_and_float32_learns() -> None:
    narrow, wide = moves(replace(ONE_STEP, mixed_precision="bf16")), moves(ONE_STEP)
    name = "blocks.0.ffn.2.weight"
    assert narrow[name].dtype == torch.float32
    assert not torch.equal(narrow[name], wide[name])
    assert ((narrow[name] - wide[name]).abs() < 1e-3).float().mean() > 0.9


def distance_to(target: CausalWanModel) -> Callable[[nn.Module, Example], Tensor]:
    """Distance of a model's weights from those of another."""

    def loss(model: nn.Module, _: Example) -> Tensor:
        pairs = zip(model.parameters(), target.parameters(), strict=True)
        return torch.stack([(a - b.detach()).square().sum() for a, b in pairs]).sum()

    return loss


def test_a_near_perfect_start_gets_a_smaller_learning_rate() -> None:
    loss, rates = distance_to(tiny_model(MODEL)), list[float]()
    for size in (1.0, 1e-2, 1e-3, 0.0):
        model = tiny_model(MODEL)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size * noise(*parameter.shape, seed=3)
        rates.append(find_learning_rate(model, loss, examples(ONE_STEP), ONE_STEP))
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == LONGER_RUN * max(PROBED_RATES)
    assert rates[-1] == LONGER_RUN * min(PROBED_RATES)
    assert len({*rates}) >= 3


def test_the_probe_sees_no_old_gradient_and_leaves_no_trace() -> None:
    found: list[float] = []
    for stale in (None, 100.0):
        model, config = tiny_model(MODEL), TrainingConfig(batch_size=2)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "ffn" in name
            parameter.grad = None if stale is None else torch.full_like(parameter, stale)
        found.append(find_learning_rate(model, LOSS, examples(config), config))
        assert same_weights(model, tiny_model(MODEL))
        assert all(parameter.grad is None for parameter in model.parameters())
    assert found[0] == found[1] and found[0] in [LONGER_RUN * rate for rate in PROBED_RATES]


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    (example,) = examples(TrainingConfig(batch_size=1))(0)
    models = tiny_model(MODEL), tiny_model(MODEL)
    models[1].checkpoint_blocks()
    for model in models:
        LOSS(model, example).backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one.grad, other.grad)  # pyright: ignore[reportArgumentType]


def test_curves_go_to_a_tracker(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = replace(SHORT, steps=2, tracker="tensorboard")
    train(
        tiny_model(MODEL),
        LOSS,
        examples(config),
        config,
        held_out_error,
        logs=tmp_path,
        label="on policy",
    )
    (events,) = tmp_path.rglob("events*")
    assert events.parent.name == "on-policy"
    assert all(name in events.read_bytes() for name in (b"loss", b"held_out"))
