# SPDX-License-Identifier: Apache-2.0
"""The meta device: shapes of convolution and mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qkern import _library, _library_conv, _library_grouped
from qkern._library_conv import Geometry
from qkern.formats import Format


def conv(
    x: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: Sequence[int],
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    _library_conv.check_image(x, geometry)
    _library.check_devices(x, bias, *weight.values())
    return _library_conv.empty_output(x, bias, shape[0], geometry)


def grouped_linear(
    x: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: Sequence[int],
    offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    _library_grouped.check_rows(x, offsets, bias, shape[1])
    _library.check_columns(x, shape[2])
    _library.check_devices(x, offsets, bias, *weight.values())
    return x.new_empty((x.shape[0], shape[1]))
