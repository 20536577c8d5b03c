# SPDX-License-Identifier: Apache-2.0
"""Triton versions of every operation: the GPU path for what the compiled kernels do not cover.

Needs torch and triton 3.2 or newer; nothing in ``qkern`` imports this package unasked. The
functions take the parts of a weight as plain tensors in canonical storage, and a `Spec` that says
what they mean. Importing this module is cheap: kernels and torch are loaded by the first call.
"""

from __future__ import annotations

if __name__ != "qkern.triton_kernels":
    raise ImportError(
        f"This folder is installed as 'qkern.triton_kernels', but was imported as {__name__!r}. "
        "Write 'import qkern.triton_kernels' (and keep the root of the repository off sys.path)."
    )

import importlib
import importlib.util
from typing import TYPE_CHECKING

from . import excluded
from .spec import Spec, check_parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OLDEST_TRITON = (3, 2)

__all__ = [
    "Spec",
    "dequantize",
    "embedding",
    "grouped_linear",
    "linear",
    "linear_input_grad",
    "quantize_activations",
    "unavailable",
]


def unavailable() -> str | None:
    """Why these kernels cannot be used here, as a sentence; None if they can. Loads neither torch
    nor triton."""
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"The Triton kernels need {name}, which is not installed."
    found = excluded.installed()
    if excluded.parsed(found) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"The Triton kernels need triton {oldest} or newer, but {found} is installed."
    return None


def _ops():  # type: ignore[no-untyped-def]
    # A statement, not a function: torch.compile traces through it.
    from . import ops

    return ops


def _ops_grouped():  # type: ignore[no-untyped-def]
    from . import ops_grouped

    return ops_grouped


def _check_place(x: Tensor, *parts: Tensor | None) -> None:
    for part in parts:
        if part is not None and part.device != x.device:
            raise ValueError(
                f"Every part must be on one device, but {x.device} and {part.device} came."
            )
    if x.device.type == "cpu":
        from triton.runtime.interpreter import InterpretedFunction

        from .dequantize_rows import dequantize_kernel

        if not isinstance(dequantize_kernel, InterpretedFunction):
            raise ValueError(
                "The Triton kernels need tensors on a GPU, but they are on the CPU. "
                "(TRITON_INTERPRET=1 before the first import runs them there, slowly.)"
            )


def _check_table_scale(table_scale: Tensor | None, count: int, name: str) -> None:
    if table_scale is not None and (
        tuple(table_scale.shape) != (count,) or str(table_scale.dtype) != "torch.float32"
    ):
        raise ValueError(
            f"{name} must be float32 [{count}], but {table_scale.dtype} "
            f"{list(table_scale.shape)} came."
        )


def _check_floats(x: Tensor, name: str) -> None:
    kinds = ("torch.float16", "torch.bfloat16", "torch.float32")
    if str(x.dtype) not in kinds:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, but {x.dtype} came.")


