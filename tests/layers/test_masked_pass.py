"""One pass over a whole clip, group by group, against a mask of all pairs of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import (
    EITHER_LATENT,
    TINY_GEOMETRY,
    noise,
    tiny_clip,
    tiny_config,
    tiny_mla,
    tiny_model,
)
from reference.masks import PairwiseAttend, block_causal_mask, token_masks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vmla_convert.config import CachePolicy, CodecConfig, Sizes
from vmla_convert.layers import attention as dense_layer
from vmla_convert.layers import mla as latent_layer
from vmla_convert.layers.block import Attend, Block, masked_attention
from vmla_convert.maths.masks import AttentionMask, teacher_forcing_mask
from vmla_convert.maths.rope3d import rotary_table, token_positions
from vmla_convert.media.clips import Batch
from vmla_convert.training.losses import flow_matching, make_example, teacher_forcing_inputs

FRAMES, TOKENS = 6, 2
KINDS: dict[str, dict[str, Any]] = {
    "dense model": {},
    **{latent: {"mla": tiny_mla(latent)} for latent in EITHER_LATENT},
    "codec": {"codec": CodecConfig(40, Sizes(20))},
}
POLICIES = [
    # policy, chunk; all that have one evict
    (None, 2),
    (CachePolicy(4, 0), 3),
    (CachePolicy(4, 1, dense_recent_frames=2), 1),
]
MAKERS = {"block-causal": block_causal_mask, "teacher forcing": teacher_forcing_mask}

kinds = pytest.mark.parametrize("kind", KINDS)
policies = pytest.mark.parametrize(
    ("policy", "chunk"),
    POLICIES,
    ids=[f"{p.window_frames}-{p.sink_frames}-{p.dense_recent_frames}" if p else "all the past"
         for p, _ in POLICIES],
)  # fmt: skip
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
Maker = Callable[[int, int, int, CachePolicy | None], AttentionMask]


class Pass(NamedTuple):
    """Output and gradients of one pass of a layer."""

    output: Tensor
    gradients: list[Tensor]


def block_with(kind: dict[str, Any]) -> Block:
    """A block with random parameters."""
    return tiny_model(tiny_config(**kind), seed=4).all_blocks()[1]


def attend_of(mask: AttentionMask) -> Attend:
    """Masked attention over one clip, or a clean and a noisy one, in frames of 1 x 2 tokens."""
    frames = torch.arange(FRAMES).repeat(len(mask.visible) // FRAMES)
    rotary = rotary_table(token_positions(frames, 1, TOKENS), TINY_GEOMETRY.head_dim)
    return masked_attention(rotary, mask)


def passed(block: Block, x: Tensor, mask: AttentionMask) -> Pass:
    """Output and gradients, of x first and then of all parameters that take part."""
    leaf = x.clone().requires_grad_()
    y = attend_of(mask)(block, leaf)
    inputs = [leaf, *block.parameters()]
    pull = noise(*y.shape, seed=9).to(y)
    gradients = torch.autograd.grad(y, inputs, pull, allow_unused=True)
    return Pass(y.detach(), [g for g in gradients if g is not None])


def pairwise(monkeypatch: pytest.MonkeyPatch, mask: AttentionMask) -> None:
    """Let layers attend under one mask of all pairs, whatever they pass."""
    for module in (dense_layer, latent_layer):
        monkeypatch.setattr(module, "attend", PairwiseAttend(mask))


@kinds
@policies
@makers
def test_groups_give_what_a_mask_of_all_pairs_gives(
    kind: str,
    policy: CachePolicy | None,
    chunk: int,
    make: Maker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs and gradients alike, of several clips."""
    block, mask = block_with(KINDS[kind]).double(), make(FRAMES, chunk, TOKENS, policy)
    x = noise(2, TOKENS * len(mask.visible), TINY_GEOMETRY.dim).double()
    grouped = passed(block, x, mask)
    pairwise(monkeypatch, mask)
    plain = passed(block, x, mask)
    assert len(grouped.gradients) == len(plain.gradients) > 5
    torch.testing.assert_close(grouped, plain, atol=1e-10, rtol=1e-10)


@kinds
@makers
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"]
)
@torch.no_grad()
def test_without_gradients_too(
    kind: str, make: Maker, dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in two bytes."""
    block, mask = block_with(KINDS[kind]).to(dtype), make(FRAMES, 2, TOKENS, CachePolicy(5, 1))
    x = noise(2, TOKENS * len(mask.visible), TINY_GEOMETRY.dim).to(dtype)
    attend = attend_of(mask)
    grouped = attend(block, x)
    pairwise(monkeypatch, mask)
    assert grouped.dtype == dtype
    torch.testing.assert_close(grouped, attend(block, x), atol=error, rtol=error)


# What is never made


class Watched(TorchDispatchMode):
    """The largest tensor that was made, and the pairs of tokens that fused attention went over."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.pairs = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            assert kwargs.get("attn_mask") is None
            self.pairs += args[0].shape[-2] * args[1].shape[-2]
        made = func(*args, **kwargs)
        tensors = made if isinstance(made, tuple) else [made]
        sizes = [t.numel() for t in tensors if isinstance(t, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return made


@kinds
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_training_makes_nothing_of_the_size_of_all_pairs(kind: str, checkpointed: bool) -> None:
    """Nor computes a masked pair."""
    config = tiny_config(cache=CachePolicy(5, 1), **KINDS[kind], latent_size=(12, 12))
    model, clip = tiny_model(config), Batch(*tiny_clip(config, 8, batch=1))
    if checkpointed:
        model.checkpoint_blocks()
    with Watched() as watched:
        example = make_example(clip, config.chunk_frames, torch.Generator().manual_seed(0))
        flow_matching(config)(model, example).backward()
    _, mask = teacher_forcing_inputs(config, example)
    seen, _ = token_masks(mask)
    assert watched.largest < seen.numel() / 2
    prompt = len(seen) * config.geometry.text_len
    passes = config.geometry.num_layers * (2 if checkpointed else 1)
    assert watched.pairs == passes * (int(seen.sum()) + prompt)
