# SPDX-License-Identifier: Apache-2.0
"""Triton: from the canonical parts of a weight to the functions of qkern.triton_kernels.

Serves GPUs; with TRITON_INTERPRET=1, set before triton is first imported, CPU tensors too, slowly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qkern import _library, triton_kernels
from qkern.formats import Format
from qkern.triton_kernels import Spec

DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
PACKED = False

# The float32 scale of a whole tensor as a number: reading it waits for the device, so once.
_global_scales: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def unavailable() -> str | None:
    reason = triton_kernels.unavailable()
    if reason is None and "cpu" not in DEVICES and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return reason


@lru_cache(maxsize=64)
def _table(fmt: Format, device: torch.device) -> Tensor | None:
    """The table of a format that brings its own, on the device."""
    table = getattr(fmt, "table", None)
    return None if table is None else torch.from_numpy(table.copy()).to(device).unsqueeze(0)


def _spec(fmt: Format, weight: Mapping[str, Any]) -> Spec:
    scale = weight.get("global_scale")
    if scale is None:
        return Spec.from_format(fmt)
    if scale not in _global_scales:
        _global_scales[scale] = float(scale)
    return Spec.from_format(fmt, _global_scales[scale] * fmt.table_scale)


def _parts(fmt: Format, weight: Mapping[str, Any]) -> dict[str, Tensor | None]:
    codes = weight["codes"]
    codebook = weight.get("codebook")
    return {
        "codes": codes,
        "scales": weight.get("scales"),
        "zeros": weight.get("zeros"),
        "codebook": _table(fmt, codes.device) if codebook is None else codebook,
        "perm": weight.get("perm"),
    }


def linear(
    x: Tensor, weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    _library.check_input(x)
    _library.check_columns(x, shape[1])
    if bias is not None:
        bias = _library.checked_bias(bias, shape[0])
    spec, parts = _spec(fmt, weight), _parts(fmt, weight)
    return triton_kernels.linear(x, bias=bias, spec=spec, **parts)  # type: ignore[arg-type]


def embedding(
    ids: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    spec, parts = _spec(fmt, weight), _parts(fmt, weight)
    return triton_kernels.embedding(ids, spec=spec, k=shape[1], dtype=dtype, **parts)  # type: ignore[arg-type]


def dequantize(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    spec, parts = _spec(fmt, weight), _parts(fmt, weight)
    return triton_kernels.dequantize(spec=spec, k=shape[1], dtype=dtype, **parts)  # type: ignore[arg-type]


def quantize_activations(x: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    return triton_kernels.quantize_activations(x, group_size)


def kernels() -> list[dict[str, Any]]:
    usable = unavailable() is None
    return [
        {
            "device": "cuda",
            "name": f"{op}_triton",
            "op": op,
            "isa": "triton",
            "weights": "1-8 bits: int table row-table",
            "activations": "float, int8, int8_group",
            "usable": usable,
        }
        for op in ("linear", "dequantize", "embedding", "quantize_activations")
    ]


def explain(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], x: Tensor
) -> list[tuple[str, bool, str]]:
    return [("linear_triton", True, "the Triton backend has one linear for every format")]
