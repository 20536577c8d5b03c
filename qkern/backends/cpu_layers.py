# SPDX-License-Identifier: Apache-2.0
"""The CPU: convolution and mixture of experts. What qkern/backends/cpu.py is for `linear`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from qkern import _core, _library, _library_conv, _library_grouped
from qkern._library import FLOATS, packed_address
from qkern._library_conv import Geometry
from qkern.formats import Format


def _bias_arguments(bias: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The dense bias (to be held), its dtype's number and its address."""
    if bias is None:
        return None, 0, 0
    bias = bias.contiguous()
    return bias, FLOATS[bias.dtype], bias.data_ptr()


# ---- convolution ----


def _conv(x: Tensor, packed: Tensor, bias: Tensor | None, n: int, *geometry: Any) -> Tensor:
    _library_conv.check_image(x, geometry)  # type: ignore[arg-type]
    y = _library_conv.empty_output(x, bias, n, geometry)  # type: ignore[arg-type]
    bias, bias_code, bias_address = _bias_arguments(bias)
    kernel, stride, padding, dilation, groups = geometry
    _core.conv(
        packed_address(packed), packed.shape[0], FLOATS[x.dtype], x.data_ptr(), tuple(x.shape),
        x.stride(), kernel, stride, padding[:2], dilation, groups, bias_address, bias_code,
        y.data_ptr(), tuple(y.shape), y.stride(),
    )  # fmt: skip
    return y


def _conv_grad_input(grad: Tensor, packed: Tensor, shape: Sequence[int], *geometry: Any) -> Tensor:
    kernel, stride, padding, dilation, groups = geometry
    batch, channels, height, width = shape
    top, left, bottom, right = padding
    n, columns = grad.shape[1], channels // groups * kernel[0] * kernel[1]
    weight = _library.dequantize(packed, n, columns, torch.float32)
    whole = conv2d_input(
        (batch, channels, height + top + bottom, width + left + right),
        weight.view(n, channels // groups, *kernel),
        grad.float(),
        tuple(stride), 0, tuple(dilation), groups,
    )  # fmt: skip
    return whole[:, :, top : top + height, left : left + width].to(grad.dtype).contiguous()


def conv(
    x: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: Sequence[int],
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """x [B, C, H, W]; `shape` is (N, C / groups * kernel height * kernel width)."""
    train = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    op = _library_conv.conv_train if train else _library_conv.conv
    return op(x, weight["packed"], bias, shape[0], *geometry)


# ---- mixture of experts ----


def _grouped_linear(
    x: Tensor, packed: Tensor, offsets: Tensor, bias: Tensor | None, n: int
) -> Tensor:
    _library_grouped.check_rows(x, offsets, bias, n)
    bias, bias_code, bias_address = _bias_arguments(bias)
    bounds = offsets.to(torch.int64).contiguous()
    y = x.new_empty((x.shape[0], n))
    _core.grouped_linear(
        packed_address(packed), packed.shape[0], bounds.shape[0] - 1, bounds.data_ptr(),
        FLOATS[x.dtype], x.data_ptr(), tuple(x.shape), x.stride(), bias_address, bias_code,
        y.data_ptr(), n,
    )  # fmt: skip
    return y


def _segments(offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or bounds != sorted(bounds):
        raise ValueError(f"offsets must ascend from 0 to the {rows} rows, but they are {bounds}.")
    return list(itertools.pairwise(bounds))


def _grouped_linear_grad_input(grad: Tensor, packed: Tensor, offsets: Tensor, k: int) -> Tensor:
    """grad . W of each expert; one expert's weight is floats at a time."""
    result = grad.new_empty((grad.shape[0], k))
    address, begin, whole = packed_address(packed), 0, packed.shape[0]
    for first, last in _segments(offsets, grad.shape[0]):
        size = _core.packed_size(address + begin, whole - begin)
        if first < last:
            block = packed[begin : begin + size]
            weight = _library.dequantize(block, grad.shape[1], k, torch.float32)
            result[first:last] = grad[first:last].float() @ weight
        begin += -(-size // 64) * 64
    return result


def _grouped_linear_grad_bias(grad: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    segments = _segments(offsets, grad.shape[0])
    return torch.stack([grad[first:last].sum(0) for first, last in segments]).to(dtype)


def grouped_linear(
    x: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: Sequence[int],
    offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """x [T, K] sorted by expert; `shape` is (E, N, K)."""
    train = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    op = _library_grouped.grouped_linear_train if train else _library_grouped.grouped_linear
    return op(x, weight["packed"], offsets, bias, shape[1])


for _name, _kernel in (
    ("conv", _conv),
    ("conv_train", _conv),
    ("conv_grad_input", _conv_grad_input),
    ("grouped_linear", _grouped_linear),
    ("grouped_linear_train", _grouped_linear),
    ("grouped_linear_grad_input", _grouped_linear_grad_input),
    ("grouped_linear_grad_bias", _grouped_linear_grad_bias),
):
    _library.register_cpu(_name, _kernel)
