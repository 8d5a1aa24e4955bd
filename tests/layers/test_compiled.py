"""A self-attention compiles as one graph, for hosts that compile whole blocks.

Every size has a graph of its own, because sizes of weights are constants of a graph. The package
itself compiles all but the self-attention, once for all blocks (see test_dit).
"""

from __future__ import annotations

import pytest
import torch
from conftest import noise, tiny_config, tiny_mla, tiny_model
from torch import Tensor
from torch._dynamo.utils import counters

from vmla_convert.config import CachePolicy, CodecConfig, ModelConfig, Sizes
from vmla_convert.layers.attention import AttendedTokens, AttentionMetadata
from vmla_convert.layers.block import SelfAttention
from vmla_convert.maths.rope3d import Rotary, rotary_table, token_positions

CHUNK, CHUNKS = 2, 3
WINDOW = CachePolicy(CHUNK * CHUNKS, 1)
MODELS = {
    "dense": tiny_config(cache=WINDOW),
    "mla": tiny_config(cache=WINDOW, mla=tiny_mla()),
    "codec": tiny_config(cache=WINDOW, codec=CodecConfig(24, Sizes(rank=12))),
}


def rotations(config: ModelConfig, frames: list[int]) -> Rotary:
    positions = token_positions(torch.tensor(frames), 2, 3)
    return rotary_table(positions, config.geometry.head_dim)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_attention_is_one_graph(name: str) -> None:
    config = MODELS[name]
    model = tiny_model(config)
    cache = model.new_cache(1)
    for _ in range(CHUNKS):
        cache.open_chunk(CHUNK)
    positions = cache.frame_positions()
    metadata = AttentionMetadata(
        rotations(config, positions.entries[-CHUNK:]),
        rotations(config, positions.entries),
        rotations(config, positions.past) if positions.past else None,
    )

    def attend(attention: SelfAttention, x: Tensor, attended: AttendedTokens) -> Tensor:
        return attention(x, attended, metadata)

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(attend, fullgraph=True)
    x = noise(1, CHUNK * config.tokens_per_frame, config.geometry.dim)
    for layer, attention in enumerate(model.self_attentions()):
        attended = cache.update(layer, attention.project(x), keep=False)
        assert (attended.past is None) == (name != "codec")
        expected = attend(attention, x, attended)
        torch.testing.assert_close(compiled(attention, x, attended), expected, atol=1e-5, rtol=0)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= config.geometry.num_layers
