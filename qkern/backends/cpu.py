# SPDX-License-Identifier: Apache-2.0
"""The CPU: from tensors to the addresses, sizes and strides that the native library takes.

The functions under "kernels" are what torch runs for the operations of qkern/_library.py. They
check what they get: a packed weight tells its own size, and no tensor may be smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkern import _core, _library, _threads, _transforms
from qkern._library import FLOATS, packed_address
from qkern.formats import Format

DEVICES = ("cpu",)
PACKED = True

_GRADIENT_BLOCK = 1 << 20  # weights that are floats at a time in the backward pass

_threads.adopt_torch()


# ---- kernels ----


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    if x.dtype not in FLOATS or not x.dim():
        _library.check_input(x)
    y = x.new_empty((*x.shape[:-1], n))
    linear_into(x, packed, bias, y if y.dim() == 2 else y.view(-1, n))
    return y


def linear_into(x: Tensor, packed: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [M, N] must have rows that are dense and as many as x has; x must have been checked."""
    bias_address = bias_code = 0
    n = y.shape[1]
    if bias is not None:
        if bias.dtype not in FLOATS or bias.shape != (n,) or not bias.is_contiguous():
            bias = _library.checked_bias(bias, n)
        bias_address, bias_code = bias.data_ptr(), FLOATS[bias.dtype]
    rows = x if x.dim() == 2 else rows_of(x)
    m, k = rows.shape
    code = FLOATS[x.dtype]
    row_stride, column_stride = rows.stride()
    _core.linear(
        packed_address(packed), packed.shape[0], code, rows.data_ptr(), m, row_stride,
        column_stride, bias_address, bias_code, code, y.data_ptr(), y.stride(0), None, k, n,
    )  # fmt: skip


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]; a view where the strides allow it, whatever the last two are."""
    if x.dim() == 1:
        return x.unsqueeze(0)
    return x.flatten(0, -2)


def _linear_grad_input(grad: Tensor, packed: Tensor, k: int) -> Tensor:
    """grad . W, by blocks of rows of W, so that the float weight never exists as a whole."""
    n = grad.shape[-1]
    address = checked_packed(packed, n, k)
    rows = rows_of(grad).float()
    result = rows.new_zeros((rows.shape[0], k))
    step = max(1, min(n, _GRADIENT_BLOCK // k))
    block = rows.new_empty((step, k))
    for begin in range(0, n, step):
        count = min(step, n - begin)
        _dequantize_rows(address, packed, begin, count, block)
        result.addmm_(rows[:, begin : begin + count], block[:count])
    return result.to(grad.dtype).view(*grad.shape[:-1], k)


def _dequantize(packed: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    _library.check_float_dtype(dtype)
    address = checked_packed(packed, n, k)
    weight = packed.new_empty((n, k), dtype=dtype)
    _dequantize_rows(address, packed, 0, n, weight)
    return weight


def _embedding(ids: Tensor, packed: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    _library.check_ids(ids)
    _library.check_float_dtype(dtype)
    address = checked_packed(packed, None, k)
    rows = ids.to(torch.int64).contiguous()
    out = packed.new_empty((*ids.shape, k), dtype=dtype)
    _core.dequantize(
        None, address, packed.shape[0], FLOATS[dtype], rows.data_ptr(), 0, rows.numel(),
        out.data_ptr(), k,
    )  # fmt: skip
    return out


def _quantize_activations(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    _library.check_input(x)
    _library.check_group(group)
    k = x.shape[-1]
    rows = rows_of(x)
    groups = -(-k // group) if group else 1
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_zeros((*x.shape[:-1], groups), dtype=torch.float32)
    _core.quantize_activations(
        FLOATS[x.dtype], rows.data_ptr(), rows.shape[0], k, group, *rows.stride(),
        codes.data_ptr(), k, scales.data_ptr(),
    )  # fmt: skip
    return codes, scales


def checked_packed(packed: Tensor, n: int | None, k: int) -> int:
    address = packed_address(packed)
    facts = _core.packed_describe(address, packed.shape[0])
    if facts["k"] != k or (n is not None and facts["n"] != n):
        raise ValueError(
            f"The packed weight is {facts['n']} x {facts['k']}, but "
            f"{'any' if n is None else n} x {k} was asked for."
        )
    return address


def _dequantize_rows(address: int, packed: Tensor, begin: int, count: int, out: Tensor) -> None:
    _core.dequantize(
        None, address, packed.shape[0], FLOATS[out.dtype], 0, begin, count, out.data_ptr(),
        out.shape[1],
    )  # fmt: skip


for _name, _kernel in (
    ("linear", _linear),
    ("linear_train", _linear),
    ("linear_grad_input", _linear_grad_input),
    ("dequantize", _dequantize),
    ("embedding", _embedding),
    ("quantize_activations", _quantize_activations),
):
    _library.register_cpu(_name, _kernel)


# ---- the backend ----


def unavailable() -> str | None:
    return None


def linear(
    x: Tensor, weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    if _transforms.active():
        return _transforms.linear(x, bias, _product, _to_input, weight["packed"], *shape)
    train = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    op = _library.linear_train if train else _library.linear
    return op(x, weight["packed"], bias, shape[0])


def _product(x: Tensor, bias: Tensor | None, packed: Tensor, n: int, k: int) -> Tensor:
    return _library.linear(x, packed, bias, n)


def _to_input(grad: Tensor, packed: Tensor, n: int, k: int) -> Tensor:
    return _library.linear_grad_input(grad, packed, k)


def embedding(
    ids: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    return _library.embedding(ids, weight["packed"], shape[1], dtype)


def dequantize(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    return _library.dequantize(weight["packed"], *shape, dtype)


def quantize_activations(x: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    return _library.quantize_activations(x, group_size or 0)


def kernels() -> list[dict[str, Any]]:
    return [{"device": "cpu", **row} for row in _core.kernels()]


def explain(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], x: Tensor
) -> list[tuple[str, bool, str]]:
    packed = weight["packed"]
    lines = _core.explain(packed_address(packed), packed.shape[0]).splitlines()
    rows = (line.split("\t") for line in lines)
    return [(kernel, verdict == "runs", reason) for kernel, verdict, reason in rows]
