# SPDX-License-Identifier: Apache-2.0
"""The meta device: shapes and dtypes without numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkern import _library
from qkern.formats import Format

DEVICES = ("meta",)
PACKED = False


def unavailable() -> str | None:
    return None


def linear(
    x: Tensor, weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    _library.check_input(x)
    _library.check_columns(x, shape[1])
    _library.check_devices(x, bias, *weight.values())
    return x.new_empty((*x.shape[:-1], shape[0]))


def embedding(
    ids: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    return ids.new_empty((*ids.shape, shape[1]), dtype=dtype)


def dequantize(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def quantize_activations(x: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    return _library.quantize_activations(x, group_size or 0)


def kernels() -> list[dict[str, Any]]:
    return []


def explain(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], x: Tensor
) -> list[tuple[str, bool, str]]:
    return []
