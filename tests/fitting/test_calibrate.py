"""Calibration walks a model block by block, and sees what the whole model would show."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from checkpoints import CLIPS, CONVERT, MODEL
from safetensors.torch import save_file
from torch import Tensor, nn

from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.checkpoint.tensor_store import FolderStore, MemoryStore
from vmla_convert.config import DataConfig, Product
from vmla_convert.errors import ConfigError
from vmla_convert.fitting import calibrate as pipeline
from vmla_convert.fitting.calibrate import (
    LayerReads,
    calibrate,
    deployed_phases,
    merge_layer_reads,
    model_blocks,
)
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.dit import Block, CausalWanModel
from vmla_convert.loading.load import build_shell, load, read_block
from vmla_convert.maths.moments import Moments, measure_moments
from vmla_convert.maths.rope3d import axis_pairs
from vmla_convert.media.clips import Batch, ClipSource, open_clips, seeded
from vmla_convert.training.losses import make_example, teacher_forcing_inputs

pytest_plugins = ["checkpoints"]

SEED = 5
LAYERS = MODEL.geometry.num_layers
HALF = CLIPS.frames * MODEL.tokens_per_frame
CHUNK = MODEL.chunk_frames * MODEL.tokens_per_frame


def tensors(reads: LayerReads) -> Iterator[Tensor]:
    """Everything that was measured of one layer."""
    for sums, moments in (reads.past, *reads.own):
        yield from sums
        yield from moments
    if reads.samples is not None:
        yield reads.samples


def equal(one: list[LayerReads], other: list[LayerReads]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        torch.equal(a, b) for x, y in pairs for a, b in zip(tensors(x), tensors(y), strict=True)
    )


def every(measured: Callable[[int], LayerReads]) -> list[LayerReads]:
    return [measured(layer) for layer in range(LAYERS)]


class Seen(NamedTuple):
    """Input and output gradient of one layer's self-attention on one batch."""

    x: Tensor
    pull: Tensor


@pytest.fixture(scope="module")
def walked(teacher: Path) -> tuple[list[LayerReads], list[Seen]]:
    """Three clips in batches of two and one, and what each layer was measured on, last first."""
    model, measure, seen = load(teacher), pipeline.measure_attention, list[Seen]()

    def noted(attention: DenseSelfAttention, x: Tensor, pull: Tensor, *rest: Any) -> LayerReads:
        seen.append(Seen(x, pull))
        return measure(attention, x, pull, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "CLIPS_AT_ONCE", 2)
        patch.setattr(pipeline, "measure_attention", noted)
        measured = calibrate(model, model_blocks(model), open_clips(CLIPS), 3, SEED, product="mla")
    return every(measured), seen


def whole_model(model: CausalWanModel, index: int, size: int) -> list[Seen]:
    """The same of every layer, by one pass through the whole model and autograd."""
    example = make_example(
        open_clips(CLIPS).batch(index, size), MODEL.chunk_frames, seeded(SEED, index, "calibration")
    )
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(arguments[0].detach())
        outputs.append(output)

    for attention in model.self_attentions():
        attention.register_forward_hook(note)
    latents = example.latents.requires_grad_(True)
    velocity = model(
        latents, example.timestep, example.context, *teacher_forcing_inputs(MODEL, example)
    )
    direction = torch.randn(velocity.shape, generator=seeded(SEED + index, 0, "direction"))
    # Of the noisy half, the chunks that have a past.
    direction[:, : CLIPS.frames + MODEL.chunk_frames] = 0
    pulls = torch.autograd.grad((velocity * direction).sum(), outputs)
    return [Seen(x, pull) for x, pull in zip(inputs, pulls, strict=True)]


def test_reading_blocks_from_the_checkpoint_measures_what_the_model_in_memory_shows(
    teacher: Path, measured: list[LayerReads]
) -> None:
    checkpoint = open_checkpoint(teacher)
    streamed = calibrate(
        build_shell(checkpoint),
        lambda layer: read_block(checkpoint, layer),
        open_clips(CLIPS),
        CONVERT.calibration_clips,
        product="mla",
    )
    for one, other in zip(every(streamed), measured, strict=True):
        for a, b in zip(tensors(one), tensors(other), strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()


def test_the_shell_has_no_blocks_and_the_config_of_the_whole(teacher: Path) -> None:
    checkpoint, model = open_checkpoint(teacher), load(teacher)
    shell = build_shell(checkpoint)
    assert shell.config == model.config
    outside = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}
    assert shell.state_dict().keys() == outside.keys()
    assert all(torch.equal(shell.state_dict()[name], tensor) for name, tensor in outside.items())
    for layer, block in enumerate(model.blocks):
        read = read_block(checkpoint, layer)
        assert not read.training and not any(p.requires_grad for p in read.parameters())
        for name, tensor in block.state_dict().items():
            assert torch.equal(read.state_dict()[name], tensor)


