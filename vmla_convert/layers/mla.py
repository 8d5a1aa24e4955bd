"""Latent self-attention: one content latent and one rope key per token, shared by all heads.

METHOD 1, 3 and 8. The cache keeps, per token, the content latent c (R numbers), the rope key r (two
numbers for each selected RoPE pair, unrotated), and the reciprocal key norm 1/rho: one scalar,
which commutes with every up-projection and with RoPE, so that Wan's QK-norm stays exact.

Keys of all heads are one matrix M_h of one shared key, values one N_h of the latent:

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
    AttendedTokens,
    AttentionMetadata,
    Entries,
    WanRMSNorm,
    head_tiles,
    in_float32,
    split_heads,
)
from vmla_convert.layers.backends import Backend, faster_backend
from vmla_convert.layers.sdpa import attend
from vmla_convert.maths.cost import AttentionShape
from vmla_convert.maths.rope3d import Rotary, rotate


class LatentSelfAttention(nn.Module):
    """Wan self-attention that reads latents, of the past and of the chunk that is denoised.

        score_h = [q_h · (U_k,h c + beta_h) + RoPE(C_h q_h) · RoPE(r)] / (rho · sqrt(D))

    `kv_a_proj` is x → c, `kv_b_proj_k` and `kv_b_proj_v` are c → keys and values of all heads (of
    split latents each reads its own part), `k_rope_proj` is x → r, `q_rope_map` is C (H, 2·pairs,
    D). The norm comes from the source's own key projection, `k_norm_proj`.
    """

    def __init__(self, geometry: Geometry, mla: MLAConfig, layer: int) -> None:
        super().__init__()
        dim, rank, rope = geometry.dim, mla.kv_lora_rank[layer], mla.qk_rope_head_dim(layer)
        self.num_heads, self.head_dim, self.eps = (
            geometry.num_heads,
            geometry.head_dim,
            geometry.eps,
        )
        self.rope_pairs = mla.rope_pairs[layer]
        self.key_rank, self.value_rank = mla.latent_parts(layer)
        self.q, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, eps=geometry.eps)
        self.k_norm_proj = nn.Linear(dim, dim)
        self.kv_a_proj = nn.Linear(dim, rank)
        self.kv_b_proj_k = nn.Linear(self.key_rank, dim)
        self.kv_b_proj_v = nn.Linear(self.value_rank, dim)
        self.k_rope_proj = nn.Linear(dim, rope)
        self.q_rope_map = nn.Parameter(torch.zeros(self.num_heads, rope, self.head_dim))

    @property
    def entry_widths(self) -> dict[str, int]:
        """Numbers kept per token: content latent, rope key, reciprocal norm."""
        rope = 2 * len(self.rope_pairs)
        return {"latent": self.kv_a_proj.out_features, "rope": rope, "norm": 1}

    def project(self, x: Tensor) -> Entries:
        """Content latent (B, L, R), rope key (B, L, rope) and 1/rho (B, L, 1) of x (B, L, d)."""
        return self.kv_a_proj(x), self.k_rope_proj(x), self._norm(self.k_norm_proj(x))

    def forward(self, x: Tensor, attended: AttendedTokens, metadata: AttentionMetadata) -> Tensor:
        """Attend from x (B, T, d) to cached tokens; as `DenseSelfAttention.forward`.

        Raises:
            ValueError: An absorbed read was asked for under a mask or gradients.
        """
        q = split_heads(self.norm_q(self.q(x)), self.num_heads)
        return self.o(self.attend_latents(q, attended, metadata).flatten(2))

    # Two ways to the same

    def attend_latents(
        self, q: Tensor, attended: AttendedTokens, metadata: AttentionMetadata
    ) -> Tensor:
        """What normed queries (B, T, H, D) gather, (B, T, H, D), the way that `metadata` asks for.

        Raises:
            ValueError: See `forward`.
        """
        backend = metadata.runtime.backend
        if backend == "auto":
            backend = self.faster_backend(q, attended, metadata)
        return self._way(backend)(q, attended, metadata)

    def attend_materialised(
        self, q: Tensor, attended: AttendedTokens, metadata: AttentionMetadata
    ) -> Tensor:
        """Rebuild keys and values, some heads at a time, and attend.

        Args:
            q: Normed queries (B, T, H, D), unrotated.
            attended: What they read.
            metadata: Positions and mask; `runtime.tile_mib` bounds what is rebuilt at
                a time, except under gradients, which keep all of it anyway.

        Returns:
            (B, T, H, D).
        """
        tokens = attended.entries[0].shape[1]
        width = self._key_width() + self.head_dim
        tiles = head_tiles(q, tokens, width, metadata.runtime.tile_mib)
        return torch.cat(list(self._read_tiles(q, attended, metadata, tiles)), 2)

    def attend_absorbed(
        self, q: Tensor, attended: AttendedTokens, metadata: AttentionMetadata
    ) -> Tensor:
        """Attend in the latent space, all heads as queries of one; as `attend_materialised`.

        Raises:
            ValueError: There is a mask, or gradients are on.
        """
        if not self.absorbs(metadata):
            raise ValueError("only reads without mask or gradient are absorbed")
        key = self._shared_key(attended.entries, metadata.key_positions)[:, :, None]
        value = self._value_part(attended.entries[0])[:, :, None]
        query = torch.einsum(
            "bthn,hnw->bhtw", self._query(q, metadata.query_positions), self._key_map()
        )
        folded = query.flatten(1, 2)[:, :, None]
        return self._values_of(attend(folded, key, value, scale=self.head_dim**-0.5), q.shape[1])

    def absorbs(self, metadata: AttentionMetadata) -> bool:
        """Whether an absorbed read is possible; training reads as it is told, rebuilt."""
        return metadata.groups is None and not torch.is_grad_enabled()

    def faster_backend(
        self, q: Tensor, attended: AttendedTokens, metadata: AttentionMetadata
    ) -> Backend:
        """The way that `auto` takes; arguments as `read`."""
        if not self.absorbs(metadata):
            return "materialised"
        return faster_backend(
            self.attention_shape(q, attended),
            q,
            partial(self.attend_materialised, q, attended, metadata),
            partial(self.attend_absorbed, q, attended, metadata),
        )

    def _way(
        self, backend: Backend
    ) -> Callable[[Tensor, AttendedTokens, AttentionMetadata], Tensor]:
        return self.attend_absorbed if backend == "absorbed" else self.attend_materialised

    def attention_shape(self, q: Tensor, attended: AttendedTokens) -> AttentionShape:
        """Sizes of a read of q (B, T, H, D), by which its cost is foreseen."""
        batch, queries = q.shape[:2]
        rope = 2 * len(self.rope_pairs)
        return AttentionShape(
            queries=batch * queries,
            keys=attended.entries[0].shape[1],
            batch=batch,
            heads=self.num_heads,
            key_width=self._key_width(),
            value_width=self.head_dim,
            shared_key=self.key_rank + 1 + rope,
            shared_value=self.value_rank,
        )

    # Rebuilding

    def _read_tiles(
        self, q: Tensor, attended: AttendedTokens, metadata: AttentionMetadata, tiles: list[slice]
    ) -> Iterator[Tensor]:
        """Output (B, T, some heads, D), tile by tile."""
        latent, query = attended.entries[0], self._query(q, metadata.query_positions)
        shared, key_map = (
            self._shared_key(attended.entries, metadata.key_positions),
            self._key_map(),
        )
        for heads in tiles:
            k = torch.einsum("bsw,hnw->bshn", shared, key_map[heads])
            v = self._values(latent, heads)
            yield attend(query[:, :, heads], k, v, metadata.groups, self.head_dim**-0.5)

    def _values(self, latent: Tensor, heads: slice) -> Tensor:
        """Values (B, S, some heads, D) of latents."""
        rows = slice(heads.start * self.head_dim, heads.stop * self.head_dim)
        weight, bias = self.kv_b_proj_v.weight[rows], self.kv_b_proj_v.bias[rows]
        return F.linear(self._value_part(latent), weight, bias).unflatten(-1, (-1, self.head_dim))

    # The shared space

    def _shared_key(self, entries: Entries, rotary: Rotary) -> Tensor:
        """[c, 1, RoPE(r)] / rho of cached tokens, (B, S, R of keys + 1 + rope)."""
        latent, rope, norm = entries
        rope = rotate((rope * norm)[:, :, None], self._selected(rotary))[:, :, 0]
        content = latent[..., : self.key_rank] * norm
        return torch.cat([content, norm, rope], -1).to(latent.dtype)

    def _key_map(self) -> Tensor:
        """M: keys of all heads from the shared one, (H, D + rope, R of keys + 1 + rope)."""
        bias = self.kv_b_proj_k.bias[:, None]
        content = torch.cat([self.kv_b_proj_k.weight, bias], 1).unflatten(0, (self.num_heads, -1))
        rope = 2 * len(self.rope_pairs)
        eye = torch.eye(rope, dtype=bias.dtype, device=bias.device).expand(self.num_heads, -1, -1)
        return torch.cat([F.pad(content, (0, rope)), F.pad(eye, (content.shape[-1], 0))], 1)

    def _query(self, q: Tensor, rotary: Rotary) -> Tensor:
        """What the query (B, T, H, D) is to the keys of `_key_map`, (B, T, H, D + rope)."""
        q_rope = torch.einsum("bthd,hrd->bthr", q, self.q_rope_map)
        return torch.cat([q, rotate(q_rope, self._selected(rotary))], -1)

    def _values_of(self, gathered: Tensor, queries: int) -> Tensor:
        """Values (B, T, H, D) of gathered latents (B, H·T, 1, R); weights that sum to one."""
        weight = self.kv_b_proj_v.weight.unflatten(0, (self.num_heads, -1))
        latents = gathered[:, :, 0].unflatten(1, (self.num_heads, queries))
        values = torch.einsum("bhtr,hdr->bthd", latents, weight)
        return values + split_heads(self.kv_b_proj_v.bias, self.num_heads)

    def _key_width(self) -> int:
        return self.head_dim + 2 * len(self.rope_pairs)

    def _value_part(self, latent: Tensor) -> Tensor:
        return latent[..., latent.shape[-1] - self.value_rank :]

    def _norm(self, raw_key: Tensor) -> Tensor:
        """1/rho (B, L, 1) of a raw key (B, L, d); not narrow, its error scales the whole key."""
        return torch.rsqrt(in_float32(raw_key).square().mean(-1, keepdim=True) + self.eps)

    def _selected(self, rotary: Rotary) -> Rotary:
        pairs = torch.tensor(self.rope_pairs, dtype=torch.long, device=rotary.table.device)
        return rotary.select(pairs)
