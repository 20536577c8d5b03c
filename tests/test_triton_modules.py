# SPDX-License-Identifier: Apache-2.0
"""Modules on the Triton backend, in its interpreter, against the CPU kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")
pytest.importorskip("torch", reason="the modules need torch")

FORMATS = [
    "int8", "int4-g32", "int4-g32-asym", "int3-g24", "nf4", "codebook4", "codebook3-tensor-g64",
    "mxfp4", "nvfp4", "int8-a8", "int4-g32-a8g", "codebook4-a8",
]  # fmt: skip

# Exact data: multiples of 1/8 from small integers keep every product and sum exact in float32
# only for Int formats with power-of-two scales; the others are compared within the bound of both
# orders of addition, K * 2^-23 * sum |x| |w|.
PROGRAM = """
import sys
import torch, qkern
torch.manual_seed(0)
for fmt in sys.argv[1:]:
    layer = qkern.nn.Linear.from_float(torch.nn.Linear(70, 20), fmt)
    weight = layer.weight.dequantize().double().abs()
    for rows in (1, 3, 20):
        x = torch.randn(rows, 70, requires_grad=True)
        grad = torch.randn(rows, 20)
        results = {}
        for backend in ("cpu", "triton"):
            with qkern.override(backend=backend):
                y = layer(x)
                results[backend] = (y.detach(), *torch.autograd.grad(y, (x, layer.bias), grad))
        size = [x.detach().double().abs() @ weight.T + 1, grad.double().abs() @ weight,
                grad.double().abs().sum(0)]
        for ours, theirs, magnitude in zip(results["triton"], results["cpu"], size):
            limit = 80 * 2**-23 * magnitude
            worst = ((ours.double() - theirs.double()).abs() / limit).max()
            assert worst <= 1, (fmt, rows, float(worst))
    with qkern.override(backend="triton"):
        same = qkern.dequantize(layer.weight) == layer.weight.dequantize()
        assert same.all(), fmt
        assert qkern.explain(layer, x).kernel.endswith("_triton")
print("ok", len(sys.argv) - 1)
"""


def test_modules_run_on_triton() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *FORMATS],
        capture_output=True, text=True, check=False, env=environment, cwd="/",
    )  # fmt: skip
    assert done.stdout.split() == ["ok", str(len(FORMATS))], done.stderr[-2000:]


def test_without_a_gpu_the_backend_says_so() -> None:
    import torch

    import qkern

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    reason = qkern.info()["backends"]["triton"]
    assert "no GPU" in reason
    with (
        pytest.raises(qkern.UnsupportedError, match="'triton' cannot run here"),
        qkern.override(backend="triton"),
    ):
        pass


WITHOUT = """
import sys
{prepare}
import torch, qkern
layer = qkern.nn.Linear.from_float(torch.nn.Linear(70, 20), "int4-g32")
assert layer(torch.randn(3, 70)).isfinite().all()
print(qkern.info()["backends"]["triton"])
try:
    import qkern.triton_kernels
    qkern.triton_kernels.quantize_activations(torch.randn(2, 8))
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("version", [None, "3.1.0"])
def test_without_a_triton_that_is_new_enough_all_else_works(
    version: str | None, tmp_path: Path
) -> None:
    """Absent, and (as far as its metadata say) too old."""
    words = "need triton, which is not installed"
    prepare = "sys.modules['triton'] = None"
    if version is not None:
        words = f"need triton 3.2 or newer, but {version} is installed"
        folder = tmp_path / f"triton-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: triton\nVersion: {version}\n")
        prepare = f"sys.path.insert(0, {str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(prepare=prepare)],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert len(said) == 2 and all(words in line for line in said), done.stderr[-2000:]
