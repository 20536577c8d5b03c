# SPDX-License-Identifier: Apache-2.0
"""Rows of the packed layout as floats: the bits that canonical storage gives, whatever the width,
the lanes, the groups, the rows asked for and the instruction set are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qkern import _core
from qkern.testing import BFLOAT16, DTYPE_CODE, Case, Problem, address

# Columns: below and around units and spans of 1024; groups that end inside them.
SHAPES = ((5, 37, 0), (33, 300, 32), (18, 2100, 0), (47, 1100, 40), (16, 1029, 13), (17, 2048, 64))


def dequantize(
    p: Problem, code: int, rows: np.ndarray | None, begin: int, count: int
) -> np.ndarray:
    """Bits of rows, with guard elements behind each."""
    out = np.full((count, p.k + 3), 7, np.uint32 if code == 0 else np.uint16)
    _core.dequantize(
        None, address(p.packed), p.packed.size, code, address(rows), begin, count, address(out),
        p.k + 3,
    )  # fmt: skip
    assert (out[:, p.k :] == 7).all()
    return out[:, : p.k]


def bits_of(values: np.ndarray, code: int) -> np.ndarray:
    """As the kernels round: half to even."""
    if code == BFLOAT16:
        wide = values.view(np.uint32).astype(np.uint64)
        return (wide + 0x7FFF + (wide >> 16 & 1) >> 16).astype(np.uint16)
    return values.view(np.uint32) if code == 0 else values.astype(np.float16).view(np.uint16)


def check(case: Case, n: int, k: int) -> None:
    p = Problem(case, n, k, seed=n)
    values = p.dequantized()
    chosen = np.array([n - 1, 0, 1, 2, 3, 4, n // 2, n // 2, 0], np.int64)
    for code in (0, DTYPE_CODE[np.dtype(np.float16)], BFLOAT16):
        expected = bits_of(values, code)
        for begin, count in {(0, n), (n // 3, 1), (n // 4, n - n // 4), (n - 2, 2)}:
            np.testing.assert_array_equal(
                dequantize(p, code, None, begin, count), expected[begin : begin + count]
            )
        np.testing.assert_array_equal(dequantize(p, code, chosen, 0, len(chosen)), expected[chosen])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("table", [None, "tensor", "row", "group"])
def test_every_width(isa: str, bits: int, table: str | None) -> None:
    for i, (n, k, group) in enumerate(SHAPES):
        scale = ("float32", "float16", "none", "bfloat16", "e8m0", "e4m3")[(i + bits) % 6]
        asymmetric = table is None and i % 2 == 1
        zero = ("uint8", "float16", "float32")[(i // 2 + bits) % 3]
        activations = "float" if i % 3 else "int8"
        factor = 0.3 if table else 1.0
        case = Case(bits, activations, group, asymmetric, table, scale, zero, factor, i >= 4)
        check(case, n, k)


def test_groups_of_one_column(isa: str) -> None:
    for table, perm in itertools.product((None, "group"), (False, True)):
        check(Case(4, group=1, table=table, scale="float16", perm=perm), 19, 300)


def test_threads_share_rows_anywhere() -> None:
    """Shares of rows end where halves end, also where the first row is inside one."""
    p = Problem(Case(4, group=32, scale="float16"), 203, 256)
    expected = p.dequantized().view(np.uint32)
    before = _core.get_threads()
    try:
        for threads, begin in itertools.product((1, 2, 3, 7), (0, 5, 16, 150)):
            _core.set_threads(threads)
            got = dequantize(p, 0, None, begin, p.n - begin)
            np.testing.assert_array_equal(got, expected[begin:])
    finally:
        _core.set_threads(before)
