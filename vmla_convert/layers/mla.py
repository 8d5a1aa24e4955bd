"""MLA self-attention: one content latent and one rope key per token, shared by all heads.

The cache keeps, per token, the content latent c, the rope key r (two numbers for each selected RoPE
pair, unrotated), and the reciprocal key norm 1/rho: one scalar, which commutes with every
up-projection and with RoPE, so that Wan's QK-norm stays exact (Method: key norm).

Keys of all heads are one matrix M_h times one shared key, values one N_h times the latent:

    key_j = [c_j, 1, RoPE(r_j)] / rho_j        k_h,j = M_h key_j        v_h,j = N_h c_j + gamma_h

The `materialised` backend computes q_h · (M_h key_j): it rebuilds S keys for H heads. The
`absorbed` backend computes (M_hᵀ q_h) · key_j: it attends in a wider space and rebuilds nothing
(Method: cost of attention).

Shapes: B batch, L tokens, T query tokens, S attended tokens, H heads, D head dim (H·D = d), R
latent rank.
"""

from __future__ import annotations

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
from vmla_convert.layers.parallel import OneProcess
from vmla_convert.layers.sdpa import attend
from vmla_convert.maths.cost import AttentionShape
from vmla_convert.maths.masks import runs
from vmla_convert.maths.rope3d import Rotary, rotate


