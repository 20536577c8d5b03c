# SPDX-License-Identifier: Apache-2.0
"""Where torch cannot be imported: what works, and what the rest says."""

from __future__ import annotations

import subprocess
import sys

_BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith(("torch.", "triton", "transformers")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _BLOCK + code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numpy_works_and_nothing_imports_torch() -> None:
    run("""
import copy, pickle
import numpy as np, qkern
w = np.random.default_rng(0).standard_normal((37, 75)).astype(np.float32)
x = np.random.default_rng(1).standard_normal((2, 75)).astype(np.float32)
for fmt in ("int4-g32-asym", "int8-a8", "codebook4", "nf4-g32", "mxfp4", "nvfp4"):
    qt = qkern.numpy.quantize(w, fmt)
    table = qkern.numpy.dequantize(qt)
    y = qkern.numpy.linear(x, qt, w[:, 0])
    out = np.empty_like(y)
    assert qkern.numpy.linear(x, qt, w[:, 0], out=out) is out and (out == y).all()
    if "-a8" not in fmt:
        assert np.abs(y - x @ table.T - w[:, 0]).max() < 1e-4
    assert (qkern.numpy.embedding(np.array([3, 1]), qt) == table[[3, 1]]).all()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(qt)))
    assert (qkern.numpy.linear(x, twin, w[:, 0]) == y).all()
assert qkern.parse_format("int4-g32") == qkern.Int(4, 32)
assert qkern.kernels() and "torch cannot be imported" in str(qkern.info())
with qkern.override(isa="scalar", threads=1):
    assert (qkern.numpy.linear(x, twin, w[:, 0]) == y).all()
assert "torch" not in sys.modules
""")


def test_what_needs_torch_says_so() -> None:
    names = ["linear", "embedding", "dequantize", "quantize_activations", "int8_matmul"]
    names += ["nn", "quantize_"]
    run(f"""
import qkern
for name in {names}:
    try:
        getattr(qkern, name)
    except ImportError as error:
        assert error.name == "torch", error
        assert str(error) == (
            f"qkern.{{name}} works on torch tensors, but torch cannot be imported "
            "(No module named 'torch'); install torch, or use qkern.numpy."
        ), error
    else:
        raise AssertionError(name)
try:
    qkern.numpy.quantize([[1.0]], "int8")
except TypeError as error:
    assert "must be a numpy array" in str(error)
assert set(qkern.__all__) <= set(dir(qkern))
""")
