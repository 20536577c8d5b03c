# SPDX-License-Identifier: Apache-2.0
"""The operations as torch ops of the namespace ``qkern_triton``.

They are `torch.library.triton_op`s: torch.compile and AOTInductor see the kernels inside, and
tracing them with fake tensors gives the shapes. A format comes in as the text of a `Spec`. Weight
parts are canonical storage, read in place. Mixtures of experts are in `ops_grouped`.
"""

from __future__ import annotations

from . import unavailable

if reason := unavailable():
    raise ImportError(reason)

from dataclasses import astuple
from functools import lru_cache
from typing import Any

import torch
from torch.library import triton_op, wrap_triton

from . import configs, plan
from .activations import quantize_activations_kernel
from .dequantize_rows import dequantize_kernel
from .linear_finish import sum_parts_kernel
from .linear_float import linear_dot_kernel
from .linear_gemv import linear_gemv_kernel
from .linear_grad import linear_grad_kernel
from .linear_int8 import linear_int8_kernel
from .spec import Spec

Tensor = torch.Tensor


def launch(kernel: Any) -> Any:
    """The kernel in the form that tracing sees; an interpreted one (no compiler) runs as it is."""
    return wrap_triton(kernel) if type(kernel).__name__ == "JITFunction" else kernel


@lru_cache(maxsize=64)
def _device(index: int) -> configs.Device:
    properties = torch.cuda.get_device_properties(index)
    arch = 0 if torch.version.hip else properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", configs.GENERIC.shared)
    return configs.Device(properties.name, arch, properties.multi_processor_count, shared)


def device_of(x: Tensor) -> configs.Device:
    if x.device.type != "cuda" or not torch.cuda.is_available():
        return configs.GENERIC
    index = x.device.index
    return _device(torch.cuda.current_device() if index is None else index)


def weight_arguments(
    codes: Tensor, scales: Tensor | None, zeros: Tensor | None, codebook: Tensor | None
) -> tuple[Any, ...]:
    """Weight arguments as the kernels order them. Where a part is absent any address will do: the
    constants say that it is not read."""

    def raw(part: Tensor) -> Tensor:
        return part.view(torch.uint8) if part.element_size() == 1 else part

    return (
        codes,
        codes.stride(0),
        codes if scales is None else raw(scales),
        0 if scales is None else scales.stride(0),
        codes if zeros is None else zeros,
        0 if zeros is None else zeros.stride(0),
        codes if codebook is None else raw(codebook),
    )


def _table_scale(spec: Spec, stored: Tensor | None) -> tuple[Tensor | float, bool]:
    """What a kernel takes as table_scale, and SCALE_STORED."""
    return (spec.table_scale, False) if stored is None else (stored, True)


def tables_of(spec: Spec, k: int) -> int:
    return spec.tile_columns(k) if spec.table_per == "tile" else spec.groups(k)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@triton_op("qkern_triton::dequantize", mutates_args={})
