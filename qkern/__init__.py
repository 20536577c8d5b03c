# SPDX-License-Identifier: Apache-2.0
"""qkern: low-bit kernels for CPU, CUDA and Triton, and torch modules over them.

Names are loaded on first use, so that `import qkern` needs numpy alone; those that work on torch
tensors import torch when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

try:
    from qkern import _core  # noqa: F401
except ImportError as _error:
    raise ImportError(
        f"qkern was imported from {__file__}, beside which there is no compiled core ({_error}). "
        "In the folder of the sources, install it first (pip install -e .) or run Python elsewhere."
    ) from _error

from qkern import truth as _truth

if TYPE_CHECKING:
    from qkern import nn, numpy
    from qkern._layers import grouped_linear
    from qkern._link import get_cmake_dir, get_include
    from qkern._quantize import quantize
    from qkern.errors import FormatError, QkernError, UnsupportedError
    from qkern.formats import FP4, IQ4NL, LUTB, MXFP4, NF4, NVFP4, Codebook, Int, parse_format
    from qkern.model import quantize_
    from qkern.ops import dequantize, embedding, int8_matmul, linear, quantize_activations
    from qkern.stack import QuantizedStack
    from qkern.store import load, save
    from qkern.tensor import QuantizedTensor
    from qkern.truth import explain, info, kernels, override

__all__ = [
    "FP4",
    "IQ4NL",
    "LUTB",
    "MXFP4",
    "NF4",
    "NVFP4",
    "Codebook",
    "FormatError",
    "Int",
    "QkernError",
    "QuantizedStack",
    "QuantizedTensor",
    "UnsupportedError",
    "dequantize",
    "embedding",
    "explain",
    "get_cmake_dir",
    "get_include",
    "grouped_linear",
    "info",
    "int8_matmul",
    "kernels",
    "linear",
    "load",
    "nn",
    "numpy",
    "override",
    "parse_format",
    "quantize",
    "quantize_",
    "quantize_activations",
    "save",
]

_MODULES = ("nn", "numpy")
# Public name: the module that has it (of _MODULES: that it is).
_HOME = {
    "Codebook": "formats",
    "FP4": "formats",
    "FormatError": "errors",
    "IQ4NL": "formats",
    "Int": "formats",
    "LUTB": "formats",
    "MXFP4": "formats",
    "NF4": "formats",
    "NVFP4": "formats",
    "QkernError": "errors",
    "QuantizedStack": "stack",
    "QuantizedTensor": "tensor",
    "UnsupportedError": "errors",
    "dequantize": "ops",
    "embedding": "ops",
    "explain": "truth",
    "grouped_linear": "_layers",
    "get_cmake_dir": "_link",
    "get_include": "_link",
    "info": "truth",
    "int8_matmul": "ops",
    "kernels": "truth",
    "linear": "ops",
    "load": "store",
    "nn": "nn",
    "numpy": "numpy",
    "override": "truth",
    "parse_format": "formats",
    "quantize": "_quantize",
    "quantize_": "model",
    "quantize_activations": "ops",
    "save": "store",
}

__version__ = _truth.version()


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'qkern' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"qkern.{home}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"qkern.{name} works on torch tensors, but torch cannot be imported ({error}); "
            "install torch, or use qkern.numpy.",
            name="torch",
        ) from None
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_truth.apply_environment()
