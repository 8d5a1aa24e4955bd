"""The host that the page "Write a host" writes, run from the page."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_GEOMETRY, noise, randomise, tiny_config, tiny_model
from torch import Tensor, nn

import vmla_convert as vmla
from evals.dictionary_host import turned, turns
from vmla_convert.config import CodecConfig, Sizes
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.loading.codec import Codec

PAGE = Path(__file__).parents[2] / "docs" / "write-a-host.md"
GRID, CHUNK, WINDOW = (2, 3), 12, 30
HEADS, HEAD_DIM = TINY_GEOMETRY.num_heads, TINY_GEOMETRY.head_dim
WIDTH, LAYERS = TINY_GEOMETRY.dense_cache_scalars, TINY_GEOMETRY.num_layers


class Rolling:
    """The program's own cache: the last tokens, as they are."""

    slots = WINDOW

    def __init__(self) -> None:
        self.key = self.value = torch.empty(0)
        self.newest: int | None = None

    def update(self, key: Tensor, value: Tensor, start: int, _: Any) -> tuple[Tensor, Tensor]:
        if start == 0:
            self.key, self.value = key[:, :0], value[:, :0]
        kept = self.key.shape[1] - (key.shape[1] if start == self.newest and start else 0)
        self.key = torch.cat([self.key[:, :kept], key], 1)[:, -self.slots :]
        self.value = torch.cat([self.value[:, :kept], value], 1)[:, -self.slots :]
        self.newest = start
        return self.key, self.value


class Layer(DenseSelfAttention):
    """A layer that keeps its cache itself."""

    def __init__(self) -> None:
        super().__init__(TINY_GEOMETRY)
        self.kv = Rolling()

    def step(self, x: Tensor, start: int) -> Tensor:
        places = turns(start // 6, x.shape[1] // 6, *GRID, HEAD_DIM)
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)) for part in (self.norm_q(self.q(x)), *self.project(x))
        )
        key, value = self.kv.update(turned(k, places), v, start, GRID)
        q, k, v = (t.transpose(1, 2) for t in (turned(q, places), key, value))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Program:
    """Passes noise through its layers, twice for each chunk."""

    def __init__(self) -> None:
        layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        randomise(layers, seed=4)
        self.model, self.blocks = layers, [SimpleNamespace(attention=layer) for layer in layers]

    @torch.no_grad()
    def generate(self, prompts: range) -> Tensor:
        clips, x = list[Tensor](), torch.empty(0)
        for seed in prompts:
            for start in range(0, 6 * CHUNK, CHUNK):
                for step in range(2):
                    x = noise(1, CHUNK, TINY_GEOMETRY.dim, seed=1000 * seed + 10 * start + step)
                    for block in self.blocks:
                        x = block.attention.step(x, start)
                clips.append(x)
        return torch.cat(clips, 1)


@pytest.fixture
def page() -> dict[str, Any]:
    """Names that the page's first block defines."""
    names: dict[str, Any] = {}
    exec(blocks()[0], names)
    return names


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def whole() -> Codec:
    config = tiny_config(codec=CodecConfig(WIDTH, Sizes(rank=WIDTH)))
    layers = tuple(b.codec for b in tiny_model(config).all_blocks() if b.codec)
    return Codec(config, layers, {})


def test_its_host_is_dense_without_loss(page: dict[str, Any]) -> None:
    program = Program()
    dense = program.generate(range(2))
    host = page["RollingHost"](program)
    for _ in range(2):
        vmla.attach(host, whole(), cache_dtype="model")
        torch.testing.assert_close(program.generate(range(2)), dense, atol=1e-5, rtol=1e-5)
        vmla.detach(host)
        assert torch.equal(program.generate(range(2)), dense)


def test_its_lines_fit_a_codec(page: dict[str, Any]) -> None:
    program = Program()
    dense = program.generate(range(8))
    lines = blocks()[1].replace("vmla.fit(seen)", "vmla.fit(seen, channels=40)")
    lines = lines.replace("bytes_per_token=200", "bytes_per_token=60")
    exec(lines, page | {"program": program, "prompts": range(8)})
    found = program.generate(range(8))
    assert 0 < (found - dense).norm() / dense.norm() < 0.1


def test_it_is_short() -> None:
    lines = [line for block in blocks()[::2] for line in block.splitlines() if line.strip()]
    assert len(lines) <= 60
