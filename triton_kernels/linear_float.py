# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""y = x . W^T with float activations on the matrix units: tiles, K in parts where N is small.

The problem is computed transposed, ``y^T = W . x^T``: the weight tile is the first operand of
``tl.dot``, which may stay in registers, so that decoded weights never travel through shared memory
(on Hopper they feed wgmma directly); and the few rows of a small batch lie along the side of the
instruction that is cut in steps of 8.

Numbers: accumulation in float32. The weight operand is the float32 weight rounded once to the type
of x; where a row has a single scale, the operand is what that scale multiplies (mostly exact) and
the scale multiplies the float32 sum. float32 activations take the exact ("ieee") path throughout.

A row's sum is a chain along each part of K, whatever tile it is in: matrix instructions add to one
accumulator step by step. The parts depend on the weight and the device alone (`configs`). With FOLD
a program walks all parts of its tile one after another; without, it makes one, for few rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import INTERPRETED, load_weights
from .linear_finish import factor_of, store_tile


@triton.jit
def halves(a):
    """The left and the right half of the columns."""
    rows: tl.constexpr = a.shape[0]
    columns: tl.constexpr = a.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(a, (rows, 2, columns)), (0, 2, 1)))


@triton.jit
def dot(a, b, acc):
    """acc + a . b^T in float32, exact products.

    Triton's interpreter would multiply the bit patterns of bfloat16, and would sum in an order that
    depends on the tile. So there, steps of 64 columns stand for the instructions that add one after
    the other to acc, each rounded once.
    """
    if INTERPRETED:
        if a.shape[1] > 64:
            first, second = halves(a)
            first_b, second_b = halves(b)
            return dot(second, second_b, dot(first, first_b, acc))
        return tl.dot(a.to(tl.float64), tl.trans(b).to(tl.float64), acc.to(tl.float64),
                      out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, tl.trans(b), acc, input_precision="ieee")


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
    """float32 ``[BN, BM]``: the columns ``begin .. end`` of W . x^T for one tile; scales are
    included where a row has more than one."""
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for column in tl.range(begin, end, BK):
        w = load_weights(codes, codes_stride, scales, scales_stride, zeros, zeros_stride, table,
                         tables, table_scale, row, n_mask, column, end, BITS, TABLE, TABLE_TYPE,
                         SYMMETRIC, GROUP, SCALES, SCALE_TYPE, SCALES > 1, BN, BK, FULL,
                         x.dtype.element_ty)
        tile = activation_tile(x, x_row, x_stride_k, m_mask, perm, column, end, PERM, BK, FULL)
        acc = dot(w, tile, acc)
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
def dot_sum(x, x_row, x_stride_k, m_mask, perm, codes, codes_stride, scales, scales_stride, zeros,
            zeros_stride, table, tables, table_scale, row, n_mask, part, span, K,
            BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
            SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
            SCALE_TYPE: tl.constexpr, PERM: tl.constexpr, FULL: tl.constexpr, FOLD: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """`dot_tile` of a part of K; with FOLD of all of them, summed in their order from 0 on."""
    if FOLD:
        # One loop for the first part and the others: a copy of it for each spilled on sm_80.
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        for first in tl.range(0, K, span):
            acc += dot_tile(x, x_row, x_stride_k, m_mask, perm, codes, codes_stride, scales,
                            scales_stride, zeros, zeros_stride, table, tables, table_scale, row,
                            n_mask, first, tl.minimum(first + span, K), BITS, TABLE, TABLE_TYPE,
                            SYMMETRIC, GROUP, SCALES, SCALE_TYPE, PERM, FULL, BM, BN, BK)
        return acc
    else:
        begin = part * span
        return dot_tile(x, x_row, x_stride_k, m_mask, perm, codes, codes_stride, scales,
                        scales_stride, zeros, zeros_stride, table, tables, table_scale, row, n_mask,
                        begin, tl.minimum(begin + span, K), BITS, TABLE, TABLE_TYPE, SYMMETRIC,
                        GROUP, SCALES, SCALE_TYPE, PERM, FULL, BM, BN, BK)


@triton.jit
def linear_dot_kernel(x, x_stride_m, x_stride_k, perm, codes, codes_stride, scales, scales_stride,
                      zeros, zeros_stride, table, tables, table_scale, bias, y, M, N, K, SPAN,
                      BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                      SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                      SCALE_TYPE: tl.constexpr, PERM: tl.constexpr, BIAS: tl.constexpr,
                      SCALE_STORED: tl.constexpr, FULL: tl.constexpr, FOLD: tl.constexpr,
                      FACTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Program (tile, part). y is ``[parts, M, N]`` dense, without FACTOR and BIAS where there are
    several; a part is SPAN columns of K."""
    if SCALE_STORED:
        table_scale = tl.load(table_scale)
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN)
    part = tl.program_id(1)
    m = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
    acc = dot_sum(x, m * x_stride_m, x_stride_k, m < M, perm, codes, codes_stride, scales,
                  scales_stride, zeros, zeros_stride, table, tables, table_scale, n, n < N, part,
                  SPAN, K, BITS, TABLE, TABLE_TYPE, SYMMETRIC, GROUP, SCALES, SCALE_TYPE, PERM,
                  FULL, FOLD, BM, BN, BK)
    factor = factor_of(scales, scales_stride, scales, m, m < M, table_scale, n, n < N, FACTOR,
                       TABLE, SCALES, SCALE_TYPE)
    store_tile(acc, factor, y, (part.to(tl.int64) * M + m) * N, m < M, n, n < N, bias, FACTOR, BIAS)
