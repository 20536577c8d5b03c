# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""dx = dy . W from packed codes: the gradient of a linear layer with respect to its input.

The reduction runs over the rows of W, each with its own scale, so the operand is always the scaled
weight rounded once to the type of dy: the weights of the forward pass. With a permutation,
column k of the stored weight is column perm[k] of dx.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import load_weights
from .linear_float import dot, tile_of


@triton.jit
def grad_sum(dy, dy_row, dy_stride_n, m_mask, codes, codes_stride, scales, scales_stride, zeros,
             zeros_stride, table, tables, table_scale, base, column, N, K,
             BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
             SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
             SCALE_TYPE: tl.constexpr, FULL: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """float32 ``[BM, BK]``: rows of dy times the columns ``column ..`` of the N rows of W from
    `base` on."""
    acc = tl.zeros((BM, BK), dtype=tl.float32)
    for first in tl.range(0, N, BN):
        n = (first + tl.arange(0, BN)).to(tl.int64)
        at = dy + dy_row[:, None] + (n * dy_stride_n)[None, :]
        tile = tl.load(at, mask=m_mask[:, None] & (n < N)[None, :], other=0)
        w = load_weights(codes, codes_stride, scales, scales_stride, zeros, zeros_stride, table,
                         tables, table_scale, base + n, n < N, column, K, BITS, TABLE, TABLE_TYPE,
                         SYMMETRIC, GROUP, SCALES, SCALE_TYPE, True, BN, BK, FULL,
                         dy.dtype.element_ty)
        acc = dot(tile, tl.trans(w), acc)
    return acc


@triton.jit
def store_grad(acc, dx, m, m_mask, perm, column, K, PERM: tl.constexpr, BK: tl.constexpr):
    """A tile to its columns of dx ``[M, K]`` dense, in input order."""
    k = column + tl.arange(0, BK)
    if PERM:
        target = tl.load(perm + k, mask=k < K, other=0)
    else:
        target = k
    at = dx + (m * K)[:, None] + target[None, :]
    tl.store(at, acc.to(dx.dtype.element_ty), mask=m_mask[:, None] & (k < K)[None, :])


@triton.jit
def linear_grad_kernel(dy, dy_stride_m, dy_stride_n, perm, codes, codes_stride, scales,
                       scales_stride, zeros, zeros_stride, table, tables, table_scale, dx, M, N, K,
                       BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                       SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                       SCALE_TYPE: tl.constexpr, SCALE_STORED: tl.constexpr, PERM: tl.constexpr,
                       FULL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Program: one tile ``[BM, BK]`` of dx ``[M, K]`` dense."""
    if SCALE_STORED:
        table_scale = tl.load(table_scale)
    tile_m, tile_k = tile_of(tl.program_id(0), M, K, BM, BK)
    m = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    column = tile_k * BK
    acc = grad_sum(dy, m * dy_stride_m, dy_stride_n, m < M, codes, codes_stride, scales,
                   scales_stride, zeros, zeros_stride, table, tables, table_scale, 0, column, N, K,
                   BITS, TABLE, TABLE_TYPE, SYMMETRIC, GROUP, SCALES, SCALE_TYPE, FULL, BM, BN, BK)
    store_grad(acc, dx, m, m < M, perm, column, K, PERM, BK)
