# SPDX-License-Identifier: Apache-2.0
"""What is particular to the avx2 kernels, each against the scalar kernel, bit for bit.

Their pieces (64 to 512 columns), their four streams of panels for few rows, sums in int16, and
their own conversions of scales and outputs. test_linear.py has what all kernels share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from qkern import _core
from qkern.testing import BFLOAT16, Case, Problem, address

ROWS = [r for r in _core.kernels() if r["op"] == "linear" and r["isa"] == "avx2" and r["usable"]]
if not ROWS:
    pytest.skip("this machine has no avx2", allow_module_level=True)
each_kernel = pytest.mark.parametrize("row", ROWS, ids=[r["name"] for r in ROWS])


@pytest.fixture(autouse=True)
def all_threads() -> Iterator[None]:
    yield
    _core.set_threads(0)


def cases(row: dict, group: int, scale: str = "float16") -> list[Case]:
    """What a row reads with one group size: all modes, with zeros and without."""
    bits, token = int(row["weights"][0]), row["weights"].split(": ")[1]
    modes = row["activations"].split(", ")
    if token == "int":
        kinds = [{"asymmetric": False}, {"asymmetric": True, "zero": "float32"}]
    elif token == "table":
        kinds = [{"table": "tensor", "table_scale": 0.3}]
    elif token == "tile-table":
        kinds = [{"table": "tile", "table_scale": 0.3}]
    else:
        kinds = [{"table": "row"}, {"table": "group"}]
    return [Case(bits, mode, group, scale=scale, **kind) for mode in modes for kind in kinds]


def scalar(row: dict) -> str:
    return f"linear_any_{'a32' if row['activations'] == 'float' else 'a8d'}_scalar"


def assert_like_scalar(row: dict, p: Problem, x: np.ndarray, bias: np.ndarray | None = None):
    expected = p.linear(x, bias, scalar(row))
    np.testing.assert_array_equal(
        p.linear(x, bias, row["name"]).view(np.uint32), expected.view(np.uint32), str(p.case)
    )


@each_kernel
def test_groups_chunks_and_pieces(row: dict) -> None:
    """Groups that end inside units, pieces and chunks, a ragged last one; tiles of every height."""
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(37).astype(np.float32)
    for group, k in [(8, 70), (12, 131), (100, 257), (128, 1300), (1500, 2100), (0, 2100)]:
        for case in cases(row, group):
            p = Problem(case, 37, k, seed=k)
            for m in (1, 2, 3, 7, 11):
                assert_like_scalar(row, p, rng.standard_normal((m, k)).astype(np.float32), bias)


@each_kernel
def test_streams_of_panels(row: dict) -> None:
    """Ranges of panels that do not divide by four, the last panel with one half, and any number of
    threads; more rows than a block holds."""
    rng = np.random.default_rng(1)
    case = cases(row, 64)[0]
    for n, m in [(1, 1), (33, 4), (97, 2), (175, 3), (175, 67), (1025, 1), (1025, 5)]:
        p, x = Problem(case, n, 136, seed=n), rng.standard_normal((m, 136)).astype(np.float32)
        for threads in (1, 3):
            _core.set_threads(threads)
            assert_like_scalar(row, p, x)


@each_kernel
def test_pairs_at_their_extremes(row: dict) -> None:
    """Every pair of products at the end of its range, both signs: sums that 16 bits do not hold
    must not saturate. The exact integer sums are the expectation."""
    if row["activations"] == "float":
        pytest.skip("this kernel has no integer sums")
    k = 1111
    columns = np.arange(k)
    patterns = [columns % 2 == 0, columns % 4 < 2, columns >= 0, columns < 0, columns % 3 == 0]
    for case in cases(row, 0, "none")[::2]:
        p = Problem(case, 20, k)
        low, high = 0, 2**case.bits - 1
        if p.codebook is not None:
            p.codebook[:, low], p.codebook[:, high] = -128, 127
        for codes, signs in itertools.product(patterns, patterns):
            p.codes[:] = np.where(codes, high, low)
            p.pack()
            q = np.where(signs, 127, -127)
            sums = (p.values().astype(np.int64) @ q).astype(np.float32)
            for m in (1, 2, 3, 4):
                got = p.linear(np.tile(q.astype(np.float32), (m, 1)), kernel=row["name"])
                expected = sums * np.float32(case.table_scale if case.table else 1)
                # All chunks have nearly the same sum: a rounding for each of 9 chunks, two more.
                np.testing.assert_allclose(got, np.tile(expected, (m, 1)), rtol=11 * 2.0**-24)
                assert_like_scalar(row, p, np.tile(q.astype(np.float32), (m, 1)))


@each_kernel
@pytest.mark.parametrize("scale", ["e8m0", "e4m3", "bfloat16", "float16", "float32", "none"])
def test_every_scale(row: dict, scale: str) -> None:
    """All finite bytes, and for the wider types subnormal, large and negative values."""
    case = next(c for c in cases(row, 32, scale) if c.activations != "int8")
    p = Problem(case, 256, 64)
    if scale == "e8m0":
        p.scales[:] = np.minimum(np.arange(256), 200)[:, None]
    elif scale == "e4m3":
        values = np.arange(256)
        p.scales[:] = np.where(values & 127 == 127, 0, values)[:, None]
    elif scale == "bfloat16":
        p.scales[:] = (np.arange(256) * 127)[:, None]
    elif scale == "float16":
        p.scales[:] = (np.arange(256) * 123).astype(np.uint16).view(np.float16)[:, None]
    elif scale == "float32":
        p.scales[:, 1] = np.float32(1e-40) * np.arange(256)
    p.pack()
    for m in (1, 5):
        x = np.random.default_rng(m).standard_normal((m, 64)).astype(np.float32)
        assert_like_scalar(row, p, x)


@each_kernel
def test_half_precision_outputs(row: dict) -> None:
    """float16 and bfloat16 outputs have the bits of the scalar kernel's: ties, overflow, infinity,
    NaN, subnormal results; nothing is written behind the last output."""
    x = np.random.default_rng(2).standard_normal((6, 40)).astype(np.float32)
    x[1] *= 1e4
    x[2] *= 1e-7
    x[3, 7], x[4, 3] = np.nan, np.inf
    for n, dtype in itertools.product((5, 8, 13, 47), (1, BFLOAT16)):
        p = Problem(cases(row, 0, "float32")[0], n, 40)
        results = []
        for kernel in (row["name"], scalar(row)):
            y = np.full((6, n + 9), 0x1234, np.uint16)
            _core.linear(address(p.packed), p.packed.size, 0, address(x), 6, 40, 1, 0, 0, dtype,
                         address(y), n + 9, kernel)  # fmt: skip
            assert (y[:, n:] == 0x1234).all()
            results.append(y[:, :n])
        exponent = 0x7C00 if dtype == 1 else 0x7F80
        nan = [(y & 0x7FFF) > exponent for y in results]
        np.testing.assert_array_equal(*nan)
        np.testing.assert_array_equal(*(np.where(nan[0], 0, y) for y in results))
