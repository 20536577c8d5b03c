# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""Mixture of experts: y[t] = x[t] . W[expert of t]^T for tokens sorted by expert, one launch.

Weights of all experts are stacked: expert e owns the rows ``e * N .. (e + 1) * N`` of the codes,
scales and zeros. ``offsets`` ``[E + 1]`` says which tokens belong to an expert; it stays on the
device. The grid is an upper bound on the number of tiles that any offsets can need; a program finds
its tile from the offsets and leaves if there is none, so nothing waits for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear_finish import factor_of, store_tile
from .linear_float import dot_sum
from .linear_grad import grad_sum, store_grad
from .linear_int8 import int8_sum


@triton.jit
def expert_tile(offsets, tile, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, BM: tl.constexpr):
    """(expert, first token, end of the expert's tokens) of a tile; the expert is EXPERTS for
    none."""
    e = tl.arange(0, EXPERTS_2)
    low = tl.load(offsets + e, mask=e < EXPERTS, other=0).to(tl.int32)
    high = tl.load(offsets + e + 1, mask=e < EXPERTS, other=0).to(tl.int32)
    tiles = (tl.maximum(high - low, 0) + (BM - 1)) // BM
    ends = tl.cumsum(tiles, axis=0)
    expert = tl.sum(tl.where((ends <= tile) & (e < EXPERTS), 1, 0), axis=0)
    mine = e == expert
    before = tl.sum(tl.where(mine, ends - tiles, 0), axis=0)
    first = tl.sum(tl.where(mine, low, 0), axis=0) + (tile - before) * BM
    return expert, first, tl.sum(tl.where(mine, high, 0), axis=0)


@triton.jit
def grouped_dot_kernel(x, x_stride_m, x_stride_k, perm, perm_stride, codes, codes_stride, scales,
                       scales_stride, zeros, zeros_stride, table, tables, table_stride,
                       table_scales, bias, y, offsets, T, N, K, SPAN,
                       EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr,
                       BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                       SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                       SCALE_TYPE: tl.constexpr, PERM: tl.constexpr, BIAS: tl.constexpr,
                       FULL: tl.constexpr, FOLD: tl.constexpr, FACTOR: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Program (tile of tokens, tile of n). table_scales ``[E]``, bias ``[E, N]``, y ``[T, N]``."""
    expert, first, end = expert_tile(offsets, tl.program_id(0), EXPERTS, EXPERTS_2, BM)
    if expert < EXPERTS:
        m = (first + tl.arange(0, BM)).to(tl.int64)
        n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
        m_mask = (m >= 0) & (m < tl.minimum(end, T))
        base = expert.to(tl.int64)
        table_scale = tl.load(table_scales + expert)
        acc = dot_sum(x, m * x_stride_m, x_stride_k, m_mask,
                      perm + base * perm_stride if PERM else perm, codes, codes_stride, scales,
                      scales_stride, zeros, zeros_stride, table + base * table_stride, tables,
                      table_scale, base * N + n, n < N, 0, SPAN, K, BITS, TABLE, TABLE_TYPE,
                      SYMMETRIC, GROUP, SCALES, SCALE_TYPE, PERM, FULL, FOLD, BM, BN, BK)
        factor = factor_of(scales, scales_stride, scales, m, m_mask, table_scale, base * N + n,
                           n < N, FACTOR, TABLE, SCALES, SCALE_TYPE)
        store_tile(acc, factor, y, m * N, m_mask, n, n < N, bias + base * N if BIAS else bias,
                   FACTOR, BIAS)


@triton.jit
def grouped_int8_kernel(x, x_stride_m, x_stride_k, perm, xs, xs_stride, codes, codes_stride, scales,
                        scales_stride, zeros, zeros_stride, table, tables, table_stride,
                        table_scales, bias, y, offsets, T, N, K, SPAN,
                        EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr,
                        BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                        SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                        SCALE_TYPE: tl.constexpr, X_GROUP: tl.constexpr, QUANTIZE: tl.constexpr,
                        PERM: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
                        BIAS: tl.constexpr, FULL: tl.constexpr, FOLD: tl.constexpr,
                        FACTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same for int8 activations ``[T, K]`` and their scales, or (QUANTIZE) floats."""
    expert, first, end = expert_tile(offsets, tl.program_id(0), EXPERTS, EXPERTS_2, BM)
    if expert < EXPERTS:
        m = (first + tl.arange(0, BM)).to(tl.int64)
        n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
        m_mask = (m >= 0) & (m < tl.minimum(end, T))
        base = expert.to(tl.int64)
        table_scale = tl.load(table_scales + expert)
        acc = int8_sum(x, m * x_stride_m, x_stride_k, m_mask, perm, xs, m * xs_stride, codes,
                       codes_stride, scales, scales_stride, zeros, zeros_stride,
                       table + base * table_stride, tables, table_scale, base * N + n, n < N, 0,
                       SPAN, K, BITS, TABLE, TABLE_TYPE, SYMMETRIC, GROUP, SCALES, SCALE_TYPE,
                       X_GROUP, QUANTIZE, PERM, CHUNK, ALIGNED, FULL, FOLD, BM, BN, BK)
        factor = factor_of(scales, scales_stride, xs, m * xs_stride, m_mask, table_scale,
                           base * N + n, n < N, FACTOR, TABLE, SCALES, SCALE_TYPE)
        store_tile(acc, factor, y, m * N, m_mask, n, n < N, bias + base * N if BIAS else bias,
                   FACTOR, BIAS)


@triton.jit
def grouped_grad_kernel(dy, dy_stride_m, dy_stride_n, perm, perm_stride, codes, codes_stride,
                        scales, scales_stride, zeros, zeros_stride, table, tables, table_stride,
                        table_scales, dx, offsets, T, N, K,
                        EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr,
                        BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                        SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                        SCALE_TYPE: tl.constexpr, PERM: tl.constexpr, FULL: tl.constexpr,
                        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The gradient with respect to x: program (tile of tokens, tile of k) of dx ``[T, K]`` from dy
    ``[T, N]``."""
    expert, first, end = expert_tile(offsets, tl.program_id(0), EXPERTS, EXPERTS_2, BM)
    if expert < EXPERTS:
        m = (first + tl.arange(0, BM)).to(tl.int64)
        m_mask = (m >= 0) & (m < tl.minimum(end, T))
        base = expert.to(tl.int64)
        column = tl.program_id(1) * BK
        acc = grad_sum(dy, m * dy_stride_m, dy_stride_n, m_mask, codes, codes_stride, scales,
                       scales_stride, zeros, zeros_stride, table + base * table_stride, tables,
                       tl.load(table_scales + expert), base * N, column, N, K, BITS, TABLE,
                       TABLE_TYPE, SYMMETRIC, GROUP, SCALES, SCALE_TYPE, FULL, BM, BN, BK)
        store_grad(acc, dx, m, m_mask, perm + base * perm_stride if PERM else perm, column, K, PERM,
                   BK)
