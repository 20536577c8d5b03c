# SPDX-License-Identifier: Apache-2.0
"""torch.ops.qkern.conv: schema, checks, shapes, gradients; like qkern/_library.py for `linear`.

Images are [B, C, H, W]; one dimension has H = 1. `padding` is (top, left, bottom, right), zeros.
The gradient to x is a float convolution with the dequantized weight, which exists as a whole
during the backward pass; with int8 activations it goes straight through the rounding of x.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qkern import _library as checks

_ARGUMENTS = (
    "Tensor packed, Tensor? bias, SymInt n, SymInt[2] kernel_size, SymInt[2] stride, "
    "SymInt[4] padding, SymInt[2] dilation, SymInt groups"
)
_SCHEMAS = (
    f"conv(Tensor x, {_ARGUMENTS}) -> Tensor",
    f"conv_train(Tensor x, {_ARGUMENTS}) -> Tensor",
    "conv_grad_input(Tensor grad, Tensor packed, SymInt[4] shape, SymInt[2] kernel_size, "
    "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
)
for _schema in _SCHEMAS:
    checks.library.define(_schema)

conv: Callable[..., Tensor] = torch.ops.qkern.conv.default
conv_train: Callable[..., Tensor] = torch.ops.qkern.conv_train.default
conv_grad_input: Callable[..., Tensor] = torch.ops.qkern.conv_grad_input.default

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int]


def output_size(shape: Sequence[int], geometry: Geometry) -> tuple[int, int]:
    """Height and width of the output for an input [B, C, H, W]."""
    kernel, stride, padding, dilation, _ = geometry
    sizes = []
    for i in (0, 1):
        span = dilation[i] * (kernel[i] - 1) + 1
        room = shape[2 + i] + padding[i] + padding[2 + i] - span
        if room < 0:
            raise ValueError(
                f"A kernel that spans {span} positions does not fit into an input of "
                f"{shape[2 + i]} with padding {padding[i]} and {padding[2 + i]}."
            )
        sizes.append(room // stride[i] + 1)
    return sizes[0], sizes[1]


def check_image(x: Tensor, geometry: Geometry) -> None:
    """x must be [B, C, H, W], the geometry that of a convolution."""
    checks.check_input(x)
    kernel, stride, padding, dilation, groups = geometry
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W] here, but its shape is {tuple(x.shape)}.")
    if min(*kernel, *stride, *dilation, groups) < 1 or min(padding) < 0:
        raise ValueError(
            "kernel_size, stride, dilation and groups must be at least 1 and padding at least 0, "
            f"but they are {kernel}, {stride}, {dilation}, {groups} and {padding}."
        )


def memory_format(x: Tensor) -> torch.memory_format:
    """That of the output by torch's rule: channels last where the strides of x [B, C, H, W] can
    only be read so."""
    sizes, strides = x.shape, x.stride()
    least = 0
    for place in (1, 3, 2, 0):
        nested = sizes[place] != 0 and strides[place] >= least
        ambiguous = strides[1] == 0 or (place == 0 and least == strides[1])
        if not nested or ambiguous:
            return torch.contiguous_format
        least = strides[place] * sizes[place]
    return torch.channels_last


def empty_output(x: Tensor, bias: Tensor | None, n: int, geometry: Geometry) -> Tensor:
    """The output without numbers; x has been checked."""
    if n % geometry[4]:
        raise ValueError(f"{n} outputs cannot be divided into {geometry[4]} groups.")
    if bias is not None:
        checks.checked_bias(bias, n)
    size = (x.shape[0], n, *output_size(x.shape, geometry))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _conv_shape(x: Tensor, packed: Tensor, bias: Tensor | None, n: int, *geometry: Any) -> Tensor:
    check_image(x, geometry)  # type: ignore[arg-type]
    checks.check_devices(x, packed, bias)
    return empty_output(x, bias, n, geometry)  # type: ignore[arg-type]


def _grad_shape(grad: Tensor, packed: Tensor, shape: Sequence[int], *geometry: Any) -> Tensor:
    checks.check_devices(grad, packed)
    return grad.new_empty(tuple(shape))


for _name, _shape in (
    ("conv", _conv_shape),
    ("conv_train", _conv_shape),
    ("conv_grad_input", _grad_shape),
):
    torch.library.register_fake(f"qkern::{_name}", _shape, lib=checks.library)


# ---- gradients ----


def _keep_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, packed, bias, _, *ctx.geometry = inputs
    ctx.save_for_backward(packed)
    ctx.shape = x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_backward(ctx: Any, grad: Tensor) -> tuple:
    (packed,) = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = conv_grad_input(grad, packed, ctx.shape, *ctx.geometry)
    if ctx.needs_input_grad[2]:
        to_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
    return to_x, None, to_bias, *(None,) * 6


torch.library.register_autograd(
    "qkern::conv_train", _conv_backward, setup_context=_keep_for_backward, lib=checks.library
)


# ---- autocast: like torch's own convolution, in the dtype of the region ----


for _name in ("conv", "conv_train"):
    checks.cast_under_autocast(_name)


# Whoever sees an operation finds its kernels (as at the end of qkern/_library.py).
importlib.import_module("qkern.backends.cpu_layers")
