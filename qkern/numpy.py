# SPDX-License-Identifier: Apache-2.0
"""The operations on numpy arrays, for programs without torch.

Where an array is expected, anything on the CPU that offers its memory by DLPack will do: it is read
where it lies. Results are numpy arrays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qkern import _arrays, _core
from qkern._quantize import quantize as _quantize
from qkern.errors import UnsupportedError
from qkern.formats import Format
from qkern.tensor import QuantizedTensor

__all__ = ["dequantize", "embedding", "int8_matmul", "linear", "quantize"]

_FLOATS = ("float32", "float16")


def quantize(
    weight: np.ndarray,
    fmt: Format | str,
    *,
    method: str = "rtn",
    importance: np.ndarray | None = None,
    hessian: np.ndarray | None = None,
) -> QuantizedTensor:
    """`qkern.quantize` of a numpy array."""
    return _quantize(
        _arrays.as_numpy(weight, "weight"),
        fmt,
        method=method,
        importance=None if importance is None else _arrays.as_numpy(importance, "importance"),
        hessian=None if hessian is None else _arrays.as_numpy(hessian, "hessian"),
    )


def linear(
    x: np.ndarray,
    qt: QuantizedTensor,
    bias: np.ndarray | None = None,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """x [..., K] times the transposed weight [N, K], plus bias [N]; of the dtype of x.

    `out` takes the result: its rows may lie apart, it shares no memory with x or bias.

    The first call on a tensor makes its machine layout, which the tensor keeps; `qt.pack_()`
    drops the other copy.
    """
    _require_tensor(qt)
    n, k = qt.shape
    x = _float_array(x, "x")
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(
            f"x must have {k} columns for a weight of {n} x {k}, but has shape {x.shape}."
        )
    if bias is not None:
        bias = _float_array(bias, "bias")
        if bias.shape != (n,):
            raise ValueError(f"bias must have shape ({n},), but has {bias.shape}.")
        bias = _arrays.contiguous(bias)
    m = math.prod(x.shape[:-1])
    x2 = _arrays.addressable(x.reshape(m, k))
    if out is None:
        out = np.empty((*x.shape[:-1], n), x2.dtype)
    y = _rows_of(out, (*x.shape[:-1], n), x2.dtype, x=x, bias=bias)
    packed = qt.packed()
    row_stride, column_stride = _arrays.strides(x2)
    _core.linear(
        packed.address,
        packed.nbytes,
        _arrays.dtype_code(x2),
        _arrays.address(x2),
        m,
        row_stride,
        column_stride,
        _arrays.address(bias),
        0 if bias is None else _arrays.dtype_code(bias),
        _arrays.dtype_code(y),
        _arrays.address(y),
        _arrays.strides(y)[0] if m > 1 else n,
    )
    return out


def dequantize(
    qt: QuantizedTensor, dtype: Any = None, *, out: np.ndarray | None = None
) -> np.ndarray:
    """The weight [N, K] as float32 or float16: `dtype`, or that of `out`, which takes it."""
    _require_tensor(qt)
    dtype = _result_dtype(dtype, out)
    if out is None:
        return qt.dequantize(dtype)
    qt._rows(None, dtype, _rows_of(out, qt.shape, np.dtype(dtype)))
    return out


def embedding(
    ids: np.ndarray, qt: QuantizedTensor, dtype: Any = None, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Rows `ids` (integers of any shape, 0..N-1) of the weight: [..., K] of `dtype`, or of that
    of `out`, which takes them."""
    _require_tensor(qt)
    dtype = _result_dtype(dtype, out)
    ids = _arrays.as_numpy(ids, "ids") if hasattr(ids, "__dlpack__") else np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"ids must be integers, but are {ids.dtype.name}.")
    n, k = qt.shape
    if ids.size and (ids.min() < 0 or ids.max() >= n):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise IndexError(f"ids must lie in 0..{n - 1}, but {wrong} came.")
    flat = np.ascontiguousarray(ids.reshape(-1), np.int64)
    if out is None:
        return qt.rows(flat, dtype).reshape(*ids.shape, k)
    qt._rows(flat, dtype, _rows_of(out, (*ids.shape, k), np.dtype(dtype), ids=ids))
    return out


def _result_dtype(dtype: Any, out: Any) -> Any:
    if dtype is not None:
        return dtype
    return out.dtype if isinstance(out, np.ndarray) else np.float32


def _rows_of(
    out: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, **others: np.ndarray | None
) -> np.ndarray:
    """`out` as a matrix over its own memory; it must fit the result and share no memory."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a numpy array, but it is {type(out).__name__}.")
    if out.shape != shape:
        raise ValueError(f"out must have the shape {shape} of the result, but has {out.shape}.")
    if out.dtype != dtype or not out.dtype.isnative:
        raise TypeError(f"out must be {dtype.name}, but is {out.dtype.name}.")
    if not out.flags.writeable:
        raise ValueError("out is read-only; give an array that can be written.")
    for name, other in others.items():
        if other is not None and np.shares_memory(out, other):
            raise ValueError(f"out shares memory with {name}; give it memory of its own.")
    rows = out.reshape(math.prod(shape[:-1]), shape[-1])
    if not out.size:
        return rows
    (m, n), (step, column) = rows.shape, rows.strides
    inside = np.may_share_memory(rows, out)
    dense = (n <= 1 or column == rows.itemsize) and (m <= 1 or step >= n * rows.itemsize)
    if not inside or not dense or step % rows.itemsize or not out.flags.aligned:
        raise ValueError(
            "The rows of out must be dense and lie at one distance that is not below their "
            f"length, but its shape is {out.shape} and its strides are {out.strides} bytes."
        )
    return rows


def int8_matmul(a: Any, b: Any) -> np.ndarray:
    """a [..., K] times b [K, N], both int8, exactly, as int32 [..., N]. Any strides; K is at most
    131071, with which no sum leaves int32."""
    a, b = _arrays.as_numpy(a, "a"), _arrays.as_numpy(b, "b")
    for name, array in (("a", a), ("b", b)):
        if array.dtype != np.int8:
            raise TypeError(f"{name} must be int8, but it is {array.dtype.name}.")
    if b.ndim != 2 or a.ndim < 1 or a.shape[-1] != b.shape[0]:
        raise ValueError(
            "int8_matmul takes a [..., K] and b [K, N], "
            f"but their shapes are {a.shape} and {b.shape}."
        )
    k, n = b.shape
    rows = a.reshape(math.prod(a.shape[:-1]), k)
    c = np.empty((*a.shape[:-1], n), np.int32)
    _core.int8_matmul(
        _arrays.address(rows),
        _arrays.address(b),
        _arrays.address(c),
        rows.shape[0],
        n,
        k,
        *_arrays.strides(rows),
        *_arrays.strides(b),
        n,
    )
    return c


def _float_array(x: object, what: str) -> np.ndarray:
    array = _arrays.as_numpy(x, what)
    if array.dtype.name not in _FLOATS:
        raise UnsupportedError(f"{what} must be {' or '.join(_FLOATS)}, but is {array.dtype.name}.")
    return array


def _require_tensor(qt: object) -> None:
    if not isinstance(qt, QuantizedTensor):
        raise TypeError(f"A QuantizedTensor was expected, but {type(qt).__name__} came.")
    if qt.kind != "numpy":
        raise TypeError("The tensor holds torch parts; use qkern.linear and the like, or .numpy().")
