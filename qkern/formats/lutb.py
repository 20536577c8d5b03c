# SPDX-License-Identifier: Apache-2.0
"""LUT-B: a table of 8 float8 numbers per tile of 8 rows x 64 columns, 3.125 bits per weight.

The last tiles of rows and columns may be smaller. Checkpoints of compressed-tensors' prototype
(vllm-project/compressed-tensors#801) hold the same numbers tile by tile; `from_tiles` and
`to_tiles` convert exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qkern import _arrays
from qkern._arrays import Array
from qkern.errors import FormatError
from qkern.formats import _fit
from qkern.formats._base import Format, Part, register
from qkern.formats._codes import E4M3, stream_bytes
from qkern.formats._fit import TILE_COLUMNS, TILE_ROWS

_BITS, _ENTRIES = 3, 8
_ROW_BYTES = TILE_COLUMNS * _BITS // 8  # of one row of a tile
_TILE_BYTES = TILE_ROWS * _ROW_BYTES
_NEGATIVE_ZERO, _LARGEST = 0x80, 0x7E


@register
@dataclass(frozen=True, repr=False)
class LUTB(Format):
    """w = table[code], `codebook` float8 e4m3 bytes [tiles, 8], tiles row by row.

    With int8 activations the entries of a tile are integers (of at most 120) times one power of
    two: 2**(E - 6), where 2**E is the exponent of the largest. Their values are the same in every
    mode.
    """

    family = "lutb"
    kind = "table"
    bits = _BITS
    group_size = TILE_COLUMNS
    table_per = "tile"
    table_encoding = "e4m3"
    scale_encoding = "e8m0"  # of the scales that kernels get; none are stored
    uses_importance = True

    @property
    def has_scales(self) -> bool:
        return False

    def parts(self, n: int, k: int) -> dict[str, Part]:
        return {
            "codes": Part((n, stream_bytes(k, _BITS)), ("uint8",)),
            "codebook": Part((_row_tiles(n) * self.groups(k), _ENTRIES), ("uint8",)),
        }

    def quantize(
        self, w: np.ndarray, *, importance: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The best table of every tile among all that the format allows."""
        self._check_range(w)
        codebook, codes = _fit.tiles(w, self.activations, importance)
        return {"codes": codes, "codebook": codebook}

    def _check_range(self, w: np.ndarray) -> None:
        """There is no scale that would bring weights into the range of float8."""
        size = np.abs(w)
        largest = float(size.max())
        what = None
        if largest > E4M3[_LARGEST]:
            row, column = (int(i) for i in np.unravel_index(int(size.argmax()), w.shape))
            what = f"weight[{row}, {column}] is {w[row, column]:g}, and float8 ends at 448"
        elif 0 < largest <= E4M3[1] / 2:
            what = f"all of them are below 2**-10 (the largest is {largest:g}) and would become 0"
        if what is not None:
            raise FormatError(
                f"{self} cannot hold these weights: {what}. Multiply the weight by a power of two "
                "and the output by its inverse, or choose a format with scales, as codebook3."
            )

    def decode_codebook(self, codebook: np.ndarray) -> np.ndarray:
        return E4M3[codebook]

    def refused_entries(self, codebook: np.ndarray) -> tuple[np.ndarray, str]:
        multiples = E4M3[codebook] / _units(codebook)[:, None]
        bad = (multiples != np.rint(multiples)) | (codebook == _NEGATIVE_ZERO)
        return bad, (
            "must hold integers times one power of two in each tile, 2**(E - 6) where 2**E is the "
            f"exponent of the tile's largest entry, and no negative zero, for {self} (activations "
            f"{self.activations!r}; 'lutb' takes any entries)"
        )

    def core_parts(self, parts: dict[str, Any], shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """float32 entries; with int8 activations integers, and a scale (e8m0) per row and tile."""
        codebook = _arrays.to_numpy(parts["codebook"])
        if self.activations == "float":
            return {"codebook": E4M3[codebook]}
        units = _units(codebook)
        exponents = (np.frexp(units)[1] + 126).astype(np.uint8)
        scales = exponents.reshape(-1, self.groups(shape[1])).repeat(TILE_ROWS, axis=0)
        return {
            "codebook": E4M3[codebook] / units[:, None],
            "scales": np.ascontiguousarray(scales[: shape[0]]),
        }

    def core_shapes(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], str]]:
        shapes = {"codebook": (self.parts(n, k)["codebook"].shape, "float32")}
        if self.activations != "float":
            shapes["scales"] = ((n, self.groups(k)), "uint8")
        return shapes

    def stored_codebook(self, core: dict[str, np.ndarray]) -> np.ndarray:
        entries = core["codebook"]
        if "scales" in core:
            exponents = core["scales"][::TILE_ROWS].reshape(-1, 1).astype(np.int32) - 127
            entries = np.ldexp(entries, exponents)
        return _bytes_of(entries)

    def _entries(self, codes: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
        n, k = codes.shape
        row, column = np.arange(n)[:, None] // TILE_ROWS, np.arange(k)[None] // TILE_COLUMNS
        return E4M3[parts["codebook"][row * self.groups(k) + column, codes]]

    # ---- tile by tile ----

    @staticmethod
    def from_tiles(
        weight_packed: Array, weight_codebook: Array, shape: tuple[int, int] | None = None
    ) -> dict[str, Array]:
        """Parts of a checkpoint that is stored tile by tile, for `QuantizedTensor.from_parts`.

        `weight_packed` is uint8 [N/8, K/64, 192]: the codes of a tile row by row, each row a
        little-endian bit stream of 24 bytes. `weight_codebook` is [N/8, K/64, 8] float8 e4m3, or
        its bytes. `shape` (N, K) cuts the last tiles; without it they are whole.
        """
        kind = _arrays.kind_of(weight_packed, "weight_packed")
        device = _arrays.device_of(weight_packed)
        tiles = _arrays.to_numpy(weight_packed)
        codebook = _arrays.to_numpy(_as_bytes(weight_codebook))
        if tiles.dtype != np.uint8 or tiles.ndim != 3 or tiles.shape[2] != _TILE_BYTES:
            raise FormatError(
                f"weight_packed must be uint8 [N/8, K/64, {_TILE_BYTES}], "
                f"but is {tiles.dtype.name} {list(tiles.shape)}."
            )
        rows, groups = tiles.shape[:2]
        if codebook.dtype != np.uint8 or codebook.shape != (rows, groups, _ENTRIES):
            raise FormatError(
                f"weight_codebook must be float8_e4m3fn or uint8 [{rows}, {groups}, {_ENTRIES}], "
                f"but is {_arrays.name_of(weight_codebook)} {list(codebook.shape)}."
            )
        n, k = shape or (rows * TILE_ROWS, groups * TILE_COLUMNS)
        if _row_tiles(n) != rows or _column_tiles(k) != groups:
            raise FormatError(
                f"A weight of {n} x {k} has {_row_tiles(n)} x {_column_tiles(k)} tiles, "
                f"but weight_packed has {rows} x {groups}."
            )
        by_row = tiles.reshape(rows, groups, TILE_ROWS, _ROW_BYTES).transpose(0, 2, 1, 3)
        codes = by_row.reshape(rows * TILE_ROWS, -1)[:n, : stream_bytes(k, _BITS)].copy()
        if k * _BITS % 8:
            codes[:, -1] &= (1 << k * _BITS % 8) - 1
        parts = {"codes": codes, "codebook": codebook.reshape(-1, _ENTRIES).copy()}
        return {name: _arrays.from_numpy(part, kind, device) for name, part in parts.items()}

    @staticmethod
    def to_tiles(codes: Array, codebook: Array, shape: tuple[int, int]) -> tuple[Array, Array]:
        """`weight_packed` and `weight_codebook` (as bytes) of `from_tiles`; what the last tiles
        lack of 8 rows or 64 columns has code 0."""
        n, k = shape
        rows, groups = _row_tiles(n), _column_tiles(k)
        kind, device = _arrays.kind_of(codes, "codes"), _arrays.device_of(codes)
        stream = _arrays.to_numpy(codes)
        tables = _arrays.to_numpy(_as_bytes(codebook))
        if stream.shape != (n, stream_bytes(k, _BITS)) or tables.shape != (rows * groups, _ENTRIES):
            raise FormatError(
                f"A weight of {n} x {k} has codes {[n, stream_bytes(k, _BITS)]} and codebook "
                f"{[rows * groups, _ENTRIES]}, but {list(stream.shape)} and "
                f"{list(tables.shape)} came."
            )
        whole = np.zeros((rows * TILE_ROWS, groups * _ROW_BYTES), np.uint8)
        whole[:n, : stream.shape[1]] = stream
        if k * _BITS % 8:
            whole[:, stream.shape[1] - 1] &= (1 << k * _BITS % 8) - 1
        tiles = whole.reshape(rows, TILE_ROWS, groups, _ROW_BYTES).transpose(0, 2, 1, 3)
        packed = np.ascontiguousarray(tiles).reshape(rows, groups, _TILE_BYTES)
        return (
            _arrays.from_numpy(packed, kind, device),
            _arrays.from_numpy(tables.reshape(rows, groups, _ENTRIES).copy(), kind, device),
        )


def _row_tiles(n: int) -> int:
    return -(-n // TILE_ROWS)


def _column_tiles(k: int) -> int:
    return -(-k // TILE_COLUMNS)


def _units(codebook: np.ndarray) -> np.ndarray:
    """2^(E - 6) of every tile, 1 for a tile of zeros."""
    largest = np.abs(E4M3[codebook]).max(axis=1)
    exponent = np.frexp(largest)[1] - 1
    return np.where(largest == 0, 1, np.ldexp(np.float32(1), exponent - 6)).astype(np.float32)


def _bytes_of(values: np.ndarray) -> np.ndarray:
    """Bytes of numbers that float8 e4m3 holds exactly, the sign of zero included."""
    magnitude = np.searchsorted(E4M3[:127], np.abs(values)).astype(np.uint8)
    return magnitude | np.signbit(values).astype(np.uint8) << 7


def _as_bytes(codebook: Array) -> Array:
    """uint8 of an array of float8 e4m3."""
    if _arrays.name_of(codebook) != "float8_e4m3fn":
        return codebook
    if isinstance(codebook, np.ndarray):
        return codebook.view(np.uint8)
    import torch

    return codebook.view(torch.uint8)
