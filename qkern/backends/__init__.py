# SPDX-License-Identifier: Apache-2.0
"""Which code runs an operation: one module of this package per backend, chosen by device.

A backend is a module `qkern/backends/<name>.py` with

    DEVICES   types of torch devices that it serves
    PACKED    whether it reads the packed weight ({"packed": uint8 tensor}) or canonical parts
              ({"codes": ..., "scales": ..., ...})
    unavailable() -> str | None
              why it cannot run here, in words that follow "because"
    linear(x, weight, fmt, shape, bias)
    embedding(ids, weight, fmt, shape, dtype)
    dequantize(weight, fmt, shape, dtype)
              `weight` maps names of parts to tensors, `shape` is (N, K); the results are
              differentiable to x and bias where grad mode asks for it
    quantize_activations(x, group_size)
    kernels() -> list[dict]
              rows for qkern.kernels()
    explain(weight, fmt, shape, x) -> list[tuple[str, bool, str]]
              (kernel, whether it runs, why), best first

and its name stands in `_BACKENDS`. It may import torch; this file does not.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from qkern import _core
from qkern.errors import UnsupportedError

_BACKENDS = ("cpu", "cuda", "triton")
# Best first.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "meta": ("meta",)}

_forced: str | None = None
_chosen: dict[str, ModuleType] = {}  # by device type; emptied when the choice changes


def names() -> tuple[str, ...]:
    return _BACKENDS


def forced() -> str | None:
    """The backend that every operation must use, if one was named."""
    return _forced


def force(name: str | None) -> None:
    """Makes every operation use this backend; None lets the device decide."""
    global _forced
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"The backends are {', '.join(_BACKENDS)}, but {name!r} came.")
    _forced = name
    _chosen.clear()
    _core.eager_allow(name in (None, "cpu"))


def select(device_type: str) -> ModuleType:
    """The backend for tensors on this type of device."""
    return _chosen.get(device_type) or _choose(device_type)


def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def why_not(name: str) -> str | None:
    """Why this backend cannot run here; None where it can."""
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        return "this build of qkern does not have it"
    try:
        return load(name).unavailable()
    except ImportError as error:
        return f"importing it failed: {error}"


def _choose(device_type: str) -> ModuleType:
    reasons = []
    forced = _forced if device_type != "meta" else None  # which computes nothing
    for name in (forced,) if forced else _PREFERENCE.get(device_type, ()):
        reason = why_not(name)
        if reason is None:
            module = load(name)
            if device_type in module.DEVICES:
                _chosen[device_type] = module
                return module
            reason = f"it serves {' and '.join(module.DEVICES)} tensors only"
        reasons.append(f"{name}: {reason}")
    known = "; ".join(reasons) or "only CPU and CUDA tensors are known to qkern"
    raise UnsupportedError(
        f"No backend can run this on {device_type} tensors ({known}). "
        "Move the module and its input to the CPU, or choose another backend."
    )
