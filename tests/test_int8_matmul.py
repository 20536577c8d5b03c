# SPDX-License-Identifier: Apache-2.0
"""int8_matmul: every kernel and both fronts against int64 sums, exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import qkern.numpy as qn
from qkern import _core
from qkern.testing import address

KERNELS = [row["name"] for row in _core.kernels() if row["op"] == "int8_matmul" and row["usable"]]
# Around the tiles of all levels: rows by 2, 6 and 16 and blocks of 96, 256 and (many columns) 64,
# columns by 4, 16 and 32 and blocks of 128, k by 16, 32 and 64 and pieces of 512 and 1024.
ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 13, 97)
COLUMNS = (1, 2, 3, 4, 5, 8, 63, 67)
DEPTHS = (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 130)
GUARD = 0x5A5A5A5A


def matrices(m: int, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((m, k), (k, n)))
    return a, b


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.int64) @ b.astype(np.int64)


def run(a: np.ndarray, b: np.ndarray, kernel: str | None = None, gap: int = 3) -> np.ndarray:
    """The product; what lies between the rows of c must not change."""
    (m, k), n = a.shape, b.shape[1]
    c = np.full((m, n + gap), GUARD, np.int32)
    _core.int8_matmul(
        address(a), address(b), address(c), m, n, k, *a.strides, *b.strides, n + gap, kernel
    )
    assert (c[:, n:] == GUARD).all()
    assert not kernel or _core.last_kernel() == kernel
    return c[:, :n]


def dense_along_k(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b.T).T


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel(kernel: str) -> None:
    shapes = [(m, 5, k) for m, k in itertools.product(ROWS, (1, 33, 127))]
    shapes += [(7, n, 65) for n in COLUMNS] + [(8, 6, k) for k in DEPTHS]
    shapes += [(5, 5, 1024), (7, 5, 1055), (98, 3, 2100)]
    shapes += [(16, 32, 64), (17, 33, 512), (32, 64, 513), (33, 31, 575), (49, 70, 1088)]
    shapes += [(256, 4, 64), (273, 36, 70), (66, 34, 30001)]
    for i, (m, n, k) in enumerate(shapes):
        a, b = matrices(m, n, k, seed=i)
        np.testing.assert_array_equal(run(a, dense_along_k(b), kernel), product(a, b))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("low", [-128, -127])
def test_extremes(kernel: str, low: int) -> None:
    """Where 16-bit sums saturate, and the longest columns: -128 * -128 * 131071 < 2^31."""
    for k, (x, y) in itertools.product((32, 131071), itertools.product((low, 127), repeat=2)):
        for m in (1, 7):
            a, b = np.full((m, k), x, np.int8), np.full((5, k), y, np.int8).T
            assert (run(a, b, kernel) == k * x * y).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_strides(kernel: str) -> None:
    m, n, k = 9, 150, 83
    big = np.random.default_rng(1).integers(-128, 128, (2 * k, 2 * k), dtype=np.int8)
    rows = (big[:m, :k], big[:k, :m].T, big[: 2 * m : 2, : 2 * k : 2], big[m:0:-1, k:0:-1],
            np.broadcast_to(big[0, :k], (m, k)))  # fmt: skip
    columns = (big[:k, :n], big[:n, :k].T, big[: 2 * k : 2, : 2 * n : 2], big[k:0:-1, n:0:-1],
               big[:n, 1:].T[k:0:-1], np.broadcast_to(big[0, :n], (k, n)))  # fmt: skip
    for a, b in itertools.product(rows, columns):
        np.testing.assert_array_equal(run(a, b, kernel), product(a, b))


def test_threads() -> None:
    """Few columns and many rows, and the other way round, dense or not."""
    before = _core.get_threads()
    try:
        for threads in (1, 2, 3, 8):
            _core.set_threads(threads)
            for m, n, k in ((200, 5, 300), (3, 400, 300), (65, 130, 77), (310, 301, 35)):
                a, b = matrices(m, n, k)
                for right in (b, dense_along_k(b)):
                    np.testing.assert_array_equal(run(a, right), product(a, b))
                np.testing.assert_array_equal(run(dense_along_k(a), b), product(a, b))
    finally:
        _core.set_threads(before)


def test_empty() -> None:
    for m, n, k in itertools.product((0, 2), (0, 3), (0, 4)):
        a, b = np.ones((m, k), np.int8), np.ones((k, n), np.int8)
        np.testing.assert_array_equal(run(a, b), np.full((m, n), k))
        np.testing.assert_array_equal(qn.int8_matmul(a, b), np.full((m, n), k))


def test_bad_arguments_of_the_core() -> None:
    a, b = matrices(2, 3, 4)
    c = np.zeros((2, 3), np.int32)

    def call(m: int = 2, n: int = 3, k: int = 4, out: int = 3, at: int | None = None,
             kernel: str | None = None) -> None:  # fmt: skip
        where = address(c) if at is None else at
        _core.int8_matmul(address(a), address(b), where, m, n, k, 4, 1, 3, 1, out, kernel)

    for sentence, arguments in (
        ("must not be negative", {"m": -1}),
        ("131071 columns int32 may overflow, k is 131072", {"k": 131072}),
        ("rows of c need 3 elements", {"out": 2}),
        ("must not be NULL", {"at": 0}),
        ("no kernel is called int4_matmul", {"kernel": "int4_matmul"}),
    ):
        with pytest.raises(ValueError, match=sentence):
            call(**arguments)


# ---- numpy ----


def test_numpy() -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-128, 128, s).astype(np.int8) for s in ((3, 2, 50), (50, 7)))
    got = qn.int8_matmul(a, b)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, product(a, b))
    np.testing.assert_array_equal(qn.int8_matmul(a[0, 0], b), product(a[0, 0], b))
    swapped = a.transpose(1, 0, 2)
    np.testing.assert_array_equal(qn.int8_matmul(swapped, b), product(swapped, b))
    with pytest.raises(TypeError, match="b must be int8, but it is int32"):
        qn.int8_matmul(a, got)
    with pytest.raises(TypeError, match="a must be a numpy array"):
        qn.int8_matmul([[1]], b)
    with pytest.raises(ValueError, match="their shapes are"):
        qn.int8_matmul(a, a)


# ---- torch ----


def test_torch_against_torch() -> None:
    torch = pytest.importorskip("torch", reason="the operation is on torch tensors")
    import qkern.ops

    for m, n, k in ((17, 24, 64), (33, 8, 2048), (1, 16, 24)):
        a, b = (torch.from_numpy(x) for x in matrices(m, n, k))
        for right in (b, b.t().contiguous().t()):
            got = torch.ops.qkern.int8_matmul(a, right)
            assert torch.equal(got, torch._int_mm(a, right))
            assert torch.equal(got, qkern.int8_matmul(a, right))


def test_torch_op() -> None:
    torch = pytest.importorskip("torch", reason="the operation is on torch tensors")
    import qkern.ops

    a, b = (torch.from_numpy(x) for x in matrices(6, 5, 40))
    op = torch.ops.qkern.int8_matmul.default
    for left, right in ((a, b), (a.view(2, 3, 40), b), (a[0], b), (a[:0], b), (a[:, :0], b[:0])):
        torch.library.opcheck(op, (left, right))
    meta = qkern.int8_matmul(a.view(2, 3, 40).to("meta"), b.to("meta"))
    assert meta.shape == (2, 3, 5) and meta.dtype == torch.int32 and meta.is_meta
    many = torch.empty(1, 131072, dtype=torch.int8, device="meta")
    for error, sentence, left, right in (
        (TypeError, "b must be int8, but it is float32", a, b.float()),
        (TypeError, "a must be a torch tensor", a.numpy(), b),
        (ValueError, "one device", a, b.to("meta")),
        (ValueError, "may overflow; K is 131072", many, many.t()),
    ):
        with pytest.raises(error, match=sentence):
            qkern.int8_matmul(left, right)
