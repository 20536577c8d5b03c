# SPDX-License-Identifier: Apache-2.0
"""The CUDA library: mixture of experts, as qkern/_layers.py asks for it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkern.backends import cuda
from qkern.formats import Format


class _GroupedLinear(torch.autograd.Function):
    """The offsets are read by the host in the backward pass alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, packed: cuda.Packed, shape: tuple, offsets: Tensor
    ) -> Tensor:
        ctx.packed, ctx.shape, ctx.bias, ctx.offsets = packed, shape, bias, offsets
        return cuda.product(x, packed, shape[1], bias, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        _, _, k = ctx.shape
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = grad.new_zeros((grad.shape[0], k))
        if ctx.needs_input_grad[1]:
            to_bias = torch.zeros_like(ctx.bias)
        for e, (first, last) in enumerate(itertools.pairwise(ctx.offsets.tolist())):
            rows = grad[first:last]
            if to_x is not None and first < last:
                to_x[first:last] = cuda.grad_input(rows, ctx.packed.of_expert(e), k)
            if to_bias is not None:
                to_bias[e] = rows.sum(0)
        return to_x, to_bias, None, None, None


def grouped_linear(
    x: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: Sequence[int],
    offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    packed = cuda.pack(weight, fmt, shape)
    bias = None if bias is None else bias.contiguous()
    offsets = offsets.to(torch.int64).contiguous()
    if cuda.wants_gradient(x, bias):
        return _GroupedLinear.apply(x, bias, packed, tuple(shape), offsets)
    return cuda.product(x, packed, shape[1], bias, offsets)
