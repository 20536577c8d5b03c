# SPDX-License-Identifier: Apache-2.0
"""qkern.numpy: the operations on arrays, with and without torch in reach."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qkern.numpy as qn
from qkern import _arrays
from qkern.errors import UnsupportedError
from qkern.formats import Int

N, K = 19, 100
TEXTS = ("int4-g32-asym", "int8", "codebook3", "nf4", "mxfp4", "nvfp4")
rng = np.random.default_rng(0)
W = rng.standard_normal((N, K)).astype(np.float32)
X = rng.standard_normal((6, K)).astype(np.float32)
BIAS = rng.standard_normal(N).astype(np.float32)


def bound(x: np.ndarray, values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Error of float32 sums: K + G + 3 roundings of 2^-24 of the sum of magnitudes, and one of
    the output's dtype; an asymmetric grid subtracts zero * sum(x), up to 15 times as large."""
    magnitudes = np.abs(x).astype(np.float64) @ np.abs(values).T.astype(np.float64)
    scale = 15 * np.abs(x).sum(-1, keepdims=True) * np.abs(values).max()
    rounding = np.finfo(out.dtype).eps / 2
    return (2 * K * 2.0**-24) * (magnitudes + scale) + rounding * np.abs(out) + 1e-7


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_linear(text: str, dtype: type) -> None:
    qt = qn.quantize(W, text)
    values = qn.dequantize(qt)
    x, bias = X.astype(dtype), BIAS.astype(dtype)
    plain, shifted = qn.linear(x, qt), qn.linear(x, qt, bias)
    assert plain.dtype == shifted.dtype == dtype
    exact = x.astype(np.float64) @ values.T
    assert (np.abs(plain - exact) <= bound(x, values, plain)).all()
    limit = bound(x, values, shifted) + np.abs(BIAS) * 2.0**-24
    assert (np.abs(shifted - (exact + bias)) <= limit).all()
    np.testing.assert_array_equal(qn.linear(x, qt.pack_()), plain)
    np.testing.assert_array_equal(qn.linear(x, qt, BIAS.astype(np.float32)).dtype, dtype)


def test_int8_activations_are_exact_on_integers() -> None:
    """Weights and activations on the int8 grid: 127 in each row of both makes all scales 1."""
    w = rng.integers(-127, 128, (N, K)).astype(np.float32)
    x = rng.integers(-127, 128, (4, K)).astype(np.float32)
    w[:, 0] = x[:, 1] = 127
    qt = qn.quantize(w, Int(8, activations="int8"))
    np.testing.assert_array_equal(qn.linear(x, qt), x.astype(np.int64) @ w.T.astype(np.int64))


def unaligned(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transposed": np.asfortranarray,
    "sliced": lambda x: np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3],
    "reversed": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "unaligned": unaligned,
    "swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "field": lambda x: np.rec.fromarrays([x, np.zeros(x.shape, np.uint8)], names="x,y").x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_linear_of_any_layout(layout: str, dtype: type) -> None:
    qt = qn.quantize(W, "int4-g32-asym")
    x = X.astype(dtype)
    view = LAYOUTS[layout](x)
    expected = qn.linear(x, qt, BIAS)
    np.testing.assert_array_equal(qn.linear(view, qt, LAYOUTS[layout](BIAS[None])[0]), expected)


