# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""Activations to int8 at run time, symmetric, one scale per row or per row and group.

``scale = max|x| / 127``, ``q = rint(x * (127 / max|x|))``, half to even: the bits of the CPU
kernels. A group of zeros, or whose maximum is below 2^-100, gets scale 0 and zeros; one with NaN or
infinity gets scale NaN and zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_tile(x, x_row, x_stride_k, perm, k, inside, PERM: tl.constexpr):
    """float32 activations of a block of columns in weight order; 0 outside."""
    if PERM:
        k = tl.load(perm + k, mask=inside, other=0)
    return tl.load(x + x_row + k.to(tl.int64) * x_stride_k, mask=inside, other=0).to(tl.float32)


@triton.jit
def scale_and_inverse(largest, bad):
    """Of groups with the largest finite magnitude `largest`; `bad` where one number is none."""
    live = (bad == 0) & (largest >= 7.888609052210118e-31)
    safe = tl.where(live, largest, 1.0)
    steps = tl.full(largest.shape, 127.0, dtype=tl.float32)
    scale = tl.where(live, tl.div_rn(safe, steps), tl.where(bad != 0, float("nan"), 0.0))
    return scale, tl.where(live, tl.div_rn(steps, safe), 0.0)


@triton.jit
def codes_by(value, inverse):
    """int8 of float32 values times the inverse of their scale; 0 where that is 0."""
    value = tl.where(inverse == 0.0, 0.0, value) * inverse
    # The clamp also keeps the product and the rounding from being fused into one step.
    value = tl.minimum(tl.maximum(value, -127.0), 127.0)
    # Adding 1.5 * 2^23 rounds half to even.
    return ((value + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def quantize_activations_kernel(x, x_stride_m, x_stride_k, perm, q, scales, K, GROUP, GROUPS,
                                PERM: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, MANY groups). A group is walked in blocks of BLOCK columns, twice."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * MANY + tl.arange(0, MANY)
    lane = tl.arange(0, BLOCK)
    x_row = row * x_stride_m
    largest = tl.zeros((MANY,), dtype=tl.float32)
    bad = tl.zeros((MANY,), dtype=tl.int32)
    for first in range(0, GROUP, BLOCK):
        k = group[:, None] * GROUP + first + lane[None, :]
        inside = (first + lane < GROUP)[None, :] & (k < K)
        value = tl.abs(quantize_tile(x, x_row, x_stride_k, perm, k, inside, PERM))
        finite = value <= 3.4028234663852886e38
        bad = tl.maximum(bad, tl.max(tl.where(finite, 0, 1), axis=1))
        largest = tl.maximum(largest, tl.max(tl.where(finite, value, 0.0), axis=1))
    scale, inverse = scale_and_inverse(largest, bad)
    tl.store(scales + row * GROUPS + group, scale, mask=group < GROUPS)
    for first in range(0, GROUP, BLOCK):
        k = group[:, None] * GROUP + first + lane[None, :]
        inside = (first + lane < GROUP)[None, :] & (k < K)
        value = quantize_tile(x, x_row, x_stride_k, perm, k, inside, PERM)
        tl.store(q + row * K + k, codes_by(value, inverse[:, None]), mask=inside)
