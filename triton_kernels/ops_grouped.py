# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts as torch ops of the namespace ``qkern_triton``, like those in `ops`: tokens
sorted by expert, weights of all experts stacked along the first axis, offsets on the device."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch.library import triton_op

from . import configs, plan
from .linear_grouped import grouped_dot_kernel, grouped_grad_kernel, grouped_int8_kernel
from .ops import (
    Tensor,
    cdiv,
    device_of,
    launch,
    quantize_activations,
    tables_of,
    weight_arguments,
)
from .spec import Spec


def _table_scales(spec: Spec, given: Tensor | None, experts: int, x: Tensor) -> Tensor:
    if given is not None:
        return given
    return torch.full((experts,), spec.table_scale, device=x.device)


def _table_stride(spec: Spec, codebook: Tensor | None) -> int:
    """Entries from an expert's table to that of the next; tables of rows follow the rows."""
    own = spec.table_per == "tensor" and codebook is not None and codebook.shape[0] > 1
    return 2**spec.bits if own else 0


def _perm_stride(perm: Tensor | None, k: int) -> int:
    return k if perm is not None and perm.ndim == 2 else 0


def _grid(tokens: int, rows: int, experts: int, columns: int) -> tuple[int, int]:
    """As many tiles of tokens as any offsets can need."""
    return tokens // rows + min(experts, tokens), columns


@triton_op("qkern_triton::grouped_linear_chosen", mutates_args={})
def grouped_linear_chosen(
    x: Tensor,
    offsets: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    codebook: Tensor | None,
    perm: Tensor | None,
    table_scales: Tensor | None,
    bias: Tensor | None,
    spec: str,
    rows: int,
    cols: int,
    depth: int,
    warps: int,
    stages: int,
    split: int,
) -> Tensor:
    t, k = x.shape
    experts = offsets.shape[0] - 1
    n = codes.shape[0] // experts
    s = Spec.parse(spec).of_columns(k)
    # A token that belongs to no expert has an output of zeros.
    y = torch.zeros((t, n), dtype=x.dtype, device=x.device)
    if t == 0 or n == 0:
        return y
    table_scales = _table_scales(s, table_scales, experts, x)
    config = configs.Config(rows, cols, depth, warps, stages)
    weight = weight_arguments(codes, scales, zeros, codebook)
    tail = (
        tables_of(s, k),
        _table_stride(s, codebook),
        table_scales,
        x if bias is None else bias,
        y,
        offsets,
        t,
        n,
        k,
        configs.span_of(k, split, plan.step(s)),
    )
    grid = _grid(t, rows, experts, cdiv(n, cols))
    xs = x
    if s.activations != "float" and not plan.quantizes(s, config):
        x, xs = quantize_activations(x, perm, s.activation_group() or 0)
        perm = None
    head = (x, x.stride(0), x.stride(1), codes if perm is None else perm)
    options = {
        **plan.expert_constants(experts),
        "PERM": perm is not None,
        "BIAS": bias is not None,
        "FACTOR": plan.factor(s, scales is not None),
        "FOLD": split > 1,
        "num_warps": warps,
        "num_stages": stages,
    }
    if s.activations == "float":
        c = plan.dot_constants(s, scales is not None, config, k)
        launch(grouped_dot_kernel)[grid](
            *head, _perm_stride(perm, k), *weight, *tail, **c, **options
        )
    else:
        c = plan.int8_constants(s, scales is not None, config, k)
        launch(grouped_int8_kernel)[grid](*head, xs, xs.stride(0), *weight, *tail, **c, **options)
    return y


@triton_op("qkern_triton::grouped_linear", mutates_args={})
def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    codebook: Tensor | None,
    perm: Tensor | None,
    table_scales: Tensor | None,
    bias: Tensor | None,
    spec: str,
) -> Tensor:
    """x ``[T, K]`` sorted by expert, ``offsets`` [E + 1] on the device, parts stacked over
    experts."""
    s = Spec.parse(spec).of_columns(x.shape[1])
    experts, k = offsets.shape[0] - 1, x.shape[1]
    choice = configs.choose_grouped(
        device_of(x), s, x.element_size(), x.shape[0], experts, codes.shape[0] // experts, k
    )
    return grouped_linear_chosen(
        x,
        offsets,
        codes,
        scales,
        zeros,
        codebook,
        perm,
        table_scales,
        bias,
        spec,
        *astuple(choice.config),
        choice.split,
    )


@triton_op("qkern_triton::grouped_input_grad_chosen", mutates_args={})
def grouped_input_grad_chosen(
    dy: Tensor,
    offsets: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    codebook: Tensor | None,
    perm: Tensor | None,
    table_scales: Tensor | None,
    spec: str,
    k: int,
    rows: int,
    cols: int,
    depth: int,
    warps: int,
    stages: int,
) -> Tensor:
    t, n = dy.shape
    experts = offsets.shape[0] - 1
    s = Spec.parse(spec).of_columns(k)
    dx = torch.zeros((t, k), dtype=dy.dtype, device=dy.device)
    if t == 0:
        return dx
    config = configs.Config(rows, cols, depth, warps, stages)
    launch(grouped_grad_kernel)[_grid(t, rows, experts, cdiv(k, depth))](
        dy,
        dy.stride(0),
        dy.stride(1),
        codes if perm is None else perm,
        _perm_stride(perm, k),
        *weight_arguments(codes, scales, zeros, codebook),
        tables_of(s, k),
        _table_stride(s, codebook),
        _table_scales(s, table_scales, experts, dy),
        dx,
        offsets,
        t,
        n,
        k,
        **plan.expert_constants(experts),
        PERM=perm is not None,
        **plan.grad_constants(s, scales is not None, config, k),
        num_warps=warps,
        num_stages=stages,
    )
    return dx


@triton_op("qkern_triton::grouped_input_grad", mutates_args={})
def grouped_input_grad(
    dy: Tensor,
    offsets: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    codebook: Tensor | None,
    perm: Tensor | None,
    table_scales: Tensor | None,
    spec: str,
    k: int,
) -> Tensor:
    """dy ``[T, N]`` to dx ``[T, K]``: each token's gradient has the bits that `linear_input_grad`
    gives it with the weight of its expert."""
    s = Spec.parse(spec).of_columns(k)
    experts = offsets.shape[0] - 1
    config = configs.choose_grouped_grad(device_of(dy), s, dy.element_size(), dy.shape[0], experts)
    return grouped_input_grad_chosen(
        dy,
        offsets,
        codes,
        scales,
        zeros,
        codebook,
        perm,
        table_scales,
        spec,
        k,
        *astuple(config),
    )


def bias_grad(dy: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, N]: the sum of each expert's rows of dy, as a product with zeros and ones: no atomics,
    and no need to know the offsets on the host."""
    token = torch.arange(dy.shape[0], device=dy.device)
    mine = (token >= offsets[:-1, None]) & (token < offsets[1:, None])
    return (mine.float() @ dy.float()).to(dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, codes, scales, zeros, codebook, perm, table_scales, bias, spec = inputs
    ctx.save_for_backward(offsets, codes, scales, zeros, codebook, perm, table_scales)
    ctx.spec, ctx.k = spec, x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = bias = None
    if ctx.needs_input_grad[0]:
        dx = grouped_input_grad(dy, *ctx.saved_tensors, ctx.spec, ctx.k)
    if ctx.needs_input_grad[8]:
        bias = bias_grad(dy, ctx.saved_tensors[0], ctx.bias_dtype)
    return dx, None, None, None, None, None, None, None, bias, None


grouped_linear.register_autograd(_backward, setup_context=_save)
