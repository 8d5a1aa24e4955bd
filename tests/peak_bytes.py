"""Count the bytes of tensors at true sizes without holding any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from evals.counted_bytes import CountedBytes
from vmla_convert.config import ModelConfig
from vmla_convert.layers import dit
from vmla_convert.layers.block import Attend, masked_attention
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.masks import AttentionMask
from vmla_convert.maths.rope3d import Rotary


@contextmanager
def counted_bytes() -> Iterator[CountedBytes]:
    """Make every new tensor a fake one, which has a size and no numbers, and count its bytes.

    Masks and the choice of a past depend on numbers, so they stay real tensors.
    """

    def rotary(model: CausalWanModel, frames: Tensor, latents: Tensor) -> Rotary:
        geometry, size = model.config.geometry, latents.shape[-2:]
        tokens = len(frames) * geometry.tokens_per_frame((size[0], size[1]))
        return Rotary(torch.zeros(tokens, geometry.head_dim // 2, 2))

    def real_masked_attention(rotary: Rotary, mask: AttentionMask | None) -> Attend:
        with unset_fake_temporarily():
            return masked_attention(rotary, mask)

    with (
        pytest.MonkeyPatch.context() as patch,
        FakeTensorMode(allow_non_fake_inputs=True),
        CountedBytes() as counted,
    ):
        patch.setattr(CausalWanModel, "rotary", rotary)
        patch.setattr(dit, "masked_attention", real_masked_attention)
        yield counted


def fake_model(config: ModelConfig, dtype: torch.dtype) -> CausalWanModel:
    """A frozen model of fake weights."""
    with torch.device("meta"):
        model = CausalWanModel(config)
    state = model.state_dict()
    precise = {name for name, _ in model.named_buffers()}
    fake = {
        name: torch.zeros(t.shape, dtype=torch.float32 if name in precise else dtype)
        for name, t in state.items()
    }
    model.load_state_dict(fake, assign=True)
    return model.eval().requires_grad_(False)
