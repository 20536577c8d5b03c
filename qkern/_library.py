# SPDX-License-Identifier: Apache-2.0
"""The operations that torch knows as torch.ops.qkern.*: schemas, checks, shapes, gradients.

They work on weights in the packed state of the CPU, one uint8 tensor that describes itself;
qkern/backends/cpu.py has the kernels. `linear` has no gradient, so that inference pays nothing
for one; `linear_train` is the same with gradients to x and bias, which take the packed weight as it
is. With int8 activations the gradient is that of the float product (straight through the
rounding of x).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkern.errors import UnsupportedError

FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # qk_dtype of qkern.h
_FLOAT_NAMES = "float32, float16 or bfloat16"
_ALIGNMENT = 64

_SCHEMAS = (
    "linear(Tensor x, Tensor packed, Tensor? bias, SymInt n) -> Tensor",
    "linear_train(Tensor x, Tensor packed, Tensor? bias, SymInt n) -> Tensor",
    "linear_grad_input(Tensor grad, Tensor packed, SymInt k) -> Tensor",
    "dequantize(Tensor packed, SymInt n, SymInt k, ScalarType dtype) -> Tensor",
    "embedding(Tensor ids, Tensor packed, SymInt k, ScalarType dtype) -> Tensor",
    "quantize_activations(Tensor x, SymInt group) -> (Tensor, Tensor)",
)

library = torch.library.Library("qkern", "DEF")
for _schema in _SCHEMAS:
    library.define(_schema)

linear: Callable[..., Tensor] = torch.ops.qkern.linear.default
linear_train: Callable[..., Tensor] = torch.ops.qkern.linear_train.default
linear_grad_input: Callable[..., Tensor] = torch.ops.qkern.linear_grad_input.default
dequantize: Callable[..., Tensor] = torch.ops.qkern.dequantize.default
embedding: Callable[..., Tensor] = torch.ops.qkern.embedding.default
quantize_activations: Callable[..., Any] = torch.ops.qkern.quantize_activations.default


def register_cpu(name: str, kernel: Callable[..., Any]) -> None:
    """Makes `kernel` what runs the operation on CPU tensors."""
    library.impl(name, kernel, "CPU")


# ---- checks; each breach has its sentence ----


def check_input(x: Any, what: str = "x") -> None:
    """x must be a float tensor with at least one dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} must be a torch tensor, but it is {type(x).__name__}.")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{what} must be {_FLOAT_NAMES}, but it is {name_of(x.dtype)}; "
            f"use {what}.float() or another of them."
        )
    if x.dim() == 0:
        raise ValueError(f"{what} must have at least one dimension, but it is a single number.")


def check_columns(x: Tensor, k: int) -> None:
    if x.shape[-1] != k:
        raise ValueError(
            f"The last dimension of x must be the {k} columns of the weight, "
            f"but x has the shape {tuple(x.shape)}."
        )


