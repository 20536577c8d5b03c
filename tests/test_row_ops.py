# SPDX-License-Identifier: Apache-2.0
"""Row operations of the registry: activation quantizers, conversions, dequantizers.

Each kernel is forced by name and held to numpy, bit for bit; every output has guard elements.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import qkern.numpy
from qkern import _core
from qkern.testing import BFLOAT16, DTYPE_CODE, Case, Problem, address


@pytest.fixture
def page_end() -> Iterator[Callable[[np.ndarray], int]]:
    """Copies bytes to the very end of memory: the page behind them cannot be read."""
    size = mmap.PAGESIZE
    block = mmap.mmap(-1, 2 * size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    protect = getattr(ctypes.CDLL(None), "mprotect", None)
    if protect is None:
        pytest.skip("this system has no mprotect")
    assert protect(ctypes.c_void_p(start + size), ctypes.c_size_t(size), 0) == 0

    def place(values: np.ndarray) -> int:
        begin = start + size - values.nbytes
        ctypes.memmove(begin, values.ctypes.data, values.nbytes)
        return begin

    yield place
    protect(ctypes.c_void_p(start + size), ctypes.c_size_t(size), mmap.PROT_READ)


def kernels_of(op: str) -> list[str]:
    return [row["name"] for row in _core.kernels() if row["op"] == op and row["usable"]]


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, half to even; not for NaN."""
    bits = values.view(np.uint32).astype(np.uint64)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- activation quantizers ----

DTYPES = {"float32": 0, "float16": 1, "bfloat16": BFLOAT16}
# Around the vectors of every level, their unrolled loops and the longest tails.
LENGTHS = [*range(1, 35), 63, 64, 65, 100, 127, 128, 129, 333, 4097]


