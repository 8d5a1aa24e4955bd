"""Latent self-attention: one content latent and one rope key per token, shared by all heads.

METHOD 1, 3 and 8. The cache keeps, per token, the content latent c (R numbers), with decoupled
positions the rope key r (two numbers for each selected RoPE pair, unrotated), and with a stored
norm the reciprocal key norm 1/rho: one scalar, which commutes with every up-projection and with
RoPE, so that Wan's QK-norm stays exact.

Decoupled keys of all heads are one matrix M_h of one shared key, values one N_h of the latent:

    key_j = [c_j, 1, RoPE(r_j)] / rho_j        k_h,j = M_h key_j        v_h,j = N_h c_j + gamma_h

so that a read is `materialised`, q_h · (M_h key_j), or `absorbed`, (M_hᵀ q_h) · key_j. The former
rebuilds S keys for H heads, the latter attends in a wider space and rebuilds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmla_convert.config import Geometry, MLAConfig
from vmla_convert.layers.attention import (
    Entries,
    Projection,
    Reading,
    Sight,
    WanRMSNorm,
    attend,
    in_float32,
    split_heads,
)
from vmla_convert.layers.backends import Backend, faster_way
from vmla_convert.layers.partial import Partial, attend_partly, merge
from vmla_convert.maths.cost import ReadShape
from vmla_convert.maths.rope3d import Rotary, rotate, rotate_

# Rebuilt at a time: what stays in a CPU's cache, and what keeps a GPU busy.
TILE_MIB = {"cpu": 64, "cuda": 1024}


class LatentSelfAttention(nn.Module):
    """Wan self-attention that reads its past from latents.

    With decoupled positions

        score_h = [q_h · (U_k,h c + beta_h) + RoPE(C_h q_h) · RoPE(r)] / (rho · sqrt(D))

    and with reconstructed ones the key is rebuilt before RoPE and rotated in full when it is read:

        score_h = RoPE(q_h) · RoPE(U_k,h c + beta_h) / (rho · sqrt(D))

    `kv_a_proj` is x → c, `kv_b_proj_k` and `kv_b_proj_v` are c → keys and values of all heads (of
    split latents each reads its own part), `k_rope_proj` is x → r, `q_rope_map` is C (H, 2·pairs,
    D). The norm comes from the source's own key projection (`stored`, under the name `k` when the
    current chunk stays dense, else `k_norm_proj`), from the latents (`latent`: rho² is the squared
    length of `k_norm_latent`(c, r) plus `k_norm_floor`), or from the rebuilt key (`rebuilt`).

    With a `qk_nope_head_dim` n below D, `q_nope_map` is A (H, n, D), else None: keys of the content
    part are n wide, and meet A_h q_h.
    """

    def __init__(self, geometry: Geometry, mla: MLAConfig, layer: int) -> None:
        super().__init__()
        dim, rank, rope = geometry.dim, mla.kv_lora_rank[layer], mla.qk_rope_head_dim(layer)
        self.num_heads, self.head_dim, self.eps = (
            geometry.num_heads,
            geometry.head_dim,
            geometry.eps,
        )
        self.dense_chunk = mla.layer.current_chunk == "dense"
        self.k_norm = mla.layer.k_norm
        self.rope_pairs = mla.rope_pairs[layer]
        self.key_rank, self.value_rank = mla.latent_parts(layer)
        self.q, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, eps=geometry.eps)
        if self.dense_chunk:
            self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim)
        elif self.k_norm == "stored":
            self.k_norm_proj = nn.Linear(dim, dim)
        if self.dense_chunk or self.k_norm == "rebuilt":
            self.norm_k = WanRMSNorm(dim, eps=geometry.eps)
        self.kv_a_proj = nn.Linear(dim, rank)
        self.nope_dim = mla.qk_nope_head_dim or self.head_dim
        self.kv_b_proj_k = nn.Linear(self.key_rank, self.num_heads * self.nope_dim)
        self.q_nope_map = (
            nn.Parameter(torch.zeros(self.num_heads, self.nope_dim, self.head_dim))
            if self.nope_dim < self.head_dim
            else None
        )
        self.kv_b_proj_v = nn.Linear(self.value_rank, dim)
        if self.rope_pairs:
            self.k_rope_proj = nn.Linear(dim, rope)
            self.q_rope_map = nn.Parameter(torch.zeros(self.num_heads, rope, self.head_dim))
        if self.k_norm == "latent":
            self.k_norm_latent = nn.Linear(rank + rope, rank + rope + 1)
        if self.k_norm != "stored":
            self.k_norm_floor = nn.Parameter(torch.zeros(1))

    @property
    def entry_widths(self) -> dict[str, int]:
        """Numbers kept per token: content latent, rope key, reciprocal norm."""
        widths = {"latent": self.kv_a_proj.out_features, "rope": 2 * len(self.rope_pairs)}
        widths["norm"] = int(self.k_norm == "stored")
        return {name: width for name, width in widths.items() if width}

    def project(self, x: Tensor, keep: bool = True) -> Projection:
        """Latents of x (B, L, d), and its dense key and value where the chunk itself reads those.

        The cached entries are the content latent (B, L, R), with decoupled positions the rope key
        (B, L, rope), with a stored norm 1/rho (B, L, 1); none where nobody would read them.
        """
        if not self.dense_chunk:
            norm = [self._norm(self.k_norm_proj(x))] if self.k_norm == "stored" else []
            return Projection((*self._latents(x), *norm), keep=keep)
        raw_key = self.k(x)
        own = self.norm_k(raw_key), self.v(x)
        if not keep:
            return Projection((), own, keep)
        norm = [self._norm(raw_key)] if self.k_norm == "stored" else []
        return Projection((*self._latents(x), *norm), own, keep)

    def forward(self, x: Tensor, reading: Reading, sight: Sight) -> Tensor:
        """Attend from x (B, T, d) to cached tokens; as `DenseSelfAttention.forward`.

        Raises:
            ValueError: An absorbed read was asked for that the layer does not allow.
        """
        q = split_heads(self.norm_q(self.q(x)), self.num_heads)
        return self.o(self.read(q, reading, sight).flatten(2))

    # Two ways to the same

    def read(self, q: Tensor, reading: Reading, sight: Sight) -> Tensor:
        """What normed queries (B, T, H, D) gather, (B, T, H, D), the way that `sight` asks for.

        Raises:
            ValueError: See `forward`.
        """
        backend = sight.runtime.backend
        if backend == "auto":
            backend = self.faster(q, reading, sight)
        return self._way(backend)(q, reading, sight)

    def read_materialised(self, q: Tensor, reading: Reading, sight: Sight) -> Tensor:
        """Rebuild keys and values, some heads at a time, and attend.

        Args:
            q: Normed queries (B, T, H, D), unrotated.
            reading: What they read.
            sight: Positions, and who sees what; `sight.runtime.tile_mib` bounds what is rebuilt at
                a time, except under gradients, which keep all of it anyway.

        Returns:
            (B, T, H, D).
        """
        tokens, itemsize = reading.entries[0].shape[:2].numel(), q.dtype.itemsize
        # Narrow keys are in float32 meanwhile, as they are and rotated.
        key_bytes = itemsize if itemsize >= 4 else itemsize + 8
        head_bytes = tokens * (self._key_width() * key_bytes + self.head_dim * itemsize)
        mib = sight.runtime.tile_mib or TILE_MIB["cuda" if q.is_cuda else "cpu"]
        most = max(1, mib * 2**20 // max(head_bytes, 1))
        # Tiles of one size keep all cores at work.
        heads = -(-self.num_heads // -(-self.num_heads // most))
        if torch.is_grad_enabled():
            heads = self.num_heads
        read = self._read_decoupled if self.rope_pairs else self._read_reconstructed
        tiles = [slice(start, start + heads) for start in range(0, self.num_heads, heads)]
        return torch.cat(list(read(q, reading, sight, tiles)), 2)

    def read_absorbed(self, q: Tensor, reading: Reading, sight: Sight) -> Tensor:
        """Attend in the latent space, all heads as queries of one; as `read_materialised`.

        Raises:
            ValueError: Keys are rebuilt before RoPE, there is a mask, or gradients are on.
        """
        if not self.absorbs(sight):
            raise ValueError("only decoupled positions, without mask or gradient, are absorbed")
        own = self._own_part(q, self._exact(reading, sight), sight)
        if own is not None and not reading.entries[0].shape[1]:
            return own.output
        key = self._shared_key(reading.entries, sight.keys)[:, :, None]
        value = self._value_part(reading.entries[0])[:, :, None]
        query = torch.einsum("bthn,hnw->bhtw", self._query(q, sight.query), self._key_map())
        folded, scale = query.flatten(1, 2)[:, :, None], self.head_dim**-0.5
        if own is None:
            gathered = attend(folded, key, value, scale=scale)
            return self._values_of(gathered, q.shape[1])
        past = attend_partly(folded, key, value, scale)
        log_sum = past.log_sum.unflatten(1, (self.num_heads, -1))[..., 0].transpose(1, 2)
        past = Partial(self._values_of(past.output, q.shape[1]), log_sum)
        return merge(past, own)

    def absorbs(self, sight: Sight) -> bool:
        """Whether an absorbed read is possible; training reads as it is told, rebuilt."""
        return bool(self.rope_pairs) and sight.groups is None and not torch.is_grad_enabled()

    def faster(self, q: Tensor, reading: Reading, sight: Sight) -> Backend:
        """The way that `auto` takes; arguments as `read`."""
        if not self.absorbs(sight):
            return "materialised"
        return faster_way(
            self.read_shape(q, reading),
            q,
            partial(self.read_materialised, q, reading, sight),
            partial(self.read_absorbed, q, reading, sight),
        )

    def _way(self, backend: Backend) -> Callable[[Tensor, Reading, Sight], Tensor]:
        return self.read_absorbed if backend == "absorbed" else self.read_materialised

    def read_shape(self, q: Tensor, reading: Reading) -> ReadShape:
        """Sizes of a read of q (B, T, H, D), by which its cost is foreseen."""
        batch, queries = q.shape[:2]
        rope = 2 * len(self.rope_pairs)
        return ReadShape(
            queries=batch * queries,
            keys=reading.entries[0].shape[1],
            batch=batch,
            heads=self.num_heads,
            key_width=self._key_width(),
            value_width=self.head_dim,
            shared_key=self.key_rank + 1 + rope,
            shared_value=self.value_rank,
        )

    # Rebuilding

    def _read_reconstructed(
        self, q: Tensor, reading: Reading, sight: Sight, tiles: list[slice]
    ) -> Iterator[Tensor]:
        """Output (B, T, some heads, D), tile by tile; keys rebuilt before RoPE."""
        latent = reading.entries[0]
        # The norm scales a whole key, so it rides along with the rotation.
        turns = sight.keys.scaled(self._cached_norm(reading.entries, tiles))
        query, exact = rotate(q, sight.query), self._exact(reading, sight)
        own = self._own_part(q, exact, sight)
        for heads in tiles:
            k, v = rotate_(self._content_keys(latent, heads), turns), self._values(latent, heads)
            if exact is not None and own is None:
                own_k, own_v = (part[:, :, heads] for part in exact)
                k, v = torch.cat([k, own_k], 1), torch.cat([v, own_v], 1)
            yield self._attended(query[:, :, heads], k, v, sight, own, heads)

    def _read_decoupled(
        self, q: Tensor, reading: Reading, sight: Sight, tiles: list[slice]
    ) -> Iterator[Tensor]:
        """Output (B, T, some heads, D), tile by tile; keys with a part that is rotated."""
        latent, exact = reading.entries[0], self._exact(reading, sight)
        shared, key_map = self._shared_key(reading.entries, sight.keys), self._key_map()
        query, own = self._query(q, sight.query), self._own_part(q, exact, sight)
        for heads in tiles:
            k = torch.einsum("bsw,hnw->bshn", shared, key_map[heads])
            v, asked = self._values(latent, heads), query[:, :, heads]
            if exact is not None and own is None:
                own_k, own_v = (part[:, :, heads] for part in exact)
                own_query = rotate(q[:, :, heads], sight.query)
                asked, k = _side_by_side(asked, own_query, k, own_k)
                v = torch.cat([v, own_v], 1)
            yield self._attended(asked, k, v, sight, own, heads)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, sight: Sight, own: Partial | None, heads: slice
    ) -> Tensor:
        """What some heads gather from rebuilt keys, and from the dense ones that `own` is of."""
        scale = self.head_dim**-0.5
        if own is None:
            return attend(q, k, v, sight.groups, scale)
        own = Partial(own.output[:, :, heads], own.log_sum[:, :, heads])
        return merge(attend_partly(q, k, v, scale), own) if k.shape[1] else own.output

    def _own_part(
        self, q: Tensor, exact: tuple[Tensor, Tensor] | None, sight: Sight
    ) -> Partial | None:
        """Attention of normed queries to the dense keys alone.

        None where there are none, or where one softmax must see all keys at once: the parts have no
        gradient and know no groups.
        """
        if exact is None or sight.groups is not None or torch.is_grad_enabled():
            return None
        return attend_partly(rotate(q, sight.query), *exact, self.head_dim**-0.5)

    def _content_keys(self, latent: Tensor, heads: slice) -> Tensor:
        """Keys (B, S, some heads, n) of latents, unrotated, their norm left out."""
        keys = self._raw_keys(latent, heads)
        if self.k_norm == "rebuilt":
            keys = keys * split_heads(self.norm_k.weight, self.num_heads)[heads]
        return keys

    def _raw_keys(self, latent: Tensor, heads: slice) -> Tensor:
        """What `kv_b_proj_k` makes of latents, (B, S, some heads, n)."""
        rows = slice(heads.start * self.nope_dim, heads.stop * self.nope_dim)
        weight, bias = self.kv_b_proj_k.weight[rows], self.kv_b_proj_k.bias[rows]
        return F.linear(latent[..., : self.key_rank], weight, bias).unflatten(
            -1, (-1, self.nope_dim)
        )

    def _values(self, latent: Tensor, heads: slice) -> Tensor:
        """Values (B, S, some heads, D) of latents."""
        rows = slice(heads.start * self.head_dim, heads.stop * self.head_dim)
        weight, bias = self.kv_b_proj_v.weight[rows], self.kv_b_proj_v.bias[rows]
        return F.linear(self._value_part(latent), weight, bias).unflatten(-1, (-1, self.head_dim))

    def _exact(self, reading: Reading, sight: Sight) -> tuple[Tensor, Tensor] | None:
        """Dense keys, rotated, and values (B, E, H, D); None where there are none."""
        if reading.exact is None:
            return None
        assert sight.exact is not None
        key, value = (split_heads(part, self.num_heads) for part in reading.exact)
        return rotate(key, sight.exact), value

    # The shared space

    def _shared_key(self, entries: Entries, rotary: Rotary) -> Tensor:
        """[c, 1, RoPE(r)] / rho of cached tokens, (B, S, R of keys + 1 + rope)."""
        norm = self._cached_norm(entries, [])  # rebuilt norms have no rope key
        content = entries[0][..., : self.key_rank] * norm
        rope = rotate((entries[1] * norm)[:, :, None], self._selected(rotary))[:, :, 0]
        return torch.cat([content, norm, rope], -1).to(entries[0].dtype)

    def _key_map(self) -> Tensor:
        """M: keys of all heads from the shared one, (H, n + rope, R of keys + 1 + rope)."""
        bias = self.kv_b_proj_k.bias[:, None]
        content = torch.cat([self.kv_b_proj_k.weight, bias], 1).unflatten(0, (self.num_heads, -1))
        rope = 2 * len(self.rope_pairs)
        eye = torch.eye(rope, dtype=bias.dtype, device=bias.device).expand(self.num_heads, -1, -1)
        return torch.cat([F.pad(content, (0, rope)), F.pad(eye, (content.shape[-1], 0))], 1)

    def _query(self, q: Tensor, rotary: Rotary) -> Tensor:
        """What the query (B, T, H, D) is to the keys of `_key_map`, (B, T, H, n + rope)."""
        q_rope = torch.einsum("bthd,hrd->bthr", q, self.q_rope_map)
        if self.q_nope_map is not None:
            q = torch.einsum("bthd,hnd->bthn", q, self.q_nope_map)
        return torch.cat([q, rotate(q_rope, self._selected(rotary))], -1)

    def _values_of(self, gathered: Tensor, queries: int) -> Tensor:
        """Values (B, T, H, D) of gathered latents (B, H·T, 1, R); weights that sum to one."""
        weight = self.kv_b_proj_v.weight.unflatten(0, (self.num_heads, -1))
        latents = gathered[:, :, 0].unflatten(1, (self.num_heads, queries))
        values = torch.einsum("bhtr,hdr->bthd", latents, weight)
        return values + split_heads(self.kv_b_proj_v.bias, self.num_heads)

    def _key_width(self) -> int:
        return self.nope_dim + 2 * len(self.rope_pairs)

    def _value_part(self, latent: Tensor) -> Tensor:
        return latent[..., latent.shape[-1] - self.value_rank :]

    # What is cached

    def _latents(self, x: Tensor) -> list[Tensor]:
        return [self.kv_a_proj(x)] + ([self.k_rope_proj(x)] if self.rope_pairs else [])

    def _cached_norm(self, entries: Entries, tiles: list[slice]) -> Tensor:
        """1/rho (B, S, 1) of cached tokens."""
        if self.k_norm == "stored":
            return entries[-1]
        if self.k_norm == "latent":
            root = in_float32(self.k_norm_latent(torch.cat(entries, -1)))
            square = root.square().sum(-1, keepdim=True)
        else:
            keys = (in_float32(self._raw_keys(entries[0], heads)) for heads in tiles)
            squares = torch.stack([part.square().sum((-1, -2)) for part in keys]).sum(0)
            square = squares[..., None] / self.o.in_features
        return torch.rsqrt(square + self.k_norm_floor + self.eps)

    def _norm(self, raw_key: Tensor) -> Tensor:
        """1/rho (B, L, 1) of a raw key (B, L, d); not narrow, its error scales the whole key."""
        return torch.rsqrt(in_float32(raw_key).square().mean(-1, keepdim=True) + self.eps)

    def _selected(self, rotary: Rotary) -> Rotary:
        pairs = torch.tensor(self.rope_pairs, dtype=torch.long, device=rotary.table.device)
        return rotary.select(pairs)

    @torch.no_grad()
    def latent_metric(self, latents: Tensor) -> Tensor:
        """What an error in the content latent costs at the layer's output, (R, R).

        Values matter as the output projection passes them on; keys as their logits move what is
        gathered, whose spread is that of the values (METHOD 7, to first order).

        Args:
            latents: Samples (n, R).
        """
        heads, samples = self.num_heads, latents.double()
        mean = samples.mean(0)
        covariance = (samples - mean).mT @ (samples - mean) / len(samples)
        up_value = self.kv_b_proj_v.weight.double().unflatten(0, (heads, -1))
        output = self.o.weight.double().unflatten(1, (heads, -1)).transpose(0, 1)
        passed = output @ up_value  # (H, d, R of values)
        value_part = covariance[-self.value_rank :, -self.value_rank :]
        spread = ((passed @ value_part) * passed).sum((1, 2))
        up_key, key_part = self.kv_b_proj_k.weight.double(), slice(self.key_rank)
        mean_key = up_key @ mean[key_part] + self.kv_b_proj_k.bias.double()
        varying = (up_key @ covariance[key_part, key_part] * up_key).sum(1)
        square_norm = ((varying + mean_key.square()).sum() / self.o.in_features).clamp_min(1e-12)
        scored = up_key.unflatten(0, (heads, -1))
        if self.q_nope_map is not None:
            scored = self.q_nope_map.double().mT @ scored
        # A normed query's channels have the size of their gain.
        scored = scored * split_heads(self.norm_q.weight.double(), heads)[..., None]
        weight = (spread / (square_norm * self.head_dim)).sqrt()[:, None, None]
        key, value = (weight * scored).flatten(0, 1), passed.flatten(0, 1)
        metric = latents.new_zeros(latents.shape[1], latents.shape[1], dtype=torch.float64)
        metric[: self.key_rank, : self.key_rank] += key.mT @ key
        metric[-self.value_rank :, -self.value_rank :] += value.mT @ value
        return metric


def _side_by_side(
    past_query: Tensor, own_query: Tensor, past_key: Tensor, own_key: Tensor
) -> tuple[Tensor, Tensor]:
    """One query that scores two kinds of keys, each in channels of its own; and the keys."""
    past, own = past_key.shape[-1], own_key.shape[-1]
    keys = [F.pad(past_key, (0, own)), F.pad(own_key, (past, 0))]
    return torch.cat([past_query, own_query], -1), torch.cat(keys, 1)
