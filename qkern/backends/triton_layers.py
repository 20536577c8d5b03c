# SPDX-License-Identifier: Apache-2.0
"""Triton: convolution and mixture of experts, as qkern/_layers.py asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkern import _library_conv, triton_kernels
from qkern._library_conv import Geometry
from qkern.backends import triton
from qkern.errors import UnsupportedError
from qkern.formats import Format
from qkern.triton_kernels import Spec

_PATCHES = 1 << 24  # numbers of patches that are gathered at a time


def _of_group(
    weight: Mapping[str, Tensor], fmt: Format, columns: int, first: int, count: int
) -> dict[str, Tensor]:
    """Rows first .. first + count of a weight, as views."""
    parts = dict(weight)
    for name in ("codes", "scales", "zeros"):
        if name in parts:
            parts[name] = parts[name][first : first + count]
    if "codebook" in parts and fmt.table_per != "tensor":
        # So many tables belong to a row, or to the 8 rows of a tile.
        height = 8 if fmt.table_per == "tile" else 1
        if first % height:
            raise UnsupportedError(
                f"The backend triton convolves groups of {count} outputs, and {fmt} has tables for "
                f"{height} at a time; move the module and its input to the CPU, or use "
                "dequantize() of the module."
            )
        each = 1 if fmt.table_per == "row" else fmt.groups(columns)
        begin, end = first // height, -(-(first + count) // height)
        parts["codebook"] = parts["codebook"][begin * each : end * each]
    return parts


def _blocks(size: Sequence[int], columns: int) -> Iterator[tuple[slice, slice]]:
    """Images and rows of outputs [B, OH, OW] whose patches are gathered together."""
    images, height, width = size
    rows = max(1, min(height, _PATCHES // (width * columns)))
    together = max(1, _PATCHES // (height * width * columns)) if rows == height else 1
    for image in range(0, images, together):
        for row in range(0, height, rows):
            yield slice(image, image + together), slice(row, row + rows)


def conv(
    x: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: Sequence[int],
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """x [B, C, H, W]: patches are gathered block by block, and each is a row for `linear`.

    The gradient to x goes the same way back, and is that of the weights as they were rounded for
    the product.
    """
    _library_conv.check_image(x, geometry)
    kernel, stride, padding, dilation, groups = geometry
    y = _library_conv.empty_output(x, bias, shape[0], geometry)
    outputs, columns = shape[0] // groups, shape[1]
    top, left, bottom, right = padding
    windows = torch.nn.functional.pad(x, (left, right, top, bottom))
    for i in (0, 1):
        windows = windows.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])
    # [B, OH, OW, C, kernel rows, kernel columns], a view.
    windows = windows[..., :: dilation[0], :: dilation[1]].permute(0, 2, 3, 1, 4, 5)
    channels = x.shape[1] // groups
    for group in range(groups):
        first = group * outputs
        part = _of_group(weight, fmt, columns, first, outputs)
        add = None if bias is None else bias[first : first + outputs]
        source = windows[:, :, :, group * channels : (group + 1) * channels]
        for images, rows in _blocks(source.shape[:3], columns):
            patches = source[images, rows]
            rows_of_y = triton.linear(
                patches.reshape(-1, columns), part, fmt, (outputs, columns), add
            )
            block = rows_of_y.view(*patches.shape[:3], outputs).permute(0, 3, 1, 2)
            y[images, first : first + outputs, rows] = block
    return y


def grouped_linear(
    x: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: Sequence[int],
    offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    perm = weight.get("perm")
    if perm is not None and fmt.activations != "float":
        if not bool((perm == perm[:1]).all()):
            raise UnsupportedError(
                "The backend triton quantizes activations once for all experts, so that with int8 "
                "activations they must share one permutation of the columns; these do not."
            )
        perm = perm[0]
    # All experts along the first axis, as the kernel takes them.
    flat = {name: weight[name].flatten(0, 1) for name in ("codes", "scales", "zeros", "codebook")
            if name in weight}  # fmt: skip
    factors = triton.stored_scale(weight, fmt)
    if fmt.table is not None:
        table = triton._fixed_table(fmt.family, fmt.activations, weight["codes"].device)
        flat["codebook"] = table.expand(shape[0], -1).contiguous()
    return triton_kernels.grouped_linear(
        x, offsets, flat["codes"], flat.get("scales"), flat.get("zeros"), flat.get("codebook"),
        perm, None if bias is None else bias.contiguous(),
        None if factors is None else factors.flatten(),
        spec=Spec.from_format(fmt),
    )  # fmt: skip
