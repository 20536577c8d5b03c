# SPDX-License-Identifier: Apache-2.0
"""Fixed 16-entry tables with a scale per group: NF4, FP4, IQ4NL, MXFP4, NVFP4.

No table holds a negative zero: codes of one value decode to one bit pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from qkern.formats import _fit
from qkern.formats._base import (
    ACTIVATIONS,
    Format,
    Part,
    checked_group,
    register,
    set_checked,
)
from qkern.formats._codes import E4M3, e2m1_codes, e4m3_codes


def _table(values: Any) -> np.ndarray:
    table = np.asarray(values, np.float32) + np.float32(0)  # -0 + 0 is 0
    table.flags.writeable = False
    return table


def _mirrored(magnitudes: list[float]) -> np.ndarray:
    """Codes 0..7 the magnitudes, 8..15 their negatives."""
    return _table(magnitudes + [-m for m in magnitudes])


class FixedTable(Format):
    """A table given by the format. `values` serves float activations, `int_values` int8 ones."""

    kind = "table"
    bits = 4
    table_per = "tensor"
    values: np.ndarray
    int_values: np.ndarray
    int_scale: float  # int_values * int_scale is values, or close to it

    @property
    def table(self) -> np.ndarray:
        return self.values if self.activations == "float" else self.int_values

    @property
    def table_scale(self) -> float:
        return 1.0 if self.activations == "float" else self.int_scale


@dataclass(frozen=True, repr=False)
class ScaledTable(FixedTable):
    """Float scales that map a group's extreme value onto the table's extreme entry."""

    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        set_checked(self, "group_size", checked_group(self.group_size))

    @classmethod
    def variants(cls, group_sizes: tuple[int, ...] = (32, 64, 128)) -> Iterator[Format]:
        sizes = dict.fromkeys((cls._default_group(), *group_sizes))
        yield from (cls(group_size=g, activations=a) for g, a in product(sizes, ACTIVATIONS))

    def quantize(
        self, w: np.ndarray, *, importance: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        values = self.values
        anchor = values[np.argmax(np.abs(values))]
        extreme = _fit.group_extreme(w, self.group_size)
        # A table without the anchor's mirror image takes the sign into the scale.
        scales = np.abs(extreme / anchor) if -anchor in values else extreme / anchor
        # A group too small for a scale becomes zeros: by code where the table has a zero.
        blank = np.float32(1 if 0 in values else 0)
        scales[np.abs(scales) < _fit.SMALLEST_NORMAL["float32"]] = blank
        scales = _fit.store_scales(scales, prefer_half=True)
        effective = scales.astype(np.float32) * np.float32(self.table_scale)
        codes = _fit.nearest(w, self.bits, self.table, "tensor", effective, self.group_size)
        return {"codes": codes, "scales": scales}


_NF4 = _table(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
_FP4 = _table(_mirrored([0, 0.0625, 8, 12, 4, 6, 2, 3]) / np.float32(12))
_IQ4NL = _table([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_E2M1 = _mirrored([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_E4M3_ONE = 0x38
_INT8_STEP = float(np.float32(1) / np.float32(127))


@register
@dataclass(frozen=True, repr=False)
class NF4(ScaledTable):
    """Quantiles of a normal distribution on [-1, 1] with a float scale per group."""

    family = "nf4"
    values = _NF4
    int_values = _table(np.rint(127 * _NF4))
    int_scale = _INT8_STEP


@register
@dataclass(frozen=True, repr=False)
class FP4(ScaledTable):
    """A small float with sign, on [-1, 1], with a float scale per group."""

    family = "fp4"
    values = _FP4
    int_values = _table(np.rint(127 * _FP4))
    int_scale = _INT8_STEP


@register
@dataclass(frozen=True, repr=False)
class IQ4NL(ScaledTable):
    """The non-linear integers of GGUF's IQ4_NL; the scale carries a sign."""

    group_size: int = 32

    family = "iq4nl"
    values = _IQ4NL
    int_values = _IQ4NL
    int_scale = 1.0


class E2M1(FixedTable):
    """Codes that are four-bit floats: sign, two bits of exponent, one of mantissa."""

    values = _E2M1
    int_values = _table(2 * _E2M1)
    int_scale = 0.5


@register
@dataclass(frozen=True, repr=False)
class MXFP4(E2M1):
    """OCP MX 1.0: e2m1 codes, a power of two (e8m0) per 32 columns."""

    family = "mxfp4"
    group_size = 32
    scale_encoding = "e8m0"

    def quantize(
        self, w: np.ndarray, *, importance: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Scale 2^(floor(log2(max|w|)) - 2): the largest element lies in [4, 8), 6 saturates."""
        largest = np.abs(_fit.group_extreme(w, 32))
        exponent = np.frexp(largest)[1] - 1 - 2
        exponent = np.where(largest == 0, 0, np.clip(exponent, -127, 127))
        quotients = np.ldexp(w, -_fit.spread(exponent, w.shape[1], 32))
        return {
            "codes": _fit.pack(e2m1_codes(quotients), 4),
            "scales": (exponent + 127).astype(np.uint8),
        }


@register
@dataclass(frozen=True, repr=False)
class NVFP4(E2M1):
    """e2m1 codes, an e4m3 scale per 16 columns, and one float32 `global_scale` per tensor."""

    family = "nvfp4"
    group_size = 16
    scale_encoding = "e4m3"

    def parts(self, n: int, k: int) -> dict[str, Part]:
        return super().parts(n, k) | {"global_scale": Part((1,), ("float32",))}

    def table_factor(self, parts: dict[str, Any]) -> float:
        return float(np.float32(self.table_scale) * np.float32(float(parts["global_scale"][0])))

    def quantize(
        self, w: np.ndarray, *, importance: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The largest weight of the tensor gets the largest scale (448) and code (6)."""
        largest = np.abs(_fit.group_extreme(w, 16))
        whole = largest.max() / np.float32(6 * 448)
        if whole < _fit.SMALLEST_NORMAL["float32"]:
            whole = np.float32(1)
        stored = e4m3_codes(largest / np.float32(6) / whole)
        # A scale of zero would lose the group, the smallest one keeps what it can.
        stored = np.where(largest == 0, _E4M3_ONE, np.maximum(stored, 1)).astype(np.uint8)
        divisor = _fit.spread(E4M3[stored] * whole, w.shape[1], 16)
        return {
            "codes": _fit.pack(e2m1_codes(w / divisor), 4),
            "scales": stored,
            "global_scale": np.array([whole], np.float32),
        }
