# SPDX-License-Identifier: Apache-2.0
"""linear under torch.func's transforms and in forward mode.

What torch makes of register_autograd does not take part in functorch's transforms, and in forward
mode it would lose tangents without a word. This function takes part, maps with vmap, and says that
there is no forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """Whether `linear` below must be called. (torch.compile looks through transforms by itself.)"""
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, product: Callable, to_input: Callable, *weight: Any
    ) -> Tensor:
        return product(x, bias, *weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, bias, _, to_input, *weight = inputs
        tensors = [part for part in weight if isinstance(part, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.to_input = to_input
        ctx.weight = [None if isinstance(part, Tensor) else (part,) for part in weight]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        tensors = iter(ctx.saved_tensors)
        weight = [next(tensors) if kept is None else kept[0] for kept in ctx.weight]
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = ctx.to_input(grad, *weight)
        if ctx.needs_input_grad[1]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return (to_x, to_bias, None, None, *[None] * len(weight))


def linear(
    x: Tensor, bias: Tensor | None, product: Callable, to_input: Callable, *weight: Any
) -> Tensor:
    """product(x, bias, *weight), the gradient to x being to_input(grad, *weight)."""
    return _Linear.apply(x, bias, product, to_input, *weight)
