# SPDX-License-Identifier: Apache-2.0
"""What the kernels need to know of a format, in one small immutable value, and the checks of
parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

KINDS = ("int", "table")
ACTIVATIONS = ("float", "int8", "int8_group")
TABLES = (None, "tensor", "row", "group", "tile")
ENCODINGS = ("float", "e8m0", "e4m3")
INT8_GROUP = 128  # columns per activation scale where the weight has no groups
TILE_ROWS, TILE_COLUMNS = 8, 64  # that share a table where table_per is "tile"
INT8_CHUNK = 65536  # columns whose products of int8 sum up within int32


@dataclass(frozen=True)
class Spec:
    """One weight format as the kernels see it.

    ``int``: w = scale * (code - zero); ``table``: w = (scale * table_scale) * table[code].
    ``group``: columns per scale, None where a row has one; ``table_per`` ``"tile"`` is one table
    for 8 rows x 64 columns, tiles in row-major order, whose columns are the groups of activations.
    ``scale_type`` and ``table_type`` say how bytes are to be read where scales or tables are stored
    as such.
    """

    kind: str
    bits: int
    group: int | None = None
    symmetric: bool = True
    table_per: str | None = None
    table_scale: float = 1.0
    activations: str = "float"
    scale_type: str = "float"
    table_type: str = "float"

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("activations", self.activations, ACTIVATIONS)
        _one_of("scale_type", self.scale_type, ENCODINGS)
        _one_of("table_type", self.table_type, ("float", "e4m3"))
        _one_of("table_per", self.table_per, TABLES[1:] if self.kind == "table" else TABLES[:1])
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, but {self.bits} came.")
        if self.group is not None and self.group < 8:
            raise ValueError(f"group must be None or at least 8 columns, but {self.group} came.")
        if self.table_per == "group" and self.group is None:
            raise ValueError("One table per group needs a group size, but group is None.")

    @classmethod
    def from_format(cls, fmt: Any, table_scale: float | None = None) -> Spec:
        """The spec of a ``qkern`` format. ``table_scale`` replaces the format's own where the
        tensor adds a factor (the float32 scale of a whole NVFP4 tensor)."""
        table_per = getattr(fmt, "table_per", None)
        return cls(
            kind=fmt.kind,
            bits=fmt.bits,
            group=None if table_per == "tile" else fmt.group_size,
            symmetric=getattr(fmt, "symmetric", True),
            table_per=table_per,
            table_scale=float(fmt.table_scale if table_scale is None else table_scale),
            activations=fmt.activations,
            scale_type=getattr(fmt, "scale_encoding", None) or "float",
            table_type=getattr(fmt, "table_encoding", None) or "float",
        )

    @property
    def text(self) -> str:
        """All fields as one string, exactly; ``Spec.parse`` reads it."""
        fields = (
            self.kind,
            self.bits,
            self.group or 0,
            int(self.symmetric),
            self.table_per or "none",
            self.table_scale.hex(),
            self.activations,
            self.scale_type,
            self.table_type,
        )
        return ":".join(str(field) for field in fields)

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Spec:
        kind, bits, group, symmetric, table, scale, activations, scales, tables = text.split(":")
        return Spec(
            kind,
            int(bits),
            int(group) or None,
            symmetric == "1",
            None if table == "none" else table,
            float.fromhex(scale),
            activations,
            scales,
            tables,
        )

    @property
    def name(self) -> str:
        """The class of formats that share a tuned configuration."""
        words = [f"{self.kind}{self.bits}"]
        words += [self.table_per] if self.table_per else []
        words += [f"g{self.group}"] if self.group else []
        words += ["asym"] if self.kind == "int" and not self.symmetric else []
        words += {"float": [], "int8": ["a8"], "int8_group": ["a8g"]}[self.activations]
        return "-".join(words)

    def of_columns(self, k: int) -> Spec:
        """The same for a weight of k columns: a group that holds a whole row is no group."""
        if self.group is None or self.group < k:
            return self
        return replace(
            self, group=None, table_per="row" if self.table_per == "group" else self.table_per
        )

    def groups(self, k: int) -> int:
        return 1 if self.group is None else -(-k // self.group)

    def tables(self, n: int, k: int) -> int:
        return {
            None: 0,
            "tensor": 1,
            "row": n,
            "group": n * self.groups(k),
            "tile": -(-n // TILE_ROWS) * self.tile_columns(k),
        }[self.table_per]

    def tile_columns(self, k: int) -> int:
        return -(-k // TILE_COLUMNS)

    def chunk(self) -> int:
        """Columns that are summed as integers before a float comes in (int8 activations)."""
        if self.group is not None:
            return self.group
        if self.table_per == "tile":
            return TILE_COLUMNS
        return INT8_GROUP if self.activations == "int8_group" else INT8_CHUNK

    def activation_group(self) -> int | None:
        """Columns per scale of the activations; None for one per row."""
        return self.chunk() if self.activations == "int8_group" else None


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, known))}, but {value!r} came."
        )


def check_parts(
    spec: Spec,
    k: int,
    codes: Any,
    scales: Any,
    zeros: Any,
    codebook: Any,
    perm: Any,
    experts: int = 1,
) -> int:
    """Refuse parts that a kernel would read wrongly or outside; returns N (rows of one expert)."""
    import torch

    if k < 1 or k * spec.bits >= 2**31:
        raise ValueError(
            f"The number of columns must be 1 to {2**31 // spec.bits - 1}, but {k} came."
        )
    row_bytes = -(-k * spec.bits // 8)
    if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] != row_bytes:
        raise ValueError(
            f"codes must be uint8 [N, {row_bytes}] for {k} columns of {spec.bits} bits, "
            f"but {codes.dtype} {list(codes.shape)} came."
        )
    rows = codes.shape[0]
    if rows % experts:
        raise ValueError(f"codes must stack the rows of {experts} experts, but has {rows} rows.")
    groups = spec.groups(k)
    if scales is None and spec.kind == "int":
        raise ValueError("Integer codes need scales, but scales is None.")
    if spec.kind == "int" and (zeros is None) != spec.symmetric:
        raise ValueError("zeros must be given exactly where the format is asymmetric.")
    encoded = spec.scale_type != "float"
    for name, part in (("scales", scales), ("zeros", zeros)):
        if part is not None and tuple(part.shape) != (rows, groups):
            raise ValueError(f"{name} must be [{rows}, {groups}], but {list(part.shape)} came.")
    if scales is not None and (scales.element_size() == 1) != encoded:
        raise ValueError(f"scales of type {spec.scale_type!r} cannot be stored as {scales.dtype}.")
    if spec.kind == "table":
        n = rows // experts
        if spec.table_per == "tile" and experts > 1 and n % 8:
            raise ValueError(
                f"Tile tables of several experts need N to be a multiple of 8, not {n}."
            )
        many = (1, experts) if spec.table_per == "tensor" else (spec.tables(rows, k),)
        if (
            codebook is None
            or codebook.ndim != 2
            or codebook.shape[0] not in many
            or (codebook.shape[1] != 2**spec.bits)
        ):
            got = "None" if codebook is None else list(codebook.shape)
            raise ValueError(f"codebook must be [{many[-1]}, {2**spec.bits}], but {got} came.")
        if not codebook.is_contiguous():
            raise ValueError("codebook must be contiguous.")
    if perm is not None and (
        perm.dtype != torch.int32
        or perm.numel() != k * (experts if perm.ndim == 2 else 1)
        or not perm.is_contiguous()
    ):
        raise ValueError(
            f"perm must be contiguous int32 [{k}], but {perm.dtype} {list(perm.shape)} came."
        )
    for name, part in (("codes", codes), ("scales", scales), ("zeros", zeros)):
        if part is not None and part.shape[1] > 1 and part.stride(1) != 1:
            raise ValueError(
                f"The columns of {name} must be adjacent, but their stride is {part.stride(1)}."
            )
    return rows // experts
