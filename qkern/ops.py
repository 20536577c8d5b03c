# SPDX-License-Identifier: Apache-2.0
"""Functions on torch tensors and quantized tensors. Each checks its arguments, asks for the
backend that serves the device, and leaves the work to it."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from qkern import _canonical, _eager, _library, _out, backends
from qkern._int8_matmul import int8_matmul as int8_matmul
from qkern.tensor import QuantizedTensor


def linear(
    x: Tensor, qt: QuantizedTensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """x [..., K] times the transposed weight [N, K], plus bias [N]: [..., N] in the dtype of x.

    float32, float16 and bfloat16, any strides; differentiable to x and bias. Each row of the
    result has the same bits whatever the other rows, the strides and the number of threads are.

    `out` takes the result: rows may lie apart, no memory may be shared with x, no gradient.
    """
    if out is None and type(qt) is QuantizedTensor and not is_dynamo_compiling():
        parts, layout = qt._state
        if layout is not None and "codes" not in parts:
            y = _eager.linear(x, layout.buffer, bias, qt.shape[0])
            if y is not None:
                return y
    check_pair(qt, x, bias)
    backend = backends.select(x.device.type)
    if out is None:
        return backend.linear(x, held(qt, backend), qt.format, qt.shape, bias)
    _out.check_out(out, (*x.shape[:-1], qt.shape[0]), x.dtype, x.device)
    _out.check_no_gradient(x=x, bias=bias, out=out)
    if backend.PACKED:
        _out.linear(x, held(qt, backend)["packed"], bias, out)
        return out
    return out.copy_(backend.linear(x, held(qt, backend), qt.format, qt.shape, bias))


def embedding(
    ids: Tensor, qt: QuantizedTensor, dtype: Any = None, *, out: Tensor | None = None
) -> Tensor:
    """Rows `ids` [...] of the weight [N, K] as floats [..., K]: float32, or the dtype of `out`,
    which takes the result."""
    check_weight(qt)
    _library.check_ids(ids)
    dtype = _result_dtype(dtype, out)
    _check_device(qt, ids, name="ids")
    backend = backends.select(ids.device.type)
    readable = not qt.is_packed and _canonical.rows_lie_ready(qt.format)
    if out is None and backend.PACKED and readable:
        parts: dict[str, Any] = {name: _as_tensor(part) for name, part in qt.parts().items()}
        parts["format"] = str(qt.format)
        return _canonical.embedding(ids, parts, qt.format, qt.shape, dtype)
    if out is None:
        return backend.embedding(ids, held(qt, backend), qt.format, qt.shape, dtype)
    _out.check_out(out, (*ids.shape, qt.shape[1]), dtype, ids.device)
    _out.check_no_gradient(out=out)
    if backend.PACKED:
        _out.embedding(ids, held(qt, backend)["packed"], qt.shape[1], out)
        return out
    return out.copy_(backend.embedding(ids, held(qt, backend), qt.format, qt.shape, dtype))


def dequantize(qt: QuantizedTensor, dtype: Any = None, *, out: Tensor | None = None) -> Tensor:
    """The weight [N, K] as a float tensor, its columns in the order of the input: float32, or the
    dtype of `out`, which takes the result."""
    check_weight(qt)
    dtype = _result_dtype(dtype, out)
    device = torch.device(qt.device)
    backend = backends.select(device.type)
    if out is None:
        return backend.dequantize(held(qt, backend), qt.format, qt.shape, dtype)
    _out.check_out(out, qt.shape, dtype, device)
    _out.check_no_gradient(out=out)
    if backend.PACKED:
        _out.dequantize(held(qt, backend)["packed"], *qt.shape, out)
        return out
    return out.copy_(backend.dequantize(held(qt, backend), qt.format, qt.shape, dtype))


def quantize_activations(
    x: Tensor, group_size: int | None = None, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of each row, or of each group of columns of it: (int8 [..., K], float32
    scale [..., 1 or ceil(K / group_size)]). Half to even, in -127..127; a group with NaN or
    infinity has scale NaN and zeros. `out` is a pair that takes both."""
    _library.check_input(x)
    if group_size is not None:
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(f"group_size must be an integer or None, but {group_size!r} came.")
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, but {group_size} came.")
    backend = backends.select(x.device.type)
    if out is None:
        return backend.quantize_activations(x, group_size)
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError("out must be a pair of tensors, for the codes and for the scales.")
    codes, scales = out
    _out.check_quantized(x, group_size or 0, codes, scales)
    if backend.PACKED:
        _out.quantize_activations(x, group_size or 0, codes, scales)
    else:
        for tensor, result in zip(out, backend.quantize_activations(x, group_size), strict=True):
            tensor.copy_(result)
    return codes, scales


def check_weight(qt: Any) -> None:
    if not isinstance(qt, QuantizedTensor):
        raise TypeError(
            f"A QuantizedTensor was expected, but {type(qt).__name__} came; "
            "qkern.quantize makes one."
        )


def check_pair(qt: Any, x: Any, bias: Any = None) -> None:
    """The weight, its input and its bias must fit each other."""
    check_weight(qt)
    _library.check_input(x)
    _library.check_columns(x, qt.shape[1])
    if bias is not None:
        _library.checked_bias(bias, qt.shape[0])
    _check_device(qt, x, bias)


def held(qt: QuantizedTensor, backend: ModuleType) -> Mapping[str, Tensor]:
    """The weight as the backend reads it, as torch tensors.

    For a backend that packs, the tensor drops its canonical parts: one copy remains.
    """
    if backend.PACKED:
        return {"packed": _as_tensor(qt.pack_().packed().buffer)}
    return {name: _as_tensor(part) for name, part in qt.parts().items()}


def _result_dtype(dtype: Any, out: Tensor | None) -> torch.dtype:
    if dtype is None:
        dtype = out.dtype if isinstance(out, Tensor) else torch.float32
    _library.check_float_dtype(dtype)
    return dtype


def _as_tensor(part: Any) -> Tensor:
    return part if isinstance(part, Tensor) else torch.from_numpy(part)


def _check_device(
    qt: QuantizedTensor, x: Tensor, bias: Tensor | None = None, name: str = "x"
) -> None:
    home = torch.device(qt.device)
    for what, tensor in ((name, x), ("bias", bias)):
        if tensor is not None and tensor.device != home:
            raise ValueError(
                f"The weight is on {home}, but {what} is on {tensor.device}; "
                "move one to the other with .to()."
            )
