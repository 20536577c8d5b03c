# SPDX-License-Identifier: Apache-2.0
"""torch.ops.qkern.int8_matmul: products of int8 matrices, exactly, as int32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkern import _core
from qkern.errors import UnsupportedError

MOST_COLUMNS = 131071  # 128 * 128 times as many is less than 2^31
_EXACT_COLUMNS = 1024  # of which every sum of products of two int8 numbers is exact in float32

_library = torch.library.Library("qkern", "FRAGMENT")
_library.define("int8_matmul(Tensor a, Tensor b) -> Tensor")
_op: Callable[..., Tensor] = torch.ops.qkern.int8_matmul.default


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., K] times b [K, N], both int8, exactly, as int32 [..., N].

    Any strides; a transposed weight, `w.t()` of w [N, K], is read in place. K is at most 131071,
    with which no sum leaves int32.
    """
    for name, tensor in (("a", a), ("b", b)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch tensor, but it is {type(tensor).__name__}.")
    return _op(a, b)


def _check(a: Tensor, b: Tensor) -> None:
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != torch.int8:
            found = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{name} must be int8, but it is {found}.")
    if b.dim() != 2 or a.dim() == 0 or a.shape[-1] != b.shape[0]:
        raise ValueError(
            "int8_matmul takes a [..., K] and b [K, N], "
            f"but their shapes are {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if a.device != b.device:
        raise ValueError(f"a is on {a.device} and b on {b.device}; move them to one device.")
    if a.shape[-1] > MOST_COLUMNS:
        raise ValueError(
            f"With more than {MOST_COLUMNS} columns int32 may overflow; K is {a.shape[-1]}."
        )


def _empty(a: Tensor, b: Tensor) -> Tensor:
    _check(a, b)
    return a.new_empty((*a.shape[:-1], b.shape[1]), dtype=torch.int32)


def _on_cpu(a: Tensor, b: Tensor) -> Tensor:
    c = _empty(a, b)
    rows = a.unsqueeze(0) if a.dim() == 1 else a.flatten(0, -2)
    m, k = rows.shape
    n = b.shape[1]
    _core.int8_matmul(
        rows.data_ptr(), b.data_ptr(), c.data_ptr(), m, n, k, *rows.stride(), *b.stride(), n
    )
    return c


def _by_floats(a: Tensor, b: Tensor) -> Tensor:
    """On the float units, in pieces whose sums are exact (int8 is exact in TF32 too)."""
    c = _empty(a, b).zero_()
    with torch.autocast(a.device.type, enabled=False):
        for begin in range(0, a.shape[-1], _EXACT_COLUMNS):
            part = slice(begin, begin + _EXACT_COLUMNS)
            c += (a[..., part].float() @ b[part].float()).to(torch.int32)
    return c


def _refuse(a: Tensor, b: Tensor) -> Any:
    raise UnsupportedError(
        "qkern::int8_matmul works on CPU and CUDA tensors, "
        f"but a is on {a.device} and b on {b.device}; move them there."
    )


_library.impl("int8_matmul", _on_cpu, "CPU")
_library.impl("int8_matmul", _by_floats, "CUDA")
for _key in ("MPS", "XPU"):
    _library.impl("int8_matmul", _refuse, _key)
torch.library.register_fake("qkern::int8_matmul", _empty, lib=_library)
