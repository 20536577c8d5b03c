# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""Rows of W as floats, columns in input order: dequantize (all rows) and embedding (chosen
rows)."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import load_weights


@triton.jit
def dequantize_kernel(ids, perm, codes, codes_stride, scales, scales_stride, zeros, zeros_stride,
                      table, tables, table_scale, y, COUNT, N, K,
                      BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                      SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                      SCALE_TYPE: tl.constexpr, SCALE_STORED: tl.constexpr, IDS: tl.constexpr,
                      PERM: tl.constexpr, FULL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Program: tile ``[BN, BK]`` of y ``[COUNT, K]`` dense. An id outside 0..N-1 gives a row of
    NaN: a kernel cannot raise, and must not read outside the weight."""
    if SCALE_STORED:
        table_scale = tl.load(table_scale)
    tiles_k = tl.cdiv(K, BK)
    tile_k = tl.program_id(0) % tiles_k
    out = (tl.program_id(0) // tiles_k).to(tl.int64) * BN + tl.arange(0, BN)
    if IDS:
        row = tl.load(ids + out, mask=out < COUNT, other=0).to(tl.int64)
    else:
        row = out
    valid = (row >= 0) & (row < N) & (out < COUNT)
    column = tile_k * BK
    w = load_weights(codes, codes_stride, scales, scales_stride, zeros, zeros_stride, table, tables,
                     table_scale, row, valid, column, K, BITS, TABLE, TABLE_TYPE, SYMMETRIC, GROUP,
                     SCALES, SCALE_TYPE, True, BN, BK, FULL, tl.float32)
    if IDS:
        w = tl.where(valid[:, None], w, float("nan"))
    k = column + tl.arange(0, BK)
    if PERM:
        target = tl.load(perm + k, mask=k < K, other=0)
    else:
        target = k
    at = y + (out * K)[:, None] + target[None, :]
    tl.store(at, w.to(y.dtype.element_ty), mask=(out < COUNT)[:, None] & (k < K)[None, :])
