# SPDX-License-Identifier: Apache-2.0
"""Embedding, convolution and mixture of experts on the Triton backend, in its interpreter, against
the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")
pytest.importorskip("torch", reason="the modules need torch")

FORMATS = ("int4-g32", "int4-g32-asym", "nf4", "codebook4", "codebook4-tensor", "nvfp4", "int8-a8")

# Rows of weights are the same bits. Sums of 70 products in another order: 80 roundings each way.
PROGRAM = """
import sys
import torch, qkern
torch.manual_seed(0)
offsets = torch.tensor([0, 3, 3, 8])
for fmt in sys.argv[1:]:
    table = qkern.nn.Embedding.from_float(torch.nn.Embedding(9, 70), fmt)
    layer = qkern.nn.GroupedLinear.from_stack(torch.randn(3, 20, 70), fmt)
    layer = qkern.nn.GroupedLinear(layer.weight, torch.randn(3, 20))
    x, ids = torch.randn(8, 70, requires_grad=True), torch.tensor([[3, 0], [8, 8]])
    layer.bias.requires_grad_()
    results = {}
    for backend in ("cpu", "triton"):
        with qkern.override(backend=backend):
            y = layer(x, offsets)
            results[backend] = table(ids), y.detach(), *torch.autograd.grad(
                y, (x, layer.bias), torch.ones_like(y))
    assert torch.equal(results["triton"][0], results["cpu"][0]), fmt
    dense = list(zip(offsets[:-1], offsets[1:], layer.weight.dequantize().abs()))
    sizes = [torch.cat([x.detach()[a:b].abs() @ w.T for a, b, w in dense]) + 1,
             torch.cat([torch.ones(b - a, 20) @ w for a, b, w in dense]) + 1, torch.full((1,), 8.0)]
    for ours, theirs, size in zip(results["triton"][1:], results["cpu"][1:], sizes):
        error = (ours - theirs).abs()
        assert (error <= 80 * 2**-23 * size).all(), (fmt, float((error / size).max()))

from qkern.backends import triton_layers
shapes = (  # channels, outputs, kernel, stride, padding, dilation, groups
    (3, 24, (3, 3), 1, 1, 1, 1), (6, 16, (2, 3), (2, 1), "valid", (1, 2), 1),
    (4, 16, (4, 1), 1, "same", 1, 2), (16, 20, 1, 1, 0, 1, 1),
)
formats = ("int4-g32-asym", "codebook4", "nvfp4", "lutb-a8")
for index, shape in enumerate(shapes):
    for fmt in (formats[index], "int8", "codebook3-tensor-g64-a8g"):
        conv = qkern.nn.Conv2d.from_float(torch.nn.Conv2d(*shape), fmt)
        for blocks in (1 << 24, 200):
            triton_layers._PATCHES = blocks
            x = torch.randn(2, shape[0], 6, 7, requires_grad=True)
            if blocks == 200:
                x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
            results = {}
            for backend in ("cpu", "triton"):
                with qkern.override(backend=backend):
                    y = conv(x)
                    grads = torch.autograd.grad(y, (x, conv.bias), torch.ones_like(y))
                    results[backend] = y.detach(), *grads
            with torch.no_grad():
                whole = conv.dequantize()
                whole.weight.abs_(), whole.bias.zero_()
                size = [whole(x.abs()) + 1]
            grown = x.detach().clone().requires_grad_()
            size += [torch.autograd.grad(whole(grown).sum(), grown)[0] + 1, torch.full((1,), 200.0)]
            for ours, theirs, magnitude in zip(results["triton"], results["cpu"], size):
                assert ours.stride() == theirs.stride(), (fmt, shape)
                error = (ours - theirs).abs()
                assert (error <= 200 * 2**-23 * magnitude).all(), (fmt, shape, float(error.max()))
with qkern.override(backend="triton"):
    one = qkern.nn.Conv1d(2, 3, 3, format="int8")
    assert one(torch.randn(2, 8)).shape == (3, 6)
    assert one(torch.randn(0, 2, 8)).shape == (0, 3, 6)
    odd = qkern.nn.Conv2d(4, 12, 3, groups=2, format="lutb")
    try:
        odd(torch.randn(1, 4, 5, 5))
    except qkern.UnsupportedError as error:
        assert "lutb has tables for 8 at a time" in str(error), error
        print("ok", len(sys.argv) - 1)
"""


def test_layers_run_on_triton() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *FORMATS],
        capture_output=True, text=True, check=False, env=environment, cwd="/",
    )  # fmt: skip
    assert done.stdout.split() == ["ok", str(len(FORMATS))], done.stderr[-2000:]
