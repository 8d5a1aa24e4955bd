"""Stages of a recovery: what each learns from, what it may change, and that none does harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CLIPS, CONVERT, EVALUATE, MODEL, RECOVER, evidence_of
from torch import Tensor

from vmla_convert.checkpoint.tensor_store import MemoryStore
from vmla_convert.config import RecoverConfig, SamplerConfig, TrainingConfig
from vmla_convert.fitting import calibrate
from vmla_convert.fitting.calibrate import LayerReads, model_blocks
from vmla_convert.fitting.convert import convert
from vmla_convert.fitting.factors import convert_model
from vmla_convert.layers.dit import Block, CausalWanModel
from vmla_convert.maths.flow import sampler_sigmas
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.measuring.rows import Errors
from vmla_convert.media.clips import open_clips, seeded
from vmla_convert.progress import Silent
from vmla_convert.recovery import layerwise
from vmla_convert.recovery.layerwise import fit_layers
from vmla_convert.recovery.nested import NestedSizes
from vmla_convert.recovery.on_policy import roll_out, rollout_examples
from vmla_convert.recovery.recover import recover
from vmla_convert.recovery.stages import Recovered, recover_model
from vmla_convert.recovery.trained import (
    add_adapters,
    new_names,
    new_parameters,
    unfreeze,
)
from vmla_convert.training.losses import (
    Example,
    Levels,
    make_example,
    predicted_velocity,
    streamed_velocity,
    velocity_distillation,
)
from vmla_convert.training.processes import Share

pytest_plugins = ["checkpoints"]
pytestmark = pytest.mark.usefixtures("few_layerwise_clips")

Weights = dict[str, Tensor]
# Attention to the one token of a prompt is 1, whatever query and key are.
SEES_NO_GRADIENT = {
    f"blocks.{i}.cross_attn.{name}"
    for i in (0, 1)
    for name in (
        *(f"{part}.{kind}" for part in "qk" for kind in ("weight", "bias")),
        "norm_q.weight",
        "norm_k.weight",
    )
}
# Far too large, even where there is nothing to gain.
RUINOUS = TrainingConfig(steps=3, batch_size=2, lr=1.0, warmup_steps=0, eval_every=1)


@pytest.fixture(params=[False, True], ids=["euler", "renoise"])
def dense_of_sampler(request: pytest.FixtureRequest, dense: CausalWanModel) -> CausalWanModel:
    sampler = SamplerConfig((1000, 600, 300), 2.0, request.param)
    dense.config = replace(dense.config, sampler=sampler)
    return dense


@pytest.fixture
def ignorant(dense: CausalWanModel) -> CausalWanModel:
    """A conversion that knows nothing yet."""
    return convert_model(dense, replace(CONVERT, init="random"), None)


@pytest.fixture
def calibrated(dense: CausalWanModel, measured: list[LayerReads]) -> CausalWanModel:
    """A conversion as it should be."""
    config = replace(CONVERT, kv_lora_rank=24)
    return convert_model(dense, config, evidence_of(dense, measured))


def weights(model: CausalWanModel) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: CausalWanModel, before: Weights) -> set[str]:
    now = model.state_dict()
    assert now.keys() == before.keys()
    return {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}


def recovered(
    student: CausalWanModel, dense: CausalWanModel, config: RecoverConfig
) -> tuple[dict[int, Errors], Recovered]:
    curve: dict[int, Errors] = {}
    held_out = HeldOut(dense, EVALUATE)
    how = recover_model(student, dense, config, held_out, curve.__setitem__)
    return curve, how


# On policy


def context_of(batch: int) -> Tensor:
    return open_clips(CLIPS).batch(0, batch).context


@torch.no_grad()
def test_a_rolled_out_example_holds_what_the_student_met(
    dense_of_sampler: CausalWanModel,
) -> None:
    """Streaming over its past, the student predicts the same as in the masked pass."""
    student = convert_model(dense_of_sampler, replace(CONVERT, init="random"), None)
    example = roll_out(student, context_of(3), 7, (0, 0))
    past, noisy = example.latents.chunk(2, dim=1)
    assert past.shape == (3, 6, 12, 12, 12)
    masked = predicted_velocity(student, student.config, example)
    torch.testing.assert_close(streamed_velocity(student, example), masked, atol=1e-4, rtol=1e-4)
    levels = sampler_sigmas((1000, 600, 300), 2.0)[:-1]
    sigma = example.timestep[:, 6:] / 1000
    assert (sigma[..., None] - levels).abs().min(-1).values.max() < 1e-6
    assert len(sigma.unique()) > 1
    torch.testing.assert_close(past + sigma[..., None, None, None] * example.velocity, noisy)


@torch.no_grad()
def test_the_last_step_of_a_rollout_leads_to_its_clean_chunk(dense: CausalWanModel) -> None:
    """With one step only, what the student predicts from a state is where its rollout ended."""
    dense.config = replace(dense.config, sampler=SamplerConfig((1000,), 2.0))
    student = convert_model(dense, replace(CONVERT, init="random"), None)
    example = roll_out(student, context_of(2), 6, (0, 0))
    velocity = predicted_velocity(student, student.config, example)
    torch.testing.assert_close(velocity, example.velocity, atol=1e-4, rtol=1e-4)


def test_processes_roll_out_parts_of_one_batch(dense_of_sampler: CausalWanModel) -> None:
    whole = roll_out(dense_of_sampler, context_of(5), 6, (3, 1))
    parts = [roll_out(dense_of_sampler, context_of(5), 6, (3, 1), Share(r, 2)) for r in (0, 1)]
    for tensor, *halves in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(halves), tensor, atol=1e-5, rtol=1e-4)
        assert all(not half[1 - rank :: 2].any() for rank, half in enumerate(halves))


def test_every_step_rolls_out_anew(dense: CausalWanModel) -> None:
    examples = rollout_examples(dense, open_clips(CLIPS), TrainingConfig(batch_size=2))
    (first,), (again,), (other,) = (examples(step) for step in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.latents, other.latents)


def test_a_student_learns_from_its_own_rollouts(
    ignorant: CausalWanModel, dense: CausalWanModel
) -> None:
    training = TrainingConfig(steps=0, batch_size=2, lr=5e-3, eval_every=6)
    config = RecoverConfig(0, on_policy_steps=12, training=training, data=CLIPS)
    curve, how = recovered(ignorant, dense, config)
    assert list(curve) == [0, 6, 12]
    assert curve[12].velocity_error < 0.9 * curve[0].velocity_error
    assert how.best_steps["on policy"] == 12


@pytest.mark.parametrize("on_policy", [False, True], ids=["clips", "on policy"])
def test_a_student_learns_in_two_bytes(
    on_policy: bool, ignorant: CausalWanModel, dense: CausalWanModel
) -> None:
    training = TrainingConfig(
        steps=0 if on_policy else 8, batch_size=2, lr=5e-3, eval_every=8, mixed_precision="bf16"
    )
    config = RecoverConfig(0, on_policy_steps=8 * on_policy, training=training, data=CLIPS)
    curve, _ = recovered(ignorant, dense, config)
    assert curve[8].velocity_error < curve[0].velocity_error
    assert {tensor.dtype for tensor in ignorant.state_dict().values()} == {torch.float32}


# Losses


def test_examples_take_the_noise_levels_of_a_sampler() -> None:
    sigmas, clips = torch.tensor([0.9, 0.5, 0.2]), open_clips(CLIPS).batch(0, 64)

    def shares_of(share: float) -> Tensor:
        example = make_example(clips, 2, seeded(0, 0, "x"), levels=Levels(sigmas, share))
        sigma = example.timestep[:, 6:] / 1000
        assert torch.equal(sigma[:, ::2], sigma[:, 1::2])
        noise = example.velocity + clips.latents
        expected = clips.latents + sigma[..., None, None, None] * (noise - clips.latents)
        torch.testing.assert_close(example.latents[:, 6:], expected, atol=1e-5, rtol=0)
        return ((sigma[..., None] - sigmas).abs() < 1e-6).float().mean((0, 1))

    assert shares_of(0.0).sum() == 0
    assert shares_of(1.0).sum() == 1
    assert shares_of(1.0).min() > 0.2
    assert 0.35 < shares_of(0.5).sum() < 0.65


def tiny_example(dtype: torch.dtype = torch.float32) -> Example:
    made = make_example(open_clips(CLIPS).batch(0, 1), 2, seeded(0, 0, "x"))
    return Example(*(tensor.to(dtype) for tensor in made))


@pytest.mark.parametrize("flow_weight", [0.0, 0.5])
def test_the_gradient_of_distillation_is_that_of_its_differences(
    flow_weight: float, ignorant: CausalWanModel, dense: CausalWanModel
) -> None:
    """In double precision, along a random direction of all new parameters."""
    student, example = ignorant.double(), tiny_example(torch.float64)
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


def test_the_flow_term_is_added_and_vanishes_at_the_truth(dense: CausalWanModel) -> None:
    example = tiny_example()
    assert velocity_distillation(dense)(dense, example) == 0
    flow = velocity_distillation(dense, 0.5)(dense, example)
    velocity = predicted_velocity(dense, MODEL, example)
    torch.testing.assert_close(flow, 0.5 * (velocity - example.velocity).square().mean())


# What trains


def adapted(student: CausalWanModel, dense: CausalWanModel, **how: object) -> set[str]:
    before = weights(student)
    training = replace(RECOVER.training, lr=1e-2, steps=2, eval_every=2)
    config = RecoverConfig(0, training=training, data=CLIPS, **how)  # pyright: ignore[reportArgumentType]
    recovered(student, dense, config)
    assert not any(parameter.requires_grad for parameter in student.parameters())
    return changed(student, before)


def test_queries_and_output_train_when_attention_does(
    ignorant: CausalWanModel, dense: CausalWanModel
) -> None:
    new, names = new_names(ignorant), adapted(ignorant, dense, train="attention")
    attention = {
        f"blocks.{i}.self_attn.{name}"
        for i in (0, 1)
        for name in ("q.weight", "q.bias", "o.weight", "o.bias", "norm_q.weight")
    }
    assert names == new | attention


def test_everything_trains_when_all_does(ignorant: CausalWanModel, dense: CausalWanModel) -> None:
    names = adapted(ignorant, dense, train="all")
    assert names >= {name for name in ignorant.state_dict() if name not in SEES_NO_GRADIENT}


def test_adapters_are_merged_into_what_else_stays_frozen(
    ignorant: CausalWanModel, dense: CausalWanModel
) -> None:
    pytest.importorskip("peft")
    before, new = weights(ignorant), new_names(ignorant)
    names = adapted(ignorant, dense, lora_rank=2)
    matrices = ("self_attn.q", "self_attn.o", "ffn.0", "ffn.2")
    matrices += tuple(f"cross_attn.{name}" for name in "qkvo")
    expected = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in matrices}
    assert names == new | expected
    for name in expected:
        if name not in SEES_NO_GRADIENT:
            difference = ignorant.state_dict()[name] - before[name]
            assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 2, name


def test_adapters_change_nothing_at_first_and_are_those_of_their_seed(
    ignorant: CausalWanModel,
) -> None:
    pytest.importorskip("peft")
    example, before = tiny_example(), weights(ignorant)
    velocity = predicted_velocity(ignorant, MODEL, example)
    started: list[Tensor] = []
    for seed in (0, 0, 1):
        adapted = add_adapters(ignorant, 2, "new", seed)
        torch.testing.assert_close(predicted_velocity(ignorant, MODEL, example), velocity)
        started += [p.clone() for n, p in ignorant.named_parameters() if "lora_A" in n][:1]
        adapted.merge_and_unload()
        assert not changed(ignorant, before)
    assert torch.equal(started[0], started[1])
    assert not torch.equal(started[0], started[2])


def test_what_is_not_new_moves_by_a_part_of_the_learning_rate(
    ignorant: CausalWanModel, dense: CausalWanModel
) -> None:
    before, new = weights(ignorant), new_names(ignorant)
    training = TrainingConfig(steps=1, batch_size=2, lr=1e-3, warmup_steps=0, eval_every=1)
    config = RecoverConfig(0, train="all", rest_lr=0.05, training=training, data=CLIPS)
    recovered(ignorant, dense, config)
    for name, tensor in ignorant.state_dict().items():
        moved = (tensor - before[name]).abs().max().item()
        assert moved <= 1.01 * (1e-3 if name in new else 5e-5), name


# No harm


@pytest.mark.parametrize("stage", ["distilling", "on policy"])
def test_a_ruinous_stage_is_undone(
    stage: str, calibrated: CausalWanModel, dense: CausalWanModel
) -> None:
    before, distils = weights(calibrated), stage == "distilling"
    training = replace(RUINOUS, steps=3 if distils else 0)
    config = RecoverConfig(0, on_policy_steps=3 * (not distils), training=training, data=CLIPS)
    curve, how = recovered(calibrated, dense, config)
    assert curve[1].velocity_error > curve[0].velocity_error
    # The end of a stage is what it kept.
    assert curve[3] == curve[0]
    assert how.best_steps == {stage: 0}
    assert not changed(calibrated, before)


def test_a_ruinous_layer_is_undone_by_itself(
    ignorant: CausalWanModel, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, fit = weights(ignorant), layerwise.fit_layer

    def ruin_the_first(
        layer: Block, lesson: layerwise.Lesson, config: RecoverConfig, sizes: NestedSizes
    ) -> tuple[float, float]:
        first = layer is ignorant.all_blocks()[0]
        return fit(layer, lesson, replace(config, layerwise_lr=1.0 if first else 3e-3), sizes)

    monkeypatch.setattr(layerwise, "fit_layer", ruin_the_first)
    config = RecoverConfig(10, training=TrainingConfig(batch_size=4), data=CLIPS)
    fit_layers(ignorant, dense, model_blocks(dense), config, None, Silent())
    moved = changed(ignorant, before)
    assert moved
    assert all(name.startswith("blocks.1.") for name in moved)


def test_layers_that_are_better_alone_and_worse_together_are_undone(
    calibrated: CausalWanModel, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(layer: object, *_: object) -> tuple[float, float]:
        assert isinstance(layer, torch.nn.Module)
        with torch.no_grad():
            for parameter in new_parameters(layer):  # pyright: ignore[reportArgumentType]
                parameter += 1
        return 1.0, 0.5

    monkeypatch.setattr(layerwise, "fit_layer", spoil)
    before = weights(calibrated)
    config = RecoverConfig(3, training=replace(RUINOUS, steps=0), data=CLIPS)
    curve, how = recovered(calibrated, dense, config)
    assert curve[3] == curve[0]
    assert how.best_steps == {"layer by layer": 0}
    assert not changed(calibrated, before)


@pytest.mark.parametrize("seed", range(5))
def test_recovery_never_ends_worse_than_it_began(
    seed: int, calibrated: CausalWanModel, dense: CausalWanModel
) -> None:
    training = TrainingConfig(steps=2, batch_size=2, seed=seed, eval_every=2)
    config = RecoverConfig(2, on_policy_steps=2, training=training, data=CLIPS)
    curve, _ = recovered(calibrated, dense, config)
    held_out = HeldOut(dense, EVALUATE)
    assert held_out.measure(calibrated).velocity_error <= curve[0].velocity_error


def test_without_a_learning_rate_one_is_found_and_told(
    ignorant: CausalWanModel, dense: CausalWanModel
) -> None:
    training = TrainingConfig(steps=4, batch_size=2, eval_every=4)
    curve, how = recovered(ignorant, dense, RecoverConfig(0, training=training, data=CLIPS))
    assert how.learning_rate is not None
    assert curve[4].velocity_error < curve[0].velocity_error


# Layer by layer


def test_layers_learn_the_same_from_clips_that_pass_one_by_one(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RecoverConfig(3, training=TrainingConfig(batch_size=4), data=CLIPS)
    students = [convert_model(dense, replace(CONVERT, init="random"), None) for _ in range(2)]
    before, attend, passed = weights(students[0]), layerwise.masked_attention, set[int]()

    def noted(*how: Any) -> Any:
        inner = attend(*how)

        def attending(layer: Any, x: Tensor) -> Tensor:
            passed.add(len(x))
            return inner(layer, x)

        return attending

    monkeypatch.setattr(layerwise, "masked_attention", noted)
    fit_layers(students[0], dense, model_blocks(dense), config, None, Silent())
    assert max(passed) > 1
    passed.clear()
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", 1)
    fit_layers(students[1], dense, model_blocks(dense), config, None, Silent())
    assert passed == {1}
    together, alone = map(weights, students)
    moved = changed(students[0], before)
    assert moved == changed(students[1], before) != set()
    for name in moved:
        step = (together[name] - before[name]).abs().max()
        assert (together[name] - alone[name]).abs().max() < 0.05 * step, name


def test_processes_divide_the_layers(
    ignorant: CausalWanModel, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "CLIPS", 8)
    config = RecoverConfig(3, data=CLIPS)
    together = convert_model(dense, replace(CONVERT, init="random"), None)

    def fit(student: CausalWanModel, share: Share) -> MemoryStore:
        store = MemoryStore()
        layerwise.fit_share(student, dense, model_blocks(dense), config, store, share, Silent())
        return store

    whole = fit(together, Share(0, 1))
    for rank in (0, 1):
        part = fit(ignorant, Share(rank, 2))
        assert [part.has(f"layer-{i:03d}") for i in (0, 1)] == [rank == 0, rank == 1]
        mine, all_of_it = part.get(f"layer-{rank:03d}"), whole.get(f"layer-{rank:03d}")
        assert all(torch.equal(mine[name], tensor) for name, tensor in all_of_it.items())


def test_a_model_that_is_offloaded_learns_the_same(teacher: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    convert(teacher, converted, replace(CONVERT, init="random"))
    later = replace(RECOVER.training, steps=0)
    for steps, training in ((0, later), (4, RECOVER.training)):
        files: list[bytes] = []
        for offload in (False, True):
            out = tmp_path / f"{steps}-{offload}"
            config = replace(RECOVER, layerwise_steps=10, offload=offload, training=training)
            rows = recover(converted, teacher, out, config, EVALUATE)
            files.append((out / "model.safetensors").read_bytes())
            measured = any(row.metric == "velocity_error" for row in rows)
            assert measured == (steps > 0 or not offload)
        assert files[0] == files[1]
