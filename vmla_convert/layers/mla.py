"""Latent self-attention: one content latent and one rope key per token, shared by all heads.

METHOD 1 and 3. The cache keeps, per token, the content latent c (R numbers), with decoupled
positions the rope key r (two numbers for each selected RoPE pair, unrotated), and with a stored
norm the reciprocal key norm 1/rho: one scalar, which commutes with every up-projection and with
RoPE, so that Wan's QK-norm stays exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmla_convert.config import Geometry, MLAConfig
from vmla_convert.layers.attention import (
    Entries,
    Projection,
    Sight,
    WanRMSNorm,
    attend,
    split_heads,
)
from vmla_convert.maths.rope3d import Rotary, rotate


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
        self.kv_b_proj_k = nn.Linear(self.key_rank, dim)
        self.kv_b_proj_v = nn.Linear(self.value_rank, dim)
        if self.rope_pairs:
            self.k_rope_proj = nn.Linear(dim, rope)
            self.q_rope_map = nn.Parameter(torch.zeros(self.num_heads, rope, self.head_dim))
        if self.k_norm == "latent":
            self.k_norm_latent = nn.Linear(rank + rope, rank + rope + 1)
        if self.k_norm != "stored":
            self.k_norm_floor = nn.Parameter(torch.zeros(1))

    @property
    def entry_widths(self) -> tuple[int, ...]:
        """Numbers kept per token: content latent, rope key, reciprocal norm."""
        rope, norm = 2 * len(self.rope_pairs), self.k_norm == "stored"
        return self.kv_a_proj.out_features, *([rope] if rope else []), *([1] if norm else [])

    def project(self, x: Tensor) -> Projection:
        """Latents of x (B, L, d), and its dense key and value where the chunk itself reads those.

        The cached entries are the content latent (B, L, R), with decoupled positions the rope key
        (B, L, rope), with a stored norm 1/rho (B, L, 1).
        """
        latents = [self.kv_a_proj(x)] + ([self.k_rope_proj(x)] if self.rope_pairs else [])
        if not self.dense_chunk:
            norm = [self._norm(self.k_norm_proj(x))] if self.k_norm == "stored" else []
            return Projection((*latents, *norm))
        raw_key = self.k(x)
        norm = [self._norm(raw_key)] if self.k_norm == "stored" else []
        return Projection((*latents, *norm), (self.norm_k(raw_key), self.v(x)))

    def forward(self, x: Tensor, entries: Entries, own: Entries | None, sight: Sight) -> Tensor:
        """Attend from x (B, T, d) to S cached tokens, keys and values rebuilt from the latents.

        Arguments and result as `DenseSelfAttention.forward`.
        """
        q = split_heads(self.norm_q(self.q(x)), self.num_heads)
        query = self._query(q, sight.query_rotary)
        if own is None:
            k, v = self._rebuild(entries, sight.key_rotary)
            # The head may be wider than the source's D; its softmax scale is not.
            return self.o(attend(query, k, v, sight.mask, self.head_dim**-0.5))
        past_rotary = sight.key_rotary
        if sight.past is not None:
            entries = tuple(entry[:, sight.past] for entry in entries)
            past_rotary = past_rotary.at(sight.past)
        k, v = self._rebuild(entries, past_rotary)
        own_k, own_v = (split_heads(part, self.num_heads) for part in own)
        own_k = rotate(own_k, sight.query_rotary)
        if self.rope_pairs:
            # One softmax over both: the past's channels are zero in the chunk's keys, and back.
            query, k, own_k = _side_by_side(query, rotate(q, sight.query_rotary), k, own_k)
        k, v = torch.cat([k, own_k], dim=1), torch.cat([v, own_v], dim=1)
        return self.o(attend(query, k, v, sight.split_mask, self.head_dim**-0.5))

    def _query(self, q: Tensor, rotary: Rotary) -> Tensor:
        """What the query (B, T, H, D) is to the keys of `_rebuild`."""
        if not self.rope_pairs:
            return rotate(q, rotary)
        q_rope = torch.einsum("bthd,hrd->bthr", q, self.q_rope_map)
        return torch.cat([q, rotate(q_rope, self._selected(rotary))], -1)

    def _rebuild(self, entries: Entries, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys (B, S, H, D or D + rope) and values (B, S, H, D) of cached tokens."""
        latent = entries[0]
        raw_key = self.kv_b_proj_k(latent[..., : self.key_rank])
        value = self.kv_b_proj_v(latent[..., latent.shape[-1] - self.value_rank :])
        norm = self._cached_norm(entries, raw_key)
        if self.k_norm == "rebuilt":
            raw_key = raw_key * self.norm_k.weight
        key = split_heads(raw_key * norm, self.num_heads)
        value = split_heads(value, self.num_heads)
        if not self.rope_pairs:
            return rotate(key, rotary), value
        k_rope = rotate((entries[1] * norm)[:, :, None], self._selected(rotary))
        return torch.cat([key, k_rope.expand(-1, -1, self.num_heads, -1)], -1), value

    def _cached_norm(self, entries: Entries, raw_key: Tensor) -> Tensor:
        """1/rho (B, S, 1) of cached tokens."""
        if self.k_norm == "stored":
            return entries[-1]
        if self.k_norm == "rebuilt":
            return self._norm(raw_key, self.k_norm_floor)
        root = self.k_norm_latent(torch.cat(entries, -1)).float()
        square = root.square().sum(-1, keepdim=True) + self.k_norm_floor
        return torch.rsqrt(square + self.eps).to(raw_key.dtype)

    def _norm(self, raw_key: Tensor, floor: Tensor | float = 0.0) -> Tensor:
        """1/rho (B, L, 1) of a raw key (B, L, d)."""
        square = raw_key.float().square().mean(-1, keepdim=True)
        return torch.rsqrt(square + floor + self.eps).to(raw_key.dtype)

    def _selected(self, rotary: Rotary) -> Rotary:
        pairs = torch.tensor(self.rope_pairs, dtype=torch.long, device=rotary.cos.device)
        return rotary.select(pairs)


def _side_by_side(
    past_query: Tensor, own_query: Tensor, past_key: Tensor, own_key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One query that scores two kinds of keys, each in channels of its own."""
    past, own = past_key.shape[-1], own_key.shape[-1]
    query = torch.cat([past_query, own_query], -1)
    return query, nn.functional.pad(past_key, (0, own)), nn.functional.pad(own_key, (past, 0))
