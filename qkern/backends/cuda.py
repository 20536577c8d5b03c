# SPDX-License-Identifier: Apache-2.0
"""The CUDA library: from tensors on an NVIDIA device to addresses, sizes, strides and a stream.

No GPU has run its kernels yet, so nothing chooses this backend by itself: it answers only where it
is named, by qkern.override(backend="cuda") or QKERN_BACKEND=cuda.

Weights are packed into the device layout at their first use; the packed copy lives as long as the
codes it was made from. Use a weight once before a CUDA graph is captured: packing may read a fixed
table from the host. The workspace of a call comes from torch's allocator, which knows streams and
captures.
"""

from __future__ import annotations

import ctypes.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from qkern import _arrays, _library, backends
from qkern._library import FLOATS
from qkern.errors import UnsupportedError
from qkern.formats import Format
from qkern.formats._fit import TABLE_PER
from qkern.tensor import _ACTIVATIONS, _KINDS

DEVICES = ("cuda",)
PACKED = False

_PARTS = ("codes", "scales", "zeros", "codebook", "perm")
_GRADIENT_BLOCK = 1 << 26  # weights that are floats at a time in the backward pass


def _extension() -> Any:
    """qkern._cuda with its library open."""
    from qkern import _cuda

    # Beside the module: an editable install has its Python files elsewhere.
    _cuda.open(str(Path(_cuda.__file__).parent / "lib" / "libqkern_cuda.so.1"))
    return _cuda


def unavailable() -> str | None:
    if backends.forced() != "cuda":
        return (
            "no GPU has confirmed its kernels yet, so it runs only where it is named: "
            'qkern.override(backend="cuda")'
        )
    try:
        _extension()
    except ImportError:
        return "this build of qkern has no CUDA kernels (build with -C cmake.define.QKERN_CUDA=ON)"
    except RuntimeError as error:
        return f"the CUDA library cannot be opened: {error}"
    if not torch.cuda.is_available():
        driver = ctypes.util.find_library("cuda")
        return "torch finds no CUDA device" + ("" if driver else ", and there is no driver")
    return None


# ---- weights ----


@dataclass(frozen=True)
class _Packed:
    description: Any  # _cuda.Weight
    block: Tensor
    made_from: tuple  # addresses and versions of the parts
    kept: tuple  # parts that the description points to

    @property
    def arguments(self) -> tuple[Any, int, int]:
        return self.description, self.block.data_ptr(), self.block.numel()


_packed_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the tensor of codes


def _describe(
    parts: Mapping[str, Tensor], fmt: Format, shape: tuple[int, int]
) -> tuple[Any, tuple]:
    """The C description, and the tensors whose addresses it holds."""
    n, k = shape
    table = None
    if fmt.table_per is not None:
        table = parts.get("codebook")
        if fmt.table is not None:
            table = torch.from_numpy(fmt.table.copy()).to(parts["codes"].device)
    fields: dict[str, Any] = {
        "kind": _KINDS[fmt.kind],
        "bits": fmt.bits,
        "activations": _ACTIVATIONS[fmt.activations],
        "n": n,
        "k": k,
        "group": min(fmt.group_size or k, k),
        "codes": parts["codes"].data_ptr(),
        "codes_stride": parts["codes"].shape[1],
    }
    if "perm" in parts:
        fields["perm"] = parts["perm"].data_ptr()
    for name, prefix in (("scales", "scale"), ("zeros", "zero")):
        if name in parts:
            encoding = fmt.scale_encoding if name == "scales" else None
            fields[name] = parts[name].data_ptr()
            fields[f"{prefix}_dtype"] = _arrays.dtype_code(parts[name], encoding)
            fields[f"{name}_stride"] = parts[name].shape[1]
    if table is not None:
        fields["codebook"] = table.data_ptr()
        fields["table_per"] = TABLE_PER[str(fmt.table_per)]
        fields["table_scale"] = fmt.table_factor(dict(parts))
    kept = tuple(parts[name] for name in _PARTS if name in parts and name != "codes")
    return _extension().Weight(**fields), (*kept, table)


def _pack(parts: Mapping[str, Tensor], fmt: Format, shape: tuple[int, int]) -> _Packed:
    codes = parts["codes"]
    made_from = (fmt, shape, *((p.data_ptr(), p._version) for p in parts.values()))
    found = _packed_weights.get(codes)
    if found is not None and found.made_from == made_from:
        return found
    description, kept = _describe(parts, fmt, shape)
    extension = _extension()
    block = torch.empty(extension.packed_bytes(description), dtype=torch.uint8, device=codes.device)
    extension.pack(description, block.data_ptr(), block.numel(), *_where(block))
    made = _Packed(description, block, made_from, kept)
    _packed_weights[codes] = made
    return made


