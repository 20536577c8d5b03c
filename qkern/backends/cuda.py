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
from collections.abc import Mapping, Sequence
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
class Packed:
    description: Any  # _cuda.Weight; of one expert where there are several
    block: Tensor
    experts: int  # 0: a single weight
    factors: Tensor | None  # of whole tensors, one per expert
    made_from: tuple  # format, shape, addresses and versions of the parts

    @property
    def arguments(self) -> tuple[Any, int, int]:
        return self.description, self.block.data_ptr(), self.block.numel()

    def of_expert(self, e: int) -> tuple[Any, int, int]:
        size = self.block.numel() // self.experts
        return self.description, self.block.data_ptr() + e * size, size


_packed_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the tensor of codes


def _describe(
    parts: Mapping[str, Tensor], fmt: Format, shape: tuple[int, int]
) -> tuple[Any, list[Tensor]]:
    """The C description, and tensors that must live until it has been packed."""
    n, k = shape
    codes = parts["codes"]
    core = {
        name: torch.from_numpy(part).to(codes.device)
        for name, part in fmt.core_parts(dict(parts), shape).items()
    }
    parts = {**parts, **core}
    fields: dict[str, Any] = {
        "kind": _KINDS[fmt.kind],
        "bits": fmt.bits,
        "activations": _ACTIVATIONS[fmt.activations],
        "n": n,
        "k": k,
        "group": min(fmt.group_size or k, k),
        "codes": codes.data_ptr(),
        "codes_stride": codes.shape[1],
    }
    if "perm" in parts:
        fields["perm"] = parts["perm"].data_ptr()
    for name, prefix in (("scales", "scale"), ("zeros", "zero")):
        if name in parts:
            encoding = fmt.scale_encoding if name == "scales" else None
            fields[name] = parts[name].data_ptr()
            fields[f"{prefix}_dtype"] = _arrays.dtype_code(parts[name], encoding)
            fields[f"{name}_stride"] = parts[name].shape[1]
    if fmt.table_per is not None:
        if fmt.table is not None:
            core["codebook"] = torch.from_numpy(fmt.table.copy()).to(codes.device)
        table = core.get("codebook", parts.get("codebook"))
        fields["codebook"] = table.data_ptr()  # type: ignore[union-attr]
        fields["table_per"] = TABLE_PER[str(fmt.table_per)]
        fields["table_scale"] = fmt.table_factor(dict(parts))
    return _extension().Weight(**fields), list(core.values())


def pack(parts: Mapping[str, Tensor], fmt: Format, shape: Sequence[int]) -> Packed:
    """The weight (N, K), or those of all experts (E, N, K), in the layout of the kernels."""
    codes = parts["codes"]
    made_from = (fmt, tuple(shape), *((p.data_ptr(), p._version) for p in parts.values()))
    found = _packed_weights.get(codes)
    if found is not None and found.made_from == made_from:
        return found
    extension = _extension()
    experts = shape[0] if len(shape) == 3 else 0
    one = (shape[-2], shape[-1])
    for e in range(max(experts, 1)):
        each = {name: p[e].contiguous() for name, p in parts.items()} if experts else parts
        description, _kept = _describe(each, fmt, one)
        if e == 0:
            first = description
            size = extension.packed_bytes(first)
            block = torch.empty(max(experts, 1) * size, dtype=torch.uint8, device=codes.device)
        extension.pack(description, block.data_ptr() + e * size, size, *_where(block))
    factors = None
    if experts and "global_scale" in parts:
        factors = parts["global_scale"].flatten().float() * fmt.table_scale
    made = Packed(first, block, experts, factors, made_from)
    _packed_weights[codes] = made
    return made


def _where(tensor: Tensor) -> tuple[int, int]:
    """Device and current stream."""
    index = tensor.device.index or 0
    return index, torch.cuda.current_stream(index).cuda_stream


# ---- operations ----


def product(
    x: Tensor, packed: Packed, n: int, bias: Tensor | None, offsets: Tensor | None = None
) -> Tensor:
    """x . W^T + bias; with offsets, of each expert's rows, and zeros for rows of none."""
    extension = _extension()
    rows = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    y = x.new_empty((*x.shape[:-1], n)) if offsets is None else x.new_zeros((*x.shape[:-1], n))
    device, stream = _where(x)
    facts = (FLOATS[x.dtype], rows.data_ptr(), rows.shape[0], *rows.stride())
    who = (packed.experts, 0 if offsets is None else offsets.data_ptr())
    size = extension.linear_workspace(*packed.arguments, device, *facts, *who)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    extension.linear(
        *packed.arguments, device, stream, *facts,
        0 if bias is None else FLOATS[bias.dtype], 0 if bias is None else bias.data_ptr(),
        FLOATS[y.dtype], y.data_ptr(), n, workspace.data_ptr(), size, *who,
        0 if packed.factors is None else packed.factors.data_ptr(),
    )  # fmt: skip
    return y


