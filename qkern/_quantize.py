# SPDX-License-Identifier: Apache-2.0
"""From a float weight to a QuantizedTensor, and the registry of methods that do it.

A method is a function `(w, fmt, importance=, hessian=) -> parts`: `w` dense finite float32
[N, K], the result the canonical parts as numpy arrays. A new one is a file with that function and
a line in METHODS.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any, NamedTuple

import numpy as np

from qkern import _arrays
from qkern._arrays import Array
from qkern.errors import FormatError, UnsupportedError
from qkern.formats import Format, parse_format
from qkern.formats._check import checked_shape
from qkern.tensor import QuantizedTensor

Parts = dict[str, np.ndarray]


class Method(NamedTuple):
    """Where a method is found and what it uses beside the weight."""

    function: str  # "module:name", imported on first use
    uses_hessian: bool = False
    uses_importance: bool = False  # for every format; else as Format.uses_importance says

    def load(self) -> Any:
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


METHODS = {
    "rtn": Method("qkern._quantize:round_to_nearest"),
}


def round_to_nearest(
    w: np.ndarray, fmt: Format, *, importance: np.ndarray | None, hessian: None
) -> Parts:
    """Each weight to the nearest value of its format; learned tables by optimal k-means."""
    return fmt.quantize(w, importance=importance)


def quantize(
    weight: Array,
    fmt: Format | str,
    *,
    method: str = "rtn",
    importance: Array | None = None,
    hessian: Array | None = None,
) -> QuantizedTensor:
    """Quantizes `weight` [N, K], a float numpy array or torch tensor of any layout and device.

    `fmt` is a format or its text ("int4-g128"). `importance` [K] or [N, K], not negative, weighs
    the squared errors of a codebook's fit. The parts of the result are of the weight's library
    and on its device; the fit itself runs on the CPU.
    """
    fmt = parse_format(fmt)
    chosen = _method(method)
    if hessian is not None and not chosen.uses_hessian:
        able = [name for name, m in METHODS.items() if m.uses_hessian]
        raise UnsupportedError(
            f"Method {method!r} does not use a hessian; "
            + (f"those that do: {', '.join(able)}." if able else "no method here does yet.")
        )
    if importance is not None and not (chosen.uses_importance or fmt.uses_importance):
        raise UnsupportedError(
            f"Method {method!r} does not use importance for {fmt}; it does for learned tables, "
            "as in 'codebook4'."
        )
    w = _checked_weight(weight)
    if importance is not None:
        importance = _checked_importance(importance, w.shape)
    parts = chosen.load()(w, fmt, importance=importance, hessian=hessian)
    kind, device = _arrays.kind_of(weight, "weight"), _arrays.device_of(weight)
    placed = {name: _arrays.from_numpy(part, kind, device) for name, part in parts.items()}
    return QuantizedTensor.from_parts(fmt, w.shape, check=False, **placed)


def _method(name: str) -> Method:
    if name not in tuple(METHODS):
        close = difflib.get_close_matches(str(name), METHODS, n=1)
        raise UnsupportedError(
            f"There is no method {name!r}; there are: {', '.join(METHODS)}."
            + (f" Did you mean {close[0]!r}?" if close else "")
        )
    return METHODS[name]


def _checked_weight(weight: Array) -> np.ndarray:
    """Dense float32 of a weight that can be quantized."""
    _arrays.kind_of(weight, "weight")
    if len(weight.shape) != 2:
        raise FormatError(
            f"weight must have two dimensions [N, K], but has shape {tuple(weight.shape)}."
        )
    checked_shape(weight.shape)
    if not _is_floating(weight):
        raise FormatError(f"weight must be of a float dtype, but is {_arrays.name_of(weight)}.")
    w = _as_float32(weight, "weight")
    bad = ~np.isfinite(w)
    if bad.any():
        row, column = (int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        value = _arrays.to_numpy(weight[row : row + 1, column : column + 1])[0, 0]
        raise FormatError(
            f"weight must be finite in float32, but weight[{row}, {column}] is {value}."
        )
    return w


def _checked_importance(importance: Array, shape: tuple[int, ...]) -> np.ndarray:
    _arrays.kind_of(importance, "importance")
    if tuple(importance.shape) not in (shape, shape[1:]):
        raise FormatError(
            f"importance must have shape {shape[1:]} or {shape}, but has {tuple(importance.shape)}."
        )
    values = _as_float32(importance, "importance")
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        place = np.unravel_index(int(bad.argmax()), bad.shape)
        where = ", ".join(str(int(i)) for i in place)
        raise FormatError(
            f"importance must be finite and not negative, but importance[{where}] is "
            f"{values[place]}."
        )
    return values


def _is_floating(x: Array) -> bool:
    if isinstance(x, np.ndarray):
        return np.issubdtype(x.dtype, np.floating)
    return x.is_floating_point()


def _as_float32(x: Array, what: str) -> np.ndarray:
    if _arrays.is_meta(x):
        raise UnsupportedError(f"{what} is on the meta device and has no numbers to quantize.")
    with np.errstate(over="ignore"):  # what overflows is named by the check for finite numbers
        return np.ascontiguousarray(_arrays.to_numpy(x), dtype=np.float32)
