# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""y = (xq . xs) . W^T with int8 activations: int8 matrix units, int32 sums, float32 across groups.

K is cut into chunks: the groups of the weight; whole rows cut at 65536 columns where neither side
has groups; 128 columns where only the activations have. A chunk's sum S is exact. Then, per chunk,
``t = fma(-zero, X, S)`` for integers with zeros (X the chunk's sum of xq), else ``t = S``, and
``acc = fma(t, scale, acc)``: unsplit, these are the numbers of the CPU kernels bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import load_codes, load_scales, look_up, to_float
from .linear_float import activation_tile, store_tile, tile_of


@triton.jit
def load_int8(codes, codes_stride, table, tables, row, row_mask, column, end, BITS: tl.constexpr,
              TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr, OFFSET: tl.constexpr,
              GROUP: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """int8 ``[ROWS, COLS]``: code - OFFSET, or the (integer) table entry."""
    code = load_codes(codes, row * codes_stride, row_mask, column, end, BITS, COLS, ALIGNED, FULL)
    if TABLE:
        return look_up(table, tables, code, row, row_mask, column, end, BITS, TABLE, TABLE_TYPE,
                       GROUP, COLS, FULL).to(tl.int8)
    else:
        return (code - OFFSET).to(tl.int8)


@triton.jit
def int8_tile(xq, x_row, m_mask, xs, xs_row, codes, codes_stride, scales, scales_stride, zeros,
              zeros_stride, table, tables, table_scale, row, n_mask, begin, end,
              BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
              SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
              SCALE_TYPE: tl.constexpr, X_GROUP: tl.constexpr, CHUNK: tl.constexpr,
              ALIGNED: tl.constexpr, FULL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              BK: tl.constexpr):
    """float32 ``[BN, BM]``: the columns ``begin .. end``, scales of the weight included, those of
    the activations where X_GROUP."""
    # Codes with zeros are unsigned; 8-bit ones are moved into the range of int8 and back in S.
    OFFSET: tl.constexpr = 1 << (BITS - 1) if SYMMETRIC else (128 if BITS == 8 else 0)
    ZEROS: tl.constexpr = not TABLE and not SYMMETRIC
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for first in tl.range(begin, end, CHUNK):
        last = tl.minimum(first + CHUNK, end)
        total = tl.zeros((BN, BM), dtype=tl.int32)
        x_sum = tl.zeros((BM,), dtype=tl.int32)
        if CHUNK <= BK:
            w = load_int8(codes, codes_stride, table, tables, row, n_mask, first, last, BITS, TABLE,
                          TABLE_TYPE, OFFSET, GROUP, BK, ALIGNED, FULL)
            tile = activation_tile(xq, x_row, 1, m_mask, xq, first, last, False, BK, FULL)
            total = tl.dot(w, tl.trans(tile), total, out_dtype=tl.int32)
            if ZEROS:
                x_sum += tl.sum(tile.to(tl.int32), axis=1)
        else:
            for column in tl.range(first, last, BK):
                w = load_int8(codes, codes_stride, table, tables, row, n_mask, column, last, BITS,
                              TABLE, TABLE_TYPE, OFFSET, GROUP, BK, ALIGNED, FULL)
                tile = activation_tile(xq, x_row, 1, m_mask, xq, column, last, False, BK, FULL)
                total = tl.dot(w, tl.trans(tile), total, out_dtype=tl.int32)
                if ZEROS:
                    x_sum += tl.sum(tile.to(tl.int32), axis=1)
        if ZEROS and OFFSET:
            total += OFFSET * x_sum[None, :]
        value = total.to(tl.float32)
        if ZEROS:
            zero = load_scales(zeros, row * zeros_stride, n_mask, first, end, 0, GROUP, SCALES, BN,
                               CHUNK)
            zero, shared = tl.broadcast(-zero, x_sum.to(tl.float32)[None, :])
            value = tl.fma(zero, shared, value)
        if SCALES == 0:
            scale = tl.full((BN, 1), 1.0, dtype=tl.float32)
        elif SCALES == 1:
            scale = to_float(tl.load(scales + row * scales_stride, mask=n_mask, other=0),
                             SCALE_TYPE)[:, None]
        else:
            scale = load_scales(scales, row * scales_stride, n_mask, first, end, SCALE_TYPE, GROUP,
                                SCALES, BN, CHUNK)
        if X_GROUP:
            of_x = tl.load(xs + xs_row + first // X_GROUP, mask=m_mask, other=0) * table_scale
            factor = scale * of_x[None, :]
        else:
            factor = tl.broadcast_to(scale, (BN, BM))
        acc = tl.fma(value, factor, acc)
    return acc


@triton.jit
def store_int8_tile(acc, xs, xs_row, table_scale, y, y_row, m_mask, n, n_mask, bias,
                    X_GROUP: tl.constexpr, BIAS: tl.constexpr):
    """The activations' row scales and the bias in one fused step, then the store."""
    if X_GROUP:
        store_tile(acc, y, y_row, m_mask, n, n_mask, bias, BIAS)
    else:
        of_x = tl.load(xs + xs_row, mask=m_mask, other=0) * table_scale
        if BIAS:
            add = tl.load(bias + n, mask=n_mask, other=0).to(tl.float32)
            of_x, add = tl.broadcast(of_x[None, :], add[:, None])
            acc = tl.fma(acc, of_x, add)
        else:
            acc *= of_x[None, :]
        store_tile(acc, y, y_row, m_mask, n, n_mask, bias, False)


@triton.jit
def linear_int8_kernel(xq, xq_stride, xs, xs_stride, codes, codes_stride, scales, scales_stride,
                       zeros, zeros_stride, table, tables, table_scale, bias, y, M, N, K, SPAN,
                       BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                       SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                       SCALE_TYPE: tl.constexpr, X_GROUP: tl.constexpr, CHUNK: tl.constexpr,
                       ALIGNED: tl.constexpr, BIAS: tl.constexpr, FULL: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Program (tile, part). xq ``[M, K]`` in the column order of the weight; y ``[parts, M,
    N]``."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN)
    part = tl.program_id(1)
    m = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
    begin = part * SPAN
    acc = int8_tile(xq, m * xq_stride, m < M, xs, m * xs_stride, codes, codes_stride, scales,
                    scales_stride, zeros, zeros_stride, table, tables, table_scale, n, n < N, begin,
                    tl.minimum(begin + SPAN, K), BITS, TABLE, TABLE_TYPE, SYMMETRIC, GROUP, SCALES,
                    SCALE_TYPE, X_GROUP, CHUNK, ALIGNED, FULL, BM, BN, BK)
    y_row = (part.to(tl.int64) * M + m) * N
    store_int8_tile(acc, xs, m * xs_stride, table_scale, y, y_row, m < M, n, n < N, bias, X_GROUP,
                    BIAS)
