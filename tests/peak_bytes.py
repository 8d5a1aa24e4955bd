"""Count the bytes of tensors at true sizes without holding any of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmla_convert.config import ModelConfig
from vmla_convert.layers import dit
from vmla_convert.layers.block import Attend, masked_attention
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.masks import AttentionMask
from vmla_convert.maths.rope3d import Rotary


class CountedBytes(TorchDispatchMode):
    """Bytes of all fake tensors, now and at most.

    Attributes:
        live: Bytes of the tensors that exist.
        peak: Largest value of `live` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        nbytes = storage.nbytes()
        self._seen.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes


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