def test_blocks_are_asked_for_there_and_back_and_two_are_never_alive(teacher: Path) -> None:
    checkpoint = open_checkpoint(teacher)
    asked: list[int] = []
    given: list[weakref.ref[Block]] = []

    def counted(layer: int) -> Block:
        assert not [ref for ref in given if ref() is not None]
        asked.append(layer)
        block = read_block(checkpoint, layer)
        given.append(weakref.ref(block))
        return block

    calibrate(build_shell(checkpoint), counted, open_clips(CLIPS), 1)
    assert asked == [*range(LAYERS), *reversed(range(LAYERS))]
    assert not [ref for ref in given if ref() is not None]


def test_the_walk_back_finds_the_gradients_of_the_whole_model(
    walked: tuple[list[LayerReads], list[Seen]], teacher: Path
) -> None:
    _, seen = walked
    batches = [whole_model(load(teacher), index, size) for index, size in ((0, 2), (1, 1))]
    expected = [batch[layer] for layer in reversed(range(LAYERS)) for batch in batches]
    assert len(seen) == len(expected) == 2 * LAYERS
    for got, wanted in zip(seen, expected, strict=True):
        assert (got.x - wanted.x).norm() <= 1e-5 * wanted.x.norm()
        assert (got.pull - wanted.pull).norm() <= 1e-5 * wanted.pull.norm()
        assert wanted.pull.norm() > 0


def test_only_errors_in_chunks_that_read_a_cache_weigh_at_the_end(
    walked: tuple[list[LayerReads], list[Seen]],
) -> None:
    last, first = walked[1][0].pull, walked[1][-1].pull
    assert not last[:, : HALF + CHUNK].any()
    assert last[:, HALF + CHUNK :].any(-1).all()
    # An earlier layer's clean tokens become what the last layer caches.
    assert first[:, :HALF].any()


def test_moments_are_of_the_clean_inputs_and_of_the_noisy_ones(
    walked: tuple[list[LayerReads], list[Seen]],
) -> None:
    measured, seen = walked
    for layer, reads in enumerate(reversed(measured)):
        batches = [noted.x for noted in seen[2 * layer : 2 * layer + 2]]
        clean, noisy = (
            measure_moments(torch.cat([x[:, half] for x in batches]))
            for half in (slice(HALF), slice(HALF, None))
        )
        assert_moments(reads.past[1], clean)
        assert_moments(reads.own[0][1], clean)
        assert_moments(reads.own[1][1], noisy)
        assert clean.tokens == 3 * HALF


def assert_moments(got: Moments, wanted: Moments) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_every_group_of_keys_has_its_reads(
    walked: tuple[list[LayerReads], list[Seen]],
) -> None:
    first, last = walked[0]
    for reads in (first, last):
        assert len(reads.own) == 2
        for sums, _ in (reads.past, *reads.own):
            assert sums.queries == 3 * pipeline.QUERIES_PER_CLIP
    read = [first.past, *first.own, last.past, last.own[1]]
    assert all(sums.value_square.any() and sums.query_square.any() for sums, _ in read)
    # Nothing comes after the last layer that would read what its clean tokens found.
    assert not last.own[0][0].value_square.any()


def test_parts_merge_to_what_all_clips_show_together(
    walked: tuple[list[LayerReads], list[Seen]],
) -> None:
    twice = merge_layer_reads([walked[0][0], walked[0][0]])
    for one, two in zip(tensors(walked[0][0]), tensors(twice), strict=True):
        assert torch.equal(2 * one, two)


def test_the_seed_decides_what_is_measured(dense: CausalWanModel) -> None:
    first, again, other = (
        every(calibrate(dense, model_blocks(dense), open_clips(CLIPS), 1, seed))
        for seed in (0, 0, 1)
    )
    assert equal(first, again)
    assert not equal(first, other)


