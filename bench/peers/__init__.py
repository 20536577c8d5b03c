# SPDX-License-Identifier: Apache-2.0
"""Other packages' quantized linear layers, and ours, behind one small interface.

A family is a module of this package with `peers(settings) -> list[Peer]`; it runs in a process of
its own (worker.py), so that thread pools and memory of one package never meet those of another.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Family: (module here, what to install, how it is kept to AVX2: a word for the output, "" if not).
FAMILIES = {
    "qkern": ("own", "qkern", "QKERN_ISA"),
    "torch": ("torch_ops", "torch", "ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA"),
    "torchao": ("ao", "torchao", "ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA"),
    "bitsandbytes": ("bnb", "bitsandbytes", ""),
    "onnxruntime": ("ort", "onnxruntime onnx", ""),
    "openvino": ("ov", "openvino", "ONEDNN_MAX_CPU_ISA"),
    "ggml": ("ggml", "llama-cpp-python (or QKERN_BENCH_GGML=folder of libggml*.so)", "its build"),
}
# Read by the libraries when they start. ONNX Runtime has no such variable, and the kernels of
# bitsandbytes are chosen when it is built: with --isa avx2 both are left out, by name.
AVX2_ENVIRONMENT = {
    "QKERN_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}
# Class of the comparison: what it is called in tables.
CLASSES = {
    "int4-g128-a8": "4-bit, groups of 128, int8 activations",
    "int4-g64-a8": "4-bit, groups of 64, int8 activations",
    "int4-g32-a8": "4-bit, groups of 32, int8 activations",
    "int4": "4-bit, float activations",
    "codebook4": "4-bit codebook",
    "int8-a8": "8-bit, int8 activations",
    "int8": "8-bit, float activations",
    "low": "3-bit and 2-bit (no peers)",
    "reference": "not quantized",
}


class Absent(Exception):
    """A family that cannot run here; the text says why and what to do."""


@dataclass(frozen=True)
class Settings:
    threads: int
    isa: str | None = None  # None: the best there is
    dtype: str = "float32"  # of our activations and results; the peers' is in their name
    compiled: bool = False  # also what has to be compiled by torch first


class Peer(ABC):
    """One way to compute x . W^T: `build` makes copies of a weight, `calls` uses them in turn."""

    tolerance = 1e-4  # relative error beyond which a result is called wrong
    per_call = 1  # layers that one call runs

    def __init__(self, name: str, kind: str, arithmetic: str = "float"):
        self.name, self.kind, self.arithmetic = name, kind, arithmetic
        if arithmetic == "int8":
            # Rounding normal activations to 8 bits with one scale for all of them: a step is
            # 2 x 5 sigma / 255, its error a step / sqrt(12) = 1.1e-2 of sigma.
            self.tolerance = 3e-2

    @abstractmethod
    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of one copy that every call has to read, scales and zeros included."""

    @abstractmethod
    def build(self, n: int, k: int, copies: int) -> None:
        """Quantizes the common weight and makes this many copies in different memory."""

    @abstractmethod
    def calls(self, x: np.ndarray, copies: int) -> list[Callable[[], object]]:
        """Calls that together use each of `copies` copies once."""

    @abstractmethod
    def output(self, x: np.ndarray) -> np.ndarray:
        """x . W^T of the first copy, float32."""

    @abstractmethod
    def weight(self) -> np.ndarray:
        """The first copy as float32 [N, K], exactly as this peer means it."""

    def seen(self, x: np.ndarray) -> np.ndarray:
        """x after the conversion to the dtype that the peer takes."""
        return x

    def detail(self) -> str:
        """What computed the last output, where the peer can tell."""
        return ""

    def close(self) -> None:  # noqa: B027 most have nothing to do
        """Gives back what the garbage collector cannot."""


def load(family: str, settings: Settings) -> list[Peer]:
    """The peers of a family; raises Absent where it is not installed or cannot be limited."""
    module, package, limited = FAMILIES[family]
    if settings.isa == "avx2" and not limited:
        raise Absent("cannot be limited to AVX2")
    try:
        return importlib.import_module(f"peers.{module}").peers(settings)
    except ImportError as error:
        raise Absent(f"not installed ({error}); pip install {package}") from error
