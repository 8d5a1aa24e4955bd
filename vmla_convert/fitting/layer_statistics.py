"""Statistics of one dense self-attention layer: moments of activations, and costs of errors.

Letters: B clips, L tokens of a clip, d width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import Product
from vmla_convert.layers.attention import DenseSelfAttention, split_heads
from vmla_convert.maths.attention_stats import (
    AttentionSample,
    AttentionStats,
    measure_stats,
    merge_stats,
)
from vmla_convert.maths.masks import AttentionMask
from vmla_convert.maths.moments import Moments, measure_moments, merge_moments
from vmla_convert.maths.rope3d import Rotary

QUERIES_PER_CLIP = 96
SAMPLES_PER_CLIP = 128
_SAMPLES = "samples"


class LayerStatistics(NamedTuple):
    """The sums that calibration makes of one layer, by group of keys.

    For an MLA layer the moments are those of the layer's inputs. For a codec they are those of
    [k; v], normed keys and values. A codec stores keys after the norm, so its attention statistics
    do not scale errors by the norm.

    Attributes:
        past: Attention statistics of cached keys, and moments of the clean tokens behind them.
        own: The same for keys of the query's own chunk: one entry for clean keys, one for noisy
            keys. Empty for a codec,
            which never stores keys of the current chunk.
        samples: Some [k; v] of cached tokens, (n, 2d), for a codec; else None.
    """

    past: tuple[AttentionStats, Moments]
    own: list[tuple[AttentionStats, Moments]]
    samples: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """Real tensors by name in host memory, which a safetensors file can hold."""
        tensors: dict[str, Tensor] = {}
        for group, (sums, moments) in enumerate([self.past, *self.own]):
            for name, tensor in (*sums._asdict().items(), *moments._asdict().items()):
                real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                # Groups may share their moments, but a file must not share memory.
                tensors[f"{group}.{name}"] = real.cpu().clone()
        return tensors if self.samples is None else tensors | {_SAMPLES: self.samples}

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], device: torch.device | None = None
    ) -> LayerStatistics:
        """Rebuild the statistics from `to_tensors`, with the sums on a device."""

        def group(index: int) -> tuple[AttentionStats, Moments]:
            names = (*AttentionStats._fields, *Moments._fields)
            parts = {name: tensors[f"{index}.{name}"].to(device=device) for name in names}
            parts["phases"] = torch.view_as_complex(parts["phases"])
            return (
                AttentionStats(*(parts[name] for name in AttentionStats._fields)),
                Moments(*(parts[name] for name in Moments._fields)),
            )

        count = sum(name.endswith(".queries") for name in tensors)
        past, *own = map(group, range(count))
        return cls(past, own, tensors.get(_SAMPLES))


def merge_statistics(parts: list[LayerStatistics]) -> LayerStatistics:
    """Merge the statistics of several batches of clips."""
    groups = [[part.past, *part.own] for part in parts]
    past, *own = (
        (merge_stats(sums for sums, _ in group), merge_moments(moments for _, moments in group))
        for group in zip(*groups, strict=True)
    )
    samples = [part.samples for part in parts if part.samples is not None]
    return LayerStatistics(past, own, torch.cat(samples) if samples else None)


@torch.no_grad()
def measure_layer(
    attention: DenseSelfAttention,
    x: Tensor,
    gradient: Tensor,
    rotary: Rotary,
    mask: AttentionMask,
    generator: torch.Generator,
    product: Product = "codec",
) -> LayerStatistics:
    """Measure one layer on one batch of clips.

    Args:
        attention: The layer.
        x: Input of the layer (B, 2L, d), clean tokens then noisy ones.
        gradient: Gradient with respect to the layer's output, (B, 2L, d).
        rotary: Positions of the tokens.
        mask: Which query may attend to which key.
        generator: Draws the queries that stand for all queries, and the samples.
        product: What the layer becomes.
    """
    is_codec, heads, length = product == "codec", attention.num_heads, x.shape[1] // 2
    clean, noisy = x.split(length, dim=1)
    picks = torch.randperm(x.shape[1], generator=generator)[:QUERIES_PER_CLIP].to(x.device)
    visible, own_chunk = mask.of_queries(picks)
    is_noisy = torch.arange(x.shape[1], device=x.device) >= length
    groups = [visible & ~own_chunk]
    groups += [] if is_codec else [own_chunk & ~is_noisy, own_chunk & is_noisy]
    value_mean = split_heads(attention.v(clean.mean((0, 1))), heads)
    rotations = rotary.rotations()
    sums: list[AttentionStats] = []
    # One clip at a time: attention of many queries and heads over a whole window is large.
    for tokens, pull in zip(x.split(1), gradient.split(1), strict=True):
        raw_key = attention.k(tokens)
        norm = torch.rsqrt(raw_key.float().square().mean(-1) + (attention.norm_k.eps or 0.0))
        sample = AttentionSample(
            query=split_heads(attention.norm_q(attention.q(tokens[:, picks])), heads).float(),
            query_rotation=rotations[picks],
            key=split_heads(attention.norm_k(raw_key), heads).float(),
            key_rotation=rotations,
            # A codec stores normed keys. MLA layers store raw keys, and the norm scales errors.
            key_norm=torch.ones_like(norm) if is_codec else norm,
            value=split_heads(attention.v(tokens), heads).float(),
            value_mean=value_mean.float(),
            gradient=split_heads(pull[:, picks] @ attention.o.weight, heads).float(),
            mask=visible,
        )
        clip = measure_stats(sample, groups)
        sums = [merge_stats(both) for both in zip(sums, clip, strict=True)] if sums else clip
    if is_codec:
        entries = torch.cat(attention.project(clean), -1)
        some = torch.randperm(length, generator=generator)[:SAMPLES_PER_CLIP].to(x.device)
        samples = entries[:, some].flatten(0, 1).float().cpu()
        return LayerStatistics((sums[0], measure_moments(entries)), [], samples)
    moments = measure_moments(clean)
    past, *own = zip(sums, [moments, moments, measure_moments(noisy)], strict=True)
    return LayerStatistics(past, own)