def _check_bias(bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if bias is not None and (tuple(bias.shape) != shape or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous {list(shape)}, but {list(bias.shape)} came.")


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    codebook: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
    table_scale: Tensor | None = None,
    *,
    spec: Spec,
    batch_invariant: bool = True,
) -> Tensor:
    """x ``[..., K]`` times the weight ``[N, K]`` transposed, plus bias: ``[..., N]`` in x's type.

    ``table_scale`` (float32 [1]) replaces the spec's, here and below: a factor of the whole weight
    that is stored with it. A row of the result has the same bits whatever the other rows are. With
    ``batch_invariant=False`` the fastest kernel for a number of rows is taken, and it may not.
    """
    ops = _ops()
    k = x.shape[-1]
    _check_floats(x, "x")
    n = check_parts(spec.of_columns(k), k, codes, scales, zeros, codebook, perm)
    _check_bias(bias, (n,))
    _check_table_scale(table_scale, 1, "table_scale")
    _check_place(x, codes, scales, zeros, codebook, perm, table_scale, bias)
    y = ops.linear(
        x.reshape(-1, k),
        codes,
        scales,
        zeros,
        codebook,
        perm,
        table_scale,
        bias,
        spec.text,
        batch_invariant,
    )
    return y.reshape(*x.shape[:-1], n)


def linear_input_grad(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    codebook: Tensor | None = None,
    perm: Tensor | None = None,
    table_scale: Tensor | None = None,
    *,
    spec: Spec,
    k: int,
) -> Tensor:
    """dy ``[..., N]`` times the weight ``[N, k]``: the gradient of `linear` with respect to x."""
    ops = _ops()
    _check_floats(dy, "dy")
    n = check_parts(spec.of_columns(k), k, codes, scales, zeros, codebook, perm)
    if dy.shape[-1] != n:
        raise ValueError(f"dy must have {n} columns, but has {dy.shape[-1]}.")
    _check_table_scale(table_scale, 1, "table_scale")
    _check_place(dy, codes, scales, zeros, codebook, perm, table_scale)
    dx = ops.linear_input_grad(
        dy.reshape(-1, n), codes, scales, zeros, codebook, perm, table_scale, spec.text, k
    )
    return dx.reshape(*dy.shape[:-1], k)


def dequantize(
    codes: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    codebook: Tensor | None = None,
    perm: Tensor | None = None,
    table_scale: Tensor | None = None,
    *,
    spec: Spec,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight as floats ``[N, k]``, columns in input order."""
    ops = _ops()
    check_parts(spec.of_columns(k), k, codes, scales, zeros, codebook, perm)
    _check_table_scale(table_scale, 1, "table_scale")
    _check_place(codes, scales, zeros, codebook, perm, table_scale)
    return ops.dequantize(
        codes, scales, zeros, codebook, perm, table_scale, None, spec.text, k, dtype
    )


def embedding(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    codebook: Tensor | None = None,
    perm: Tensor | None = None,
    table_scale: Tensor | None = None,
    *,
    spec: Spec,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``ids`` of the weight as floats ``[..., k]``. An id out of range gives a row of NaN."""
    ops = _ops()
    if str(ids.dtype) not in ("torch.int32", "torch.int64"):
        raise ValueError(f"ids must be int32 or int64, but {ids.dtype} came.")
    check_parts(spec.of_columns(k), k, codes, scales, zeros, codebook, perm)
    _check_table_scale(table_scale, 1, "table_scale")
    _check_place(ids, codes, scales, zeros, codebook, perm, table_scale)
    flat = ids.reshape(-1).contiguous()
    rows = ops.dequantize(
        codes, scales, zeros, codebook, perm, table_scale, flat, spec.text, k, dtype
    )
    return rows.reshape(*ids.shape, k)


def quantize_activations(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """x ``[..., K]`` to int8 ``[..., K]`` and float32 scales ``[..., 1 or groups]``."""
    ops = _ops()
    _check_floats(x, "x")
    _check_place(x)
    k = x.shape[-1]
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be None or at least 1, but {group_size} came.")
    if k < 1:
        raise ValueError("x must have at least one column, but has none.")
    q, scales = ops.quantize_activations(x.reshape(-1, k), None, group_size or 0)
    return q.reshape(x.shape), scales.reshape(*x.shape[:-1], scales.shape[1])


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    codes: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    codebook: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
    table_scales: Tensor | None = None,
    *,
    spec: Spec,
) -> Tensor:
    """Mixture of experts: tokens x ``[T, K]`` sorted by expert, expert e owning the rows
    ``offsets[e] .. offsets[e + 1]`` (int32 or int64 ``[E + 1]``, ascending, on x's device).

    codes, scales, zeros (and tables) of the experts are stacked along the first axis; bias is
    ``[E, N]``; ``table_scales`` ``[E]`` replaces the spec's. With int8 activations perm is one
    ``[K]`` for all experts, else it may be ``[E, K]`` too. Rows outside the offsets are zeros.
    """
    ops = _ops_grouped()
    _check_floats(x, "x")
    k = x.shape[-1]
    if x.ndim != 2 or offsets.ndim != 1 or len(offsets) < 2:
        raise ValueError(
            f"x must be [T, K] and offsets [E + 1], but {list(x.shape)} and "
            f"{list(offsets.shape)} came."
        )
    if str(offsets.dtype) not in ("torch.int32", "torch.int64"):
        raise ValueError(f"offsets must be int32 or int64, but {offsets.dtype} came.")
    experts = len(offsets) - 1
    n = check_parts(spec.of_columns(k), k, codes, scales, zeros, codebook, perm, experts)
    if perm is not None and perm.ndim == 2 and spec.activations != "float":
        raise ValueError("With int8 activations all experts must share one perm [K].")
    _check_table_scale(table_scales, experts, "table_scales")
    _check_bias(bias, (experts, n))
    _check_place(x, offsets, codes, scales, zeros, codebook, perm, bias, table_scales)
    return ops.grouped_linear(
        x, offsets.contiguous(), codes, scales, zeros, codebook, perm, table_scales, bias, spec.text
    )