class LatentSelfAttention(nn.Module):
    """Wan self-attention that attends to latents, of the past and of the open chunk.

        score_h = [q_h · (U_k,h c + beta_h) + RoPE(C_h q_h) · RoPE(r)] / (rho · sqrt(D))

    `kv_a_proj` maps x to c; `kv_b_proj_k` and `kv_b_proj_v` map c, or their parts of a split
    latent, to keys and values of all heads; `k_rope_proj` maps x to r; `q_rope_map` is C
    (H, 2·pairs, D). `k_norm_proj` is the source's key projection, which gives the norm.
    """

    def __init__(self, geometry: Geometry, mla: MLAConfig, layer: int) -> None:
        super().__init__()
        dim, rank, rope = geometry.dim, mla.kv_lora_rank[layer], mla.qk_rope_head_dim(layer)
        self.num_heads, self.head_dim = geometry.num_heads, geometry.head_dim
        self.eps = geometry.eps
        self.rope_pairs = mla.rope_pairs[layer]
        self._rope_runs = runs(self.rope_pairs) or (slice(0, 0),)
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
        """Numbers kept per token, by name."""
        rope = self.k_rope_proj.out_features
        return {"latent": self.kv_a_proj.out_features, "rope": rope, "norm": 1}

    def project(self, x: Tensor) -> Entries:
        """Content latent (B, L, R), rope key (B, L, rope) and 1/rho (B, L, 1) of x (B, L, d)."""
        # In float32: an error of the norm scales the whole key.
        square = in_float32(self.k_norm_proj(x)).square().mean(-1, keepdim=True)
        return self.kv_a_proj(x), self.k_rope_proj(x), torch.rsqrt(square + self.eps)

    def exchange(self, entries: Entries, parallel: OneProcess) -> Entries:
        """Entries of all tokens, from entries of own tokens: all heads share them."""
        return tuple(parallel.gather_tokens(entry) for entry in entries)

    def forward(self, x: Tensor, attended: AttendedTokens, metadata: AttentionMetadata) -> Tensor:
        """Output (B, T, d) of the modulated, layer-normed tokens x (B, T, d).

        Raises:
            ValueError: The absorbed backend was chosen under a mask or gradients.
        """
        parallel = metadata.parallel
        q = parallel.to_heads(self.norm_q(self.q(x))).unflatten(-1, (-1, self.head_dim))
        output = self.attend_latents(q, attended, metadata).flatten(2)
        return self.o(parallel.to_tokens(output))

    def attend_latents(
        self, q: Tensor, attended: AttendedTokens, metadata: AttentionMetadata
    ) -> Tensor:
        """Attention output (B, T, H, D) of normed, unrotated queries, by the runtime's backend."""
        backend = metadata.runtime.backend
        if backend == "auto":
            backend = self.faster_backend(q, attended, metadata)
        if backend == "absorbed":
            return self.attend_absorbed(q, attended, metadata)
        return self.attend_materialised(q, attended, metadata)

    def faster_backend(
        self, q: Tensor, attended: AttendedTokens, metadata: AttentionMetadata
    ) -> Backend:
        """The backend that `auto` chooses."""
        if not self._can_absorb(metadata):
            return "materialised"
        return faster_backend(
            self.attention_shape(q, attended),
            q,
            partial(self.attend_materialised, q, attended, metadata),
            partial(self.attend_absorbed, q, attended, metadata),
        )

    def attend_materialised(
        self, q: Tensor, attended: AttendedTokens, metadata: AttentionMetadata
    ) -> Tensor:
        """Rebuild keys and values, a tile of heads at a time, and attend."""
        latent, own = attended.entries[0], metadata.parallel.own_heads(self.num_heads)
        query, key_map = self._query(q, metadata.query_positions, own), self._key_map(own)
        shared = self._shared_key(attended.entries, metadata.key_positions)
        width, scale = query.shape[-1] + self.head_dim, self.head_dim**-0.5
        outputs: list[Tensor] = []
        for heads in head_tiles(q, latent.shape[1], width, metadata.runtime.tile_mib):
            k = torch.einsum("bsw,hnw->bshn", shared, key_map[heads])
            v = self._values(latent, slice(own.start + heads.start, own.start + heads.stop))
            outputs.append(attend(query[:, :, heads], k, v, metadata.groups, scale))
        return torch.cat(outputs, 2)

    def attend_absorbed(
        self, q: Tensor, attended: AttendedTokens, metadata: AttentionMetadata
    ) -> Tensor:
        """Attend in the latent space, all heads as queries of one shared head.

        Raises:
            ValueError: There is a mask, or gradients are on.
        """
        if not self._can_absorb(metadata):
            raise ValueError("the absorbed backend works without mask and gradients only")
        own = metadata.parallel.own_heads(self.num_heads)
        key = self._shared_key(attended.entries, metadata.key_positions)[:, :, None]
        value = self._value_part(attended.entries[0])[:, :, None]
        query = self._query(q, metadata.query_positions, own)
        folded = torch.einsum("bthn,hnw->bhtw", query, self._key_map(own)).flatten(1, 2)
        gathered = attend(folded[:, :, None], key, value, scale=self.head_dim**-0.5)
        latents = gathered[:, :, 0].unflatten(1, (q.shape[2], -1))
        weight = self.kv_b_proj_v.weight.unflatten(0, (self.num_heads, -1))[own]
        # Attention weights sum to one, so the bias is added once.
        values = torch.einsum("bhtr,hdr->bthd", latents, weight)
        return values + split_heads(self.kv_b_proj_v.bias, self.num_heads)[own]

    def attention_shape(self, q: Tensor, attended: AttendedTokens) -> AttentionShape:
        """Sizes of the attention of q (B, T, H, D), which predict the cost of each backend."""
        batch, queries, heads = q.shape[:3]
        rope = self.k_rope_proj.out_features
        return AttentionShape(
            queries=batch * queries,
            keys=attended.entries[0].shape[1],
            batch=batch,
            heads=heads,
            key_width=self.head_dim + rope,
            value_width=self.head_dim,
            shared_key=self.key_rank + 1 + rope,
            shared_value=self.value_rank,
        )

    def _can_absorb(self, metadata: AttentionMetadata) -> bool:
        return metadata.groups is None and not torch.is_grad_enabled()

    def _shared_key(self, entries: Entries, rotary: Rotary) -> Tensor:
        """[c, 1, RoPE(r)] / rho of attended tokens, (B, S, R of keys + 1 + rope)."""
        latent, rope, norm = entries
        rope = rotate((rope * norm)[:, :, None], self._selected(rotary))[:, :, 0]
        content = latent[..., : self.key_rank] * norm
        return torch.cat([content, norm, rope], -1).to(latent.dtype)

    def _key_map(self, own: slice) -> Tensor:
        """M: keys of own heads from the shared key, (H, D + rope, R of keys + 1 + rope)."""
        bias = self.kv_b_proj_k.bias[:, None]
        content = torch.cat([self.kv_b_proj_k.weight, bias], 1)
        content = content.unflatten(0, (self.num_heads, -1))[own]
        rope = self.k_rope_proj.out_features
        eye = torch.eye(rope, dtype=bias.dtype, device=bias.device).expand(len(content), -1, -1)
        return torch.cat([F.pad(content, (0, rope)), F.pad(eye, (content.shape[-1], 0))], 1)

    def _query(self, q: Tensor, rotary: Rotary, own: slice) -> Tensor:
        """Queries (B, T, H, D + rope) for the keys of `_key_map`, from q (B, T, H, D)."""
        q_rope = torch.einsum("bthd,hrd->bthr", q, self.q_rope_map[own])
        return torch.cat([q, rotate(q_rope, self._selected(rotary))], -1)

    def _values(self, latent: Tensor, heads: slice) -> Tensor:
        """Values (B, S, some heads, D) of latents."""
        rows = slice(heads.start * self.head_dim, heads.stop * self.head_dim)
        weight, bias = self.kv_b_proj_v.weight[rows], self.kv_b_proj_v.bias[rows]
        return F.linear(self._value_part(latent), weight, bias).unflatten(-1, (-1, self.head_dim))

    def _value_part(self, latent: Tensor) -> Tensor:
        return latent[..., latent.shape[-1] - self.value_rank :]

    def _selected(self, rotary: Rotary) -> Rotary:
        # Slices: an index tensor would be copied to the device in every pass.
        return Rotary(torch.cat([rotary.table[..., run, :] for run in self._rope_runs], -2))