def dequantize(
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    codebook: Tensor | None,
    perm: Tensor | None,
    table_scale: Tensor | None,
    ids: Tensor | None,
    spec: str,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of W as floats ``[rows, k]``: all, or those in ``ids`` [rows]."""
    s = Spec.parse(spec).of_columns(k)
    count = codes.shape[0] if ids is None else ids.shape[0]
    y = torch.empty((count, k), dtype=dtype, device=codes.device)
    if count == 0:
        return y
    factor, stored = _table_scale(s, table_scale)
    c = plan.dequantize_constants(s, scales is not None, k, count)
    grid = (cdiv(count, c["BN"]) * cdiv(k, c["BK"]),)
    launch(dequantize_kernel)[grid](
        codes if ids is None else ids,
        codes if perm is None else perm,
        *weight_arguments(codes, scales, zeros, codebook),
        tables_of(s, k),
        factor,
        y,
        count,
        codes.shape[0],
        k,
        SCALE_STORED=stored,
        IDS=ids is not None,
        PERM=perm is not None,
        **c,
        num_warps=4,
    )
    return y


@triton_op("qkern_triton::quantize_activations", mutates_args={})
def quantize_activations(x: Tensor, perm: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """x ``[M, K]`` to int8 ``[M, K]`` and float32 scales ``[M, groups]``; ``group`` 0 is a whole
    row. With ``perm``, column j of the result is column ``perm[j]`` of x."""
    m, k = x.shape
    group = min(group, k) or k
    groups = cdiv(k, group)
    q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scales = torch.empty((m, groups), dtype=torch.float32, device=x.device)
    if m == 0:
        return q, scales
    c = plan.quantize_constants(group)
    launch(quantize_activations_kernel)[(m, cdiv(groups, c["MANY"]))](
        x,
        x.stride(0),
        x.stride(1),
        x if perm is None else perm,
        q,
        scales,
        k,
        group,
        groups,
        PERM=perm is not None,
        **c,
        num_warps=4,
    )
    return q, scales


@triton_op("qkern_triton::linear_chosen", mutates_args={})
def linear_chosen(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    codebook: Tensor | None,
    perm: Tensor | None,
    table_scale: Tensor | None,
    bias: Tensor | None,
    spec: str,
    family: str,
    rows: int,
    cols: int,
    depth: int,
    warps: int,
    stages: int,
    split: int,
) -> Tensor:
    """`linear` with a given family, configuration and split: what the tuner and the tests call."""
    m, k = x.shape
    n = codes.shape[0]
    s = Spec.parse(spec).of_columns(k)
    config = configs.Config(rows, cols, depth, warps, stages)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    has_scales = scales is not None
    weight = weight_arguments(codes, scales, zeros, codebook)
    # With several programs per tile, what ends a sum comes after the sum of their parts.
    parts = 1 if family == "tile" else split
    out = y if parts == 1 else torch.empty((parts, m, n), dtype=torch.float32, device=x.device)
    ends = {
        "FACTOR": plan.factor(s, has_scales) if parts == 1 else 0,
        "BIAS": bias is not None and parts == 1,
    }
    factor, stored = _table_scale(s, table_scale)
    tail = (tables_of(s, k), factor, x if bias is None else bias, out, m, n, k)
    tiles = cdiv(m, rows) * cdiv(n, cols)
    fused = family != "gemv" and plan.quantizes(s, config)
    xs = x
    if s.activations != "float" and not fused:
        x, xs = quantize_activations(x, perm, s.activation_group() or 0)
        perm = None
    head = (x, x.stride(0), x.stride(1), codes if perm is None else perm)
    options = {"PERM": perm is not None, "SCALE_STORED": stored, **ends, "num_warps": warps}
    if family == "gemv":
        span = configs.span_of(k, split, depth)
        c = plan.gemv_constants(s, has_scales, config, k, m)
        launch(linear_gemv_kernel)[(cdiv(n, cols), cdiv(m, c["ROWS"]), split)](
            *head, xs, xs.stride(0), *weight, *tail, span, **c, **options
        )
    else:
        span = configs.span_of(k, split, plan.step(s))
        options |= {"FOLD": family == "tile" and split > 1, "num_stages": stages}
        if s.activations == "float":
            c = plan.dot_constants(s, has_scales, config, k)
            launch(linear_dot_kernel)[(tiles, parts)](*head, *weight, *tail, span, **c, **options)
        else:
            c = plan.int8_constants(s, has_scales, config, k)
            launch(linear_int8_kernel)[(tiles, parts)](
                *head, xs, xs.stride(0), *weight, *tail, span, **c, **options
            )
    if parts > 1:
        c = plan.sum_constants(s, has_scales)
        launch(sum_parts_kernel)[(cdiv(n, c["BLOCK"]), m)](
            out,
            *weight[2:4],
            xs,
            xs.stride(0),
            factor,
            x if bias is None else bias,
            y,
            m,
            n,
            PARTS=parts,
            BIAS=bias is not None,
            SCALE_STORED=stored,
            **c,
            num_warps=4,
        )
    return y


@triton_op("qkern_triton::linear", mutates_args={})
def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    codebook: Tensor | None,
    perm: Tensor | None,
    table_scale: Tensor | None,
    bias: Tensor | None,
    spec: str,
    batch_invariant: bool = True,
) -> Tensor:
    """x ``[M, K]`` to ``[M, N]`` in the type of x, activations as the spec says."""
    s = Spec.parse(spec).of_columns(x.shape[1])
    choice = configs.choose_linear(
        device_of(x),
        s,
        x.element_size(),
        x.shape[0],
        codes.shape[0],
        x.shape[1],
        batch_invariant,
    )
    return linear_chosen(
        x,
        codes,
        scales,
        zeros,
        codebook,
        perm,
        table_scale,
        bias,
        spec,
        choice.family,
        *astuple(choice.config),
        choice.split,
    )


@triton_op("qkern_triton::linear_input_grad_chosen", mutates_args={})
def linear_input_grad_chosen(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    codebook: Tensor | None,
    perm: Tensor | None,
    table_scale: Tensor | None,
    spec: str,
    k: int,
    rows: int,
    cols: int,
    depth: int,
    warps: int,
    stages: int,
) -> Tensor:
    m, n = dy.shape
    s = Spec.parse(spec).of_columns(k)
    dx = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    if m == 0:
        return dx
    factor, stored = _table_scale(s, table_scale)
    c = plan.grad_constants(
        s, scales is not None, configs.Config(rows, cols, depth, warps, stages), k
    )
    launch(linear_grad_kernel)[(cdiv(m, rows) * cdiv(k, depth),)](
        dy,
        dy.stride(0),
        dy.stride(1),
        codes if perm is None else perm,
        *weight_arguments(codes, scales, zeros, codebook),
        tables_of(s, k),
        factor,
        dx,
        m,
        n,
        k,
        PERM=perm is not None,
        SCALE_STORED=stored,
        **c,
        num_warps=warps,
        num_stages=stages,
    )
    return dx


@triton_op("qkern_triton::linear_input_grad", mutates_args={})
def linear_input_grad(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    codebook: Tensor | None,
    perm: Tensor | None,
    table_scale: Tensor | None,
    spec: str,
    k: int,
) -> Tensor:
    """dy ``[M, N]`` to dx ``[M, K]``: dy . W with the weights of the forward pass."""
    s = Spec.parse(spec).of_columns(k)
    c = configs.choose_grad(device_of(dy), s, dy.element_size(), dy.shape[0], dy.shape[1], k)
    return linear_input_grad_chosen(
        dy,
        codes,
        scales,
        zeros,
        codebook,
        perm,
        table_scale,
        spec,
        k,
        *astuple(c),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, zeros, codebook, perm, table_scale, _bias, spec, _invariant = inputs
    ctx.save_for_backward(codes, scales, zeros, codebook, perm, table_scale)
    ctx.spec, ctx.k = spec, x.shape[1]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """x and bias have gradients (straight through a quantization of activations); packed weights
    are constants."""
    dx = bias = None
    if ctx.needs_input_grad[0]:
        dx = linear_input_grad(dy, *ctx.saved_tensors, ctx.spec, ctx.k)
    if ctx.needs_input_grad[7]:
        bias = dy.sum(0)
    return dx, None, None, None, None, None, None, bias, None, None


linear.register_autograd(_backward, setup_context=_save)
