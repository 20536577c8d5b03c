# SPDX-License-Identifier: Apache-2.0
"""The operations that write into tensors of the caller: `linear_out` and the like.

An `out` has the shape, dtype and device of the result; rows may lie apart, numbers within a row
may not. It shares no memory with what is read. There are no gradients. Each operation returns
nothing, which is what torch.compile asks of one that changes its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qkern import _core, _library
from qkern._library import FLOATS, check_devices, check_float_dtype, check_ids, check_input, name_of
from qkern.backends import cpu

_SCHEMAS = (
    "linear_out(Tensor x, Tensor packed, Tensor? bias, Tensor(a!) out) -> ()",
    "dequantize_out(Tensor packed, SymInt n, SymInt k, Tensor(a!) out) -> ()",
    "embedding_out(Tensor ids, Tensor packed, SymInt k, Tensor(a!) out) -> ()",
    "quantize_activations_out(Tensor x, SymInt group, Tensor(a!) codes, Tensor(b!) scales) -> ()",
)


# ---- checks ----


def check_out(
    out: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, what: str = "out"
) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"{what} must be a torch tensor, but it is {type(out).__name__}.")
    if out.shape != tuple(shape):
        raise ValueError(
            f"{what} must have the shape {tuple(shape)} of the result, "
            f"but its shape is {tuple(out.shape)}."
        )
    if out.dtype != dtype:
        raise TypeError(f"{what} must be {name_of(dtype)}, but it is {name_of(out.dtype)}.")
    if out.device != device:
        raise ValueError(f"{what} must be on {device}, but it is on {out.device}.")


def check_no_gradient(**tensors: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"out= has no gradient, but {name} requires one; "
                    "call without out=, or under torch.no_grad()."
                )


def _rows_of(out: Tensor, what: str = "out") -> Tensor:
    """out [..., N] as [M, N]: its own memory, rows at one distance that do not overlap."""
    n = out.shape[-1]
    try:
        rows = out.view(-1, n) if out.numel() else out.reshape(0, n)
    except RuntimeError:
        rows = None
    if rows is not None and rows.numel():
        m, (step, column) = rows.shape[0], rows.stride()
        if (n > 1 and column != 1) or (m > 1 and step < n):
            rows = None
    if rows is None:
        raise ValueError(
            f"The rows of {what} must be dense and lie at one distance that is not below their "
            f"length, but its shape is {tuple(out.shape)} and its strides are {out.stride()}."
        )
    return rows


def _check_apart(out: Tensor, what: str = "out", **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and _overlap(out, other):
            raise ValueError(
                f"{what} shares memory with {name}, which is read while {what} is written; "
                "give it memory of its own."
            )


def _span(t: Tensor) -> tuple[int, int]:
    """First byte, and one beyond the last."""
    size, begin = t.element_size(), t.data_ptr()
    reach = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (reach + 1) * size


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether a byte belongs to both; columns of one matrix do not overlap other columns of it."""
    if not a.numel() or not b.numel():
        return False
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    if a_end <= b_begin or b_end <= a_begin:
        return False
    period = _period(a)
    if period is None or period != _period(b):
        return True
    a_row, b_row = (_span(t[(0,) * (t.dim() - 1)]) for t in (a, b))
    a_length, b_length = a_row[1] - a_row[0], b_row[1] - b_row[0]
    # Both repeat after as many bytes: modulo that, each is one interval.
    ahead = (b_begin - a_begin) % period
    return ahead < a_length or period - ahead < b_length


def _period(t: Tensor) -> int | None:
    """Bytes between rows, where all rows lie at one distance and within it."""
    steps = [(n, step) for n, step in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]
    if not steps or t.stride(-1) < 1:
        return None
    for (_, outer), (n, inner) in pairwise(steps):
        if outer != n * inner:
            return None
    row = (t.shape[-1] - 1) * t.stride(-1) + 1
    return steps[-1][1] * t.element_size() if steps[-1][1] >= row else None