def grad_input(grad: Tensor, weight: tuple[Any, int, int], k: int) -> Tensor:
    """grad [M, N] . W: from packed codes, or with float32 by blocks of rows of the weight."""
    device, stream = _where(grad)
    if grad.dtype == torch.float32:
        return _grad_input_float32(grad, weight, k)
    extension = _extension()
    to_x = grad.new_empty((grad.shape[0], k))
    facts = (FLOATS[grad.dtype], grad.data_ptr(), grad.shape[0], *grad.stride())
    size = extension.linear_grad_workspace(*weight, device, *facts)
    workspace = torch.empty(size, dtype=torch.uint8, device=grad.device)
    extension.linear_grad_input(
        *weight, device, stream, *facts, to_x.data_ptr(), k, workspace.data_ptr(), size
    )
    return to_x


def _grad_input_float32(grad: Tensor, weight: tuple[Any, int, int], k: int) -> Tensor:
    n = grad.shape[1]
    to_x = grad.new_zeros((grad.shape[0], k))
    step = max(1, min(n, _GRADIENT_BLOCK // k))
    for begin in range(0, n, step):
        count = min(step, n - begin)
        block = grad.new_empty((count, k))
        _dequantize_into(block, weight, None, begin)
        to_x.addmm_(grad[:, begin : begin + count], block)
    return to_x


def _dequantize_into(
    out: Tensor, weight: tuple[Any, int, int], rows: Tensor | None, begin: int
) -> None:
    """Rows of the weight, as many as `out` has: those of `rows`, or from `begin` on."""
    _extension().dequantize(
        *weight, *_where(out), 0 if rows is None else rows.data_ptr(), begin, out.shape[0],
        FLOATS[out.dtype], out.data_ptr(), out.shape[1],
    )  # fmt: skip


class _Linear(torch.autograd.Function):
    """Gradients to x and bias; with int8 activations straight through the rounding of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed, shape: tuple) -> Tensor:
        ctx.packed, ctx.shape, ctx.bias = packed, shape, bias
        return product(x, packed, shape[0], bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        n, k = ctx.shape
        rows = grad.reshape(-1, n)
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = grad_input(rows, ctx.packed.arguments, k).view(*grad.shape[:-1], k)
        if ctx.needs_input_grad[1]:
            to_bias = rows.sum(0).to(ctx.bias.dtype)
        return to_x, to_bias, None, None


def wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )


def linear(
    x: Tensor, weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    packed = pack(weight, fmt, shape)
    if bias is not None:
        bias = _library.checked_bias(bias, shape[0])
    if wants_gradient(x, bias):
        return _Linear.apply(x, bias, packed, shape)
    return product(x, packed, shape[0], bias)


def embedding(
    ids: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Ids out of range give rows of NaN: the host does not wait for them."""
    packed = pack(weight, fmt, shape)
    rows = ids.to(torch.int64).contiguous().view(-1)
    out = torch.empty((rows.numel(), shape[1]), dtype=dtype, device=packed.block.device)
    _dequantize_into(out, packed.arguments, rows, 0)
    return out.view(*ids.shape, shape[1])


def dequantize(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    packed = pack(weight, fmt, shape)
    out = torch.empty(shape, dtype=dtype, device=packed.block.device)
    _dequantize_into(out, packed.arguments, None, 0)
    return out


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


_OTHERS = {
    "linear_grad_input_sm80": ("linear_grad_input", "float16, bfloat16"),
    "dequantize_sm80": ("dequantize", ""),
    "quantize_activations_sm80": ("quantize_activations", "float"),
}


def kernels() -> list[dict[str, Any]]:
    shared = {"device": "cuda", "isa": "sm80", "usable": True}
    linears = [
        {
            **shared,
            "name": row["name"],
            "op": "linear",
            "weights": f"{row['weights']}, {row['bits']} bits",
            "activations": row["activations"],
        }
        for row in _extension().kernels()
    ]
    others = [
        {**shared, "name": name, "op": op, "weights": "any", "activations": activations}
        for name, (op, activations) in _OTHERS.items()
    ]
    return linears + others


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
