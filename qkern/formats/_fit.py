# SPDX-License-Identifier: Apache-2.0
"""From float32 weights to codes: the fitting functions of the core on numpy arrays."""

from __future__ import annotations

import numpy as np

from qkern import _core
from qkern._arrays import DTYPE_CODES, address
from qkern.formats._codes import stream_bytes

TABLE_PER = {"tensor": 0, "row": 1, "group": 2, "tile": 3}
TILE_ROWS, TILE_COLUMNS = 8, 64
SMALLEST_NORMAL = {"float16": 2.0**-14, "float32": 2.0**-126}


def table_count(per: str, n: int, groups: int) -> int:
    return {"tensor": 1, "row": n, "group": n * groups}[per]


def group_starts(k: int, group: int | None) -> np.ndarray:
    return np.arange(0, k, group or k)


def group_extreme(w: np.ndarray, group: int | None) -> np.ndarray:
    """Per row and group the value of largest magnitude with its sign, [N, G]."""
    starts = group_starts(w.shape[1], group)
    low = np.minimum.reduceat(w, starts, axis=1)
    high = np.maximum.reduceat(w, starts, axis=1)
    return np.where(-low > high, low, high)


def spread(per_group: np.ndarray, k: int, group: int | None) -> np.ndarray:
    """[N, G] to [N, k]: every column gets the value of its group."""
    if per_group.shape[1] == 1:
        return np.broadcast_to(per_group, (per_group.shape[0], k))
    return np.repeat(per_group, group or k, axis=1)[:, :k]


def store_scales(scales: np.ndarray, prefer_half: bool) -> np.ndarray:
    """float16 where that is wished and every scale is a normal float16 or zero, else float32."""
    if prefer_half:
        with np.errstate(over="ignore", under="ignore"):
            half = scales.astype(np.float16)
        size = np.abs(half[scales != 0])
        if size.size == 0 or (size.min() >= SMALLEST_NORMAL["float16"] and np.isfinite(size).all()):
            return half
    return scales


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The bit stream of one byte per code (qk_codes_pack)."""
    n, k = codes.shape
    stream = np.empty((n, stream_bytes(k, bits)), np.uint8)
    _core.codes_pack(address(codes), n, k, k, bits, address(stream), stream.shape[1])
    return stream


def rtn(
    w: np.ndarray, bits: int, group: int | None, symmetric: bool, scale_dtype: str
) -> dict[str, np.ndarray]:
    """Round to nearest on a uniform grid (qk_fit_rtn); FormatError where a scale does not fit."""
    n, k = w.shape
    groups = len(group_starts(k, group))
    parts = {
        "codes": np.empty((n, stream_bytes(k, bits)), np.uint8),
        "scales": np.empty((n, groups), scale_dtype),
    }
    if not symmetric:
        parts["zeros"] = np.empty((n, groups), np.uint8)
    _core.fit_rtn(
        address(w),
        n,
        k,
        k,
        bits,
        min(group or k, k),
        symmetric,
        DTYPE_CODES[scale_dtype],
        address(parts["codes"]),
        parts["codes"].shape[1],
        address(parts["scales"]),
        address(parts.get("zeros")),
    )
    return parts


def nearest(
    w: np.ndarray,
    bits: int,
    table: np.ndarray,
    per: str = "tensor",
    scales: np.ndarray | None = None,
    group: int | None = None,
) -> np.ndarray:
    """Codes (bit stream) of the nearest entries after division by the scale (qk_fit_table).

    A scale of zero stands for a group of zeros; it is divided by one.
    """
    n, k = w.shape
    codes = np.empty((n, stream_bytes(k, bits)), np.uint8)
    table = np.ascontiguousarray(table, np.float32).reshape(-1, 2**bits)
    if len(table) != table_count(per, n, len(group_starts(k, group))):
        raise ValueError(
            f"{len(table)} tables do not fit a weight of {n} x {k} with one per {per}."
        )
    if scales is not None:
        scales = np.ascontiguousarray(np.where(scales == 0, 1, scales), np.float32)
    _core.fit_table(
        address(w),
        n,
        k,
        k,
        bits,
        min(group or k, k),
        address(scales),
        address(table),
        TABLE_PER[per],
        address(codes),
        codes.shape[1],
    )
    return codes


def kmeans(
    w: np.ndarray,
    bits: int,
    per: str,
    group: int | None = None,
    importance: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tables [tables, 2^bits] and codes of the optimal k-means (qk_fit_kmeans).

    `importance` is [k] (the same for all rows) or [n, k].
    """
    n, k = w.shape
    groups = len(group_starts(k, group))
    table = np.empty((table_count(per, n, groups), 2**bits), np.float32)
    codes = np.empty((n, stream_bytes(k, bits)), np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
    _core.fit_kmeans(
        address(w),
        n,
        k,
        k,
        bits,
        TABLE_PER[per],
        min(group or k, k),
        address(importance),
        k if importance is not None and importance.ndim == 2 else 0,
        address(table),
        address(codes),
        codes.shape[1],
        0,
    )
    return table, codes


def tiles(
    w: np.ndarray, activations: str, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tables (bytes of float8, [tiles, 8]) and codes of the best LUT-B (qk_fit_tiles)."""
    n, k = w.shape
    count = -(-n // TILE_ROWS) * -(-k // TILE_COLUMNS)
    table = np.empty((count, 8), np.uint8)
    codes = np.empty((n, stream_bytes(k, 3)), np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
    _core.fit_tiles(
        address(w),
        n,
        k,
        k,
        0 if activations == "float" else 1,
        address(importance),
        k if importance is not None and importance.ndim == 2 else 0,
        address(table),
        address(codes),
        codes.shape[1],
        0,
    )
    return table, codes
