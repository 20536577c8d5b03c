# SPDX-License-Identifier: Apache-2.0
"""Embedding and mixture of experts on the Triton backend, in its interpreter, against the CPU."""

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
    x, ids = torch.randn(8, 70), torch.tensor([[3, 0], [8, 8]])
    results = {}
    for backend in ("cpu", "triton"):
        with qkern.override(backend=backend):
            results[backend] = table(ids), layer(x, offsets)
    assert torch.equal(results["triton"][0], results["cpu"][0]), fmt
    size = torch.cat([x[a:b].abs() @ w.abs().T for a, b, w in
                      zip(offsets[:-1], offsets[1:], layer.weight.dequantize())]) + 1
    error = (results["triton"][1] - results["cpu"][1]).abs()
    assert (error <= 80 * 2**-23 * size).all(), (fmt, float((error / size).max()))
conv = qkern.nn.Conv1d(2, 3, 1, format="int8")
with qkern.override(backend="triton"):
    try:
        conv(torch.randn(1, 2, 4))
    except qkern.UnsupportedError as error:
        assert "The backend triton has no convolution" in str(error), error
        print("ok", len(sys.argv) - 1)
"""


def test_layers_run_on_triton_or_say_why_not() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *FORMATS],
        capture_output=True, text=True, check=False, env=environment, cwd="/",
    )  # fmt: skip
    assert done.stdout.split() == ["ok", str(len(FORMATS))], done.stderr[-2000:]
