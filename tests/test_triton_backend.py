# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels behind the public functions: same weights, same numbers as on the CPU."""

from __future__ import annotations

import pytest

import triton_cases as cases
from triton_cases import DEVICE, torch

cases.require_kernels()

import qkern  # noqa: E402
from qkern import ops as qops  # noqa: E402
from qkern.backends import triton as backend  # noqa: E402

FORMATS = ("int4-g128", "int4-g32-asym", "int3-g64", "int8", "codebook4", "codebook3-tensor-g64",
           "nf4", "fp4", "iq4nl", "mxfp4", "nvfp4", "lutb")  # fmt: skip


def pair(text: str) -> tuple[qkern.QuantizedTensor, qkern.QuantizedTensor]:
    """The same weight on the CPU and where Triton runs."""
    w = torch.randn(24, 192, generator=torch.Generator().manual_seed(3))
    qt = qkern.quantize(w, text)
    parts = {name: part.clone() for name, part in qt.parts().items()}
    there = qkern.QuantizedTensor.from_parts(qt.format, qt.shape, **parts).to(DEVICE)
    return qt, there


@pytest.mark.parametrize("text", FORMATS)
def test_weights_are_those_of_the_cpu(text: str) -> None:
    qt, there = pair(text)
    ids = torch.tensor([[5, 23], [0, 5]])
    expected = qops.dequantize(qt), qkern.embedding(ids, qt)
    with qkern.override(backend="triton"):
        cases.assert_same(qops.dequantize(there), expected[0])
        cases.assert_same(qkern.embedding(ids.to(DEVICE), there), expected[1])


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("rows", [1, 20])
def test_linear_is_that_of_the_cpu_but_for_the_order(text: str, rows: int) -> None:
    """Two float32 sums of the same products: each within K u sum |x||w| of the exact one."""
    qt, there = pair(text)
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows))
    bound = (x.abs() @ qops.dequantize(qt).abs().t()) * 2 * 196 * 2.0**-24
    for suffix in ("", "-a8", "-a8g"):
        if suffix:
            qt, there = pair(text + suffix)
        expected = qkern.linear(x, qt)
        with qkern.override(backend="triton"):
            y = qkern.linear(x.to(DEVICE), there).cpu()
        # Quantized activations may be larger than x by half a step of 127.
        assert bool(((y - expected).abs() <= bound * 1.1).all())


def test_int8_rows_have_the_bits_of_the_cpu() -> None:
    """One scale per row on both sides: one exact integer sum and two products, in any order of
    columns the same bits."""
    qt, there = pair("int8-a8")
    x = torch.randn(70, 192, generator=torch.Generator().manual_seed(0))
    expected = qkern.linear(x, qt)
    with qkern.override(backend="triton"):
        cases.assert_same(qkern.linear(x.to(DEVICE), there), expected)


@pytest.mark.parametrize("text", ["int8-a8g", "int4-g32-a8", "int4-g32-asym-a8g", "codebook4-a8g",
                                  "nf4-a8", "nvfp4-a8g", "lutb-a8", "lutb-a8g"])  # fmt: skip
def test_int8_groups_have_the_bits_of_the_cpu(text: str) -> None:
    """The same chunks, fused steps and order on both sides, whether the programs quantize x (few
    rows, groups) or a kernel before them."""
    qt, there = pair(text)
    x = torch.randn(20, 192, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(24, generator=torch.Generator().manual_seed(1))
    expected = qkern.linear(x, qt, bias)
    with qkern.override(backend="triton"):
        for m in (3, 20):
            y = qkern.linear(x[:m].to(DEVICE), there, bias.to(DEVICE))
            cases.assert_same(y, expected[:m])


def test_gradients_pass_through_the_public_linear() -> None:
    qt, there = pair("int4-g32-asym")
    x = torch.randn(5, 192, requires_grad=True, device=DEVICE)
    with qkern.override(backend="triton"):
        qkern.linear(x, there).sum().backward()
    expected = qops.dequantize(qt).sum(0)
    assert torch.allclose(x.grad.cpu(), expected.expand(5, -1), rtol=0, atol=24 * 2.0**-22)


def test_the_choice_is_explained() -> None:
    _, there = pair("int4-g128")
    with qkern.override(backend="triton"):
        one = qkern.explain(there, torch.ones(1, 192, device=DEVICE))
        many = qkern.explain(there, torch.ones(100, 192, device=DEVICE))
    assert (one.kernel, many.kernel) == ("linear_dot_triton", "linear_dot_triton")
    assert "family split" in str(one) and "family tile" in str(many)
    assert "linear_gemv_triton" in str(one) and "batch_invariant=False" in str(one)
    names = {row["name"] for row in backend.kernels()}
    assert {one.kernel, many.kernel} <= names
