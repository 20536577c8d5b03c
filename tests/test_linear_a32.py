# SPDX-License-Identifier: Apache-2.0
"""Float-activation kernels where they change gear: borders of chunks, blocks, tiles and streams.

tests/test_linear.py holds every kernel to the contract on general shapes. Here each kernel that
takes float activations is compared with the scalar one, which that file pins, on shapes around the
sizes at which partial sums go through memory, rows change kernels, or panels are read together.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qkern import _core
from qkern.testing import BFLOAT16, Case, Problem, address

SCALAR = "linear_any_a32_scalar"
ROWS = [
    row
    for row in _core.kernels()
    if row["op"] == "linear" and row["usable"] and row["activations"] == "float"
]
ROWS = [row for row in ROWS if row["name"] != SCALAR]
if not ROWS:
    pytest.skip("this machine has no vector kernels for float activations", allow_module_level=True)
EACH = pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])


def case_of(row: dict, group: int = 0, **changes) -> Case:
    """A case the row reads: its first width and kind, with the given changes where they fit."""
    bits, kinds = row["weights"].split(" bits: ")
    kind = kinds.split()[0]
    table = {"int": None, "table": "tensor", "row-table": "row", "tile-table": "tile"}[kind]
    if table:
        changes.pop("asymmetric", None)
        changes.pop("zero", None)
    return Case(int(bits.split(",")[0].split("-")[0]), group=group, table=table, **changes)


def assert_same(problem: Problem, x: np.ndarray, row: dict, bias: np.ndarray | None = None) -> None:
    expected = problem.linear(x, bias, SCALAR).view(np.uint32)
    actual = problem.linear(x, bias, row["name"]).view(np.uint32)
    where = (row["name"], problem.case, problem.n, problem.k, len(x))
    np.testing.assert_array_equal(actual, expected, str(where))


def draw(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(m * k).standard_normal((m, k)).astype(np.float32)


@EACH
@pytest.mark.parametrize("k", [255, 256, 257, 1023, 1024, 1025, 2048, 2305])
def test_borders_of_chunks_and_blocks(row: dict, k: int) -> None:
    """One scale per row: sums of 1024 columns, in blocks of 256, and one column more or fewer."""
    for asymmetric in (False, True):
        p = Problem(case_of(row, asymmetric=asymmetric, scale="float16"), 35, k, seed=k)
        for m in (1, 5):
            assert_same(p, draw(m, k), row)


@EACH
@pytest.mark.parametrize("group", [8, 12, 32, 100, 1000, 1100, 2048])
def test_groups(row: dict, group: int) -> None:
    """Groups shorter than a unit, longer than a chunk, and a ragged last one."""
    k = min(2 * group + 7, 2300)
    p = Problem(case_of(row, group, asymmetric=True, zero="float32"), 33, k, seed=group)
    for m in (2, 7):
        assert_same(p, draw(m, k), row, draw(1, 33)[0])


@EACH
def test_rows(row: dict) -> None:
    """From alone past the streaming rows, the tile and the block of rows."""
    p = Problem(case_of(row, 32, scale="float16"), 50, 96, seed=1)
    x = draw(101, 96)
    expected = p.linear(x, kernel=SCALAR)
    for m in [*range(1, 15), 23, 47, 48, 49, 95, 96, 97, 101]:
        actual = p.linear(x[:m], kernel=row["name"])
        np.testing.assert_array_equal(actual.view("u4"), expected[:m].view("u4"), f"{m} rows")


@EACH
def test_panels(row: dict) -> None:
    """Panels read one, two and four at a time, far apart and side by side, a single half last."""
    for n in [1, 16, 17, 32, 33, 64, 96, 128, 129, 255, 256, 289, 300, 500]:
        p = Problem(case_of(row, 32), n, 64, seed=n)
        for m, threads in itertools.product((1, 3, 6), (1, 3)):
            _core.set_threads(threads)
            assert_same(p, draw(m, 64), row)
    _core.set_threads(0)


@EACH
@pytest.mark.parametrize("scale", ["float32", "float16", "bfloat16", "e8m0", "e4m3", "none"])
def test_scales_and_zeros(row: dict, scale: str) -> None:
    for zero in ("uint8", "float16", "float32"):
        p = Problem(case_of(row, 24, asymmetric=True, scale=scale, zero=zero), 40, 100, seed=7)
        for m in (1, 8):
            assert_same(p, draw(m, 100), row, draw(1, 40)[0])


@EACH
def test_rows_of_x_in_place_and_copied(row: dict) -> None:
    """Rows of x a multiple of 4 KiB apart are copied first where they are many: the same bits."""
    p = Problem(case_of(row, 128), 20, 1024, seed=3)
    x = draw(9, 1024)
    expected = p.linear(x, kernel=SCALAR)
    for stride in (1024, 1032, 2048):
        room = np.zeros((9, stride), np.float32)
        room[:, :1024] = x
        actual = p.linear(room[:, :1024], kernel=row["name"])
        np.testing.assert_array_equal(actual.view("u4"), expected.view("u4"), f"stride {stride}")


@EACH
def test_bfloat16_output(row: dict) -> None:
    """The float32 result rounded once, half to even, NaN kept."""
    p = Problem(case_of(row, 32), 21, 64, seed=4)
    x = draw(7, 64)
    x[3, 5] = np.nan
    bits = p.linear(x, kernel=row["name"]).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
    for m in (1, 7):
        y = np.zeros((m, p.n), np.uint16)
        _core.linear(
            *(address(p.packed), p.packed.size, 0, address(x), m, 64, 1),
            *(0, 0, BFLOAT16, address(y), p.n, row["name"]),
        )
        nan = np.arange(m) == 3
        np.testing.assert_array_equal(y[~nan], rounded[:m][~nan])
        assert (y[nan] & 0x7FFF > 0x7F80).all()
