# SPDX-License-Identifier: Apache-2.0
"""Failures that users of other libraries of this kind have met, each as its shortest test. Which
test stands for which failure is in tests/README.md; most of them are not in this file."""

from __future__ import annotations

import numpy as np
import pytest

from qkern import _core
from qkern.testing import ACTIVATIONS, Case, Problem, address

KINDS = [
    {},
    {"asymmetric": True},
    {"asymmetric": True, "zero": "float32"},
    {"table": "tensor"},
    {"table": "row"},
    {"table": "group"},
]


def scalar(case: Case) -> str:
    return f"linear_any_{'a32' if case.activations == 'float' else 'a8d'}_scalar"


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a.view(np.uint32) == b.view(np.uint32)).all())


def dequantized(p: Problem) -> np.ndarray:
    out = np.empty((p.n, p.k), np.float32)
    _core.dequantize(None, address(p.packed), p.packed.size, 0, 0, 0, p.n, address(out), p.k)
    return out


def every_code_and_zero(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """codes [zeros, slots * codes] and zeros: each code at each of 8 places beside each zero."""
    codes = np.repeat(np.arange(2**bits, dtype=np.uint8), 8)
    zeros = np.arange(2**bits, dtype=np.uint8)[:, None]
    return np.tile(codes, (2**bits, 1)), zeros


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_every_code_with_every_zero_at_every_place(bits: int, activations: str) -> None:
    codes, zeros = every_code_and_zero(bits)
    if bits == 8:  # all 256 codes; zeros at the ends and in the middle
        keep = [0, 1, 127, 128, 129, 254, 255]
        codes, zeros = codes[keep], zeros[keep]
    n, k = codes.shape
    p = Problem(Case(bits, activations, asymmetric=True, scale="none"), n, k)
    p.codes[:], p.zeros[:] = codes, zeros
    p.pack()
    truth = codes.astype(np.int64) - zeros
    np.testing.assert_array_equal(dequantized(p), truth)
    # Unit rows in turn would be k x k; every 16th row has ones 16 apart, exact in all modes.
    x = np.zeros((16, k), np.float32)
    for i in range(16):
        x[i, i::16] = 127
    expected = x.astype(np.int64) @ truth.T
    np.testing.assert_array_equal(p.linear(x), expected)
    np.testing.assert_array_equal(p.linear(x[:1]), expected[:1])


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_columns_by_multiples_of_32(activations: str, kind: dict) -> None:
    for k in range(32, 513, 32):
        p = Problem(Case(4, activations, group=32, **kind), 33, k, seed=k)
        x = np.random.default_rng(k).standard_normal((3, k)).astype(np.float32)
        assert same_bits(p.linear(x), p.linear(x, kernel=scalar(p.case))), k


@pytest.mark.parametrize("k", [65535, 65536, 65537, 65793, 131071, 131072, 131073])
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_at_the_borders_of_int32(k: int, bits: int) -> None:
    """All products at the end of their range; no sum of the contract may leave int32."""
    for asymmetric in (False, True):
        p = Problem(Case(bits, "int8", asymmetric=asymmetric, scale="none"), 3, k)
        p.codes[0], p.codes[1], p.codes[2] = 0, 2**bits - 1, p.codes[2]
        p.pack()
        for sign in (1, -1):
            x = np.full((5, k), sign, np.float32)
            assert same_bits(p.linear(x), p.contract(x)), (asymmetric, sign)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_numbers_of_rows(activations: str) -> None:
    """Around a block of rows and far above it: some rows are those of a call alone."""
    p = Problem(Case(4, activations, group=32, scale="float16"), 17, 40, seed=3)
    rng = np.random.default_rng(0)
    for m in (327, 328, 329, 330, 1023, 1024, 1025, 2049, 100_000):
        x = rng.standard_normal((m, 40)).astype(np.float32)
        y = p.linear(x)
        for i in {0, 1, m // 2, m - 2, m - 1} | set(range(1020, min(m, 1030))):
            assert same_bits(y[i], p.linear(x[i : i + 1])[0]), (m, i)


def test_the_last_row_two_hundred_times() -> None:
    for activations in ACTIVATIONS:
        p = Problem(Case(4, activations, group=32, asymmetric=True), 40, 72, seed=4)
        x = np.random.default_rng(1).standard_normal((329, 72)).astype(np.float32)
        first = p.linear(x)
        for _ in range(200):
            assert same_bits(p.linear(x)[-1], first[-1])


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_every_byte_offset(activations: str) -> None:
    """x, bias and y at all sixteen offsets, also those that are no multiple of an element."""
    p = Problem(Case(4, activations, group=32), 19, 50, seed=5)
    rng = np.random.default_rng(2)
    x, bias = rng.standard_normal((4, 50)).astype("f4"), rng.standard_normal(19).astype("f4")
    expected = p.linear(x, bias)
    for offset in range(16):
        room = np.zeros(4096, np.uint8)
        at = [room[start + offset :] for start in (0, 1024, 2048)]
        at[0][: x.nbytes], at[1][: bias.nbytes] = x.view(np.uint8).ravel(), bias.view(np.uint8)
        for kernel in (None, scalar(p.case)):
            at[2][:] = 0xA5
            _core.linear(address(p.packed), p.packed.size, 0, address(at[0]), 4, 50, 1,
                         address(at[1]), 0, 0, address(at[2]), 19, kernel)  # fmt: skip
            got = np.frombuffer(at[2][: expected.nbytes].tobytes(), np.float32).reshape(4, 19)
            assert same_bits(got, expected), (offset, kernel)
            assert (at[2][expected.nbytes :] == 0xA5).all()


def test_negative_zero_and_subnormal_activations() -> None:
    """-0 counts as 0; subnormal values are numbers for float activations and 0 for int8 ones."""
    for kind in KINDS:
        for activations in ACTIVATIONS:
            p = Problem(Case(4, activations, group=16, **kind), 18, 33, seed=6)
            zero, minus = np.zeros((3, 33), np.float32), np.full((3, 33), -0.0, np.float32)
            np.testing.assert_array_equal(p.linear(minus), p.linear(zero))
            assert not p.linear(zero).any()
            tiny = np.full((3, 33), 3e-41, np.float32)
            assert same_bits(p.linear(tiny), p.contract(tiny)), (kind, activations)


def test_scales_of_outliers_and_of_nothing() -> None:
    """Scales as real files hold them: 548, 6e4 in float16, the least normal and a subnormal."""
    for value in (548.0, 6e4, 2.0**-14, 2.0**-24):
        for activations in ACTIVATIONS:
            p = Problem(Case(4, activations, group=16, scale="float16"), 18, 40, seed=7)
            p.scales[:], p.scale_values[:] = value, value
            p.pack()
            x = np.random.default_rng(3).standard_normal((3, 40)).astype(np.float32)
            assert same_bits(p.linear(x), p.contract(x)), (value, activations)
