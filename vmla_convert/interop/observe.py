"""Watch a running program, and fit a codec to the keys and values that it caches.

Kept keys and values of every layer give the moments of [k; v]. Sampled queries, with what they
attend to, give the cost of an error (Method: what errors cost). Errors count at the layer's own
output, where the gradient is a random direction, because a program runs under `torch.no_grad`.
With gradients, each pass that attends to the past runs a second time, and errors count at the
model's output.

Shapes: B batch, L tokens of a chunk, S tokens attended to, n sampled queries, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmla_convert.errors import ConfigError
from vmla_convert.fitting.layer_statistics import LayerStatistics
from vmla_convert.interop.attach import connect, disconnect, find_host
from vmla_convert.interop.host import Host, linear_of, model_of
from vmla_convert.interop.rehearsal import Rehearsal
from vmla_convert.interop.tokens import DenseStore, RotaryTables, Slots, TokenCache
from vmla_convert.interop.witness import Witness, WitnessedCache
from vmla_convert.layers.attention import in_float32, split_heads
from vmla_convert.maths.attention_stats import (
    AttentionSample,
    AttentionStats,
    measure_stats,
    merge_stats,
)
from vmla_convert.maths.moments import Moments, measure_moments, merge_moments
from vmla_convert.maths.rope3d import Rotary, rotate

QUERIES_PER_PASS = 16
SAMPLES_PER_CHUNK = 64


class LayerRecord:
    """Measurements of one layer.

    Attributes:
        layer: The self-attention.
        witness: Queries and keys of the layer's last pass.
        moments: Moments of [k; v] of kept tokens; None before the first.
        stats: Statistics of attention to past tokens; None before the first.
        samples: Some [k; v] of kept tokens, each (n, 2d).
        chunk_tokens: Tokens of the largest chunk.
    """

    def __init__(self, layer: nn.Module, seed: int) -> None:
        self.layer, self.witness = layer, Witness(layer)
        self.moments: Moments | None = None
        self.stats: AttentionStats | None = None
        self.samples: list[Tensor] = []
        self.chunk_tokens = 0
        self._sampled: _Sampled | None = None
        self._random = torch.Generator().manual_seed(seed)

    @property
    def tokens(self) -> int:
        """Number of kept tokens."""
        return 0 if self.moments is None else int(self.moments.tokens)

    def statistics(self) -> LayerStatistics:
        """Statistics that a codec is fitted to."""
        assert self.stats is not None and self.moments is not None
        return LayerStatistics((self.stats, self.moments), [], torch.cat(self.samples))

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Add kept tokens, unrotated keys and values (B, L, H, D)."""
        entries = torch.cat([key.flatten(2), value.flatten(2)], -1).float().flatten(0, 1)
        self.chunk_tokens = max(self.chunk_tokens, key.shape[1])
        new = measure_moments(entries).cpu()
        self.moments = merge_moments([self.moments, new]) if self.moments else new
        some = torch.randperm(len(entries), generator=self._random)[:SAMPLES_PER_CHUNK]
        self.samples.append(entries[some.to(entries.device)].cpu())

    def attend(
        self, key: Tensor, value: Tensor, keys: Rotary, queries: Rotary, past: Tensor
    ) -> None:
        """Take what sampled queries of a pass attend to.

        Args:
            key: Unrotated keys that the chunk attends to, (B, S, H, D).
            value: Values, (B, S, H, D).
            keys: Rotations of the keys.
            queries: Rotations of the chunk's tokens.
            past: True for keys of earlier chunks, (S,).
        """
        if self.moments is None or self.witness.query is None:
            return
        heads, query = key.shape[2], self.witness.query
        picks = torch.randperm(query.shape[1], generator=self._random)[:QUERIES_PER_PASS]
        picks = picks.to(query.device)
        mean = self.moments.mean[self.moments.mean.shape[0] // 2 :]
        sample = AttentionSample(
            query=split_heads(query[:, picks], heads).float(),
            query_rotation=queries.rotations()[picks],
            key=key.detach().float(),
            key_rotation=keys.rotations(),
            key_norm=torch.ones(key.shape[:2], device=key.device),
            value=value.detach().float(),
            value_mean=mean.view(heads, -1).to(value.device, torch.float32),
            gradient=torch.empty(0),
            mask=past.new_ones(len(picks), len(past)),
        )
        self._sampled = _Sampled(sample, picks, past)

    def weigh(self, gradient: Tensor | None) -> None:
        """Measure the sampled queries of a pass.

        Args:
            gradient: Gradient at the layer's output, (B, L, d); None takes random directions.
        """
        if self._sampled is None:
            return
        (sample, picks, past), self._sampled = self._sampled, None
        output = linear_of(self.layer, "o").get_parameter("weight").detach().float()
        if gradient is None:
            shape = (len(sample.query), len(picks), len(output))
            pull = torch.randn(shape, generator=self._random).to(output.device)
        else:
            pull = gradient[:, picks].float()
        pull = split_heads(pull @ output, sample.query.shape[2])
        (found,) = measure_stats(sample._replace(gradient=pull), [sample.mask & past])
        new = found.cpu()
        self.stats = merge_stats([self.stats, new]) if self.stats else new


class _Sampled(NamedTuple):
    """Some queries of a pass, without their gradients.

    Attributes:
        sample: Queries, and what they attend to.
        picks: Numbers of the queries in the chunk, (n,).
        past: True for keys of earlier chunks, (S,).
    """

    sample: AttentionSample
    picks: Tensor
    past: Tensor


class _Pass(NamedTuple):
    """The last pass over a chunk, which is kept once another chunk follows."""

    first: int
    key: Tensor
    value: Tensor


class ObservedCache(WitnessedCache):
    """A dense cache that records what passes through."""

    def __init__(
        self,
        slots: Slots,
        tables: RotaryTables,
        rotated: bool,
        record: LayerRecord,
        rehearsal: Rehearsal | None,
    ) -> None:
        super().__init__(slots, DenseStore(slots), tables if rotated else None, record.witness)
        self._tables, self._record, self._rehearsal = tables, record, rehearsal
        self._last: _Pass | None = None

    def start(self, grid: tuple[int, int]) -> None:
        """Begin a pass."""
        self._tables.grid = grid

    def write(self, slots: range, key: Tensor, value: Tensor, first: int) -> None:
        """Take a chunk; the last pass over the chunk before was that chunk's kept pass."""
        super().write(slots, key, value, first)
        if self._rehearses:
            return
        if self._last is not None and self._last.first != first:
            self.keep()
        plain = self._unrotated(key, self._tables.of(((first, len(slots)),)))
        self._last = _Pass(first, plain, value.clone())

    def settle(self) -> None:
        """End a pass; what a second run wrote is dropped."""
        if self._rehearses:
            self._chunk = None
        super().settle()

    @property
    def _rehearses(self) -> bool:
        return self._rehearsal is not None and self._rehearsal.active

    def keep(self) -> None:
        """Record the last pass as kept."""
        if self._last is not None:
            self._record.keep(self._last.key, self._last.value)
            self._last = None

    def read(self, slots: range) -> tuple[Tensor, Tensor]:
        """Give keys and values, and measure the chunk's queries that attend to them."""
        key, value = super().read(slots)
        chunk, rehearsal = self._chunk, self._rehearsal
        if chunk is None or slots.start >= chunk.slots.start:
            return key, value
        if rehearsal is not None and not rehearsal.active:
            rehearsal.wanted = True
        else:
            past = torch.ones(len(slots), dtype=torch.bool, device=key.device)
            past[chunk.slots.start - slots.start : chunk.slots.stop - slots.start] = False
            keys, queries = (self._tables.of(self._tokens.at(at)) for at in (slots, chunk.slots))
            self._record.attend(self._unrotated(key, keys), value, keys, queries, past)
            if rehearsal is None:
                self._record.weigh(None)
        return key, value

    def _unrotated(self, key: Tensor, rotary: Rotary) -> Tensor:
        return key if self._rotary is None else rotate(in_float32(key), rotary.inverse())


class Deployment(NamedTuple):
    """How a program runs its model.

    Attributes:
        grid: Rows and columns of tokens in a latent frame.
        chunk_tokens: Tokens of the largest chunk.
        slots: Slots of a cache.
    """

    grid: tuple[int, int]
    chunk_tokens: int
    slots: int


class Seen:
    """Measurements of a program by `observe`.

    Attributes:
        program: The program.
        host: The program as a host.
        layers: Record of each layer.
        deployment: How the program runs its model; None before the first pass.
    """

    def __init__(self, program: object, host: Host, seed: int, gradients: bool) -> None:
        self.program, self.host = program, host
        self.layers = [LayerRecord(layer, seed + i) for i, layer in enumerate(host.layers)]
        self.deployment: Deployment | None = None
        self._tables: RotaryTables | None = None
        self._caches: list[ObservedCache] = []
        self._rehearsal: Rehearsal | None = None
        if gradients:
            model = model_of(program, host)
            if model is None:
                raise ConfigError(
                    f"{type(program).__name__} has no module with layers blocks.N.self_attn, "
                    "whose output gradients could start from",
                    "observe without gradients=True",
                )
            self._rehearsal = Rehearsal(
                model, host.layers, seed, lambda layer, found: self.layers[layer].weigh(found)
            )

    def new_cache(self, layer: int, slots: Slots) -> TokenCache:
        """Make the cache of a layer."""
        if self._tables is None:
            # Besides the two tables of a pass, a third one for all tokens that a chunk attends to.
            self._tables = RotaryTables(slots.head_dim, slots.device, kept=3)
        record, rotated = self.layers[layer], self.host.rotated
        cache = ObservedCache(slots, self._tables, rotated, record, self._rehearsal)
        self._caches.append(cache)
        return cache

    def finish(self) -> None:
        """Record the last chunk of the last clip."""
        for cache in self._caches:
            cache.keep()
        if self._tables is not None and self._caches:
            chunk = max(layer.chunk_tokens for layer in self.layers)
            self.deployment = Deployment(self._tables.grid, chunk, self._caches[0].slots.count)
        self._caches.clear()
        for record in self.layers:
            record.witness.close()
        if self._rehearsal is not None:
            self._rehearsal.close()


@contextmanager
def observe(program: object, *, gradients: bool = False, seed: int = 0) -> Iterator[Seen]:
    """Watch a program while it generates clips; its results do not change.

    Args:
        program: A pipeline of Self-Forcing's type, or a `Host`.
        gradients: Run each pass that attends to the past a second time with gradients, so that
            errors count at the model's output. Passes take about three times as long, and memory
            as for training. On the demo model the codec was not clearly better (`evals.host`).
        seed: Seed of the sampled queries and random directions.

    Raises:
        ConfigError: The program is no known host, has a codec attached, or caches keys whose
            positions cannot be told; or a model gives no gradients.
    """
    host = find_host(program)
    seen = Seen(getattr(host, "program", program), host, seed, gradients)
    connect(host, seen.new_cache, seen.finish)
    try:
        yield seen
    finally:
        disconnect(host)
