"""Latent self-attention: one content latent and one rotated key per token, shared by all heads.

METHOD 1 and 3. The cache keeps, per token, the content latent c (R numbers), the rope key r (two
numbers for each selected RoPE pair, unrotated) and the reciprocal key norm 1/rho, one scalar that
commutes with every up-projection and with RoPE, so that Wan's QK-norm stays exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmla_convert.config import Geometry, MLAConfig
from vmla_convert.layers.attention import Entries, WanRMSNorm, attend, split_heads
from vmla_convert.maths.rope3d import Rotary, rotate


class LatentSelfAttention(nn.Module):
    """The paper's layer: decoupled rope key, joint latent, nothing kept but latents.

    score_h = [q_h · (U_k,h c + beta_h) + RoPE(C_h q_h) · RoPE(r)] / (rho · sqrt(D))

    `kv_a_proj` is x → c, `kv_b_proj_k` and `kv_b_proj_v` are c → keys and values of all heads,
    `k_rope_proj` is x → r, `q_rope_map` is C (H, 2·pairs, D), and `k_norm_proj` is the source's own
    key projection, of which only the norm is used.
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
        self.q, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, eps=geometry.eps)
        self.kv_a_proj = nn.Linear(dim, rank)
        self.kv_b_proj_k = nn.Linear(rank, dim)
        self.kv_b_proj_v = nn.Linear(rank, dim)
        self.k_rope_proj = nn.Linear(dim, rope)
        self.q_rope_map = nn.Parameter(torch.zeros(self.num_heads, rope, self.head_dim))
        self.k_norm_proj = nn.Linear(dim, dim)

    @property
    def entry_widths(self) -> tuple[int, ...]:
        """Numbers kept per token: content latent, rope key, reciprocal norm."""
        return self.kv_a_proj.out_features, self.k_rope_proj.out_features, 1

    def project(self, x: Tensor) -> Entries:
        """Content latent (B, L, R), rope key (B, L, rope) and 1/rho (B, L, 1) of x (B, L, d)."""
        mean_square = self.k_norm_proj(x).float().square().mean(-1, keepdim=True)
        norm = torch.rsqrt(mean_square + self.eps).to(x.dtype)
        return self.kv_a_proj(x), self.k_rope_proj(x), norm

    def forward(
        self,
        x: Tensor,
        entries: Entries,
        query_rotary: Rotary,
        key_rotary: Rotary,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from x (B, T, d) to S cached tokens, keys and values rebuilt from the latents.

        Arguments and result as `DenseSelfAttention.forward`.
        """
        latent, rope_key, norm = entries
        q = split_heads(self.norm_q(self.q(x)), self.num_heads)
        q_rope = torch.einsum("bthd,hrd->bthr", q, self.q_rope_map)
        k_nope = split_heads(self.kv_b_proj_k(latent) * norm, self.num_heads)
        k_rope = (rope_key * norm)[:, :, None]
        pairs = torch.tensor(self.rope_pairs, dtype=torch.long, device=x.device)
        q_rope = rotate(q_rope, query_rotary.select(pairs))
        k_rope = rotate(k_rope, key_rotary.select(pairs)).expand(-1, -1, self.num_heads, -1)
        v = split_heads(self.kv_b_proj_v(latent), self.num_heads)
        q, k = torch.cat([q, q_rope], -1), torch.cat([k_nope, k_rope], -1)
        # The head is wider than the source's D; its softmax scale is not.
        return self.o(attend(q, k, v, mask, scale=self.head_dim**-0.5))
