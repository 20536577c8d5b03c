# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""y = x . W^T for a few rows: weights stream through registers, without the matrix units.

Serves float activations and int8 ones alike (an int8 value times its group's scale is a float32).
Each thread keeps a sum for each of its columns of a tile, over all tiles, in float32; columns meet
only at the end. The order of additions does not depend on how many rows x has, but is not that of
the matrix units: this is the faster choice of those who do not ask for the same bits in any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import load_weights
from .linear_finish import factor_of, store_tile


@triton.jit
def row_values(x, x_row, source, k, end, xs, xs_row, X_GROUP: tl.constexpr):
    """float32 ``[1, BK]`` of one row of x; 0 from `end` on (0 for a row that is not there)."""
    values = tl.load(x + x_row + source, mask=k < end, other=0).to(tl.float32)
    if X_GROUP:
        values *= tl.load(xs + xs_row + k // X_GROUP, mask=k < end, other=0)
    return values[None, :]


@triton.jit
def finish_row(acc, row, M, N, part, n, n_mask, scales, scales_stride, xs, xs_stride, table_scale,
               bias, y, INT8: tl.constexpr, FACTOR: tl.constexpr, TABLE: tl.constexpr,
               SCALES: tl.constexpr, SCALE_TYPE: tl.constexpr, BIAS: tl.constexpr):
    """Fold the columns of one row of x, apply what is left of the scales, store."""
    m = row + tl.arange(0, 1)
    total = tl.sum(acc, axis=1)[:, None]
    if INT8:
        # What is left is the scale of the activations.
        if SCALES <= 1:
            total *= factor_of(scales, scales_stride, xs, m, m < M, table_scale, n, n_mask, 1,
                               TABLE, SCALES, SCALE_TYPE)
        table_scale = 1.0
    factor = factor_of(scales, scales_stride, xs, m * xs_stride, m < M, table_scale, n, n_mask,
                       FACTOR, TABLE, SCALES, SCALE_TYPE)
    store_tile(total, factor, y, (part.to(tl.int64) * M + m) * N, m < M, n, n_mask, bias, FACTOR,
               BIAS)


@triton.jit
def linear_gemv_kernel(x, x_stride_m, x_stride_k, perm, xs, xs_stride, codes, codes_stride, scales,
                       scales_stride, zeros, zeros_stride, table, tables, table_scale, bias, y,
                       M, N, K, SPAN,
                       BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                       SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                       SCALE_TYPE: tl.constexpr, PERM: tl.constexpr, BIAS: tl.constexpr,
                       SCALE_STORED: tl.constexpr, INT8: tl.constexpr, X_GROUP: tl.constexpr,
                       FULL: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr,
                       BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """Program (n tile, group of ROWS rows of x, part of K). y is ``[parts, M, N]`` dense, without
    FACTOR and BIAS where there are several."""
    if SCALE_STORED:
        table_scale = tl.load(table_scale)
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    n_mask = n < N
    row = tl.program_id(1).to(tl.int64) * ROWS
    part = tl.program_id(2)
    begin = part * SPAN
    end = tl.minimum(begin + SPAN, K)
    acc0 = tl.zeros((BN, BK), dtype=tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for column in tl.range(begin, end, BK, num_stages=STAGES):
        w = load_weights(codes, codes_stride, scales, scales_stride, zeros, zeros_stride, table,
                         tables, table_scale, n, n_mask, column, end, BITS, TABLE, TABLE_TYPE,
                         SYMMETRIC, GROUP, SCALES, SCALE_TYPE, SCALES > 1, BN, BK, FULL, tl.float32)
        k = column + tl.arange(0, BK)
        if PERM:
            source = tl.load(perm + k, mask=k < end, other=0).to(tl.int64) * x_stride_k
        else:
            source = k.to(tl.int64) * x_stride_k
        # A row beyond the last is a row without columns.
        acc0 += w * row_values(x, row * x_stride_m, source, k, end, xs, row * xs_stride, X_GROUP)
        if ROWS > 1:
            stop = tl.where(row + 1 < M, end, 0)
            acc1 += w * row_values(x, (row + 1) * x_stride_m, source, k, stop, xs,
                                   (row + 1) * xs_stride, X_GROUP)
        if ROWS > 2:
            stop = tl.where(row + 2 < M, end, 0)
            acc2 += w * row_values(x, (row + 2) * x_stride_m, source, k, stop, xs,
                                   (row + 2) * xs_stride, X_GROUP)
            stop = tl.where(row + 3 < M, end, 0)
            acc3 += w * row_values(x, (row + 3) * x_stride_m, source, k, stop, xs,
                                   (row + 3) * xs_stride, X_GROUP)
    finish_row(acc0, row, M, N, part, n, n_mask, scales, scales_stride, xs, xs_stride, table_scale,
               bias, y, INT8, FACTOR, TABLE, SCALES, SCALE_TYPE, BIAS)
    if ROWS > 1:
        finish_row(acc1, row + 1, M, N, part, n, n_mask, scales, scales_stride, xs, xs_stride,
                   table_scale, bias, y, INT8, FACTOR, TABLE, SCALES, SCALE_TYPE, BIAS)
    if ROWS > 2:
        finish_row(acc2, row + 2, M, N, part, n, n_mask, scales, scales_stride, xs, xs_stride,
                   table_scale, bias, y, INT8, FACTOR, TABLE, SCALES, SCALE_TYPE, BIAS)
        finish_row(acc3, row + 3, M, N, part, n, n_mask, scales, scales_stride, xs, xs_stride,
                   table_scale, bias, y, INT8, FACTOR, TABLE, SCALES, SCALE_TYPE, BIAS)
