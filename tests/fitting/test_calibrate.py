"""Calibration passes a model block by block, and measures what the whole model would show."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from checkpoints import CLIPS, CONVERT, MODEL
from safetensors.torch import save_file
from torch import Tensor, nn

from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.config import DataConfig, Product
from vmla_convert.errors import ConfigError
from vmla_convert.fitting import calibrate as pipeline
from vmla_convert.fitting import layer_statistics
from vmla_convert.fitting.calibrate import (
    Statistics,
    calibrate,
    deployed_phases,
    model_blocks,
)
from vmla_convert.fitting.calibration_clips import batch_sizes
from vmla_convert.fitting.layer_statistics import LayerStatistics, merge_statistics
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.block import Block
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import build_shell, load, read_block
from vmla_convert.maths.moments import Moments, measure_moments
from vmla_convert.maths.rope3d import axis_pairs
from vmla_convert.media import clip_checks
from vmla_convert.media.clip_checks import check_clips
from vmla_convert.media.clips import Batch, ClipSource, open_clips, seeded
from vmla_convert.storage.tensor_store import FolderStore, MemoryStore
from vmla_convert.training.losses import make_example, teacher_forcing_inputs

pytest_plugins = ["checkpoints"]

SEED = 5
LAYERS, FRAMES = MODEL.geometry.num_layers, CLIPS.frames or 0
HALF = FRAMES * MODEL.tokens_per_frame
CHUNK = MODEL.chunk_frames * MODEL.tokens_per_frame


def tensors(statistics: LayerStatistics) -> Iterator[Tensor]:
    """All tensors of one layer's statistics."""
    for sums, moments in (statistics.past, *statistics.own):
        yield from sums
        yield from moments
    if statistics.samples is not None:
        yield statistics.samples


def equal(one: list[LayerStatistics], other: list[LayerStatistics]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        torch.equal(a, b) for x, y in pairs for a, b in zip(tensors(x), tensors(y), strict=True)
    )


def every(measured: Statistics) -> list[LayerStatistics]:
    return [measured(layer) for layer in range(LAYERS)]


def refuse(_: int) -> NoReturn:
    pytest.fail("a block that should not have been read")


class Seen(NamedTuple):
    """Input and output gradient of one layer's self-attention on one batch.

    Attributes:
        x: Input.
        gradient: Gradient with respect to the output.
        entries: [k; v] of the clean tokens.
    """

    x: Tensor
    gradient: Tensor
    entries: Tensor


Walked = tuple[list[LayerStatistics], list[Seen]]


def walk(model: CausalWanModel, product: Product) -> Walked:
    """Calibrate on three clips in batches of two and one; `Seen` comes last layer first."""
    measure, seen = pipeline.measure_layer, list[Seen]()

    def noted(
        attention: DenseSelfAttention, x: Tensor, gradient: Tensor, *rest: Any
    ) -> LayerStatistics:
        entries = torch.cat(attention.project(x[:, :HALF]), -1).detach().flatten(0, 1)
        seen.append(Seen(x, gradient, entries))
        return measure(attention, x, gradient, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_checks, "CLIPS_AT_ONCE", 2)
        patch.setattr(pipeline, "measure_layer", noted)
        measured = calibrate(
            model, model_blocks(model), open_clips(CLIPS), 3, SEED, product=product
        )
    return every(measured), seen


@pytest.fixture(scope="module")
def walked(teacher: Path) -> Walked:
    return walk(load(teacher), "mla")


@pytest.fixture(scope="module")
def codec_walked(teacher: Path) -> Walked:
    return walk(load(teacher), "codec")


