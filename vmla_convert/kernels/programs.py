"""The Triton programs. Imported only where triton is installed.

Letters in code: S tokens, R channels, D head dim; a suffix `_b`, `_s` or `_h` is the stride of a
tensor over batch, tokens or heads. The last dimension of every tensor is contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turned(x, table, rows, mask, D: tl.constexpr, BLOCK: tl.constexpr):
    """Interleaved pairs of x (BLOCK, D) float32, turned by the table (S, D/2, 2) of some rows."""
    pairs = tl.arange(0, D // 2)
    place = table + rows[:, None] * D + 2 * pairs[None, :]
    cos = tl.load(place, mask=mask[:, None], other=0.0)
    sin = tl.load(place + 1, mask=mask[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(x, (BLOCK, D // 2, 2)))
    pair = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(pair, (BLOCK, D))


@triton.jit
def rotate(
    x, out, table, S, x_b, x_s, x_h, out_b, out_s, out_h, D: tl.constexpr, BLOCK: tl.constexpr
):
    """out[b, s, h] = x[b, s, h] turned; `out` may be x. Grid: blocks of S, heads, batch."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    mask = rows < S
    wide = rows[:, None].to(tl.int64)
    d = tl.arange(0, D)[None, :]
    part = tl.load(x + batch * x_b + wide * x_s + head * x_h + d, mask=mask[:, None], other=0.0)
    result = turned(part.to(tl.float32), table, rows, mask, D, BLOCK).to(out.dtype.element_ty)
    tl.store(out + batch * out_b + wide * out_s + head * out_h + d, result, mask=mask[:, None])


@triton.jit
def decode_rotated(
    channels,
    weight,
    mean,
    table,
    out,
    S,
    R,
    channels_b,
    channels_s,
    weight_s,
    out_b,
    out_s,
    out_h,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """out[b, s, h] = (weight[h] @ channels[b, s] + mean[h]) turned: one matrix product, one write.

    Weight is (H·D, R), mean (H·D,). Grid: blocks of S, heads, batch.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    mask = rows < S
    wide = rows[:, None].to(tl.int64)
    d = tl.arange(0, D)
    r = tl.arange(0, STEP)
    total = tl.zeros((BLOCK, D), tl.float32)
    for first in range(0, R, STEP):
        k = first + r
        a = tl.load(
            channels + batch * channels_b + wide * channels_s + k[None, :],
            mask=mask[:, None] & (k[None, :] < R),
            other=0.0,
        )
        place = weight + (head * D + d)[None, :] * weight_s + k[:, None]
        total = tl.dot(a, tl.load(place, mask=k[:, None] < R, other=0.0), total)
    total += tl.load(mean + head * D + d).to(tl.float32)[None, :]
    result = turned(total, table, rows, mask, D, BLOCK).to(out.dtype.element_ty)
    place = out + batch * out_b + wide * out_s + head.to(tl.int64) * out_h + d[None, :]
    tl.store(place, result, mask=mask[:, None])


@triton.jit
def unpacked(
    stored,
    starts,
    widths,
    tables,
    out,
    S,
    R,
    stored_s,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """out[s, r] = the channel whose code has widths[r] bits from bit starts[r] of stored[s] on.

    Widths are 1 to 8 bits, whose values are in `tables` one after the other, 16 for a float16, or 0
    for a channel that is not stored. Grid: blocks of S, blocks of R.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.program_id(1) * STEP + tl.arange(0, STEP)
    exists = channels < R
    start = tl.load(starts + channels, mask=exists, other=0)
    width = tl.load(widths + channels, mask=exists, other=0)
    mask = (rows < S)[:, None] & (width > 0)[None, :]
    byte = rows[:, None].to(tl.int64) * stored_s + (start // 8)[None, :]
    bit = (start % 8)[None, :]
    low = tl.load(stored + byte, mask=mask, other=0).to(tl.int32)
    # The second byte may be after the last one, where the code does not reach into it.
    reaches = mask & (bit + width[None, :] > 8)
    high = tl.load(stored + byte + 1, mask=reaches, other=0).to(tl.int32)
    code = ((low | (high << 8)) >> bit) & ((1 << width) - 1)[None, :]
    in_table = mask & (width <= 8)[None, :]
    value = tl.load(tables + ((1 << width) - 2)[None, :] + code, mask=in_table, other=0.0)
    whole = code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    result = tl.where((width == 16)[None, :], whole, value).to(out.dtype.element_ty)
    place = out + rows[:, None].to(tl.int64) * R + channels[None, :]
    tl.store(place, result, mask=(rows < S)[:, None] & exists[None, :])