def checked_bias(bias: Any, n: int) -> Tensor:
    """The bias as a dense tensor."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a torch tensor or None, but it is {type(bias).__name__}.")
    if bias.dtype not in FLOATS:
        raise TypeError(f"bias must be {_FLOAT_NAMES}, but it is {name_of(bias.dtype)}.")
    if bias.shape != (n,):
        raise ValueError(
            f"bias must have one number per row of the weight, shape ({n},), "
            f"but its shape is {tuple(bias.shape)}."
        )
    return bias.contiguous()


def check_float_dtype(dtype: Any) -> None:
    if dtype not in FLOATS:
        named = name_of(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise TypeError(f"dtype must be torch.{_FLOAT_NAMES}, but {named} came.")


def check_ids(ids: Any) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a torch tensor, but it is {type(ids).__name__}.")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, but they are {name_of(ids.dtype)}.")


def check_devices(*tensors: Tensor | None) -> None:
    devices = list(dict.fromkeys(str(t.device) for t in tensors if t is not None))
    if len(devices) > 1:
        raise ValueError(f"All tensors must be on one device, but they are on {devices}.")


def check_group(group: int) -> None:
    if group < 0:
        raise ValueError(f"A group needs at least 1 column (0: the whole row), but {group} came.")


def packed_address(packed: Tensor) -> int:
    """Address of a packed weight."""
    address = packed.data_ptr()
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise ValueError(
            "packed must be a dense one-dimensional uint8 tensor as QuantizedTensor.packed() "
            f"makes it, but it is {name_of(packed.dtype)} with shape {tuple(packed.shape)} "
            f"and strides {packed.stride()}."
        )
    if address % _ALIGNMENT:
        raise ValueError(
            f"packed must begin at a multiple of {_ALIGNMENT} bytes, but its address is "
            f"{address % _ALIGNMENT} bytes beyond one; clone() it."
        )
    return address


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- shapes, for torch.compile and the meta device ----


def _linear_shape(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    check_input(x)
    check_devices(x, packed, bias)
    if bias is not None:
        checked_bias(bias, n)
    return x.new_empty((*x.shape[:-1], n))


def _grad_input_shape(grad: Tensor, packed: Tensor, k: int) -> Tensor:
    check_devices(grad, packed)
    return grad.new_empty((*grad.shape[:-1], k))


def _dequantize_shape(packed: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    check_float_dtype(dtype)
    return packed.new_empty((n, k), dtype=dtype)


def _embedding_shape(ids: Tensor, packed: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    check_ids(ids)
    check_float_dtype(dtype)
    check_devices(ids, packed)
    return packed.new_empty((*ids.shape, k), dtype=dtype)


def _quantize_activations_shape(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    check_input(x)
    check_group(group)
    k = x.shape[-1]
    groups = (k + group - 1) // group if group else 1
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*x.shape[:-1], groups), dtype=torch.float32),
    )


for _name, _shape in (
    ("linear", _linear_shape),
    ("linear_train", _linear_shape),
    ("linear_grad_input", _grad_input_shape),
    ("dequantize", _dequantize_shape),
    ("embedding", _embedding_shape),
    ("quantize_activations", _quantize_activations_shape),
):
    torch.library.register_fake(f"qkern::{_name}", _shape, lib=library)


# ---- gradients ----


def _keep_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, packed, bias, _ = inputs
    ctx.save_for_backward(packed)
    ctx.k = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple:
    (packed,) = ctx.saved_tensors
    to_x = linear_grad_input(grad, packed, ctx.k) if ctx.needs_input_grad[0] else None
    to_bias = None
    if ctx.needs_input_grad[2]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return to_x, None, to_bias, None


torch.library.register_autograd(
    "qkern::linear_train", _linear_backward, setup_context=_keep_for_backward, lib=library
)


# ---- autocast: like torch's own linear, in the dtype of the region ----


def cast_under_autocast(name: str) -> None:
    """Makes the operation cast its first argument as torch.nn.functional.linear does."""
    op = getattr(torch.ops.qkern, name).default

    def cast(x: Tensor, *others: Any) -> Tensor:
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            return op(x, *others)

    library.impl(name, cast, "AutocastCPU")


for _name in ("linear", "linear_train"):
    cast_under_autocast(_name)


# ---- tensors elsewhere ----


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*arguments: Any) -> Any:
        devices = [str(a.device) for a in arguments if isinstance(a, Tensor)]
        raise UnsupportedError(
            f"qkern::{name} works on CPU tensors and packed weights on the CPU, "
            f"but its tensors are on {', '.join(devices)}; move them to one device."
        )

    return refuse


for _schema in _SCHEMAS:
    _name = _schema.split("(")[0]
    for _key in ("CUDA", "MPS", "XPU"):
        library.impl(_name, _refuse(_name), _key)


def define(
    schema: str,
    kernel: Callable[..., Any],
    shape: Callable[..., Any],
    devices: tuple[str, ...] = ("CPU",),
) -> None:
    """One more operation: its kernel, and its checks and shapes without numbers."""
    name = schema.split("(")[0]
    library.define(schema)
    torch.library.register_fake(f"qkern::{name}", shape, lib=library)
    for key in ("CPU", "CUDA", "MPS", "XPU"):
        library.impl(name, kernel if key in devices else _refuse(name), key)


# Whoever sees an operation finds its kernels: these modules register them when they are imported,
# and take their checks from this one, so they come last.
for _name in ("backends.cpu", "_out", "_vmap", "_canonical"):
    importlib.import_module(f"qkern.{_name}")
