# SPDX-License-Identifier: Apache-2.0
"""What layers beyond Linear run: convolution and mixture of experts, by backend.

A backend `qkern/backends/<name>.py` has them in `<name>_layers.py`, as functions

    conv(x, weight, fmt, shape, bias, geometry)
              x [B, C, H, W]; geometry as in qkern/_library_conv.py
    grouped_linear(x, weight, fmt, shape, offsets, bias)
              x [T, K], shape (E, N, K)

or lacks them: then the call is refused in words.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from qkern import _library, _library_grouped, backends
from qkern.backends import cpu_layers
from qkern.errors import UnsupportedError
from qkern.ops import held
from qkern.stack import QuantizedStack
from qkern.tensor import QuantizedTensor

_WORDS = {"conv": "convolution", "grouped_linear": "mixture of experts"}


# Found before; torch.compile reads it while tracing, where nothing can be imported.
_found: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("qkern.backends.cpu", "conv"): cpu_layers.conv,
    ("qkern.backends.cpu", "grouped_linear"): cpu_layers.grouped_linear,
}


def function(backend: ModuleType, name: str) -> Callable[..., Tensor]:
    """The backend's function of this name, or a sentence."""
    key = (backend.__name__, name)
    if key not in _found:
        _found[key] = _find(backend, name)
    return _found[key]


def _find(backend: ModuleType, name: str) -> Callable[..., Tensor]:
    home = f"{backend.__name__}_layers"
    try:
        return getattr(importlib.import_module(home), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != home:
            raise
        short = backend.__name__.rpartition(".")[2]
        raise UnsupportedError(
            f"The backend {short} has no {_WORDS[name]}; move the module and its input to the CPU, "
            "or use dequantize() of the module."
        ) from None


def grouped_linear(
    x: Tensor,
    weights: QuantizedStack | Sequence[QuantizedTensor],
    offsets: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Rows offsets[e] .. offsets[e + 1] of x [T, K] times the transposed weight [N, K] of expert e,
    plus row e of bias [E, N]: [T, N] in the dtype of x.

    x is float32, float16 or bfloat16, of any strides, its rows sorted by expert; offsets is int64
    or int32 [E + 1], ascending from 0 to T. Each row has the same bits as `linear` gives with the
    expert's weight. Differentiable to x and bias. A sequence of weights is copied into one
    QuantizedStack at every call: make the stack once where there is more than one call.
    """
    if not isinstance(weights, QuantizedStack):
        weights = QuantizedStack.from_tensors(list(weights))
    experts, n, k = weights.shape
    check_grouped(x, offsets, bias, experts, n, k)
    backend = backends.select(x.device.type)
    stack = weights if weights.kind == "torch" or x.is_cpu else weights.to(x.device)
    run = function(backend, "grouped_linear")
    return run(x, held(stack, backend), weights.format, weights.shape, offsets, bias)  # type: ignore[arg-type]


def check_grouped(x: Any, offsets: Any, bias: Tensor | None, experts: int, n: int, k: int) -> None:
    _library_grouped.check_rows(x, offsets, bias, n)
    _library.check_columns(x, k)
    if offsets.shape[0] != experts + 1:
        raise ValueError(
            f"offsets must have {experts + 1} numbers for {experts} experts, "
            f"but has {offsets.shape[0]}."
        )
    _library.check_devices(x, offsets, bias)