def activations(k: int, dtype: str) -> np.ndarray:
    """Rows of every sort: plain, zero, NaN, infinite, too small to scale, ties, negative peak."""
    x = np.random.default_rng(k).standard_normal((7, k)).astype(np.float32)
    x[1] = 0
    x[2, k // 2] = np.nan
    x[3, k - 1] = -np.inf
    x[4] = 2.0**-101
    x[5] = np.arange(k) % 255 - 127 + 0.5
    x[5, 0] = 127
    x[6, k // 3] = -9
    if dtype == "float16":
        return x.astype(np.float16)
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else x


def quantized(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The rule of qkern.h in numpy float32."""
    q = np.zeros(x.shape, np.int8)
    scales = []
    for begin in range(0, x.shape[1], group):
        part = x[:, begin : begin + group]
        largest = np.abs(part).max(axis=1)
        finite = np.isfinite(part).all(axis=1)
        usable = finite & (largest >= 2.0**-100)
        factor = np.float32(127) / np.where(usable, largest, 1).astype(np.float32)
        scaled = np.where(usable[:, None], part, 0) * factor[:, None]
        q[:, begin : begin + group] = np.rint(scaled).astype(np.int8)
        scale = np.where(usable, largest, 0) / np.float32(127)
        scales.append(np.where(finite, scale, np.nan).astype(np.float32))
    return q, np.stack(scales, axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernels_of("quantize_activations"))
def test_quantize_activations(name: str, dtype: str) -> None:
    for k in LENGTHS:
        x = activations(k, dtype)
        values = from_bfloat16(x) if dtype == "bfloat16" else x.astype(np.float32)
        for group in sorted({g for g in (1, 8, 12, 32, 100, 128) if g < k} | {k}):
            expected, expected_scales = quantized(values, group)
            q = np.full((7, k + 5), 99, np.int8)
            scales = np.full((8, expected_scales.shape[1]), 99, np.float32)
            _core.quantize_activations(
                *(DTYPES[dtype], address(x), 7, k, group, k, 1),
                *(address(q), k + 5, address(scales), name),
            )
            where = str((name, dtype, k, group))
            np.testing.assert_array_equal(q[:, :k], expected, where)
            np.testing.assert_array_equal(scales[:7], expected_scales, where)
            assert (q[:, k:] == 99).all() and (scales[7] == 99).all(), where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernels_of("quantize_activations"))
def test_quantize_reads_no_byte_behind_the_row(name: str, dtype: str, page_end) -> None:
    for k in (1, 7, 16, 37, 64, 130):
        x = activations(k, dtype)[:1]
        values = from_bfloat16(x) if dtype == "bfloat16" else x.astype(np.float32)
        q, scale = np.zeros((1, k), np.int8), np.zeros(1, np.float32)
        _core.quantize_activations(
            *(DTYPES[dtype], page_end(x[0]), 1, k, 0, k, 1, address(q), k, address(scale), name)
        )
        np.testing.assert_array_equal(q, quantized(values, k)[0], f"{name}, {dtype}, {k}")


# ---- conversions ----


def test_convert_every_half(isa: str) -> None:
    """All 65536 float16 and bfloat16 numbers times 1, through the level's conversion. NaN stays
    NaN."""
    p = Problem(Case(8, table="tensor", scale="none"), 1, 1)
    p.codebook[:] = 1
    p.pack()
    bits = np.arange(65536, dtype=np.uint16).reshape(-1, 1)
    for code, expected in ((1, bits.view(np.float16)), (BFLOAT16, from_bfloat16(bits))):
        y = np.zeros((65536, 1), np.float32)
        _core.linear(
            *(address(p.packed), p.packed.size, code, address(bits), len(bits), 1, 1),
            *(0, 0, 0, address(y), 1, None),
        )
        np.testing.assert_array_equal(y, expected.astype(np.float32), f"{isa}, dtype {code}")


def test_convert_every_length(isa: str) -> None:
    """The sum of k ones counts them: no element is missed or doubled at any tail."""
    for k in [*range(1, 70), 127, 1025]:
        p = Problem(Case(8, table="tensor", scale="none"), 3, k)
        p.codebook[:] = 1
        p.pack()
        y = p.linear(np.ones((2, k), np.float16))
        np.testing.assert_array_equal(y, np.full((2, 3), k, np.float32), f"{isa}, {k} columns")


# ---- dequantizers ----


def kinds(bits: int) -> list[Case]:
    return [
        Case(bits, group=7, scale="float16"),
        Case(bits, group=32, asymmetric=True, scale="bfloat16"),
        Case(bits, asymmetric=True, zero="float32", group=100),
        Case(bits, table="tensor", group=16, scale="e8m0", table_scale=0.5),
        Case(bits, table="row", scale="none"),
        Case(bits, table="group", group=33, scale="e4m3"),
        Case(bits, group=32, perm=True),
    ]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", kernels_of("dequantize"))
def test_dequantize(name: str, bits: int) -> None:
    """Every format, every output dtype, groups that start inside a byte, rows that end anywhere."""
    for case in kinds(bits):
        for k in (1, 5, 16, 31, 64, 77, 205, 333):
            p = Problem(case, 4, k, seed=k)
            full = p.dequantized()
            expected = {0: full, 1: full.astype(np.float16).view("u2"), 2: to_bfloat16(full)}
            for dtype, rows in expected.items():
                out = np.full((4, k + 3), 99, rows.dtype)
                _core.dequantize(p.weight, 0, 0, dtype, 0, 0, 4, address(out), k + 3, name)
                where = str((name, case, k, dtype))
                np.testing.assert_array_equal(out[:, :k], rows, where)
                assert (out[:, k:] == 99).all(), where


@pytest.mark.parametrize("name", kernels_of("dequantize"))
def test_dequantize_reads_no_byte_behind_the_row(name: str, page_end) -> None:
    for bits in range(1, 9):
        for k in (3, 16, 37, 64, 130):
            p = Problem(Case(bits, group=16), 1, k, seed=bits)
            codes = page_end(p.stream[0])
            weight = _core.Weight(
                kind=0,
                bits=bits,
                activations=0,
                n=1,
                k=k,
                group=16,
                codes=codes,
                codes_stride=p.stream.size,
                scales=address(p.scales),
                scales_stride=p.groups,
            )
            out = np.zeros((1, k), np.float32)
            _core.dequantize(weight, 0, 0, 0, 0, 0, 1, address(out), k, name)
            np.testing.assert_array_equal(out, p.dequantized(), f"{name}, {bits} bits, {k} columns")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_dequantize_chosen_rows(isa: str, dtype: type) -> None:
    """Rows by index, as an embedding asks for them, from canonical and packed storage."""
    p = Problem(Case(4, group=32, scale="float16"), 40, 100, seed=1)
    rows = np.array([7, 0, 39, 7], np.int64)
    for weight, packed in ((p.weight, 0), (None, address(p.packed))):
        out = np.zeros((4, 100), dtype)
        _core.dequantize(
            *(weight, packed, p.packed.size, DTYPE_CODE[np.dtype(dtype)]),
            *(address(rows), 0, 4, address(out), 100, None),
        )
        np.testing.assert_array_equal(out, p.dequantized()[rows].astype(dtype), isa)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("text", ["int4-g128", "codebook3", "int8"])
def test_results_beyond_the_caches_are_those_of_parts(text: str, shift: int) -> None:
    """From 32 MiB on rows are stored past the caches where they are aligned: the same bits."""
    n, k = 2100, 4096
    rng = np.random.default_rng(5)
    weight = qkern.numpy.quantize(rng.standard_normal((n, k), np.float32), text)
    room = np.full(n * k + 1, np.nan, np.float32)
    out = room[shift : shift + n * k].reshape(n, k)
    assert out.nbytes >= 32 << 20
    for _ in range(2):
        qkern.numpy.dequantize(weight, out=out)
        for begin in range(0, n, 700):
            ids = np.arange(begin, begin + 700)
            assert np.array_equal(out[begin : begin + 700], qkern.numpy.embedding(ids, weight))
        weight.pack_()
        out[:] = np.nan
