# SPDX-License-Identifier: Apache-2.0
"""Plain numpy definitions of the small number encodings that formats are made of.

They are the truth that kernels are held against, so they share no code with them.
"""

from __future__ import annotations

import numpy as np


def stream_bytes(k: int, bits: int) -> int:
    """Bytes of a row of `k` codes in the dense bit stream."""
    return (k * bits + 7) // 8


def unpack_codes(stream: np.ndarray, k: int, bits: int) -> np.ndarray:
    """Codes [N, k] of a bit stream [N, ceil(k*bits/8)]: code j is bits j*bits .. , low first."""
    bit = np.unpackbits(stream, axis=1, count=k * bits, bitorder="little")
    codes = np.packbits(bit.reshape(-1, bits), axis=1, bitorder="little")
    return codes.reshape(stream.shape[0], k)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack_codes`; the unused high bits of a row's last byte are zero."""
    bit = np.unpackbits(codes[..., None], axis=2, count=bits, bitorder="little")
    return np.packbits(bit.reshape(codes.shape[0], -1), axis=1, bitorder="little")


def _e4m3_values() -> np.ndarray:
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7).astype(np.float32)
    magnitude = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(mantissa + 8, exponent - 10)
    )
    magnitude[(byte & 127) == 127] = np.nan
    return np.where(byte & 128, -magnitude, magnitude).astype(np.float32)


def _e8m0_values() -> np.ndarray:
    values = np.full(256, np.nan, np.float32)
    values[:255] = np.ldexp(np.float32(1), np.arange(255) - 127)
    return values


E4M3 = _e4m3_values()  # value of every byte; 0x7f and 0xff are NaN
E8M0 = _e8m0_values()  # 2^(byte - 127); 255 is NaN
for _values in (E4M3, E8M0):
    _values.flags.writeable = False


def e4m3_codes(x: np.ndarray) -> np.ndarray:
    """Bytes of the e4m3 values nearest to `x` >= 0, half to even, saturating at 448."""
    values = E4M3[:127].astype(np.float64)
    middle = (values[1:] + values[:-1]) / 2
    x = x.astype(np.float64)
    index = np.searchsorted(middle, x, side="left")
    tie = (index < 126) & (middle[np.minimum(index, 125)] == x)
    return (index + (tie & (index % 2 == 1))).astype(np.uint8)


def e2m1_codes(x: np.ndarray) -> np.ndarray:
    """Codes of the e2m1 values nearest to `x`, half to even, saturating at 6; zero has no sign.

    The magnitudes 0 .5 1 1.5 2 | 3 4 | 6 have steps of 1/2, 1 and 2, so in each range the code is
    the number of steps plus a constant, and an even code is an even mantissa.
    """
    size = np.abs(x)
    low, middle, high = np.rint(2 * size), np.rint(size) + 2, np.rint(size / 2) + 4
    code = np.where(size < 2, low, np.where(size < 4, middle, np.minimum(high, 7)))
    code[(x < 0) & (code > 0)] += 8
    return code.astype(np.uint8)
