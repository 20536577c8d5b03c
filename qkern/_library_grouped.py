# SPDX-License-Identifier: Apache-2.0
"""torch.ops.qkern.grouped_linear: schema, checks, shapes, gradients; like qkern/_library.py for
`linear`.

`packed` holds the packed weights of all experts one after the other, each at the next multiple of
64 bytes. Rows offsets[e] .. offsets[e + 1] of x belong to expert e.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkern import _library as checks

for _schema in (
    "grouped_linear(Tensor x, Tensor packed, Tensor offsets, Tensor? bias, SymInt n) -> Tensor",
    "grouped_linear_train(Tensor x, Tensor packed, Tensor offsets, Tensor? bias, SymInt n)"
    " -> Tensor",
    "grouped_linear_grad_input(Tensor grad, Tensor packed, Tensor offsets, SymInt k) -> Tensor",
    "grouped_linear_grad_bias(Tensor grad, Tensor offsets, ScalarType dtype) -> Tensor",
):
    checks.library.define(_schema)

grouped_linear: Callable[..., Tensor] = torch.ops.qkern.grouped_linear.default
grouped_linear_train: Callable[..., Tensor] = torch.ops.qkern.grouped_linear_train.default
grouped_linear_grad_input: Callable[..., Tensor] = torch.ops.qkern.grouped_linear_grad_input.default
grouped_linear_grad_bias: Callable[..., Tensor] = torch.ops.qkern.grouped_linear_grad_bias.default


def check_rows(x: Tensor, offsets: Any, bias: Tensor | None, n: int) -> None:
    checks.check_input(x)
    if x.dim() != 2:
        raise ValueError(f"x must be [T, K], rows sorted by expert, but it is {tuple(x.shape)}.")
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets must be a torch tensor, but it is {type(offsets).__name__}.")
    if offsets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"offsets must be int64 or int32, not {checks.name_of(offsets.dtype)}.")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(
            "offsets must have one number more than there are experts, "
            f"but its shape is {tuple(offsets.shape)}."
        )
    if bias is None:
        return
    if bias.dtype not in checks.FLOATS:
        raise TypeError(f"bias must be a float tensor, but it is {checks.name_of(bias.dtype)}.")
    if bias.shape != (offsets.shape[0] - 1, n):
        raise ValueError(
            f"bias must be [experts, N], ({offsets.shape[0] - 1}, {n}), "
            f"but its shape is {tuple(bias.shape)}."
        )


def _shape(x: Tensor, packed: Tensor, offsets: Tensor, bias: Tensor | None, n: int) -> Tensor:
    check_rows(x, offsets, bias, n)
    checks.check_devices(x, packed, offsets, bias)
    return x.new_empty((x.shape[0], n))


def _grad_input_shape(grad: Tensor, packed: Tensor, offsets: Tensor, k: int) -> Tensor:
    return grad.new_empty((grad.shape[0], k))


def _grad_bias_shape(grad: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty((offsets.shape[0] - 1, grad.shape[1]), dtype=dtype)


for _name, _fake in (
    ("grouped_linear", _shape),
    ("grouped_linear_train", _shape),
    ("grouped_linear_grad_input", _grad_input_shape),
    ("grouped_linear_grad_bias", _grad_bias_shape),
):
    torch.library.register_fake(f"qkern::{_name}", _fake, lib=checks.library)


def _keep_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, packed, offsets, bias, _ = inputs
    ctx.save_for_backward(packed, offsets)
    ctx.k = x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    packed, offsets = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = grouped_linear_grad_input(grad, packed, offsets, ctx.k)
    if ctx.needs_input_grad[3]:
        to_bias = grouped_linear_grad_bias(grad, offsets, ctx.bias_dtype)
    return to_x, None, None, to_bias, None


torch.library.register_autograd(
    "qkern::grouped_linear_train", _backward, setup_context=_keep_for_backward, lib=checks.library
)


for _name in ("grouped_linear", "grouped_linear_train"):
    checks.cast_under_autocast(_name)


# Whoever sees an operation finds its kernels (as at the end of qkern/_library.py).
importlib.import_module("qkern.backends.cpu_layers")
