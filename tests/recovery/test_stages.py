"""Stages of a recovery: what each learns from, what it may change, and that none does harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CLIPS, CONVERT, EVALUATE, MODEL, RECOVER, changed, snapshot
from torch import Tensor

from vmla_convert.config import RecoverConfig, SamplerConfig, TrainingConfig
from vmla_convert.fitting.calibrate import model_blocks
from vmla_convert.fitting.convert import convert
from vmla_convert.layers.block import Block
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.flow import predict_clean, sampler_sigmas
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.measuring.rows import Errors
from vmla_convert.media.clips import open_clips, seeded
from vmla_convert.progress import Silent
from vmla_convert.recovery import layerwise
from vmla_convert.recovery.layerwise import fit_layers
from vmla_convert.recovery.nested import NestedSizes
from vmla_convert.recovery.on_policy import roll_out, rollout_examples
from vmla_convert.recovery.recover import recover
from vmla_convert.recovery.stages import DISTILLING, LAYERWISE, ON_POLICY, Recovered, recover_model
from vmla_convert.recovery.trained import add_adapters, new_names, new_parameters, unfreeze
from vmla_convert.storage.tensor_store import MemoryStore
from vmla_convert.training.losses import (
    Example,
    make_example,
    predicted_velocity,
    streamed_velocity,
    velocity_distillation,
)
from vmla_convert.training.processes import ALONE, Share

pytest_plugins = ["checkpoints"]
pytestmark = pytest.mark.usefixtures("few_layerwise_clips")

# Attention to the one token of a prompt is 1, whatever query and key are.
NO_GRADIENT = {
    f"blocks.{i}.cross_attn.{name}"
    for i in (0, 1)
    for name in (
        *(f"{part}.{kind}" for part in "qk" for kind in ("weight", "bias")),
        "norm_q.weight",
        "norm_k.weight",
    )
}
SHORT = TrainingConfig(steps=2, batch_size=2, lr=1e-2, eval_every=2)
# A rate that spoils every model.
RUINOUS = TrainingConfig(steps=3, batch_size=2, lr=1.0, warmup_steps=0, eval_every=1)
NO_STEPS = replace(SHORT, steps=0)


def recovered(
    student: CausalWanModel, dense: CausalWanModel, config: RecoverConfig
) -> tuple[dict[int, Errors], Recovered]:
    curve: dict[int, Errors] = {}
    held_out = HeldOut(dense, EVALUATE)
    how = recover_model(student, dense, config, held_out, curve.__setitem__)
    return curve, how


# On policy


@pytest.fixture(params=[False, True], ids=["euler", "renoise"])
def sampling(request: pytest.FixtureRequest, student: CausalWanModel) -> CausalWanModel:
    """A student with a sampler of three steps."""
    sampler = SamplerConfig((1000, 600, 300), 2.0, request.param)
    student.config = replace(student.config, sampler=sampler)
    return student


def context_of(batch: int) -> Tensor:
    return open_clips(CLIPS).batch(0, batch).context


@torch.no_grad()
def test_a_rolled_out_example_holds_states_of_the_rollout(sampling: CausalWanModel) -> None:
    """Streaming over its past, the student predicts the same as in the masked pass."""
    example = roll_out(sampling, context_of(3), 7, (0, 0))
    assert example.past.shape == (3, 6, 12, 12, 12)
    masked = predicted_velocity(sampling, sampling.config, example)
    torch.testing.assert_close(streamed_velocity(sampling, example), masked, atol=1e-4, rtol=1e-4)
    levels = sampler_sigmas((1000, 600, 300), 2.0)[:-1]
    assert (example.sigma[..., None] - levels).abs().min(-1).values.max() < 1e-6
    assert len(example.sigma.unique()) > 1
    clean = predict_clean(example.noisy, example.velocity, example.sigma)
    torch.testing.assert_close(clean, example.past, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_last_step_of_a_rollout_leads_to_its_clean_chunk(student: CausalWanModel) -> None:
    """With one step only, the student's prediction from a state is the end of its rollout."""
    student.config = replace(student.config, sampler=SamplerConfig((1000,), 2.0))
    example = roll_out(student, context_of(2), 6, (0, 0))
    velocity = predicted_velocity(student, student.config, example)
    torch.testing.assert_close(velocity, example.velocity, atol=1e-4, rtol=1e-4)