def _where(tensor: Tensor) -> tuple[int, int]:
    """Device and current stream."""
    index = tensor.device.index or 0
    return index, torch.cuda.current_stream(index).cuda_stream


# ---- operations ----


def _linear(x: Tensor, packed: _Packed, n: int, bias: Tensor | None) -> Tensor:
    extension = _extension()
    if bias is not None:
        bias = _library.checked_bias(bias, n)
    rows = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    y = x.new_empty((*x.shape[:-1], n))
    device, stream = _where(x)
    facts = (FLOATS[x.dtype], rows.data_ptr(), rows.shape[0], *rows.stride())
    size = extension.linear_workspace(*packed.arguments, device, *facts)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    extension.linear(
        *packed.arguments, device, stream, *facts,
        0 if bias is None else FLOATS[bias.dtype], 0 if bias is None else bias.data_ptr(),
        FLOATS[y.dtype], y.data_ptr(), n, workspace.data_ptr(), size,
    )  # fmt: skip
    return y


def _dequantize(
    packed: _Packed, rows: Tensor | None, begin: int, count: int, k: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty((count, k), dtype=dtype, device=packed.block.device)
    _extension().dequantize(
        *packed.arguments, *_where(out), 0 if rows is None else rows.data_ptr(), begin, count,
        FLOATS[dtype], out.data_ptr(), k,
    )  # fmt: skip
    return out


class _Linear(torch.autograd.Function):
    """The gradient to x is that of the float product, by blocks of rows of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: _Packed, shape: tuple) -> Tensor:
        ctx.packed, ctx.shape, ctx.bias = packed, shape, bias
        return _linear(x, packed, shape[0], bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        n, k = ctx.shape
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            rows = grad.reshape(-1, n)
            to_x = grad.new_zeros((rows.shape[0], k), dtype=torch.float32)
            step = max(1, min(n, _GRADIENT_BLOCK // k))
            for begin in range(0, n, step):
                count = min(step, n - begin)
                block = _dequantize(ctx.packed, None, begin, count, k, torch.float32)
                to_x.addmm_(rows[:, begin : begin + count].float(), block)
            to_x = to_x.to(grad.dtype).view(*grad.shape[:-1], k)
        if ctx.needs_input_grad[1]:
            to_bias = grad.reshape(-1, n).sum(0).to(ctx.bias.dtype)
        return to_x, to_bias, None, None


def linear(
    x: Tensor, weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    packed = _pack(weight, fmt, shape)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, bias, packed, shape)
    return _linear(x, packed, shape[0], bias)


def embedding(
    ids: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Ids out of range give rows of NaN: the host does not wait for them."""
    packed = _pack(weight, fmt, shape)
    rows = ids.to(torch.int64).contiguous()
    return _dequantize(packed, rows, 0, rows.numel(), shape[1], dtype).view(*ids.shape, shape[1])


def dequantize(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    return _dequantize(_pack(weight, fmt, shape), None, 0, shape[0], shape[1], dtype)


def quantize_activations(x: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    rows = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    group = group_size or 0
    groups = -(-k // group) if group else 1
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.zeros((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    _extension().quantize_activations(
        *_where(x), FLOATS[x.dtype], rows.data_ptr(), rows.shape[0], k, group, *rows.stride(),
        codes.data_ptr(), k, scales.data_ptr(),
    )  # fmt: skip
    return codes, scales


# ---- truth ----


def kernels() -> list[dict[str, Any]]:
    return [
        {
            "device": "cuda",
            "name": row["name"],
            "op": "linear",
            "isa": "sm80",
            "weights": f"{row['weights']}, {row['bits']} bits",
            "activations": row["activations"],
            "usable": True,
        }
        for row in _extension().kernels()
    ]


def explain(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], x: Tensor
) -> list[tuple[str, bool, str]]:
    extension = _extension()
    description, _ = _describe(weight, fmt, shape)
    try:
        extension.linear_supported(description, FLOATS[x.dtype])
    except UnsupportedError as error:
        return [("none", False, str(error))]
    number = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(x.dtype, "")
    wanted = number if fmt.activations == "float" else "int8, int8_group"
    table_per = TABLE_PER[str(fmt.table_per)] if fmt.table_per is not None else 0
    for row in extension.kernels():
        fits = row["bits"] == fmt.bits and row["activations"] == wanted
        if fits and table_per <= row["table_per"] and _reads(row["weights"], fmt.kind):
            return [(row["name"], True, "the first of the list that reads this weight")]
    return []


def _reads(weights: str, kind: str) -> bool:
    return {"int": "integers", "table": "tables"}[kind] in weights
