# SPDX-License-Identifier: Apache-2.0
"""Every linear kernel of the registry, through one shared body.

A kernel is forced by name, so a test that passes has run that kernel. Its cases are all variants
of `qkern.testing.case_variants` that its registry row says it reads.
"""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest

from qkern import _core
from qkern.testing import ACTIVATIONS, Case, Problem, case_variants

ROWS = [row for row in _core.kernels() if row["op"] == "linear" and row["usable"]]
NAMES = [row["name"] for row in ROWS]
VECTOR_ROWS = [row for row in ROWS if row["isa"] != "scalar"]

# (N, K): one output; primes; one off a half, a panel, a unit; one chunk of float sums and one more.
SMALL_SHAPES = [(1, 8), (3, 13), (16, 32), (17, 33), (31, 100), (33, 128), (48, 172), (65, 257)]
# Rows: alone, the streaming sizes and one more, tile remainders, one off a row block.
ROW_COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 13, 17, 33, 47, 49]


def cases_of(row: dict, variants: int | None = None) -> list[Case]:
    cases = [c for a in ACTIVATIONS for c in case_variants(a) if c.served_by(row)]
    return cases[:variants]


def seed_of(*key: object) -> int:
    return zlib.crc32(repr(key).encode())


def draw(rng: np.random.Generator, m: int, k: int, dtype: type = np.float32) -> np.ndarray:
    return rng.standard_normal((m, k)).astype(dtype)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, context: object) -> None:
    """Equal bits; any NaN equals any NaN."""
    same = (actual.view(np.uint32) == expected.view(np.uint32)) | (
        np.isnan(actual) & np.isnan(expected)
    )
    if not same.all():
        m, n = np.argwhere(~same)[0]
        raise AssertionError(
            f"{context}: {(~same).sum()} of {same.size} differ, first at row {m}, output {n}: "
            f"{actual[m, n]!r}, expected {expected[m, n]!r}"
        )


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_contract(row: dict) -> None:
    """The numeric contract in numpy, bit for bit, with and without bias, float16 input too."""
    name, count = row["name"], 0
    for case in cases_of(row):
        for i, (n, k) in enumerate([(5, 37), (33, 300), (18, 1100)]):
            m = (3, 6, 1)[i]
            p = Problem(case, n, k, seed=seed_of(name, case, n))
            rng = np.random.default_rng(seed_of(case, n, k))
            x = draw(rng, m, k, np.float16 if i == 1 else np.float32)
            bias = draw(rng, 1, n)[0] if i != 2 else None
            assert_same_bits(p.linear(x, bias, name), p.contract(x, bias), (name, case, n, k, m))
            count += 1
    assert count >= 3 * 3, "a kernel that reads no case is not tested"


@pytest.mark.parametrize("row", VECTOR_ROWS, ids=[r["name"] for r in VECTOR_ROWS])
def test_same_bits_as_scalar(row: dict) -> None:
    """Odd shapes and row counts against the scalar kernel, which test_contract pins."""
    name, count = row["name"], 0
    suffix = "a32" if row["activations"] == "float" else "a8d"
    for case in cases_of(row):
        for (n, k), m in itertools.product(SMALL_SHAPES, ROW_COUNTS):
            p = Problem(case, n, k, seed=seed_of(case, n, k))
            x = draw(np.random.default_rng(m), m, k)
            expected = p.linear(x, kernel=f"linear_any_{suffix}_scalar")
            assert_same_bits(p.linear(x, kernel=name), expected, (name, case, n, k, m))
            count += 1
    variants = len(cases_of(row))
    assert count == variants * len(SMALL_SHAPES) * len(ROW_COUNTS) and variants >= 3