def test_processes_roll_out_parts_of_one_batch(sampling: CausalWanModel) -> None:
    whole, *parts = (
        roll_out(sampling, context_of(5), 6, (3, 1), share)
        for share in (ALONE, Share(0, 2), Share(1, 2))
    )
    for tensor, *halves in zip(whole, *parts, strict=True):
        for rank, half in enumerate(halves):
            torch.testing.assert_close(half, tensor[rank::2], atol=1e-5, rtol=1e-4)


def test_every_step_rolls_out_anew(dense: CausalWanModel) -> None:
    examples = rollout_examples(dense, open_clips(CLIPS), TrainingConfig(batch_size=2))
    (first,), (again,), (other,) = (examples(step) for step in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.latents, other.latents)


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_student_learns_from_its_own_rollouts(
    precision: Any, student: CausalWanModel, dense: CausalWanModel
) -> None:
    training = replace(NO_STEPS, lr=5e-3, eval_every=5, mixed_precision=precision)
    config = RecoverConfig(0, on_policy_steps=10, training=training, data=CLIPS)
    curve, how = recovered(student, dense, config)
    assert list(curve) == [0, 5, 10]
    assert curve[10].velocity_error < 0.95 * curve[0].velocity_error
    assert how.best_steps == {ON_POLICY: 10}
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.float32}


# Losses


def tiny_example(dtype: torch.dtype = torch.float32) -> Example:
    made = make_example(open_clips(CLIPS).batch(0, 1), 2, seeded(0, 0, "x"))
    return Example(*(tensor.to(dtype) for tensor in made))


@pytest.mark.parametrize("flow_weight", [0.0, 0.5])
def test_the_gradient_of_distillation_is_that_of_its_differences(
    flow_weight: float, student: CausalWanModel, dense: CausalWanModel
) -> None:
    """In double precision, along a random direction of all new parameters."""
    student, example = student.double(), tiny_example(torch.float64)
    loss = velocity_distillation(dense.double(), flow_weight)
    unfreeze(student, "new")
    trained = [p for p in student.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
    gradient = torch.autograd.grad(loss(student, example), trained)
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))

    @torch.no_grad()
    def shifted(step: float) -> Tensor:
        for parameter, along in zip(trained, direction, strict=True):
            parameter += step * along
        value = loss(student, example)
        for parameter, along in zip(trained, direction, strict=True):
            parameter -= step * along
        return value

    step = 1e-5
    difference = (shifted(step) - shifted(-step)) / (2 * step)
    torch.testing.assert_close(slope, difference, atol=1e-9, rtol=1e-5)


def test_the_flow_term_is_added(dense: CausalWanModel) -> None:
    example = tiny_example()
    assert velocity_distillation(dense)(dense, example) == 0
    flow = velocity_distillation(dense, 0.5)(dense, example)
    velocity = predicted_velocity(dense, MODEL, example)
    torch.testing.assert_close(flow, 0.5 * (velocity - example.velocity).square().mean())


# Trainable weights


def moved_names(student: CausalWanModel, dense: CausalWanModel, **how: Any) -> set[str]:
    """Names of the weights that a short recovery moves."""
    before = snapshot(student)
    recovered(student, dense, RecoverConfig(0, training=SHORT, data=CLIPS, **how))
    assert not any(parameter.requires_grad for parameter in student.parameters())
    return changed(student, before)


