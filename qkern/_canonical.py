# SPDX-License-Identifier: Apache-2.0
"""Operations on weights in canonical storage, for programs that are traced (torch.export,
AOTInductor, torch.jit.trace, make_fx), and for embeddings.

What such a program stores is then canonical storage too, and any version of qkern can run it. The
CPU kernels read another layout, so the first call derives it and keeps it as long as the tensor of
codes lives: a traced program has two copies of its low-bit weights in memory. It is derived anew
after torch has changed a part in place; a program that writes over the memory itself, as
AOTInductor's update of constants does, is not noticed. Rows of an embedding are read where they
lie: in canonical storage they lie together, in the other layout among those of 15 others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qkern import _arrays, _core, _library, _transforms, _vmap, backends
from qkern._library import FLOATS, check_devices, check_float_dtype, check_ids, check_input
from qkern.formats import Format, parse_format
from qkern.tensor import QuantizedTensor

PACKED = False

_NAMES = ("codes", "scales", "zeros", "codebook", "perm", "global_scale")
_WEIGHT = (
    "Tensor codes, Tensor? scales, Tensor? zeros, Tensor? codebook, Tensor? perm, "
    "Tensor? global_scale, str format, SymInt n, SymInt k"
)
_LINEAR = f"linear_canonical(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor"
_GRADIENT = f"linear_canonical_grad_input(Tensor grad, {_WEIGHT}) -> Tensor"
_EMBEDDING = f"embedding_canonical(Tensor ids, {_WEIGHT}, ScalarType dtype) -> Tensor"
_DEQUANTIZE = f"dequantize_canonical({_WEIGHT}, ScalarType dtype) -> Tensor"


# ---- what is derived from canonical parts ----


class _Made(NamedTuple):
    sources: tuple  # of every part: its storage, weakly; where it lies in it; how often it changed
    made: Any

    @property
    def alive(self) -> bool:
        return not any(storage.expired() for storage, *_ in self.sources)


_made: dict[tuple, _Made] = {}
_lock = threading.Lock()

_format = lru_cache(maxsize=256)(parse_format)


def _source(part: Tensor) -> tuple:
    # Storages that are weakly held keep their address to themselves, so equal means the same.
    changes = None if part.is_inference() else part._version
    return StorageWeakRef(part.untyped_storage()), part.data_ptr(), changes, part.dtype


def _derived(make: Callable[..., Any], given: tuple, fmt: str, n: int, k: int) -> Any:
    """What `make(parts, fmt, n, k)` gave for these parts, or gives now."""
    parts: dict[str, Any] = _parts(given)
    sources = tuple(_source(part) for part in parts.values())
    key = (make, sources[0][0].cdata, sources[0][1], fmt, n, k)
    with _lock:
        found = _made.get(key)
        if found is None or found.sources != sources or not found.alive:
            for other in [other for other, made in _made.items() if not made.alive]:
                del _made[other]
            found = _made[key] = _Made(sources, make(parts, fmt, n, k))
        return found.made


def _pack(parts: dict[str, Any], fmt: str, n: int, k: int) -> QuantizedTensor:
    return QuantizedTensor.from_parts(_format(fmt), (n, k), **parts).pack_()


def _packed(given: tuple, fmt: str, n: int, k: int) -> Tensor:
    return _derived(_pack, given, fmt, n, k).packed().buffer


def _describe(parts: dict[str, Any], fmt: str, n: int, k: int) -> tuple[_core.Weight, list]:
    """What the core reads, and what it needs besides the parts, which may die."""
    weight = QuantizedTensor.from_parts(_format(fmt), (n, k), **parts)
    described, needed = weight._weight(weight.parts())
    known = {part.data_ptr() for part in parts.values()}
    return described, [part for part in needed.values() if _arrays.address(part) not in known]


def _rows(ids: Tensor, given: tuple, fmt: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    weight, _ = _derived(_describe, given, fmt, n, k)
    rows = ids.to(torch.int64).contiguous()
    out = torch.empty((*ids.shape, k), dtype=dtype)
    _core.dequantize(
        weight, 0, 0, FLOATS[dtype], rows.data_ptr(), 0, rows.numel(), out.data_ptr(), k
    )
    return out


def rows_lie_ready(fmt: Format) -> bool:
    """Whether the core reads canonical rows of the format as they are stored."""
    return fmt.table_encoding is None


def _parts(given: tuple) -> dict[str, Tensor]:
    return {name: part for name, part in zip(_NAMES, given, strict=True) if part is not None}


# ---- kernels: weight parts come as `_WEIGHT` lists them ----


def _linear(x: Tensor, *rest: Any) -> Tensor:
    *given, fmt, n, k, bias = rest
    check_input(x)
    check_devices(x, *given, bias)
    backend = backends.select(x.device.type)
    if not backend.PACKED:
        return backend.linear(x, _parts(tuple(given)), _format(fmt), (n, k), bias)
    return _library.linear(x, _packed(tuple(given), fmt, n, k), bias, n)


def _grad_input(grad: Tensor, *rest: Any) -> Tensor:
    *given, fmt, n, k = rest
    backend = backends.select(grad.device.type)
    if not backend.PACKED:
        weight = backend.dequantize(_parts(tuple(given)), _format(fmt), (n, k), torch.float32)
        return (grad.float() @ weight).to(grad.dtype)
    return _library.linear_grad_input(grad, _packed(tuple(given), fmt, n, k), k)


def _embedding(ids: Tensor, *rest: Any) -> Tensor:
    *given, fmt, n, k, dtype = rest
    check_ids(ids)
    check_float_dtype(dtype)
    check_devices(ids, *given)
    backend = backends.select(ids.device.type)
    if not backend.PACKED:
        return backend.embedding(ids, _parts(tuple(given)), _format(fmt), (n, k), dtype)
    if not rows_lie_ready(_format(fmt)):
        return _library.embedding(ids, _packed(tuple(given), fmt, n, k), k, dtype)
    return _rows(ids, tuple(given), fmt, n, k, dtype)


def _dequantize(*rest: Any) -> Tensor:
    *given, fmt, n, k, dtype = rest
    backend = backends.select(given[0].device.type)
    if not backend.PACKED:
        return backend.dequantize(_parts(tuple(given)), _format(fmt), (n, k), dtype)
    return _library.dequantize(_packed(tuple(given), fmt, n, k), n, k, dtype)


# ---- shapes ----


def _linear_shape(x: Tensor, *rest: Any) -> Tensor:
    *given, _, n, _, bias = rest
    check_input(x)
    check_devices(x, *given, bias)
    if bias is not None:
        _library.checked_bias(bias, n)
    return x.new_empty((*x.shape[:-1], n))


def _grad_input_shape(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], rest[-1]))


def _embedding_shape(ids: Tensor, *rest: Any) -> Tensor:
    *given, _, _, k, dtype = rest
    check_ids(ids)
    check_float_dtype(dtype)
    check_devices(ids, *given)
    return ids.new_empty((*ids.shape, k), dtype=dtype)


def _dequantize_shape(codes: Tensor, *rest: Any) -> Tensor:
    n, k, dtype = rest[-3:]
    check_float_dtype(dtype)
    return codes.new_empty((n, k), dtype=dtype)


for _schema, _kernel, _shape in (
    (_LINEAR, _linear, _linear_shape),
    (_GRADIENT, _grad_input, _grad_input_shape),
    (_EMBEDDING, _embedding, _embedding_shape),
    (_DEQUANTIZE, _dequantize, _dequantize_shape),
):
    _library.define(_schema, _kernel, _shape, devices=("CPU", "CUDA"))

_linear_op: Callable[..., Tensor] = torch.ops.qkern.linear_canonical.default
_grad_input_op: Callable[..., Tensor] = torch.ops.qkern.linear_canonical_grad_input.default
_embedding_op: Callable[..., Tensor] = torch.ops.qkern.embedding_canonical.default
_dequantize_op: Callable[..., Tensor] = torch.ops.qkern.dequantize_canonical.default

_library.cast_under_autocast("linear_canonical")
for _name in ("linear_canonical", "linear_canonical_grad_input", "embedding_canonical"):
    _vmap.map_rows(_name)


# ---- gradients ----


def _keep_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, *weight, bias = inputs
    ctx.save_for_backward(*weight[: len(_NAMES)])
    ctx.facts = weight[len(_NAMES) :]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = _grad_input_op(grad, *ctx.saved_tensors, *ctx.facts)
    if ctx.needs_input_grad[-1]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (to_x, *[None] * (len(_NAMES) + len(ctx.facts)), to_bias)


torch.library.register_autograd(
    "qkern::linear_canonical", _backward, setup_context=_keep_for_backward, lib=_library.library
)


# ---- what modules call, as they call a backend ----


def _weight(weight: Mapping[str, Any], shape: tuple[int, int]) -> tuple[Any, ...]:
    """`weight` has the text of the format beside the parts."""
    return (*[weight.get(name) for name in _NAMES], weight["format"], *shape)


def linear(
    x: Tensor, weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    if _transforms.active():
        return _transforms.linear(x, bias, _product, _grad_input_op, *_weight(weight, shape))
    return _linear_op(x, *_weight(weight, shape), bias)


def _product(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return _linear_op(x, *weight, bias)


def embedding(
    ids: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    return _embedding_op(ids, *_weight(weight, shape), dtype)


def dequantize(
    weight: Mapping[str, Any], fmt: Format, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    return _dequantize_op(*_weight(weight, shape), dtype)
