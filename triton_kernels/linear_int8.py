# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""y = (xq . xs) . W^T with int8 activations: int8 matrix units, int32 sums, float32 across groups.

K is cut into chunks: the groups of the weight; whole rows cut at 65536 columns where neither side
has groups; 128 columns where only the activations have. A chunk's sum S is exact. Then, per chunk,
``t = fma(-zero, X, S)`` for integers with zeros (X the chunk's sum of xq), else ``t = S``, and
``acc = fma(t, scale, acc)``: in one part of K, the numbers of the CPU kernels bit for bit.

Tables of float8 (one per tile) hold integers times a power of two in these modes; that power is the
scale of a tile's 64 columns, and is found from the table itself.

With QUANTIZE x comes as floats and every program quantizes what it needs of it: for a few rows with
scales per group that costs less than a launch, and gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import codes_by, scale_and_inverse
from .decode import fma, load_codes, load_scales, look_up, table_exponents, to_float
from .linear_finish import factor_of, store_tile
from .linear_float import activation_tile, tile_of


@triton.jit
def load_int8(codes, codes_stride, table, tables, row, row_mask, column, end, BITS: tl.constexpr,
              TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr, OFFSET: tl.constexpr,
              GROUP: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """int8 ``[ROWS, COLS]``: code - OFFSET, or the table entry, an integer once its tile's power of
    two is out."""
    code = load_codes(codes, row * codes_stride, row_mask, column, end, BITS, COLS, ALIGNED, FULL)
    if TABLE:
        found = look_up(table, tables, code, row, row_mask, column, end, BITS, TABLE, TABLE_TYPE,
                        GROUP, COLS, FULL)
        if TABLE_TYPE:
            exponent = table_exponents(table, tables, row, row_mask, column, BITS)
            found *= (254 - exponent << 23).to(tl.float32, bitcast=True)[:, None]
        return found.to(tl.int8)
    else:
        return (code - OFFSET).to(tl.int8)


@triton.jit
def quantized_tile(x, x_row, x_stride_k, m_mask, perm, column, end, PERM: tl.constexpr,
                   COLS: tl.constexpr, FULL: tl.constexpr):
    """(int8 ``[ROWS, COLS]``, float32 ``[ROWS]``): one group of float activations and its
    scales."""
    value = activation_tile(x, x_row, x_stride_k, m_mask, perm, column, end, PERM, COLS, FULL)
    value = value.to(tl.float32)
    size = tl.abs(value)
    finite = size <= 3.4028234663852886e38
    bad = tl.max(tl.where(finite, 0, 1), axis=1)
    scale, inverse = scale_and_inverse(tl.max(tl.where(finite, size, 0.0), axis=1), bad)
    return codes_by(value, inverse[:, None]), scale


@triton.jit
def int8_tile(x, x_row, x_stride_k, m_mask, perm, xs, xs_row, codes, codes_stride, scales,
              scales_stride, zeros, zeros_stride, table, tables, table_scale, row, n_mask, begin,
              end, BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
              SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
              SCALE_TYPE: tl.constexpr, X_GROUP: tl.constexpr, QUANTIZE: tl.constexpr,
              PERM: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
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
        if X_GROUP and not QUANTIZE:
            of_x = tl.load(xs + xs_row + first // X_GROUP, mask=m_mask, other=0)
        if CHUNK <= BK:
            w = load_int8(codes, codes_stride, table, tables, row, n_mask, first, last, BITS, TABLE,
                          TABLE_TYPE, OFFSET, GROUP, BK, ALIGNED, FULL)
            if QUANTIZE:
                tile, of_x = quantized_tile(x, x_row, x_stride_k, m_mask, perm, first, last, PERM,
                                            BK, FULL)
            else:
                tile = activation_tile(x, x_row, 1, m_mask, x, first, last, False, BK, FULL)
            total = tl.dot(w, tl.trans(tile), total, out_dtype=tl.int32)
            if ZEROS:
                x_sum += tl.sum(tile.to(tl.int32), axis=1)
        else:
            for column in tl.range(first, last, BK):
                w = load_int8(codes, codes_stride, table, tables, row, n_mask, column, last, BITS,
                              TABLE, TABLE_TYPE, OFFSET, GROUP, BK, ALIGNED, FULL)
                tile = activation_tile(x, x_row, 1, m_mask, x, column, last, False, BK, FULL)
                total = tl.dot(w, tl.trans(tile), total, out_dtype=tl.int32)
                if ZEROS:
                    x_sum += tl.sum(tile.to(tl.int32), axis=1)
        if ZEROS and OFFSET:
            total += OFFSET * x_sum[None, :]
        value = total.to(tl.float32)
        if ZEROS:
            zero = load_scales(zeros, row * zeros_stride, n_mask, first, end, 0, GROUP, SCALES, BN,
                               CHUNK)
            value = fma(-zero, x_sum.to(tl.float32)[None, :], value)
        if TABLE_TYPE:
            exponent = table_exponents(table, tables, row, n_mask, first, BITS)
            scale = (exponent << 23).to(tl.float32, bitcast=True)[:, None]
        elif SCALES == 0:
            scale = tl.full((BN, 1), 1.0, dtype=tl.float32)
        elif SCALES == 1:
            scale = to_float(tl.load(scales + row * scales_stride, mask=n_mask, other=0),
                             SCALE_TYPE)[:, None]
        else:
            scale = load_scales(scales, row * scales_stride, n_mask, first, end, SCALE_TYPE, GROUP,
                                SCALES, BN, CHUNK)
        if X_GROUP:
            scale = scale * (of_x * table_scale)[None, :]
        acc = fma(value, scale, acc)
    return acc


@triton.jit
def int8_sum(x, x_row, x_stride_k, m_mask, perm, xs, xs_row, codes, codes_stride, scales,
             scales_stride, zeros, zeros_stride, table, tables, table_scale, row, n_mask, part,
             span, K, BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
             SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
             SCALE_TYPE: tl.constexpr, X_GROUP: tl.constexpr, QUANTIZE: tl.constexpr,
             PERM: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
             FOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """`int8_tile` of a part of K; with FOLD of all of them, summed in their order from 0 on (one
    loop, as in `dot_sum`)."""
    if FOLD:
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        for first in tl.range(0, K, span):
            acc += int8_tile(x, x_row, x_stride_k, m_mask, perm, xs, xs_row, codes, codes_stride,
                             scales, scales_stride, zeros, zeros_stride, table, tables, table_scale,
                             row, n_mask, first, tl.minimum(first + span, K), BITS, TABLE,
                             TABLE_TYPE, SYMMETRIC, GROUP, SCALES, SCALE_TYPE, X_GROUP, QUANTIZE,
                             PERM, CHUNK, ALIGNED, FULL, BM, BN, BK)
        return acc
    else:
        begin = part * span
        return int8_tile(x, x_row, x_stride_k, m_mask, perm, xs, xs_row, codes, codes_stride,
                         scales, scales_stride, zeros, zeros_stride, table, tables, table_scale,
                         row, n_mask, begin, tl.minimum(begin + span, K), BITS, TABLE, TABLE_TYPE,
                         SYMMETRIC, GROUP, SCALES, SCALE_TYPE, X_GROUP, QUANTIZE, PERM, CHUNK,
                         ALIGNED, FULL, BM, BN, BK)


@triton.jit
def linear_int8_kernel(x, x_stride_m, x_stride_k, perm, xs, xs_stride, codes, codes_stride, scales,
                       scales_stride, zeros, zeros_stride, table, tables, table_scale, bias, y,
                       M, N, K, SPAN,
                       BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                       SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                       SCALE_TYPE: tl.constexpr, X_GROUP: tl.constexpr, QUANTIZE: tl.constexpr,
                       PERM: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
                       BIAS: tl.constexpr, SCALE_STORED: tl.constexpr, FULL: tl.constexpr,
                       FOLD: tl.constexpr, FACTOR: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Program (tile, part). x ``[M, K]``: int8 in the column order of the weight, or floats with
    QUANTIZE (and in the order of PERM). y is ``[parts, M, N]`` dense, without FACTOR and BIAS where
    there are several."""
    if SCALE_STORED:
        table_scale = tl.load(table_scale)
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN)
    part = tl.program_id(1)
    m = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
    acc = int8_sum(x, m * x_stride_m, x_stride_k, m < M, perm, xs, m * xs_stride, codes,
                   codes_stride, scales, scales_stride, zeros, zeros_stride, table, tables,
                   table_scale, n, n < N, part, SPAN, K, BITS, TABLE, TABLE_TYPE, SYMMETRIC, GROUP,
                   SCALES, SCALE_TYPE, X_GROUP, QUANTIZE, PERM, CHUNK, ALIGNED, FULL, FOLD, BM, BN,
                   BK)
    factor = factor_of(scales, scales_stride, xs, m * xs_stride, m < M, table_scale, n, n < N,
                       FACTOR, TABLE, SCALES, SCALE_TYPE)
    store_tile(acc, factor, y, (part.to(tl.int64) * M + m) * N, m < M, n, n < N, bias, FACTOR, BIAS)
