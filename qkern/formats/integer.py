# SPDX-License-Identifier: Apache-2.0
"""Uniform integers: w = scale * (code - zero)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from qkern.errors import FormatError
from qkern.formats import _fit
from qkern.formats._base import (
    ACTIVATIONS,
    Format,
    Part,
    checked_bits,
    checked_group,
    register,
    set_checked,
)

_BITS = (2, 3, 4, 5, 6, 8)
_ZEROS = ("uint8", "float16", "float32")


@register
@dataclass(frozen=True, repr=False)
class Int(Format):
    """Codes on a uniform grid, one scale per group of columns or (group_size None) per row.

    Symmetric: zero is 2**(bits - 1) and not stored. Otherwise zeros lie beside the scales, as
    uint8 or, for formats of other packages that need it, as floats.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    family = "int"
    kind = "int"
    words = {"asym": {"symmetric": False}}

    def __post_init__(self) -> None:
        super().__post_init__()
        set_checked(self, "bits", checked_bits(self.bits, _BITS))
        if self.group_size is not None:
            set_checked(self, "group_size", checked_group(self.group_size))
        if not isinstance(self.symmetric, bool | np.bool_):
            raise FormatError(f"symmetric must be True or False, but {self.symmetric!r} came.")
        set_checked(self, "symmetric", bool(self.symmetric))

    def options(self) -> list[str]:
        group = [] if self.group_size is None else [f"g{self.group_size}"]
        return group + ([] if self.symmetric else ["asym"])

    @classmethod
    def variants(cls, group_sizes: tuple[int, ...] = (32, 64, 128)) -> Iterator[Format]:
        for bits, group, symmetric, activations in product(
            _BITS, (None, *group_sizes), (True, False), ACTIVATIONS
        ):
            yield cls(bits, group, symmetric, activations=activations)

    def parts(self, n: int, k: int) -> dict[str, Part]:
        parts = super().parts(n, k)
        if not self.symmetric:
            parts["zeros"] = Part((n, self.groups(k)), _ZEROS)
        return parts

    def quantize(
        self, w: np.ndarray, *, importance: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        if self.group_size is not None and self.bits <= 4:
            try:
                return self._rtn(w, "float16")
            except FormatError:  # a scale is no normal float16
                pass
        try:
            return self._rtn(w, "float32")
        except FormatError:  # nor a normal float32: groups that small become zeros
            w = self._without_tiny_groups(w)
        try:
            return self._rtn(w, "float32")
        except FormatError:
            raise FormatError(
                f"{self} cannot hold these weights: the range of a group does not fit float32."
            ) from None

    def _rtn(self, w: np.ndarray, scale_dtype: str) -> dict[str, np.ndarray]:
        return _fit.rtn(w, self.bits, self.group_size, self.symmetric, scale_dtype)

    def _without_tiny_groups(self, w: np.ndarray) -> np.ndarray:
        steps = 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1
        tiny = np.abs(_fit.group_extreme(w, self.group_size)) < steps * 2.0**-126
        return np.where(_fit.spread(tiny, w.shape[1], self.group_size), np.float32(0), w)
