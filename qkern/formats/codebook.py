# SPDX-License-Identifier: Apache-2.0
"""Clustered weights: w = scale * table[code] with a learned table."""

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
    _listed,
    checked_bits,
    checked_group,
    register,
    set_checked,
)

_BITS = (2, 3, 4, 8)
_PER = ("tensor", "row", "group")
_INT8_MAX = np.float32(127)


@register
@dataclass(frozen=True, repr=False)
class Codebook(Format):
    """A table of 2**bits entries per tensor, per row, or per group of a row.

    `group_size` is the width of a table's group for per="group", and otherwise adds a scale per
    group of columns to the shared table. With int8 activations table entries are integers in
    -128..127 and there is always a scale.
    """

    bits: int
    per: str = "row"
    group_size: int | None = None

    family = "codebook"
    kind = "table"
    words = {"tensor": {"per": "tensor"}, "group": {"per": "group"}}
    uses_importance = True

    def __post_init__(self) -> None:
        super().__post_init__()
        set_checked(self, "bits", checked_bits(self.bits, _BITS))
        if self.per not in _PER:
            raise FormatError(f"per must be one of {_listed(_PER)}, not {self.per!r}.")
        set_checked(self, "table_per", self.per)
        if self.group_size is not None:
            set_checked(self, "group_size", checked_group(self.group_size))
        elif self.per == "group":
            raise FormatError(
                "A codebook per group needs a group_size, as in Codebook(4, 'group', 64) "
                "or 'codebook4-group-g64'."
            )

    @classmethod
    def variants(cls, group_sizes: tuple[int, ...] = (32, 64, 128)) -> Iterator[Format]:
        for bits, per, group, activations in product(
            _BITS, _PER, (None, *group_sizes), ACTIVATIONS
        ):
            if per != "group" or group is not None:
                yield cls(bits, per, group, activations=activations)

    @property
    def has_scales(self) -> bool:
        return self._group_scales or self.activations != "float"

    @property
    def _group_scales(self) -> bool:
        return self.group_size is not None and self.per != "group"

    def quantize(
        self, w: np.ndarray, *, importance: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Optimal k-means; with group scales, of the weights divided by their group's maximum."""
        scales, divided = None, w
        if self._group_scales:
            scales, divided, importance = self._normalized(w, importance)
        table_group = self.group_size if self.per == "group" else None
        table, codes = _fit.kmeans(divided, self.bits, self.per, table_group, importance)
        if self.activations != "float":
            table, scales = self._snapped(table, scales, w.shape)
            codes = _fit.nearest(w, self.bits, table, self.per, scales, self.group_size)
        parts = {"codes": codes, "codebook": table}
        if scales is not None:
            # A snapped table's scale carries a factor of its own and is kept exactly.
            half = self.bits <= 4 and self.activations == "float"
            parts["scales"] = _fit.store_scales(scales, prefer_half=half)
        return parts

    def _normalized(
        self, w: np.ndarray, importance: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scales [N, G], weights divided by them, and the importance that the division asks for.

        The error of a weight is its scale times the error of the quotient, so squares are weighed
        by scale^2. Groups of zeros get scale 0, which is exact and takes no part in the fit.
        """
        k = w.shape[1]
        scales = np.abs(_fit.group_extreme(w, self.group_size))
        scales[scales < _fit.SMALLEST_NORMAL["float32"]] = 0
        scales = _fit.store_scales(scales, prefer_half=self.bits <= 4).astype(np.float32)
        divisor = _fit.spread(np.where(scales == 0, np.float32(1), scales), k, self.group_size)
        # Relative to the largest scale, so that squares neither overflow nor vanish together.
        relative = scales / (scales.max() or np.float32(1))
        weight = _fit.spread(relative * relative, k, self.group_size)
        return scales, w / divisor, weight if importance is None else weight * importance

    def _snapped(
        self, table: np.ndarray, scales: np.ndarray | None, shape: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Integer tables and the scales [N, G] that take the factor of their table."""
        n, groups = shape[0], self.groups(shape[1])
        factor = np.abs(table).max(axis=1) / _INT8_MAX
        factor[factor < _fit.SMALLEST_NORMAL["float32"]] = 1
        snapped = np.rint(table / factor[:, None])
        per_group = factor.reshape(n, groups) if self.per == "group" else factor.reshape(-1, 1)
        base = np.ones((n, groups), np.float32) if scales is None else scales
        return snapped, base * per_group
