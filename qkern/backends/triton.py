# SPDX-License-Identifier: Apache-2.0
"""Triton: from a format and its parts to the kernels of qkern.triton_kernels.

They serve GPUs. Where Triton interprets (TRITON_INTERPRET=1 before the first import) they run on
CPU tensors too, slowly: for tests and for debugging.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkern import _library, triton_kernels
from qkern.formats import Format, parse_format
from qkern.triton_kernels import Spec

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
PACKED = False

_fixed_tables: dict[tuple[str, str, torch.device], Tensor] = {}


def _fixed_table(family: str, activations: str, device: torch.device) -> Tensor:
    """The table of the formats of a family that has its own, brought to the device once."""
    key = family, activations, device
    if key not in _fixed_tables:
        table = parse_format(family).with_activations(activations).table
        assert table is not None, "asked for formats with a fixed table only"
        _fixed_tables[key] = torch.from_numpy(table[None].copy()).to(device)
    return _fixed_tables[key]


# torch.compile calls it while tracing; a traced one would copy from the host at every call.
_fixed_table._dynamo_marked_constant = True  # type: ignore[attr-defined]


def stored_scale(weight: Mapping[str, Tensor], fmt: Format) -> Tensor | None:
    """The factor that a tensor stores with its parts, float32, left on the device: reading it as a
    number would break the graphs of torch.compile."""
    whole = weight.get("global_scale")
    if whole is None or fmt.table_scale == 1:
        return whole
    return whole * fmt.table_scale


def _arguments(weight: Mapping[str, Tensor], fmt: Format) -> dict[str, Any]:
    """Parts and spec as the kernels take them."""
    codebook = weight.get("codebook")
    if fmt.table is not None:
        codebook = _fixed_table(fmt.family, fmt.activations, weight["codes"].device)
    return {
        "codes": weight["codes"],
        "scales": weight.get("scales"),
        "zeros": weight.get("zeros"),
        "codebook": codebook,
        "perm": weight.get("perm"),
        "table_scale": stored_scale(weight, fmt),
        "spec": Spec.from_format(fmt),
    }


def unavailable() -> str | None:
    reason = triton_kernels.unavailable()
    if reason is None and not _INTERPRETED and not torch.cuda.is_available():
        reason = "torch finds no GPU"
    return reason


def linear(
    x: Tensor, weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    _library.check_input(x)
    _library.check_columns(x, shape[1])
    if bias is not None:
        bias = _library.checked_bias(bias, shape[0]).contiguous()
    return triton_kernels.linear(x, bias=bias, **_arguments(weight, fmt))


def embedding(
    ids: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    ids = ids.to(torch.int64)
    return triton_kernels.embedding(ids, k=shape[1], dtype=dtype, **_arguments(weight, fmt))


def dequantize(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    return triton_kernels.dequantize(k=shape[1], dtype=dtype, **_arguments(weight, fmt))


def quantize_activations(x: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    return triton_kernels.quantize_activations(x, group_size)


_FAMILIES = {
    "linear_gemv_triton": ("linear", "float, int8, int8_group"),
    "linear_dot_triton": ("linear", "float"),
    "linear_int8_triton": ("linear", "int8, int8_group"),
    "linear_grad_triton": ("linear_grad_input", "float"),
    "grouped_dot_triton": ("grouped_linear", "float"),
    "grouped_int8_triton": ("grouped_linear", "int8, int8_group"),
    "grouped_grad_triton": ("grouped_linear_grad_input", "float"),
    "dequantize_triton": ("dequantize", ""),
    "quantize_activations_triton": ("quantize_activations", "float"),
}


def kernels() -> list[dict[str, Any]]:
    shared = {"device": "cuda", "isa": "triton", "weights": "any", "usable": unavailable() is None}
    return [
        {**shared, "name": name, "op": op, "activations": activations}
        for name, (op, activations) in _FAMILIES.items()
    ]


def explain(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], x: Tensor
) -> list[tuple[str, bool, str]]:
    from qkern.triton_kernels import configs, ops

    rows = x.numel() // max(x.shape[-1], 1)
    spec = Spec.from_format(fmt, 1.0).of_columns(shape[1])
    choice = configs.choose_linear(ops.device_of(x), spec, x.element_size(), rows, *shape)
    tiled = "linear_int8_triton" if spec.activations != "float" else "linear_dot_triton"
    return [
        (
            "linear_gemv_triton",
            False,
            "its rows would not have the bits that they have in a larger batch; "
            "qkern.triton_kernels.linear(..., batch_invariant=False) runs it for a few rows",
        ),
        (
            tiled,
            True,
            f"{rows} rows of x: family {choice.family}, {choice.config}, K in {choice.split} parts",
        ),
    ]