def test_a_wider_scope_trains_more(student: CausalWanModel, dense: CausalWanModel) -> None:
    new, start = new_names(student), snapshot(student)
    attention = {
        f"blocks.{i}.self_attn.{name}"
        for i in (0, 1)
        for name in ("q.weight", "q.bias", "o.weight", "o.bias", "norm_q.weight")
    }
    assert moved_names(student, dense, train="attention") == new | attention
    student.load_state_dict(start)
    moved = moved_names(student, dense, train="all")
    assert moved >= {name for name in start if name not in NO_GRADIENT}


def test_adapters_are_merged_into_frozen_matrices(
    student: CausalWanModel, dense: CausalWanModel
) -> None:
    pytest.importorskip("peft")
    before, new = snapshot(student), new_names(student)
    names = moved_names(student, dense, lora_rank=2)
    matrices = ("self_attn.q", "self_attn.o", "ffn.0", "ffn.2")
    matrices += tuple(f"cross_attn.{name}" for name in "qkvo")
    expected = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in matrices}
    assert names == new | expected
    for name in expected - NO_GRADIENT:
        difference = student.state_dict()[name] - before[name]
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 2, name


def test_adapters_change_nothing_at_first_and_depend_on_their_seed(student: CausalWanModel) -> None:
    pytest.importorskip("peft")
    before, started = snapshot(student), list[Tensor]()
    for seed in (0, 0, 1):
        adapted = add_adapters(student, 2, "new", seed)
        started += [p.clone() for n, p in student.named_parameters() if "lora_A" in n][:1]
        adapted.merge_and_unload()
        assert not changed(student, before)
    assert torch.equal(started[0], started[1])
    assert not torch.equal(started[0], started[2])


def test_what_is_not_new_moves_by_a_part_of_the_learning_rate(
    student: CausalWanModel, dense: CausalWanModel
) -> None:
    before, new = snapshot(student), new_names(student)
    training = replace(SHORT, steps=1, lr=1e-3, warmup_steps=0)
    config = RecoverConfig(0, train="all", rest_lr=0.05, training=training, data=CLIPS)
    recovered(student, dense, config)
    for name, tensor in student.state_dict().items():
        moved = (tensor - before[name]).abs().max().item()
        assert moved <= 1.01 * (1e-3 if name in new else 5e-5), name


# No harm


@pytest.mark.parametrize("stage", [DISTILLING, ON_POLICY])
def test_a_ruinous_stage_is_undone(
    stage: str, calibrated: CausalWanModel, dense: CausalWanModel
) -> None:
    before, distils = snapshot(calibrated), stage == DISTILLING
    training = replace(RUINOUS, steps=3 * distils)
    config = RecoverConfig(0, on_policy_steps=3 * (not distils), training=training, data=CLIPS)
    curve, how = recovered(calibrated, dense, config)
    assert curve[1].velocity_error > curve[0].velocity_error
    # The last report of a stage is of its best weights.
    assert curve[3] == curve[0]
    assert how.best_steps == {stage: 0}
    assert not changed(calibrated, before)