def test_linear_of_any_rank() -> None:
    qt = qn.quantize(W, "nf4")
    flat = qn.linear(X, qt)
    np.testing.assert_array_equal(qn.linear(X[2], qt), flat[2])
    np.testing.assert_array_equal(qn.linear(X.reshape(2, 1, 3, K), qt), flat.reshape(2, 1, 3, N))
    assert qn.linear(X[:0], qt).shape == (0, N)
    assert qn.linear(np.zeros((2, 0, K), np.float16), qt).shape == (2, 0, N)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda q: qn.linear(X.tolist(), q),
            TypeError,
            "x must be a numpy array or offer its memory",
        ),
        (lambda q: qn.linear(X[:, 1:], q), ValueError, "x must have 100 columns for a weight of"),
        (lambda q: qn.linear(np.array(1, np.float32), q), ValueError, "but has shape ()."),
        (
            lambda q: qn.linear(X.astype(np.float64), q),
            UnsupportedError,
            "x must be float32 or float16, but is float64.",
        ),
        (
            lambda q: qn.linear(X, q, BIAS[1:]),
            ValueError,
            "bias must have shape (19,), but has (18",
        ),
        (lambda q: qn.linear(X, q, [0.0]), TypeError, "bias must be a numpy array or"),
        (
            lambda q: qn.linear(X, q, BIAS.astype(np.int32)),
            UnsupportedError,
            "bias must be float32 or float16, but is int32.",
        ),
        (lambda q: qn.linear(X, W), TypeError, "A QuantizedTensor was expected, but ndarray came."),
        (lambda q: qn.dequantize(W), TypeError, "A QuantizedTensor was expected"),
        (lambda q: qn.embedding(np.array([0, 19]), q), IndexError, "lie in 0..18, but 19 came."),
        (lambda q: qn.embedding(np.array([[-1]]), q), IndexError, "lie in 0..18, but -1 came."),
        (lambda q: qn.embedding(np.array([0.5]), q), TypeError, "ids must be integers, but are fl"),
        (lambda q: qn.quantize([[1.0]], "int8"), TypeError, "weight must be a numpy array or"),
    ],
)
def test_bad_calls(call: Callable[[Any], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call(qn.quantize(W, "int8"))
    assert sentence in str(caught.value)


def test_torch_tensors_are_pointed_elsewhere() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    qt = qn.quantize(W, "int8")
    with pytest.raises(TypeError, match=r"holds torch parts; use qkern\.linear"):
        qn.linear(X, qt.to("cpu"))
    np.testing.assert_array_equal(qn.linear(X, qt.to("cpu").numpy()), qn.linear(X, qt))


class Lender:
    """Memory of another library: DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_dlpack_is_read_where_it_lies() -> None:
    qt = qn.quantize(Lender(W), "int4-g32-asym")
    np.testing.assert_array_equal(qt.codes, qn.quantize(W, "int4-g32-asym").codes)
    expected = qn.linear(X[::2, ::-1], qt, BIAS)
    np.testing.assert_array_equal(qn.linear(Lender(X[::2, ::-1]), qt, Lender(BIAS)), expected)
    ids = np.array([[3, 1], [0, 7]])
    np.testing.assert_array_equal(qn.embedding(Lender(ids), qt), qn.embedding(ids, qt))
    view = _arrays.as_numpy(Lender(X), "x")
    assert np.shares_memory(view, X)
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.from_numpy(X)
    assert _arrays.address(_arrays.as_numpy(tensor, "x")) == tensor.data_ptr()
    np.testing.assert_array_equal(qn.linear(tensor, qt), qn.linear(X, qt))
    with pytest.raises(UnsupportedError, match="numpy cannot take x, a Tensor, by DLPack"):
        qn.linear(tensor.bfloat16(), qt)
    with pytest.raises(UnsupportedError, match="numpy cannot take x, a Tensor, by DLPack"):
        qn.linear(tensor.clone().requires_grad_(), qt)


def test_embedding() -> None:
    qt = qn.quantize(W, "codebook3")
    values = qn.dequantize(qt)
    ids = rng.integers(0, N, (3, 2, 4))
    for kind in (np.int64, np.int32, np.uint8):
        np.testing.assert_array_equal(qn.embedding(ids.astype(kind)[:, :, ::-1], qt),
                                      values[ids[:, :, ::-1]])  # fmt: skip
    np.testing.assert_array_equal(qn.embedding(np.array(7), qt), values[7])
    assert qn.embedding(np.zeros((2, 0), np.int64), qt).shape == (2, 0, K)
    half = qn.embedding(ids, qt, np.float16)
    np.testing.assert_array_equal(half, values.astype(np.float16)[ids])


def test_without_torch() -> None:
    """All of it in a process where torch cannot be imported."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import numpy as np
import qkern.numpy as qn
import pickle
w = np.arange(-127, 129, dtype=np.float32).reshape(4, 64) % 128
w[:, 0] = 127
for text in ("int8", "int4-g32-asym", "codebook4-a8", "nf4", "mxfp4", "nvfp4"):
    qt = qn.quantize(w, text)
    values = qn.dequantize(qt)
    assert np.abs(values - w).max() <= 127 / 4, text  # mxfp4 cuts 127 to 6 * 16
    assert (qn.embedding(np.arange(4), qt) == values).all()
    y = qn.linear(np.eye(64, dtype=np.float32), qt)
    assert text != "int8" or (y == w.T).all()
    assert (pickle.loads(pickle.dumps(qt.pack_())).dequantize() == values).all()
assert "torch" not in sys.modules
try:
    qt.to("cpu")
except ImportError as error:
    print("done:", error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "done: torch is blocked" in ran.stdout


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("nbytes", [0, 100, (4 << 20) - 1, (4 << 20) + 100, (6 << 20) - 64])
def test_memory_for_packed_weights(kind: str, nbytes: int) -> None:
    """Aligned, of the size asked for, and there as long as something of it is."""
    if kind == "torch":
        pytest.importorskip("torch")
    block = _arrays.empty_aligned(nbytes, kind)
    assert block.shape == (nbytes,)
    large = nbytes >= 2 * _arrays.HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    wanted = _arrays.HUGE_PAGE if large else _arrays.ALIGNMENT
    assert _arrays.address(block) % wanted == 0 or nbytes == 0
    block[:] = 7
    last = block[-10:]
    del block
    gc.collect()
    assert (last == 7).all()