def test_phases_belong_to_the_window_that_the_model_runs_with() -> None:
    longer = replace(MODEL, cache=replace(MODEL.cache, window_frames=12))
    few, many = deployed_phases(MODEL), deployed_phases(longer)
    assert few.shape == (MODEL.geometry.head_dim // 2,)
    time, _, _ = axis_pairs(MODEL.geometry.head_dim)
    assert (few.abs() < 1).all()
    assert (many.abs()[:time] < few.abs()[:time]).all()
    torch.testing.assert_close(many[time:], few[time:])


@pytest.mark.parametrize("product", ["codec", "mla"])
def test_a_folder_gives_what_memory_gives(
    product: Product, dense: CausalWanModel, tmp_path: Path
) -> None:
    shelf, clips = FolderStore(tmp_path / "shelf", "work"), open_clips(CLIPS)
    here, there = (
        every(calibrate(dense, model_blocks(dense), clips, 3, SEED, shelf=place, product=product))
        for place in (None, shelf)
    )
    assert equal(here, there)
    assert {len(reads.own) for reads in here + there} == {2 if product == "mla" else 0}
    assert {reads.samples is None for reads in here + there} == {product == "mla"}


# For a codec


class Entered(NamedTuple):
    """What calibration for a codec measured of a layer, and [k; v] of its clean tokens."""

    reads: LayerReads
    entries: Tensor


def entered(model: CausalWanModel, monkeypatch: pytest.MonkeyPatch) -> list[Entered]:
    """What calibration measures on the clips of `walked`, layer by layer."""
    measure, seen = pipeline.measure_attention, dict[nn.Module, list[Tensor]]()

    def noted(attention: DenseSelfAttention, x: Tensor, *rest: Any) -> LayerReads:
        parts = attention.project(x[:, :HALF])
        seen.setdefault(attention, []).append(torch.cat(parts, -1).detach().flatten(0, 1))
        return measure(attention, x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "CLIPS_AT_ONCE", 2)
        patch.setattr(pipeline, "measure_attention", noted)
        measured = every(calibrate(model, model_blocks(model), open_clips(CLIPS), 3, SEED))
    entries = [torch.cat(seen[attention]) for attention in model.self_attentions()]
    return [Entered(*layer) for layer in zip(measured, entries, strict=True)]


def test_a_codec_is_measured_by_normed_keys_and_values_of_clean_tokens(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reads, entries in entered(dense, monkeypatch):
        assert reads.own == []
        assert entries.shape == (3 * HALF, 2 * MODEL.geometry.dim)
        assert_moments(reads.past[1], measure_moments(entries))


@pytest.mark.parametrize("asked", [5, 10**6])
def test_samples_are_entries_of_clean_tokens_equally_many_of_each_clip(
    asked: int, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token is sampled twice: all of them are each sampled once."""
    monkeypatch.setattr(pipeline, "SAMPLES_PER_CLIP", asked)
    for reads, entries in entered(dense, monkeypatch):
        assert reads.samples is not None
        assert reads.samples.dtype == torch.float32
        of_clips = reads.samples.view(3, min(asked, HALF), -1)
        for samples, known in zip(of_clips, entries.split(HALF), strict=True):
            gaps = torch.cdist(samples.double(), known.double())
            assert gaps.min(1).values.max() < 1e-4
            if asked > HALF:
                torch.testing.assert_close(samples.sum(0), known.sum(0), rtol=1e-4, atol=1e-2)
                assert gaps.min(0).values.max() < 1e-4


def test_what_is_read_of_normed_keys_is_what_is_read_of_raw_ones_but_for_their_norm(
    dense: CausalWanModel,
    walked: tuple[list[LayerReads], list[Seen]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for (reads, _), mla in zip(entered(dense, monkeypatch), walked[0], strict=True):
        normed, raw = reads.past[0], mla.past[0]
        assert normed.queries == raw.queries
        torch.testing.assert_close(normed.value_square, raw.value_square, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(normed.rotated_query_square, raw.rotated_query_square, rtol=0.05)


def test_samples_of_parts_are_those_of_all_clips(dense: CausalWanModel) -> None:
    reads = calibrate(dense, model_blocks(dense), open_clips(CLIPS), 1)(0)
    twice = merge_layer_reads([reads, reads])
    assert reads.samples is not None and twice.samples is not None
    assert torch.equal(twice.samples, torch.cat([reads.samples, reads.samples]))


def test_what_lies_on_a_shelf_is_not_measured_again(dense: CausalWanModel, tmp_path: Path) -> None:
    def refuse(_: int) -> NoReturn:
        pytest.fail("a block that should not have been read")

    clips = open_clips(CLIPS)
    for shelf in (MemoryStore(), FolderStore(tmp_path / "shelf", "work")):
        first = every(calibrate(dense, model_blocks(dense), clips, 2, shelf=shelf))
        assert equal(first, every(calibrate(dense, refuse, clips, 2, shelf=shelf)))


def batch_sizes(
    dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch, count: int, clips: ClipSource
) -> list[int]:
    """How many clips passed a block together."""
    sizes: list[int] = []

    def noted(_: object, batch: Batch) -> None:
        sizes.append(len(batch.latents))

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "check_clips", noted)
        calibrate(dense, model_blocks(dense), clips, count)
    return sizes


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (10**6, [4, 4, 1]),
        (6 * HALF, [3, 3, 3]),
        (6 * HALF - 1, [2, 2, 2, 2, 1]),
        (2 * HALF, [1] * 9),
        (1, [1] * 9),
    ],
)
def test_as_many_clips_go_together_as_their_tokens_allow(
    tokens: int, sizes: list[int], dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CLIPS_AT_ONCE", 4)
    monkeypatch.setattr(pipeline, "TOKENS_AT_ONCE", tokens)
    assert batch_sizes(dense, monkeypatch, 9, open_clips(CLIPS)) == sizes


def latents(file: Path, *shape: int) -> ClipSource:
    """A few clips of noise of any shape."""
    clips = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    context = torch.randn(4, MODEL.geometry.text_len, MODEL.geometry.text_dim)
    save_file({"latents": clips, "context": context}, file)
    return open_clips(DataConfig(str(file), frames=20))


@pytest.mark.parametrize("size", [(4, 8), (16, 12), (12, 12)])
def test_clips_may_be_smaller_or_larger_than_the_models_own(
    size: tuple[int, int], dense: CausalWanModel, tmp_path: Path
) -> None:
    clips = latents(tmp_path / "clips", 4, MODEL.geometry.in_dim, *size)
    reads = every(calibrate(dense, model_blocks(dense), clips, 2))
    tokens = size[0] * size[1] // 4
    for layer in reads:
        assert layer.past[1].tokens == 2 * 4 * tokens
        assert all(tensor.isfinite().all() for tensor in tensors(layer))
        assert layer.past[0].query_square.any()


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ((4, 11, 12, 12), r"\[11, 12, 12\]"),
        ((4, 12, 12, 11), r"\[12, 12, 11\]"),
        ((4, 12, 9, 12), r"\[12, 9, 12\]"),
        ((3, 12, 12, 12), "3 frames have no chunk with a past"),
    ],
)
def test_clips_that_do_not_fit_are_refused_before_a_block_is_read(
    shape: tuple[int, ...], word: str, dense: CausalWanModel, tmp_path: Path
) -> None:
    def refuse(_: int) -> NoReturn:
        pytest.fail("a block that should not have been read")

    shelf = FolderStore(tmp_path / "shelf", "work")
    with pytest.raises(ConfigError, match=word) as caught:
        calibrate(dense, refuse, latents(tmp_path / "clips", *shape), 2, shelf=shelf)
    assert caught.value.hint
    assert not (tmp_path / "shelf").exists()


def test_the_last_frames_of_no_whole_chunk_are_left_out(
    dense: CausalWanModel, tmp_path: Path
) -> None:
    clips = latents(tmp_path / "clips", 5, MODEL.geometry.in_dim, 4, 4)
    reads = every(calibrate(dense, model_blocks(dense), clips, 1))
    assert reads[0].past[1].tokens == 4 * 4


@pytest.mark.parametrize(
    ("latents", "context"),
    [
        (torch.ones(2, 6, 12, 12), torch.ones(2, 1, 10)),
        (torch.ones(2, 6, 12, 12, 12), torch.ones(2, 10)),
        (torch.ones(2, 6, 12, 12, 12), torch.ones(2, 1, 11)),
        (torch.full((2, 6, 12, 12, 12), torch.nan), torch.ones(2, 1, 10)),
        (torch.ones(2, 6, 12, 12, 12), torch.full((2, 1, 10), torch.inf)),
    ],
)
def test_clips_of_another_make_are_refused(latents: Tensor, context: Tensor) -> None:
    with pytest.raises(ConfigError, match="clips h") as caught:
        pipeline.check_clips(MODEL, Batch(latents, context))
    assert caught.value.hint
