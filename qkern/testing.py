# SPDX-License-Identifier: Apache-2.0
"""Problems, oracles and error bounds for kernels: shared by the tests and the benchmarks.

A :class:`Case` names a kind of weight; :class:`Problem` makes one of some size and holds it packed.
`Problem.contract` is the numeric contract of csrc/README.md written in numpy, independent of the
kernels: what it returns is what every kernel must return, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qkern import _core

ACTIVATIONS = ("float", "int8", "int8_group")
TABLE_PER = ("tensor", "row", "group", "tile")
TILE_ROWS = 8  # that share a table per tile
FLOAT_CHUNK, INT_CHUNK, ACTIVATION_GROUP = 1024, 65536, 128
DTYPE_CODE = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint8): 3}
BFLOAT16 = 2  # numpy has no bfloat16: such arrays are uint16 with this code beside them
E8M0, E4M3 = 6, 7
EPS = 2.0**-24  # half a unit in the last place of float32, relative


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def aligned_bytes(count: int) -> np.ndarray:
    """A uint8 array of `count` bytes that starts on a 64-byte boundary."""
    block = np.zeros(count + 64, np.uint8)
    start = -block.ctypes.data % 64
    return block[start : start + count]


def fma(a, b, c) -> np.ndarray:
    """Fused multiply-add of float32 arrays with one rounding (through extended precision)."""
    wide = np.longdouble
    return (np.asarray(a, wide) * np.asarray(b, wide) + np.asarray(c, wide)).astype(np.float32)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [N, K] to the dense little-endian bit stream of canonical storage."""
    n, k = codes.shape
    spread = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(spread.reshape(n, k * bits), axis=1, bitorder="little")


@dataclass(frozen=True)
class Case:
    """A kind of weight. `group` 0 means one scale (or table) per row."""

    bits: int = 4
    activations: str = "float"
    group: int = 0
    asymmetric: bool = False
    table: str | None = None  # None: Int; else one of TABLE_PER
    scale: str = "float32"  # float32, float16, bfloat16, e8m0, e4m3, none
    zero: str = "uint8"  # uint8, float16, float32
    table_scale: float = 1.0
    perm: bool = False

    @property
    def token(self) -> str:
        """The word the registry uses for this kind of weight."""
        return {None: "int", "tensor": "table", "tile": "tile-table"}.get(self.table, "row-table")

    def served_by(self, row: dict) -> bool:
        """Whether a registry row of linear kernels reads this case."""
        bits, kinds = row["weights"].split(" bits: ")
        low, _, high = bits.partition("-")
        widths = range(int(low), int(high) + 1) if high else [int(b) for b in bits.split(",")]
        acts = row["activations"].split(", ")
        return self.bits in widths and self.token in kinds.split() and self.activations in acts