# ---- CPU ----


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
    check_input(x)
    check_out(out, (*x.shape[:-1], *out.shape[-1:]), x.dtype, x.device)
    rows = _rows_of(out)
    _check_apart(out, x=x, packed=packed, bias=bias)
    cpu.linear_into(x, packed, bias, rows)


def _dequantize(packed: Tensor, n: int, k: int, out: Tensor) -> None:
    check_float_dtype(out.dtype)
    check_out(out, (n, k), out.dtype, packed.device)
    rows = _rows_of(out)
    _check_apart(out, packed=packed)
    address = cpu.checked_packed(packed, n, k)
    _core.dequantize(
        None, address, packed.shape[0], FLOATS[out.dtype], 0, 0, n, rows.data_ptr(), rows.stride(0)
    )


def _embedding(ids: Tensor, packed: Tensor, k: int, out: Tensor) -> None:
    check_ids(ids)
    check_float_dtype(out.dtype)
    check_out(out, (*ids.shape, k), out.dtype, packed.device)
    rows = _rows_of(out)
    _check_apart(out, ids=ids, packed=packed)
    address = cpu.checked_packed(packed, None, k)
    wanted = ids.to(torch.int64).contiguous()
    _core.dequantize(
        None, address, packed.shape[0], FLOATS[out.dtype], wanted.data_ptr(), 0, wanted.numel(),
        rows.data_ptr(), rows.stride(0),
    )  # fmt: skip


def _quantize_activations(x: Tensor, group: int, codes: Tensor, scales: Tensor) -> None:
    check_quantized(x, group, codes, scales)
    if not scales.is_contiguous():
        raise ValueError(
            f"The scales of out must be dense, but their strides are {scales.stride()}."
        )
    rows = _rows_of(codes, "the codes of out")
    _check_apart(codes, "the codes of out", x=x, scales=scales)
    _check_apart(scales, "the scales of out", x=x)
    scales.zero_()  # rows without columns have no maximum
    source = cpu.rows_of(x)
    _core.quantize_activations(
        FLOATS[x.dtype], source.data_ptr(), source.shape[0], x.shape[-1], group, *source.stride(),
        rows.data_ptr(), rows.stride(0), scales.data_ptr(),
    )  # fmt: skip


def check_quantized(x: Tensor, group: int, codes: Tensor, scales: Tensor) -> None:
    check_input(x)
    _library.check_group(group)
    groups = -(-x.shape[-1] // group) if group else 1
    check_out(codes, x.shape, torch.int8, x.device, "the codes of out")
    check_out(scales, (*x.shape[:-1], groups), torch.float32, x.device, "the scales of out")


# ---- shapes ----


def _linear_shape(x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
    check_input(x)
    check_devices(x, packed, bias)
    check_out(out, (*x.shape[:-1], *out.shape[-1:]), x.dtype, x.device)


def _dequantize_shape(packed: Tensor, n: int, k: int, out: Tensor) -> None:
    check_float_dtype(out.dtype)
    check_out(out, (n, k), out.dtype, packed.device)


def _embedding_shape(ids: Tensor, packed: Tensor, k: int, out: Tensor) -> None:
    check_ids(ids)
    check_float_dtype(out.dtype)
    check_out(out, (*ids.shape, k), out.dtype, packed.device)


_kernels: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "linear_out": (_linear, _linear_shape),
    "dequantize_out": (_dequantize, _dequantize_shape),
    "embedding_out": (_embedding, _embedding_shape),
    "quantize_activations_out": (_quantize_activations, check_quantized),
}
for _schema in _SCHEMAS:
    _library.define(_schema, *_kernels[_schema.split("(")[0]])

linear: Callable[..., None] = torch.ops.qkern.linear_out.default
dequantize: Callable[..., None] = torch.ops.qkern.dequantize_out.default
embedding: Callable[..., None] = torch.ops.qkern.embedding_out.default
quantize_activations: Callable[..., None] = torch.ops.qkern.quantize_activations_out.default