@pytest.mark.parametrize("row", VECTOR_ROWS, ids=[r["name"] for r in VECTOR_ROWS])
def test_all_columns_and_outputs(row: dict) -> None:
    """Every remainder of K over two units and of N over two panels, streaming and tiled rows."""
    name = row["name"]
    suffix = "a32" if row["activations"] == "float" else "a8d"
    case = cases_of(row)[0]
    shapes = [(37, k) for k in range(8, 8 + 256, 3)] + [(n, 70) for n in range(1, 66)]
    for n, k in shapes:
        p = Problem(case, n, k, seed=k)
        for m in (1, 4, 11):
            x = draw(np.random.default_rng(n), m, k)
            expected = p.linear(x, kernel=f"linear_any_{suffix}_scalar")
            assert_same_bits(p.linear(x, kernel=name), expected, (name, case, n, k, m))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_exact_integers(row: dict) -> None:
    """Small integers and power-of-two scales: the result is the integer one, no tolerance."""
    name = row["name"]
    for case in cases_of(row):
        if case.scale == "bfloat16":
            continue  # its zeros are not integers
        for n, k, m in [(19, 45, 2), (40, 200, 9)]:
            p = Problem(case, n, k, seed=seed_of(case, k), exact=True)
            rng = np.random.default_rng(k)
            # Every activation group reaches 127, so its scale is exactly 1.
            x = rng.integers(-127, 128, (m, k)).astype(np.float32)
            x[:, ::8] = 127
            got = p.linear(x, kernel=name)
            expected = x.astype(np.float64) @ p.dequantized().astype(np.float64).T
            assert np.abs(expected).max() > 0
            np.testing.assert_array_equal(got.astype(np.float64), expected, str((name, case, n)))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_identity_gives_the_weights(row: dict) -> None:
    """Unit activations return the dequantized weight, bit for bit; with int8 activations 127 times
    it where scales are powers of two."""
    name = row["name"]
    for case in cases_of(row):
        for n, k in [(21, 40), (37, 130)]:
            p = Problem(case, n, k, seed=3, exact=case.activations != "float")
            if case.activations == "float":
                got = p.linear(np.eye(k, dtype=np.float32), kernel=name)
                assert_same_bits(got, np.ascontiguousarray(p.dequantized().T) + 0.0, (name, case))
            elif case.scale != "bfloat16":
                got = p.linear(127 * np.eye(k, dtype=np.float32), kernel=name)
                np.testing.assert_array_equal(got, 127 * p.dequantized().T, str((name, case)))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_float64(row: dict) -> None:
    """Real-valued data against float64 within the bound of `Problem.error_bound`; int8 modes
    against the same product of the quantized activations."""
    name = row["name"]
    for case in cases_of(row):
        p = Problem(case, 50, 600, seed=9)
        x = draw(np.random.default_rng(4), 6, 600)
        if case.activations != "float":
            q, scales, group = p.quantized_activations(x)
            stored = (q * scales[:, np.arange(600) // group]).astype(np.float64)
            x = stored if p.perm is None else np.empty_like(stored)
            if p.perm is not None:
                x[:, p.perm] = stored
        expected = x @ p.dequantized().astype(np.float64).T
        given = draw(np.random.default_rng(4), 6, 600)
        error = np.abs(p.linear(given, kernel=name).astype(np.float64) - expected)
        assert (error <= p.error_bound(x)).all(), (name, case, (error / p.error_bound(x)).max())


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_bitwise_promise(row: dict) -> None:
    """A row's bits depend neither on its batch, nor on threads, strides or alignment."""
    name = row["name"]
    rng = np.random.default_rng(8)
    for case in cases_of(row, 8):
        n, k, m = 70, 200, 51
        p = Problem(case, n, k, seed=5)
        x, bias = draw(rng, m, k), draw(rng, 1, n)[0]
        whole = p.linear(x, bias, name)
        for i in (0, 3, m - 1):
            assert_same_bits(p.linear(x[i : i + 1], bias, name)[0][None], whole[i][None], (name, i))
        assert_same_bits(p.linear(x[7:23], bias, name), whole[7:23], (name, "part of the rows"))
        views = {
            "transposed": np.asfortranarray(x),
            "strided": np.repeat(np.repeat(x, 2, axis=0), 3, axis=1)[::2, ::3],
            "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
        }
        for offset in (1, 2, 3, 5, 15):
            room = np.empty(m * k + 16, np.float32)
            views[f"offset {offset}"] = room[offset : offset + m * k].reshape(m, k)
            views[f"offset {offset}"][:] = x
        for kind, view in views.items():
            assert_same_bits(p.linear(view, bias, name), whole, (name, case, kind))
        for threads in (1, 2, 3, 7):
            _core.set_threads(threads)
            assert_same_bits(p.linear(x, bias, name), whole, (name, case, threads))
            assert_same_bits(p.linear(x[:1], bias, name), whole[:1], (name, case, threads))
        _core.set_threads(0)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_extremes(row: dict) -> None:
    """All-same-sign extremes over long K: 16-bit pair sums would saturate, int32 must not wrap."""
    if row["activations"] == "float":
        pytest.skip("this kernel has no integer sums")
    name = row["name"]
    for case in cases_of(row):
        if case.group or case.perm:
            continue
        for low, high in [(0, 0), (0, 2**case.bits - 1), (2**case.bits - 1,) * 2]:
            p = Problem(case, 33, 4097, seed=1)
            p.codes[:, 0::2], p.codes[:, 1::2] = low, high
            if p.codebook is not None:
                p.codebook[:, low], p.codebook[:, high] = -128, -128 if low == high else 127
            p.pack()
            for sign in (1, -1):
                x = np.full((6, 4097), sign, np.float32)
                assert_same_bits(p.linear(x, kernel=name), p.contract(x), (name, case, low, sign))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_nan_and_infinity_stay_in_their_row(row: dict) -> None:
    name = row["name"]
    for case in cases_of(row, 6):
        for m in (3, 12):
            p = Problem(case, 20, 96, seed=2)
            clean = draw(np.random.default_rng(1), m, 96)
            x = clean.copy()
            x[1, 5], x[2, 7] = np.nan, np.inf
            got, expected = p.linear(x, kernel=name), p.linear(clean, kernel=name)
            assert np.isnan(got[1]).all(), (name, case)
            assert not np.isfinite(got[2]).any(), (name, case)
            others = [i for i in range(m) if i not in (1, 2)]
            assert_same_bits(got[others], expected[others], (name, case))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_outputs_of_other_dtypes(row: dict) -> None:
    """float16 and bfloat16 outputs are the float32 result rounded once, half to even."""
    name = row["name"]
    for case in cases_of(row, 6):
        p = Problem(case, 37, 90, seed=6)
        for m in (2, 10):
            x = draw(np.random.default_rng(2), m, 90)
            full = p.linear(x, kernel=name)
            half = p.linear(x, kernel=name, out_dtype=np.float16)
            np.testing.assert_array_equal(half.view(np.uint16), full.astype(np.float16).view("u2"))


def test_repeats_are_equal() -> None:
    """The best kernels of this machine, 10,000 calls over small shapes, outputs poisoned."""
    problems = []
    for i, case in enumerate([Case(4, a, 32, scale="float16") for a in ACTIVATIONS] + [Case(8)]):
        for n, k in [(33, 70), (64, 64), (5, 200), (70, 96), (17, 33)]:
            p = Problem(case, n, k, seed=i)
            x = draw(np.random.default_rng(i), 3, k)
            problems.append((p, x, p.linear(x)))
    for _ in range(500):
        for p, x, expected in problems:
            assert_same_bits(p.linear(x), expected, p.case)
