# SPDX-License-Identifier: Apache-2.0
"""Round to nearest and nearest table entry: bit-equal to the same float32 rules in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from qkern import _core
from qkern.errors import FormatError
from qkern.testing import address, pack_bits

F32, F16, BF16 = 0, 1, 2
STORED = {F32: np.float32, F16: np.float16, BF16: np.uint16}
SMALLEST = {F32: 2.0**-126, F16: 2.0**-14, BF16: 2.0**-126}
CANARY = 0xA5


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    _core.set_threads(request.param)
    yield request.param
    _core.set_threads(0)


def groups_of(k: int, group: int) -> list[slice]:
    return [slice(start, min(start + group, k)) for start in range(0, k, group)]


def rounded(scale: np.float32, dtype: int) -> np.float32:
    """`scale` rounded to the dtype, half to even, as float32."""
    if dtype == F16:
        return np.float32(np.float16(scale))
    if dtype == BF16:
        bits = int(np.float32(scale).view(np.uint32))
        return np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    return scale


def rtn(w: np.ndarray, bits: int, group: int, symmetric: bool, dtype: int):
    """Codes, scales (float32) and zeros by the rules of csrc/cpu/fit_rtn.cpp."""
    n, k = w.shape
    slices, top, half = groups_of(k, group), 2**bits - 1, 2 ** (bits - 1)
    codes = np.zeros((n, k), np.int64)
    scales = np.ones((n, len(slices)), np.float32)
    zeros = np.zeros((n, len(slices)), np.uint8)
    for row in range(n):
        for g, columns in enumerate(slices):
            part = w[row, columns]
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            span, steps = (max(-low, high), half - 1) if symmetric else (high - low, top)
            if low < 0 or high > 0:
                scales[row, g] = rounded(span / np.float32(steps), dtype)
            scale = scales[row, g]
            zero = half if symmetric else int(np.clip(np.rint(-low / scale), 0, top))
            zeros[row, g] = zero
            codes[row, columns] = np.clip(np.rint(part / scale) + zero, 0, top)
    return codes.astype(np.uint8), scales, zeros


def fit_rtn(w: np.ndarray, bits: int, group: int, symmetric: bool, dtype: int, gap: int = 0):
    """Stream, scales as stored, zeros; every output starts as canaries."""
    n, k = w.shape
    width, count = (k * bits + 7) // 8, -(-k // (group or k))
    stream = np.full((n, width + gap), CANARY, np.uint8)
    scales = np.frombuffer(bytes([CANARY]) * (n * count * 4), STORED[dtype])[: n * count].copy()
    zeros = None if symmetric else np.full((n, count), CANARY, np.uint8)
    outputs = (stream, scales.reshape(n, count), zeros)
    try:
        _core.fit_rtn(
            address(w), n, k, w.strides[0] // 4, bits, group, symmetric, dtype,
            address(stream), width + gap, address(scales), address(zeros),
        )  # fmt: skip
    except FormatError:
        for array in outputs:
            assert array is None or set(array.tobytes()) <= {CANARY}, "written before the failure"
        raise
    assert (stream[:, width:] == CANARY).all()
    return stream[:, :width], outputs[1], zeros


def as_float(scales: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == BF16:
        return (scales.astype(np.uint32) << 16).view(np.float32)
    return scales.astype(np.float32)


def check_rtn(w: np.ndarray, bits: int, group: int, symmetric: bool, dtype: int) -> None:
    codes, scales, zeros = rtn(w, bits, group, symmetric, dtype)
    got_stream, got_scales, got_zeros = fit_rtn(w, bits, group, symmetric, dtype, gap=3)
    assert np.array_equal(as_float(got_scales, dtype), scales)
    assert np.array_equal(got_stream, pack_bits(codes, bits))
    assert symmetric or np.array_equal(got_zeros, zeros)


def mixed_rows(k: int, seed: int) -> np.ndarray:
    """Two-sided, one-sided, constant, zero, minus zero, one outlier, ties of the 4-bit grid."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((10, k)).astype(np.float32)
    w[1], w[2] = np.abs(w[1]) + 1, -np.abs(w[2]) - 1
    w[3], w[4], w[5] = 0, 0.75, -0.0
    w[6] = 0
    w[6, k // 2] = -3
    w[7] *= np.exp(rng.standard_normal(k) * 3)
    w[8] = rng.integers(-15, 15, k) / 2
    w[8, ::8] = 7
    w[9, : k // 2] = 0
    return w


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rtn(bits: int, symmetric: bool, dtype: int, threads: int) -> None:
    for k, group in [(24, 8), (30, 12), (96, 32), (230, 100), (77, 77), (2100, 1000), (5, 1)]:
        check_rtn(mixed_rows(k, bits * k), bits, group, symmetric, dtype)


@pytest.mark.parametrize("magnitude", [2.0**-110, 2.0**110])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_rtn_of_far_magnitudes(dtype: int, magnitude: float) -> None:
    w = np.random.default_rng(0).uniform(-1, 1, (4, 64)).astype(np.float32) * np.float32(magnitude)
    for symmetric in (True, False):
        check_rtn(w, 4, 16, symmetric, dtype)


def test_rtn_group_0_is_the_whole_row_and_rows_may_lie_apart() -> None:
    wide = np.random.default_rng(1).standard_normal((5, 70)).astype(np.float32)
    w = wide[:, :45]
    codes, scales, _ = rtn(w, 3, 45, True, F32)
    stream, got_scales, _ = fit_rtn(w, 3, 0, True, F32)
    assert np.array_equal(stream, pack_bits(codes, 3)) and np.array_equal(got_scales, scales)


def test_rtn_divides_and_does_not_multiply_by_the_reciprocal() -> None:
    """Quotients next to a half, where the two differ, found by search with 8 bits."""
    rng = np.random.default_rng(2)
    top = rng.uniform(1, 2, 100).astype(np.float32)
    scale = top / np.float32(127)
    found = 0
    for t, s in zip(top, scale, strict=True):
        steps = np.arange(-126, 126, dtype=np.float32) + np.float32(0.5)
        near = steps * s
        w = np.concatenate([[t], near, np.nextafter(near, 9), np.nextafter(near, -9)])[None]
        w = w.astype(np.float32)
        found += int((np.rint(w / s) != np.rint(w * (np.float32(1) / s))).sum())
        check_rtn(w, 8, w.shape[1], True, F32)
    assert found > 20


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
def test_rtn_smallest_scale(dtype: int) -> None:
    """Judged after rounding: what rounds up to the smallest normal number still fits."""
    w = np.zeros((2, 16), np.float32)
    fits = np.float32(7 * SMALLEST[dtype])
    w[1, 11] = -fits
    check_rtn(w, 4, 8, True, dtype)
    if dtype != F32:
        half_step = {F16: 2.0**-12, BF16: 2.0**-9}[dtype]
        w[1, 11] = fits * np.float32(1 - half_step * 0.9)
        check_rtn(w, 4, 8, True, dtype)
    for low in (fits * np.float32(0.9), np.float32(1e-45)):
        w[1, 11] = low
        with pytest.raises(
            FormatError, match=r"scale of row 1, group 1.*below the smallest normal"
        ):
            fit_rtn(w, 4, 8, True, dtype)
        with pytest.raises(
            FormatError, match=r"scale of row 1, group 1.*below the smallest normal"
        ):
            fit_rtn(w, 4, 8, False, dtype)


@pytest.mark.parametrize(
    ("dtype", "symmetric", "low", "high"),
    [(F16, True, 0, 65520 * 7), (F16, False, -5e5, 5e5), (F32, False, -3e38, 3e38)],
)
def test_rtn_scale_that_is_not_finite(dtype: int, symmetric: bool, low: float, high: float) -> None:
    w = np.zeros((3, 20), np.float32)
    w[2, 7:9] = low, high
    with pytest.raises(FormatError, match=r"scale of row 2, group 0.*not a finite"):
        fit_rtn(w, 4, 10, symmetric, dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rtn_names_the_first_weight_that_is_not_finite(bad: float, threads: int) -> None:
    w = np.ones((40, 33), np.float32)
    w[7, 30], w[7, 31], w[30, 0] = bad, np.nan, np.nan
    for symmetric in (True, False):
        with pytest.raises(FormatError, match=f"got {bad} in row 7, column 30"):
            fit_rtn(w, 4, 8, symmetric, F32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "expected 2 to 8 bits, got 1"),
        ({"bits": 9}, "expected 2 to 8 bits, got 9"),
        ({"group": 17}, "group of 1 to 16 columns .*, got 17"),
        ({"group": -1}, "group of 1 to 16 columns .*, got -1"),
        ({"scale_dtype": 3}, "scale_dtype must be 0 .*, got 3"),
        ({"w": 0}, "w is NULL"),
        ({"codes": 0}, "codes is NULL"),
        ({"scales": 0}, "scales is NULL"),
        ({"zeros": 0}, "zeros is NULL"),
        ({"symmetric": True}, "zeros must be NULL"),
        ({"w_stride": 15}, "rows of w are 16 long but only 15 apart"),
        ({"codes_stride_bytes": 7}, "rows of codes are 8 long but only 7 apart"),
        ({"n": -1}, "must not be negative"),
        ({"n": 2**62}, "does not fit in memory"),
    ],
)
def test_rtn_senseless_arguments(change: dict[str, int], message: str) -> None:
    w, out = np.ones((2, 16), np.float32), np.zeros(64, np.uint8)
    good = {
        "w": address(w), "n": 2, "k": 16, "w_stride": 16, "bits": 4, "group": 8, "symmetric": False,
        "scale_dtype": F32, "codes": address(out), "codes_stride_bytes": 8,
        "scales": address(out[16:]), "zeros": address(out[48:]),
    }  # fmt: skip
    _core.fit_rtn(**good)
    with pytest.raises(ValueError, match=message):
        _core.fit_rtn(**(good | change))


# ---- nearest entry of a table ----


def nearest(values: np.ndarray, table: np.ndarray) -> list[int]:
    """By exact distances; ties to the lower entry, then to the lower code."""
    entries = [Fraction(float(t)) for t in table]
    exact = [Fraction(float(x)) for x in values]
    return [min(range(len(table)), key=lambda i: (abs(x - entries[i]), entries[i])) for x in exact]


def fit_table(w: np.ndarray, bits: int, table: np.ndarray, per: int, group=0, scales=None):
    n, k = w.shape
    stream = np.full((n, (k * bits + 7) // 8), CANARY, np.uint8)
    _core.fit_table(
        address(w), n, k, w.strides[0] // 4, bits, group, address(scales), address(table), per,
        address(stream), stream.shape[1],
    )  # fmt: skip
    return stream


def table_codes(w, bits: int, table, per: int, group=0, scales=None) -> np.ndarray:
    n, k = w.shape
    tables, slices = table.reshape(-1, 2**bits), groups_of(k, group or k)
    codes = np.zeros((n, k), np.uint8)
    for row in range(n):
        for g, columns in enumerate(slices):
            own = tables[[0, row, row * len(slices) + g][per]]
            scale = np.float32(1) if scales is None else scales[row, g]
            part = w[row, columns] / scale if scale else np.zeros_like(w[row, columns])
            codes[row, columns] = nearest(part, own)
    return codes


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("per", [0, 1, 2], ids=["tensor", "row", "group"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_table(bits: int, per: int, scaled: bool, threads: int) -> None:
    rng = np.random.default_rng(bits * 10 + per)
    n, k, group = 4, 37, 10
    for entries in ("random", "repeated", "halves"):
        shape = ([1, n, n * 4][per], 2**bits)
        table = rng.standard_normal(shape).astype(np.float32)
        if entries == "repeated":
            table = np.round(table)
            table[0, 0] = -0.0
        if entries == "halves":  # entries and weights on one grid: many exact ties
            table = (rng.integers(-9, 9, shape) / 2).astype(np.float32)
        w = np.round(rng.standard_normal((n, k)) * 16).astype(np.float32) / 8
        scales = (2.0 ** rng.integers(-2, 3, (n, 4))).astype(np.float32) if scaled else None
        if scaled:
            scales[1, 2], scales[2, 0] = 0, -0.7
        expected = table_codes(w, bits, table, per, group, scales)
        got = fit_table(w, bits, table, per, group, scales)
        assert np.array_equal(got, pack_bits(expected, bits)), entries


def test_table_decides_where_float64_cannot() -> None:
    """The middle of the entries is 0.5 +- 2^-61: 0.5 lies just on one side of it."""
    half = np.array([[0.5]], np.float32)
    assert fit_table(half, 1, np.array([2.0**-60, 1], np.float32), 0)[0, 0] == 0
    assert fit_table(half, 1, np.array([-(2.0**-60), 1], np.float32), 0)[0, 0] == 1
    assert fit_table(half, 1, np.array([1, -(2.0**-60)], np.float32), 0)[0, 0] == 0
    assert fit_table(half, 1, np.array([0, 1], np.float32), 0)[0, 0] == 0


def test_table_quotient_that_overflows_takes_the_outermost_entry() -> None:
    w = np.array([[3e38, -3e38]], np.float32)
    table = np.array([0.25, -1, 3, 0], np.float32)
    stream = fit_table(w, 2, table, 0, 0, np.array([[1e-30]], np.float32))
    assert stream[0, 0] == 2 | 1 << 2


def test_table_of_extreme_entries() -> None:
    largest, tiny = np.finfo(np.float32).max, np.float32(1e-45)
    table = np.array([largest, -largest, tiny, 0], np.float32)
    w = np.array([[largest, -largest, tiny, 0, tiny * 2, 1.7e38, -1.7e38, 1.8e38]], np.float32)
    assert np.array_equal(fit_table(w, 2, table, 0), pack_bits(table_codes(w, 2, table, 0), 2))


@pytest.mark.parametrize("what", ["w", "codebook", "scales"])
def test_table_refuses_numbers_that_are_not_finite(what: str) -> None:
    arrays = {
        "w": np.ones((3, 16), np.float32),
        "codebook": np.ones((3, 4), np.float32),
        "scales": np.ones((3, 2), np.float32),
    }
    arrays[what][2, 1] = np.nan
    with pytest.raises(FormatError, match=f"in {what}, got nan in row 2, column 1"):
        fit_table(arrays["w"], 2, arrays["codebook"], 1, 8, arrays["scales"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "expected 1 to 8 bits, got 0"),
        ({"table_per": 3}, "table_per must be"),
        ({"table_per": -1}, "table_per must be"),
        ({"group": 99}, "group of 1 to 16"),
        ({"codebook": 0}, "codebook is NULL"),
        ({"codes": 0}, "codes is NULL"),
        ({"w_stride": 1}, "rows of w are 16 long but only 1 apart"),
    ],
)
def test_table_senseless_arguments(change: dict[str, int], message: str) -> None:
    w, out = np.ones((2, 16), np.float32), np.zeros(64, np.uint8)
    good = {
        "w": address(w), "n": 2, "k": 16, "w_stride": 16, "bits": 2, "group": 8, "scales": 0,
        "codebook": address(w), "table_per": 0, "codes": address(out), "codes_stride_bytes": 4,
    }  # fmt: skip
    _core.fit_table(**good)
    with pytest.raises(ValueError, match=message):
        _core.fit_table(**(good | change))
