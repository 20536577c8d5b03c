# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""y = x . W^T with float activations on the matrix units: tiled, split along K where M is small.

The problem is computed transposed, ``y^T = W . x^T``: the weight tile is the first operand of
``tl.dot``, which may stay in registers, so that decoded weights never travel through shared memory
(on Hopper they feed wgmma directly); and the few rows of a small batch lie along the side of the
instruction that is cut in steps of 8.

Numbers: accumulation in float32. The weight operand is the float32 weight rounded once to the type
of x; where a row has a single scale, the operand is what that scale multiplies (mostly exact) and
the scale multiplies the float32 sum. float32 activations take the exact ("ieee") path throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import load_weights, row_scales

INTERPRETED = tl.constexpr(not isinstance(load_weights, triton.JITFunction))


@triton.jit
def dot(a, b, acc):
    """acc + a . b in float32, exact products. (Triton's interpreter would multiply the bit patterns
    of bfloat16.)"""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def activation_tile(x, x_row, x_stride_k, row_mask, perm, column, end, PERM: tl.constexpr,
                    COLS: tl.constexpr, FULL: tl.constexpr):
    """``[ROWS, COLS]`` of x in the column order of the stored weight."""
    k = column + tl.arange(0, COLS)
    if PERM:
        source = tl.load(perm + k, mask=k < end, other=0).to(tl.int64) * x_stride_k
    else:
        source = k.to(tl.int64) * x_stride_k
    at = x + x_row[:, None] + source[None, :]
    if FULL:
        return tl.load(at, mask=row_mask[:, None], other=0)
    else:
        return tl.load(at, mask=row_mask[:, None] & (k < end)[None, :], other=0)


@triton.jit
def dot_tile(x, x_row, x_stride_k, m_mask, perm, codes, codes_stride, scales, scales_stride, zeros,
             zeros_stride, table, tables, table_scale, row, n_mask, begin, end,
             BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
             SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
             SCALE_TYPE: tl.constexpr, PERM: tl.constexpr, FULL: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """float32 ``[BN, BM]``: the columns ``begin .. end`` of W . x^T for one tile, scales
    included."""
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for column in tl.range(begin, end, BK):
        w = load_weights(codes, codes_stride, scales, scales_stride, zeros, zeros_stride, table,
                         tables, table_scale, row, n_mask, column, end, BITS, TABLE, TABLE_TYPE,
                         SYMMETRIC, GROUP, SCALES, SCALE_TYPE, SCALES > 1, BN, BK, FULL,
                         x.dtype.element_ty)
        tile = activation_tile(x, x_row, x_stride_k, m_mask, perm, column, end, PERM, BK, FULL)
        acc = dot(w, tl.trans(tile), acc)
    if SCALES <= 1:
        scale = row_scales(scales, scales_stride, table_scale, row, n_mask, TABLE, SCALES,
                           SCALE_TYPE)
        acc *= scale[:, None]
    return acc


@triton.jit
def tile_of(program, rows_m, rows_n, BM: tl.constexpr, BN: tl.constexpr):
    """Tile coordinates (m, n): 8 tiles of m at a time walk along n, so that the programs that run
    at once share weight tiles and activation tiles in the cache."""
    tiles_m = tl.cdiv(rows_m, BM)
    tiles_n = tl.cdiv(rows_n, BN)
    band = program // (8 * tiles_n)
    height = tl.minimum(tiles_m - band * 8, 8)
    within = program - band * 8 * tiles_n
    return band * 8 + within % height, within // height


@triton.jit
def store_tile(acc, y, y_row, m_mask, n, n_mask, bias, BIAS: tl.constexpr):
    """Bias and one conversion, then ``[BN, BM]`` to the rows of y."""
    if BIAS:
        acc += tl.load(bias + n, mask=n_mask, other=0).to(tl.float32)[:, None]
    at = y + y_row[:, None] + n[None, :]
    tl.store(at, tl.trans(acc).to(y.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def linear_dot_kernel(x, x_stride_m, x_stride_k, perm, codes, codes_stride, scales, scales_stride,
                      zeros, zeros_stride, table, tables, table_scale, bias, y, M, N, K, SPAN,
                      BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                      SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                      SCALE_TYPE: tl.constexpr, PERM: tl.constexpr, BIAS: tl.constexpr,
                      FULL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Program (tile, part). y is ``[parts, M, N]`` dense; a part is SPAN columns of K."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN)
    part = tl.program_id(1)
    m = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
    begin = part * SPAN
    acc = dot_tile(x, m * x_stride_m, x_stride_k, m < M, perm, codes, codes_stride, scales,
                   scales_stride, zeros, zeros_stride, table, tables, table_scale, n, n < N,
                   begin, tl.minimum(begin + SPAN, K), BITS, TABLE, TABLE_TYPE, SYMMETRIC, GROUP,
                   SCALES, SCALE_TYPE, PERM, FULL, BM, BN, BK)
    y_row = (part.to(tl.int64) * M + m) * N
    store_tile(acc, y, y_row, m < M, n, n < N, bias, BIAS)


@triton.jit
def sum_parts_kernel(parts, bias, y, MN, N, PARTS: tl.constexpr, BIAS: tl.constexpr,
                     BLOCK: tl.constexpr):
    """y = parts[0] + parts[1] + ... in this order, then bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < MN
    acc = tl.load(parts + at, mask=mask, other=0)
    part = at
    for _ in tl.static_range(1, PARTS):
        part += MN
        acc += tl.load(parts + part, mask=mask, other=0)
    if BIAS:
        acc += tl.load(bias + at % N, mask=mask, other=0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)
