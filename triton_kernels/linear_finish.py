# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""The end of every linear layer: sums of the parts of K, the factor of whole sums, bias, one
conversion.

Parts are summed before anything else happens to them, in ascending order from 0 on, whether
one program walks them all (many rows) or each was stored by a program of its own (few rows); and
the factor and the bias are one fused step written out, which no compiler may contract in its own
way. So a row has the same bits in both.

``FACTOR`` says what multiplies a whole sum. 0: nothing; 1: the only scale of the output's weights;
2: the only scale of the row's int8 activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import fma, row_scales


@triton.jit
def factor_of(scales, scales_stride, xs, xs_row, m_mask, table_scale, row, n_mask,
              FACTOR: tl.constexpr, TABLE: tl.constexpr, SCALES: tl.constexpr,
              SCALE_TYPE: tl.constexpr):
    """The factor of a tile ``[BN, BM]``, as a column or a row of it."""
    if FACTOR == 1:
        return row_scales(scales, scales_stride, table_scale, row, n_mask, TABLE, SCALES,
                          SCALE_TYPE)[:, None]
    elif FACTOR == 2:
        return (tl.load(xs + xs_row, mask=m_mask, other=0) * table_scale)[None, :]
    else:
        return tl.full((1, 1), 1.0, dtype=tl.float32)


@triton.jit
def store_tile(acc, factor, y, y_row, m_mask, n, n_mask, bias, FACTOR: tl.constexpr,
               BIAS: tl.constexpr):
    """``[BN, BM]`` times its factor, plus bias, to the rows of y."""
    if BIAS:
        add = tl.load(bias + n, mask=n_mask, other=0).to(tl.float32)[:, None]
        if FACTOR:
            acc = fma(acc, factor, add)
        else:
            acc += add
    elif FACTOR:
        acc *= factor
    at = y + y_row[:, None] + n[None, :]
    tl.store(at, tl.trans(acc).to(y.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def sum_parts_kernel(parts, scales, scales_stride, xs, xs_stride, table_scale, bias, y, M, N,
                     PARTS: tl.constexpr, FACTOR: tl.constexpr, TABLE: tl.constexpr,
                     SCALES: tl.constexpr, SCALE_TYPE: tl.constexpr, BIAS: tl.constexpr,
                     SCALE_STORED: tl.constexpr, BLOCK: tl.constexpr):
    """Program (block of n, row m): y ``[M, N]`` from parts ``[PARTS, M, N]``."""
    if SCALE_STORED:
        table_scale = tl.load(table_scale)
    m = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = (n < N)[:, None]
    acc = tl.zeros((BLOCK, 1), dtype=tl.float32)
    for part in tl.static_range(0, PARTS):
        acc += tl.load(parts + (m + part * M)[None, :] * N + n[:, None], mask=mask, other=0)
    factor = factor_of(scales, scales_stride, xs, m * xs_stride, m < M, table_scale, n, n < N,
                       FACTOR, TABLE, SCALES, SCALE_TYPE)
    store_tile(acc, factor, y, m * N, m < M, n, n < N, bias, FACTOR, BIAS)