def test_a_ruinous_layer_is_undone_by_itself(
    student: CausalWanModel, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, fit = snapshot(student), layerwise.fit_layer

    def ruin_the_first(
        layer: Block, lesson: layerwise.Lesson, config: RecoverConfig, sizes: NestedSizes
    ) -> tuple[float, float]:
        first = layer is student.all_blocks()[0]
        return fit(layer, lesson, replace(config, layerwise_lr=1.0 if first else 3e-3), sizes)

    monkeypatch.setattr(layerwise, "fit_layer", ruin_the_first)
    config = RecoverConfig(10, training=TrainingConfig(batch_size=4), data=CLIPS)
    fit_layers(student, dense, model_blocks(dense), config, None, Silent())
    moved = changed(student, before)
    assert moved
    assert all(name.startswith("blocks.1.") for name in moved)


def test_layers_that_are_better_alone_and_worse_together_are_undone(
    calibrated: CausalWanModel, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    @torch.no_grad()
    def spoil(layer: Block, *_: object) -> tuple[float, float]:
        for parameter in new_parameters(layer):
            parameter += 1
        return 1.0, 0.5

    monkeypatch.setattr(layerwise, "fit_layer", spoil)
    before = snapshot(calibrated)
    curve, how = recovered(calibrated, dense, RecoverConfig(3, training=NO_STEPS, data=CLIPS))
    assert curve[3] == curve[0]
    assert how.best_steps == {LAYERWISE: 0}
    assert not changed(calibrated, before)


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_recovery_finds_a_rate_and_never_ends_worse_than_it_began(
    seed: int, calibrated: CausalWanModel, dense: CausalWanModel
) -> None:
    training = TrainingConfig(steps=2, batch_size=2, seed=seed, eval_every=2)
    config = RecoverConfig(2, on_policy_steps=2, training=training, data=CLIPS)
    curve, how = recovered(calibrated, dense, config)
    assert how.learning_rate is not None
    held_out = HeldOut(dense, EVALUATE)
    assert held_out.measure(calibrated).velocity_error <= curve[0].velocity_error


# Layer by layer


def fitted(student: CausalWanModel, dense: CausalWanModel) -> Tensor:
    """Movement of all weights in a short layer-wise stage."""
    before = snapshot(student)
    config = RecoverConfig(3, training=TrainingConfig(batch_size=4), data=CLIPS)
    fit_layers(student, dense, model_blocks(dense), config, None, Silent())
    moves = [(t - before[name]).flatten() for name, t in student.state_dict().items()]
    student.load_state_dict(before)
    return torch.cat(moves)


def test_layers_learn_the_same_from_clips_that_pass_one_by_one(
    student: CausalWanModel, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, passed = layerwise.masked_attention, set[int]()

    def noted(*how: Any) -> Any:
        inner = attend(*how)

        def attending(layer: Any, x: Tensor) -> Tensor:
            passed.add(len(x))
            return inner(layer, x)

        return attending

    monkeypatch.setattr(layerwise, "masked_attention", noted)
    together = fitted(student, dense)
    assert max(passed) > 1
    passed.clear()
    monkeypatch.setattr("vmla_convert.media.clip_checks.TOKENS_AT_ONCE", 1)
    alone = fitted(student, dense)
    assert passed == {1}
    assert together.any()
    assert (together - alone).abs().max() < 0.05 * together.abs().max()


def test_processes_divide_the_layers(student: CausalWanModel, dense: CausalWanModel) -> None:
    config, start, names = (
        RecoverConfig(3, data=CLIPS),
        snapshot(student),
        ("layer-000", "layer-001"),
    )

    def fit(share: Share) -> MemoryStore:
        store = MemoryStore()
        student.load_state_dict(start)
        layerwise.fit_share(student, dense, model_blocks(dense), config, store, share, Silent())
        return store

    whole = fit(ALONE)
    for rank in (0, 1):
        part = fit(Share(rank, 2))
        assert [part.has(name) for name in names] == [rank == 0, rank == 1]
        for name, tensor in whole.get(names[rank]).items():
            assert torch.equal(part.get(names[rank])[name], tensor)


@pytest.mark.parametrize("steps", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_model_that_is_offloaded_learns_the_same(
    steps: int, teacher: Path, tmp_path: Path
) -> None:
    converted, files = tmp_path / "converted", list[bytes]()
    convert(teacher, converted, replace(CONVERT, init="random"))
    for offload in (False, True):
        out, training = tmp_path / f"{offload}", replace(RECOVER.training, steps=steps)
        config = replace(RECOVER, layerwise_steps=10, offload=offload, training=training)
        rows = recover(converted, teacher, out, config, EVALUATE)
        files.append((out / "model.safetensors").read_bytes())
        measured = any(row.metric == "velocity_error" for row in rows)
        assert measured == (steps > 0 or not offload)
    assert files[0] == files[1]
