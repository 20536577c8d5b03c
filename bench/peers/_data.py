# SPDX-License-Identifier: Apache-2.0
"""The common weight and activations, quantizers for the peers, and the check of results."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np


@functools.lru_cache(2)
def weight(n: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k))


@functools.lru_cache(4)
def activations(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((m, k), dtype=np.float32)


@dataclass(frozen=True)
class Quantized:
    """w = (code - zero) * scale. Codes are padded with zeros of W to whole groups."""

    codes: np.ndarray  # uint8 [N, groups * group]
    scales: np.ndarray  # float32 [N, groups]
    zeros: np.ndarray  # uint8 [N, groups]
    group: int
    k: int

    def weight(self, scales: np.ndarray | None = None) -> np.ndarray:
        """Float32 [N, K], with these scales in place of its own."""
        scales = self.scales if scales is None else scales
        n, groups = scales.shape
        centred = self.codes.reshape(n, groups, self.group).astype(np.float32)
        centred -= self.zeros[..., None]
        centred *= scales[..., None]
        return centred.reshape(n, -1)[:, : self.k]

    def signed(self) -> np.ndarray:
        """Codes of a symmetric weight as int8."""
        return (self.codes.astype(np.int16) - int(self.zeros.flat[0])).astype(np.int8)


@functools.lru_cache(4)
def quantized(n: int, k: int, bits: int, group: int, symmetric: bool) -> Quantized:
    groups = -(-k // group)
    w = np.zeros((n, groups * group), np.float32)
    w[:, :k] = weight(n, k)
    w = w.reshape(n, groups, group)
    top = 2**bits - 1
    if symmetric:
        scales = np.abs(w).max(-1) / np.float32(top / 2)
        zeros = np.full((n, groups), 2 ** (bits - 1), np.uint8)
    else:
        low = np.minimum(w.min(-1), 0)
        scales = (np.maximum(w.max(-1), 0) - low) / np.float32(top)
        zeros = np.clip(np.rint(-low / scales), 0, top).astype(np.uint8)
    codes = np.rint(w / scales[..., None]) + zeros[..., None]
    codes = np.clip(codes, 0, top).astype(np.uint8).reshape(n, groups * group)
    return Quantized(codes, scales.astype(np.float32), zeros, group, k)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Pairs of 4-bit codes along the last axis, the first in the low half."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], -1)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def copy_of(array: np.ndarray, i: int) -> np.ndarray:
    """Copy i: rows shifted, so that no package finds two copies equal and keeps one."""
    return np.ascontiguousarray(np.roll(array, 16 * i, 0)) if i else np.ascontiguousarray(array)


def whole_groups(k: int, group: int) -> None:
    if k % group:
        raise ValueError(f"K = {k} is no multiple of {group}")


def relative_error(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> float:
    """|y - x . W^T| / |x . W^T| in float64, over at most 16 of the rows."""
    rows = np.unique(np.linspace(0, len(x) - 1, min(16, len(x))).astype(int))
    x64, wrong, size = x[rows].astype(np.float64), 0.0, 0.0
    for begin in range(0, len(w), 1024):
        truth = x64 @ w[begin : begin + 1024].T.astype(np.float64)
        wrong += float(np.square(y[rows, begin : begin + 1024] - truth).sum())
        size += float(np.square(truth).sum())
    return (wrong / size) ** 0.5
