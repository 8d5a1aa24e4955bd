"""Count the bytes that one self-attention moves, of a codec and of the dense model.

    python -m evals.traffic

One layer of Wan 1.3B in bfloat16 attends with a full window of 21 frames, on tensors without
memory. Each operation moves the tensors that it reads and writes; caches of the machine do not
count. Rows `kernels` count the Triton kernels as one operation each, and rows `eager` their twins.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import typer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evals.speed import SHAPES
from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import (
    CachePolicy,
    CodecConfig,
    ModelConfig,
    RuntimeConfig,
    SamplerConfig,
    Sizes,
)
from vmla_convert.console import out
from vmla_convert.kernels import available
from vmla_convert.layers.attention import TILE_MIB, AttentionMetadata
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.quantise import WHOLE_BITS
from vmla_convert.maths.rates import Rate
from vmla_convert.maths.rope3d import Rotary

WINDOW, CHANNELS = 21, 224
NOT_MOVING = ("empty", "new_empty", "_unsafe_view")
OVERWRITING = ("aten::copy_", "vmla::decode_rotated")


class Traffic(NamedTuple):
    """Bytes that one self-attention moves, by operation."""

    rotation: str
    moved: Counter[str]

    @property
    def total(self) -> int:
        """Bytes of all operations."""
        return sum(self.moved.values())


class CountedTraffic(TorchDispatchMode):
    """Bytes that operations read and write, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its arguments and results."""
        result = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        if not func.is_view and space != "prim" and name not in NOT_MOVING:
            self.moved[name] += _moved(func, args, kwargs or {}, result)
        return result


def _moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes of the arguments and results of an operation; what it changes in place counts twice."""
    total, changed = 0, set[int]()
    overwrites = func._schema.name in OVERWRITING
    for argument, value in zip(func._schema.arguments, args, strict=False):
        nbytes = sum(map(_nbytes, tree_leaves(value)))
        written = argument.alias_info is not None and argument.alias_info.is_write
        total += nbytes * (2 if written and not overwrites else 1)
        if written:
            changed |= {id(leaf) for leaf in tree_leaves(value)}
    named = [leaf for leaf in tree_leaves(kwargs) if isinstance(leaf, Tensor)]
    changed |= {id(leaf) for leaf in named}
    total += sum(map(_nbytes, named))
    return total + sum(_nbytes(leaf) for leaf in tree_leaves(result) if id(leaf) not in changed)


def _nbytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


def main() -> None:
    """Print what one self-attention moves, and what the codec's moves beyond the dense model's."""
    rows: list[list[Any]] = []
    for kernels in (True, False):
        dense = measured("dense", kernels)
        whole, eight = (measured("codec", kernels, bits) for bits in (WHOLE_BITS, 8))
        names = ("dense", "codec, 16-bit channels", "codec, 8-bit channels")
        for name, each in zip(names, (dense, whole, eight), strict=True):
            beyond = (each.total - dense.total) / 1e9
            rows.append([name, each.rotation, each.total / 1e9, beyond])
    header = ["model", "rotation", "moved (GB)", "beyond dense (GB)"]
    out.table("One self-attention of Wan 1.3B, 21 frames, counted", header, rows)


def measured(name: str, kernels: bool, bits: int = WHOLE_BITS) -> Traffic:
    """Count one self-attention of the dense model or of a codec, after its projections."""
    shapes, shown = SHAPES["wan-1.3b"], "kernels" if kernels else "eager"
    config = ModelConfig(
        replace(shapes.geometry, num_layers=1),
        shapes.latent_size,
        shapes.chunk_frames,
        CachePolicy(WINDOW),
        SamplerConfig(),
        codec=CodecConfig(CHANNELS, Sizes(rank=CHANNELS)) if name == "codec" else None,
    )
    with FakeTensorMode(), torch.no_grad(), kernels_are(kernels):
        model = narrow_model(config)
        if codec := model.all_blocks()[0].codec:
            codec.rate = Rate((bits,) * CHANNELS, quantised=bits < WHOLE_BITS)
        cache, attention = model.new_cache(1), model.all_blocks()[0].self_attn
        for _ in range(WINDOW // config.chunk_frames):
            cache.open_chunk(config.chunk_frames)
        positions = cache.frame_positions()
        own, attended, past = (
            _table(config, frames)
            for frames in (config.chunk_frames, len(positions.entries), len(positions.past or ()))
        )
        runtime = RuntimeConfig(tile_mib=TILE_MIB["cuda"])
        metadata = AttentionMetadata(own, attended, past, runtime=runtime)
        tokens = config.chunk_frames * config.tokens_per_frame
        x = torch.empty(1, tokens, config.geometry.dim, dtype=torch.bfloat16)
        entries = attention.project(x)
        with CountedTraffic() as counted:
            attention(x, cache.update(0, entries, keep=False), metadata)
    return Traffic(shown, counted.moved)


def _table(config: ModelConfig, frames: int) -> Rotary:
    """Rotations of the tokens of some frames."""
    shape = (frames * config.tokens_per_frame, config.geometry.head_dim // 2, 2)
    return Rotary(torch.empty(shape))


def narrow_model(config: ModelConfig) -> CausalWanModel:
    """A model in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return CausalWanModel(config)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def kernels_are(used: bool) -> Iterator[None]:
    """Let the model use its kernels, or their eager twins, whatever the device."""
    with patch.object(available, "runs_kernels", lambda _: used):
        yield


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
