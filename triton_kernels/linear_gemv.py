# SPDX-License-Identifier: Apache-2.0
"""y = x . W^T for a few rows: weights stream through registers, no shared memory, no matrix units.

Serves float activations and int8 ones alike (an int8 value is a float32, and a run's sum of products
is exact in float32). A run of RUN adjacent columns of a row lies in one thread: products are summed
within the run, the run's sum is multiplied by its scale and added to the run's accumulator; runs
meet only at the end. The order of additions does not depend on how many rows x has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import load_scales, load_weights, row_scales


@triton.jit
def add_row(acc, w, scale, x, x_row, source, k, k_end, xs, xs_row, run, run_end,
            X_GROUP: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):
    """One row of x: the sums of its runs times the scale of each run (and, where X_GROUP, times the
    activations' own), added to acc ``[BN, RUNS]``. A row that is not there has no columns."""
    values = tl.load(x + x_row + source, mask=k < k_end, other=0).to(tl.float32)
    sums = tl.sum(w * tl.reshape(values, (1, RUNS, RUN)), axis=2)
    if X_GROUP:
        at = xs + xs_row + run * RUN // X_GROUP
        scale *= tl.load(at, mask=run < run_end, other=0)[None, :]
    return acc + sums * scale


@triton.jit
def finish_row(acc, row, M, n, n_mask, scale, xs, xs_stride, bias, y, y_row, N,
               X_ROW: tl.constexpr, BIAS: tl.constexpr):
    """Fold the runs of one row of x, apply what is left of the scales, store."""
    total = tl.sum(acc, axis=1) * scale
    if X_ROW:
        total *= tl.load(xs + row * xs_stride, mask=row < M, other=0)
    if BIAS:
        total += tl.load(bias + n, mask=n_mask, other=0).to(tl.float32)
    tl.store(y + y_row + n, total.to(y.dtype.element_ty), mask=n < tl.where(row < M, N, 0))


@triton.jit
def linear_gemv_kernel(x, x_stride_m, x_stride_k, xs, xs_stride, perm, codes, codes_stride, scales,
                       scales_stride, zeros, zeros_stride, table, tables, table_scale, bias, y,
                       M, N, K, SPAN,
                       BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                       SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                       RUN_SCALES: tl.constexpr, SCALE_TYPE: tl.constexpr, PERM: tl.constexpr,
                       BIAS: tl.constexpr, X_ROW: tl.constexpr, X_GROUP: tl.constexpr,
                       FULL: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                       RUN: tl.constexpr, STAGES: tl.constexpr):
    """Program (n tile, group of ROWS rows of x, part). y is ``[parts, M, N]`` dense.

    SCALES: how the scales of a tile lie; RUN_SCALES: how those of its runs do (the same, or 0 where
    a group is not made of whole runs, and weights are scaled one by one).
    """
    RUNS: tl.constexpr = BK // RUN
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    n_mask = n < N
    row = tl.program_id(1).to(tl.int64) * ROWS
    part = tl.program_id(2)
    begin = part * SPAN
    end = tl.minimum(begin + SPAN, K)
    acc0 = tl.zeros((BN, RUNS), dtype=tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for column in tl.range(begin, end, BK, num_stages=STAGES):
        w = load_weights(codes, codes_stride, scales, scales_stride, zeros, zeros_stride, table,
                         tables, table_scale, n, n_mask, column, end, BITS, TABLE, TABLE_TYPE,
                         SYMMETRIC, GROUP, SCALES, SCALE_TYPE, SCALES == 4, BN, BK, True, FULL)
        w = tl.reshape(w, (BN, RUNS, RUN))
        k = column + tl.arange(0, BK)
        if PERM:
            source = tl.load(perm + k, mask=k < end, other=0).to(tl.int64) * x_stride_k
        else:
            source = k.to(tl.int64) * x_stride_k
        run = column // RUN + tl.arange(0, RUNS)
        scale = tl.full((1, 1), 1.0, dtype=tl.float32)
        if RUN_SCALES:
            scale = load_scales(scales, n * scales_stride, n_mask, column // RUN, tl.cdiv(end, RUN),
                                SCALE_TYPE, GROUP // RUN, RUN_SCALES, BN, RUNS)
            if TABLE:
                scale *= table_scale
        stop = tl.where(row < M, end, 0)
        acc0 = add_row(acc0, w, scale, x, row * x_stride_m, source, k, stop, xs, row * xs_stride, run,
                       tl.cdiv(stop, RUN), X_GROUP, BN, RUNS, RUN)
        if ROWS > 1:
            stop = tl.where(row + 1 < M, end, 0)
            acc1 = add_row(acc1, w, scale, x, (row + 1) * x_stride_m, source, k, stop, xs,
                           (row + 1) * xs_stride, run, tl.cdiv(stop, RUN), X_GROUP, BN, RUNS, RUN)
        if ROWS > 2:
            stop = tl.where(row + 2 < M, end, 0)
            acc2 = add_row(acc2, w, scale, x, (row + 2) * x_stride_m, source, k, stop, xs,
                           (row + 2) * xs_stride, run, tl.cdiv(stop, RUN), X_GROUP, BN, RUNS, RUN)
            stop = tl.where(row + 3 < M, end, 0)
            acc3 = add_row(acc3, w, scale, x, (row + 3) * x_stride_m, source, k, stop, xs,
                           (row + 3) * xs_stride, run, tl.cdiv(stop, RUN), X_GROUP, BN, RUNS, RUN)
    if SCALES <= 1:
        last = row_scales(scales, scales_stride, table_scale, n, n_mask, TABLE, SCALES, SCALE_TYPE)
    else:
        last = tl.full((BN,), 1.0, dtype=tl.float32)
    y_row = (part.to(tl.int64) * M + row) * N
    finish_row(acc0, row, M, n, n_mask, last, xs, xs_stride, bias, y, y_row, N, X_ROW, BIAS)
    if ROWS > 1:
        finish_row(acc1, row + 1, M, n, n_mask, last, xs, xs_stride, bias, y, y_row + N, N, X_ROW,
                   BIAS)
    if ROWS > 2:
        finish_row(acc2, row + 2, M, n, n_mask, last, xs, xs_stride, bias, y, y_row + 2 * N, N,
                   X_ROW, BIAS)
        finish_row(acc3, row + 3, M, n, n_mask, last, xs, xs_stride, bias, y, y_row + 3 * N, N,
                   X_ROW, BIAS)
