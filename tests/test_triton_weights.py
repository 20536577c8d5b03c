# SPDX-License-Identifier: Apache-2.0
"""Dequantize, embedding and the quantizer of activations in Triton: the same bits as the
definition."""

from __future__ import annotations

import numpy as np
import pytest

import triton_cases as cases
from triton_cases import DEVICE, INTEGERS, SPECS, Spec, cast, make_weight, name_of, torch

cases.require_kernels()

import qkern.triton_kernels as tk  # noqa: E402


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_dequantize_is_the_definition(spec: Spec) -> None:
    """Random scales, zeros and tables: float32 bit for bit, other types by one conversion."""
    for n, k, dtype in ((17, 172, torch.float32), (1, 13, torch.float16), (5, 64, torch.bfloat16),
                        (3, 513, torch.float32)):  # fmt: skip
        weight = make_weight(spec, n, k, exact=False, perm=n == 17, float_zeros=n == 3)
        got = tk.dequantize(**weight.parts, spec=spec, k=k, dtype=dtype)
        cases.assert_same(got, cast(weight.dense, dtype))


@pytest.mark.parametrize("scale_type", ["e8m0", "e4m3"])
def test_every_byte_of_an_encoded_scale(scale_type: str) -> None:
    """256 rows, each with its own byte as scale, 1 as weight: NaN, subnormals, both signs."""
    byte = np.arange(256, dtype=np.uint8).reshape(256, 1)
    spec = Spec("table", 4, None, table_per="tensor", scale_type=scale_type)
    got = tk.dequantize(
        torch.zeros(256, 4, dtype=torch.uint8, device=DEVICE),
        torch.from_numpy(byte).to(DEVICE),
        None,
        torch.ones(1, 16, device=DEVICE),
        spec=spec,
        k=8,
        dtype=torch.float32,
    )
    value = {"e8m0": cases.e8m0, "e4m3": cases.e4m3}[scale_type](byte)
    cases.assert_same(got, torch.from_numpy(np.repeat(value, 8, axis=1)))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_at_every_place(bits: int) -> None:
    """One code set, all others zero: a bit that is read from the wrong byte shows at once."""
    k = 19
    codes = np.zeros((k, k), np.uint8)
    np.fill_diagonal(codes, 2**bits - 1)
    spec = Spec("int", bits, None, symmetric=False)
    ones = torch.ones(k, 1, device=DEVICE)
    got = tk.dequantize(
        torch.from_numpy(cases.pack_bits(codes, bits)).to(DEVICE),
        ones,
        torch.zeros_like(ones, dtype=torch.uint8),
        spec=spec,
        k=k,
        dtype=torch.float32,
    )
    cases.assert_same(got, torch.from_numpy(codes.astype(np.float32)))


def test_embedding_takes_rows_in_any_order() -> None:
    weight = make_weight(INTEGERS[1], 29, 70, exact=False, perm=True)
    for dtype in (torch.int64, torch.int32):
        ids = torch.tensor([[28, 0, 5], [5, 5, 27]], dtype=dtype, device=DEVICE)
        got = tk.embedding(ids, **weight.parts, spec=weight.spec, k=70, dtype=torch.float32)
        assert got.shape == (2, 3, 70)
        cases.assert_same(got, torch.from_numpy(weight.dense)[ids.cpu().long()])
    outside = torch.tensor([-1, 29, 2**40, 3], device=DEVICE)
    got = tk.embedding(outside, **weight.parts, spec=weight.spec, k=70, dtype=torch.float32)
    assert bool(got[:3].isnan().all())
    cases.assert_same(got[3:], torch.from_numpy(weight.dense[3:4]))
    empty = tk.embedding(outside[:0], **weight.parts, spec=weight.spec, k=70, dtype=torch.float32)
    assert empty.shape == (0, 70)


def quantized(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The rule, in float32 steps."""
    m, k = x.shape
    q = np.zeros((m, k), np.int8)
    scales = np.zeros((m, -(-k // group)), np.float32)
    for row in range(m):
        for g, first in enumerate(range(0, k, group)):
            part = x[row, first : first + group]
            largest = np.abs(part).max()
            if not np.isfinite(part).all():
                scales[row, g] = np.nan
            elif largest >= 2.0**-100:
                scales[row, g] = largest / np.float32(127)
                q[row, first : first + group] = np.rint(part * (np.float32(127) / largest))
    return q, scales


@pytest.mark.parametrize("group", [None, 8, 20, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_activations_are_quantized_by_the_rule(group: int | None, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(6, 172)) * np.exp(rng.normal(size=(6, 1)) * 3)).to(dtype)
    x[1, 3], x[2, 100], x[3] = float("nan"), float("-inf"), 0
    if dtype != torch.float16:
        x[4] *= 2.0**-105
    for view in (x, x.t().contiguous().t()):
        q, scales = tk.quantize_activations(view.to(DEVICE), group)
        expected = quantized(x.float().numpy(), min(group or 172, 172))
        assert np.array_equal(q.cpu().numpy(), expected[0])
        assert np.array_equal(scales.cpu().numpy(), expected[1], equal_nan=True)
    assert tk.quantize_activations(x[:0].to(DEVICE), group)[0].shape == (0, 172)


def test_ties_round_to_even() -> None:
    """127 and halves: the quotients are exact, so every .5 is a tie."""
    x = torch.arange(-126, 127, dtype=torch.float32, device=DEVICE) / 2
    x = torch.cat([x, torch.tensor([127.0], device=DEVICE)]).reshape(1, -1)
    q, scales = tk.quantize_activations(x)
    assert scales.item() == 1
    assert np.array_equal(q.cpu().numpy(), np.rint(x.cpu().numpy()).astype(np.int8))


def test_rows_longer_than_a_block() -> None:
    x = torch.randn(2, 9001, device=DEVICE)
    q, scales = tk.quantize_activations(x)
    expected = quantized(x.cpu().numpy(), 9001)
    assert np.array_equal(q.cpu().numpy(), expected[0])
    assert np.array_equal(scales.cpu().numpy(), expected[1])