def whole_model(
    model: CausalWanModel, index: int, start: int, size: int
) -> list[tuple[Tensor, Tensor]]:
    """Input and output gradient of every layer, by one pass through the whole model."""
    example = make_example(
        open_clips(CLIPS).batch(start, size),
        MODEL.chunk_frames,
        seeded(SEED, index, "calibration"),
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
    # Only chunks of the noisy half that have a past count.
    direction[:, : FRAMES + MODEL.chunk_frames] = 0
    return list(
        zip(inputs, torch.autograd.grad((velocity * direction).sum(), outputs), strict=True)
    )


def test_a_checkpoint_read_block_by_block_measures_as_the_model_in_memory(
    teacher: Path, measured: Statistics
) -> None:
    checkpoint = open_checkpoint(teacher)
    asked: list[int] = []
    given: list[weakref.ref[Block]] = []

    def counted(layer: int) -> Block:
        """Blocks are asked for forward, then backward, and two are never alive."""
        assert not [ref for ref in given if ref() is not None]
        asked.append(layer)
        block = read_block(checkpoint, layer)
        given.append(weakref.ref(block))
        return block

    streamed = calibrate(
        build_shell(checkpoint),
        counted,
        open_clips(CLIPS),
        CONVERT.calibration_clips,
        product="mla",
    )
    assert asked == [*range(LAYERS), *reversed(range(LAYERS))]
    for one, other in zip(every(streamed), every(measured), strict=True):
        for a, b in zip(tensors(one), tensors(other), strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()


def test_the_backward_pass_finds_the_gradients_of_the_whole_model(
    walked: Walked, teacher: Path
) -> None:
    _, seen = walked
    parts = ((0, 0, 2), (1, 2, 1))
    batches = [whole_model(load(teacher), *part) for part in parts]
    expected = [batch[layer] for layer in reversed(range(LAYERS)) for batch in batches]
    assert len(seen) == len(expected) == 2 * LAYERS
    for got, (x, gradient) in zip(seen, expected, strict=True):
        assert (got.x - x).norm() <= 1e-5 * x.norm()
        assert (got.gradient - gradient).norm() <= 1e-5 * gradient.norm()
        assert gradient.norm() > 0


def test_only_errors_in_chunks_with_a_past_count(walked: Walked) -> None:
    last, first = walked[1][0].gradient, walked[1][-1].gradient
    assert not last[:, : HALF + CHUNK].any()
    assert last[:, HALF + CHUNK :].any(-1).all()
    # Clean tokens of an earlier layer become what the last layer caches.
    assert first[:, :HALF].any()


def assert_moments(got: Moments, wanted: Moments) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_mla_moments_are_those_of_clean_and_of_noisy_inputs(walked: Walked) -> None:
    measured, seen = walked
    for layer, statistics in enumerate(reversed(measured)):
        batches = [noted.x for noted in seen[2 * layer : 2 * layer + 2]]
        clean, noisy = (
            measure_moments(torch.cat([x[:, half] for x in batches]))
            for half in (slice(HALF), slice(HALF, None))
        )
        assert_moments(statistics.past[1], clean)
        assert_moments(statistics.own[0][1], clean)
        assert_moments(statistics.own[1][1], noisy)
        assert clean.tokens == 3 * HALF


def test_every_group_of_keys_has_statistics(walked: Walked) -> None:
    first, last = walked[0]
    for statistics in (first, last):
        assert len(statistics.own) == 2
        assert statistics.samples is None
        for sums, _ in (statistics.past, *statistics.own):
            assert sums.queries == 3 * layer_statistics.QUERIES_PER_CLIP
    groups = [first.past, *first.own, last.past, last.own[1]]
    assert all(sums.value_square.any() and sums.query_square.any() for sums, _ in groups)
    # No layer follows the last one, so errors of its clean queries cost nothing.
    assert not last.own[0][0].value_square.any()


def test_codec_moments_are_those_of_normed_keys_and_values(codec_walked: Walked) -> None:
    measured, seen = codec_walked
    for layer, statistics in enumerate(reversed(measured)):
        entries = torch.cat([noted.entries for noted in seen[2 * layer : 2 * layer + 2]])
        assert statistics.own == []
        assert entries.shape == (3 * HALF, 2 * MODEL.geometry.dim)
        assert_moments(statistics.past[1], measure_moments(entries))


def test_codec_statistics_differ_from_mla_statistics_by_the_key_norm_alone(
    codec_walked: Walked, walked: Walked
) -> None:
    for codec, mla in zip(codec_walked[0], walked[0], strict=True):
        normed, raw = codec.past[0], mla.past[0]
        assert normed.queries == raw.queries
        torch.testing.assert_close(normed.value_square, raw.value_square, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(normed.rotated_query_square, raw.rotated_query_square, rtol=0.05)


@pytest.mark.parametrize("asked", [5, 10**6])
def test_samples_are_clean_tokens_equally_many_of_each_clip(
    asked: int, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token is sampled twice, so a large number samples each token once."""
    monkeypatch.setattr(layer_statistics, "SAMPLES_PER_CLIP", asked)
    measured, seen = walk(dense, "codec")
    for layer, statistics in enumerate(reversed(measured)):
        entries = torch.cat([noted.entries for noted in seen[2 * layer : 2 * layer + 2]])
        assert statistics.samples is not None
        assert statistics.samples.dtype == torch.float32
        by_clip = statistics.samples.view(3, min(asked, HALF), -1)
        for samples, known in zip(by_clip, entries.split(HALF), strict=True):
            gaps = torch.cdist(samples.double(), known.double())
            assert gaps.min(1).values.max() < 1e-4
            assert asked < HALF or gaps.min(0).values.max() < 1e-4


def test_statistics_of_parts_merge(walked: Walked, codec_walked: Walked) -> None:
    for measured in (walked[0][0], codec_walked[0][0]):
        twice = merge_statistics([measured, measured])
        for one, two in zip(
            tensors(measured._replace(samples=None)), tensors(twice._replace(samples=None)),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(2 * one, two)
        if measured.samples is not None and twice.samples is not None:
            assert torch.equal(twice.samples, torch.cat([measured.samples, measured.samples]))


def test_a_store_is_reused_and_a_folder_gives_what_memory_gives(
    dense: CausalWanModel, tmp_path: Path
) -> None:
    clips, results = open_clips(CLIPS), list[list[LayerStatistics]]()
    for store in (MemoryStore(), FolderStore(tmp_path / "store", "work")):
        for get_block in (model_blocks(dense), refuse):
            results.append(every(calibrate(dense, get_block, clips, 1, SEED, store=store)))
    assert all(equal(results[0], other) for other in results[1:])
    other = every(calibrate(dense, model_blocks(dense), clips, 1, SEED + 1))
    assert not equal(results[0], other)


@pytest.mark.parametrize("product", ["codec", "mla"])
def test_clips_in_groups_give_the_same_sums_and_fewer_files(
    product: Product, dense: CausalWanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five clips in batches of two: one group of three batches, or a group for each."""
    monkeypatch.setattr(clip_checks, "CLIPS_AT_ONCE", 2)
    results: list[list[LayerStatistics]] = []
    most: list[int] = []
    for limit in (10**9, 1):
        monkeypatch.setattr(pipeline, "GROUP_BYTES", limit)
        store = Watched()
        blocks = model_blocks(dense)
        results.append(
            every(calibrate(dense, blocks, open_clips(CLIPS), 5, SEED, None, store, product))
        )
        latents = open_clips(CLIPS).batch(0, 1).latents
        formula = pipeline.store_bytes(MODEL.geometry, latents, 5, product)
        assert 0.5 * formula < store.most <= formula
        most.append(store.most)
    assert equal(*results)
    # Statistics are most of a model this narrow.
    assert most[1] < 0.8 * most[0]


class Watched(MemoryStore):
    """A store that knows the most bytes it held."""

    most = 0

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        super().put(name, tensors)
        held = sum(t.nbytes for group in self._groups.values() for t in group.values())
        self.most = max(self.most, held)


def test_mixed_precision_measures_nearly_the_same(dense: CausalWanModel) -> None:
    exact, narrow = (
        every(calibrate(dense, model_blocks(dense), open_clips(CLIPS), 2, mixed_precision=mixed))
        for mixed in ("no", "bf16")
    )
    # The inputs of the first layer have passed no block.
    square, near = (each[-1].past[1].inputs_square for each in (exact, narrow))
    assert 0 < (square - near).norm() < 0.02 * square.norm()


def test_phases_are_expected_in_the_window_that_the_model_runs_with() -> None:
    longer = replace(MODEL, cache=replace(MODEL.cache, window_frames=12))
    few, many = deployed_phases(MODEL), deployed_phases(longer)
    assert few.shape == (MODEL.geometry.head_dim // 2,)
    time, _, _ = axis_pairs(MODEL.geometry.head_dim)
    assert (few.abs() < 1).all()
    assert (many.abs()[:time] < few.abs()[:time]).all()
    torch.testing.assert_close(many[time:], few[time:])


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (10**6, [4, 4, 1]),
        (6 * HALF, [3, 3, 3]),
        (6 * HALF - 1, [2, 2, 2, 2, 1]),
        (1, [1] * 9),
    ],
)
def test_a_batch_holds_as_many_clips_as_tokens_allow(
    tokens: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_checks, "CLIPS_AT_ONCE", 4)
    monkeypatch.setattr(clip_checks, "TOKENS_AT_ONCE", tokens)
    assert batch_sizes(MODEL.geometry, open_clips(CLIPS), 9) == sizes


def noise_clips(file: Path, *shape: int) -> ClipSource:
    """A few clips of noise of any shape."""
    clips = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    context = torch.randn(4, MODEL.geometry.text_len, MODEL.geometry.text_dim)
    save_file({"latents": clips, "context": context}, file)
    return open_clips(DataConfig(str(file), frames=20))


@pytest.mark.parametrize(("frames", "size"), [(4, (4, 8)), (4, (16, 12)), (5, (4, 4))])
def test_clips_may_be_of_other_sizes_and_have_an_incomplete_last_chunk(
    frames: int, size: tuple[int, int], dense: CausalWanModel, tmp_path: Path
) -> None:
    clips = noise_clips(tmp_path / "clips", frames, MODEL.geometry.in_dim, *size)
    for layer in every(calibrate(dense, model_blocks(dense), clips, 2)):
        # Two clips of two chunks of two frames.
        assert layer.past[1].tokens == 2 * 4 * size[0] * size[1] // 4
        assert all(tensor.isfinite().all() for tensor in tensors(layer))
        assert layer.past[0].query_square.any()


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ((4, 11, 12, 12), r"\[11, 12, 12\]"),
        ((4, 12, 12, 11), r"\[12, 12, 11\]"),
        ((4, 12, 9, 12), r"\[12, 9, 12\]"),
        ((3, 12, 12, 12), "3 frames"),
    ],
)
def test_clips_that_do_not_fit_are_refused_before_a_block_is_read(
    shape: tuple[int, ...], word: str, dense: CausalWanModel, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path / "store", "work")
    with pytest.raises(ConfigError, match=word) as caught:
        calibrate(dense, refuse, noise_clips(tmp_path / "clips", *shape), 2, store=store)
    assert caught.value.hint
    assert not (tmp_path / "store").exists()


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
def test_malformed_clips_are_refused(latents: Tensor, context: Tensor) -> None:
    with pytest.raises(ConfigError) as caught:
        check_clips(MODEL, Batch(latents, context))
    assert caught.value.hint