class Problem:
    """One weight of a case: random canonical parts, packed.

    `exact` draws scales that are powers of two and integer tables, so that with small-integer
    activations every sum is exact and the result is the integer one.
    """

    def __init__(self, case: Case, n: int, k: int, seed: int = 0, exact: bool = False):
        rng = np.random.default_rng(seed)
        self.case, self.n, self.k = case, n, k
        self.group = case.group if 0 < case.group < k else k
        self.groups = -(-k // self.group)
        self.codes = rng.integers(0, 2**case.bits, (n, k), dtype=np.uint8)
        self._draw_scales(rng, exact)
        self.zeros = None
        if case.asymmetric:
            zeros = rng.integers(0, 2**case.bits, (n, self.groups)).astype(np.float64)
            if case.zero != "uint8" and not exact:
                zeros = zeros + rng.standard_normal(zeros.shape)
            self.zeros = zeros.astype(case.zero)
        self.codebook = None
        if case.table:
            tiles = -(-n // TILE_ROWS) * self.groups
            tables = {"tensor": 1, "row": n, "group": n * self.groups, "tile": tiles}[case.table]
            shape = (tables, 2**case.bits)
            if case.activations != "float":
                self.codebook = rng.integers(-128, 128, shape).astype(np.float32)
            elif exact:
                self.codebook = rng.integers(-8, 9, shape).astype(np.float32)
            else:
                self.codebook = rng.standard_normal(shape).astype(np.float32)
                if case.table == "tile":  # float8 e4m3: four bits that count
                    mantissa, exponent = np.frexp(self.codebook)
                    self.codebook = np.ldexp(np.rint(mantissa * 16), exponent - 4)
        self.perm = rng.permutation(k).astype(np.int32) if case.perm else None
        self.pack()

    def _draw_scales(self, rng: np.random.Generator, exact: bool) -> None:
        shape, kind = (self.n, self.groups), self.case.scale
        self.scale_code = 0
        if kind == "none":
            self.scales, self.scale_values = None, np.ones(shape, np.float32)
            return
        exponents = rng.integers(-3, 4, shape)
        values = np.exp2(exponents) if exact else rng.uniform(0.05, 2.0, shape)
        if kind in ("float32", "float16"):
            self.scales = values.astype(kind)
            self.scale_values = self.scales.astype(np.float32)
            self.scale_code = DTYPE_CODE[self.scales.dtype]
        elif kind == "bfloat16":
            self.scales = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            self.scale_values = (self.scales.astype(np.uint32) << 16).view(np.float32)
            self.scale_code = BFLOAT16
        elif kind == "e8m0":
            self.scales = (exponents + 127).astype(np.uint8)
            self.scale_values = np.exp2(exponents).astype(np.float32)
            self.scale_code = E8M0
        else:
            mantissa = np.zeros(shape, int) if exact else rng.integers(0, 8, shape)
            self.scales = ((exponents + 7) << 3 | mantissa).astype(np.uint8)
            self.scale_values = (np.exp2(exponents) * (1 + mantissa / 8)).astype(np.float32)
            self.scale_code = E4M3

    def pack(self) -> None:
        """Packs the parts as they are now; again after a test has changed them."""
        case = self.case
        self.stream = pack_bits(self.codes, case.bits)
        self.weight = _core.Weight(
            kind=int(case.table is not None),
            bits=case.bits,
            activations=ACTIVATIONS.index(case.activations),
            n=self.n,
            k=self.k,
            group=case.group,
            codes=address(self.stream),
            codes_stride=self.stream.shape[1],
            scales=address(self.scales),
            scale_dtype=self.scale_code,
            scales_stride=self.groups,
            zeros=address(self.zeros),
            zero_dtype=0 if self.zeros is None else DTYPE_CODE[self.zeros.dtype],
            zeros_stride=self.groups,
            codebook=address(self.codebook),
            table_per=TABLE_PER.index(case.table) if case.table else 0,
            table_scale=case.table_scale,
            perm=address(self.perm),
        )
        self.packed = aligned_bytes(_core.packed_bytes(self.weight))
        _core.pack(self.weight, address(self.packed), self.packed.size)

    # ---- truth ----

    def _per_column(self, per_group: np.ndarray) -> np.ndarray:
        return per_group[:, np.arange(self.k) // self.group]

    def values(self) -> np.ndarray:
        """What a kernel multiplies activations with, [N, K] float32: codes minus the symmetric
        zero, raw codes (asymmetric), or table entries."""
        if self.codebook is None:
            offset = 0 if self.case.asymmetric else 2 ** (self.case.bits - 1)
            return self.codes.astype(np.float32) - np.float32(offset)
        rows = np.arange(self.n)[:, None]
        table = {
            "tensor": np.zeros((self.n, self.k), int),
            "row": np.broadcast_to(rows, (self.n, self.k)),
            "group": rows * self.groups + np.arange(self.k)[None] // self.group,
            "tile": rows // TILE_ROWS * self.groups + np.arange(self.k)[None] // self.group,
        }[str(self.case.table)]
        return self.codebook[table, self.codes]

    def dequantized(self) -> np.ndarray:
        """The weight as float32 [N, K], columns in input order."""
        values = self.values()
        if self.zeros is not None:
            values = values - self._per_column(self.zeros.astype(np.float32))
        scale = self.scale_values * np.float32(self.case.table_scale if self.case.table else 1)
        stored = self._per_column(scale) * values
        if self.perm is None:
            return stored
        out = np.empty_like(stored)
        out[:, self.perm] = stored
        return out

    def quantized_activations(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Codes int64 [M, K] in stored column order, scales [M, groups], columns per group."""
        x = x.astype(np.float32)
        x = x if self.perm is None else x[:, self.perm]
        group = self.k
        if self.case.activations == "int8_group":
            group = self.group if self.groups > 1 else ACTIVATION_GROUP
        starts = range(0, self.k, group)
        q = np.zeros(x.shape, np.int64)
        scales = np.zeros((len(x), len(starts)), np.float32)
        for g, start in enumerate(starts):
            part = x[:, start : start + group]
            largest = np.abs(part).max(axis=1, initial=0)
            finite = np.isfinite(part).all(axis=1)
            usable = finite & (largest >= 2.0**-100)
            factor = np.float32(127) / np.where(usable, largest, 1).astype(np.float32)
            scaled = np.where(usable[:, None], part * factor[:, None], 0)
            q[:, start : start + group] = np.rint(scaled)
            scales[:, g] = np.where(finite, np.where(usable, largest / np.float32(127), 0), np.nan)
        return q, scales, group

    def _chunks(self, chunk: int) -> Iterator[tuple[int, int, int]]:
        for g in range(self.groups):
            end = min(self.k, (g + 1) * self.group)
            for begin in range(g * self.group, end, chunk):
                yield g, begin, min(end, begin + chunk)

    def contract(self, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """x [M, K] float32 or float16 through the contract: float32 [M, N]."""
        with np.errstate(invalid="ignore", over="ignore"):
            if self.case.activations == "float":
                return self._float_contract(x, bias)
            return self._int8_contract(x, bias)

    def _int8_contract(self, x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        q, x_scales, x_group = self.quantized_activations(x)
        grouped = self.case.activations == "int8_group"
        if self.case.table:
            x_scales = x_scales * np.float32(self.case.table_scale)
        values = self.values().astype(np.int64)
        acc = np.zeros((len(x), self.n), np.float32)
        for g, begin, end in self._chunks(x_group if grouped else INT_CHUNK):
            total = (q[:, begin:end] @ values[:, begin:end].T).astype(np.float32)
            if self.zeros is not None:
                x_sum = q[:, begin:end].sum(axis=1).astype(np.float32)[:, None]
                total = fma(-self.zeros[None, :, g].astype(np.float32), x_sum, total)
            scale = self.scale_values[None, :, g]
            if grouped:
                scale = scale * x_scales[:, [begin // x_group]]
            acc = fma(total, scale, acc)
        if grouped:
            return acc if bias is None else acc + bias
        return acc * x_scales if bias is None else fma(acc, x_scales, bias)

    def _float_contract(self, x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        x = x.astype(np.float32)
        x = x if self.perm is None else x[:, self.perm]
        values = self.values()
        table_scale = np.float32(self.case.table_scale if self.case.table else 1)
        acc = np.zeros((len(x), self.n), np.float32)
        for g, begin, end in self._chunks(FLOAT_CHUNK):
            lanes = np.zeros((16, len(x), self.n), np.float32)
            x_lanes = np.zeros((16, len(x)), np.float32)
            by_lane = self.case.table in ("row", "group")
            for k in range(begin, end):
                lane = (k - begin) % 16 if by_lane else 0
                lanes[lane] = fma(x[:, [k]], values[None, :, k], lanes[lane])
                x_lanes[(k - begin) % 16] += x[:, k]
            total, x_sum = lanes[0], x_lanes[0]
            for lane in range(1, 16):
                total = total + lanes[lane] if by_lane else total
                x_sum = x_sum + x_lanes[lane]
            if self.zeros is not None:
                total = fma(-self.zeros[None, :, g].astype(np.float32), x_sum[:, None], total)
            acc = fma(total, self.scale_values[None, :, g] * table_scale, acc)
        return acc if bias is None else acc + bias

    def error_bound(self, x: np.ndarray) -> np.ndarray:
        """How far a float-activation result may lie from the float64 product, [M, N].

        Every product passes through at most K + G + 20 additions of relative error EPS; the
        asymmetric form adds the terms |x| * code and |x| * zero apart before they cancel.
        """
        magnitude = np.abs(self.values()).astype(np.float64)
        if self.zeros is not None:
            magnitude = magnitude + self._per_column(np.abs(self.zeros.astype(np.float64)))
        scale = self.scale_values * np.float32(self.case.table_scale if self.case.table else 1)
        magnitude = magnitude * self._per_column(np.abs(scale.astype(np.float64)))
        x = np.abs(x.astype(np.float64))
        x = x if self.perm is None else x[:, self.perm]
        return (self.k + self.groups + 20) * EPS * (x @ magnitude.T) + 1e-37

    # ---- running ----

    def linear(
        self,
        x: np.ndarray,
        bias: np.ndarray | None = None,
        kernel: str | None = None,
        out_dtype: type = np.float32,
        guard: int = 3,
    ) -> np.ndarray:
        """Runs a kernel (the best where none is named) into an output whose rows are `guard`
        elements apart; fails if any of those is touched. Strides of x are passed on."""
        item = x.itemsize
        y: np.ndarray = np.full((len(x) + 2, self.n + guard), 7, out_dtype)
        _core.linear(
            address(self.packed),
            self.packed.size,
            DTYPE_CODE[x.dtype],
            address(x),
            len(x),
            x.strides[0] // item,
            x.strides[1] // item,
            address(bias),
            0 if bias is None else DTYPE_CODE[bias.dtype],
            DTYPE_CODE[np.dtype(out_dtype)],
            address(y) + y.strides[0],
            self.n + guard,
            kernel,
        )
        inner = y[1:-1]
        if not ((y[0] == 7).all() and (y[-1] == 7).all() and (inner[:, self.n :] == 7).all()):
            raise AssertionError(f"{_core.last_kernel()} wrote outside its output")
        return inner[:, : self.n].copy()


def case_variants(activations: str) -> Iterator[Case]:
    """The cases that every mode is tested with: each kind of weight, scale and zero."""
    a = activations
    for bits in (2, 3, 4, 5, 6, 8):
        yield Case(bits, a, group=32, scale="float16")
        yield Case(bits, a, group=64, asymmetric=True, scale="float32")
        yield Case(bits, a)
        yield Case(bits, a, group=12, asymmetric=True, zero="float32", scale="bfloat16")
    yield Case(4, a, asymmetric=True, zero="float16", scale="float16", group=100)
    yield Case(4, a, group=128, scale="float16", perm=True)
    for bits in (2, 3, 4, 8):
        yield Case(bits, a, table="tensor", group=64, scale="float16")
        yield Case(bits, a, table="tensor", scale="none")
        yield Case(bits, a, table="tensor", group=12, scale="bfloat16")
        yield Case(bits, a, table="row", scale="none" if a == "float" else "float32")
        yield Case(bits, a, table="group", group=64, scale="float32")
        yield Case(bits, a, table="row", group=32, scale="float16")
    yield Case(4, a, table="tensor", group=32, scale="e8m0", table_scale=0.5)
    yield Case(4, a, table="tensor", group=16, scale="e4m3", table_scale=0.5)
    yield Case(4, a, table="tensor", group=128, scale="float16", perm=True)
    yield Case(4, a, table="row", perm=True)
    scale = "none" if a == "float" else "e8m0"
    yield Case(3, a, table="tile", group=64, scale=scale)
    yield Case(3, a, table="tile", group=128, scale=scale, perm=True)
    yield Case(3, a, table="tile", group=12, scale="bfloat16", table_scale=0.5)
