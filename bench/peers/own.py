# SPDX-License-Identifier: Apache-2.0
"""qkern through its native call, into a given output, as the graph runtimes are called."""

from __future__ import annotations

import functools

import numpy as np

import qkern
from peers import Peer, Settings, _data
from qkern import _arrays, _core
from qkern.testing import address

FORMATS = {
    "int4-g128-a8": ("int4-g128-a8", "int4-g128-a8g", "int4-g128-asym-a8g"),
    "int4-g64-a8": ("int4-g64-a8", "int4-g64-a8g"),
    "int4-g32-a8": ("int4-g32-a8", "int4-g32-a8g", "int4-g32-asym-a8g"),
    "int4": ("int4-g128", "int4-g64", "int4-g32", "int4-g128-asym"),
    "codebook4": (
        "codebook4-a8", "codebook4-a8g", "nf4-a8", "iq4nl-a8", "iq4nl-a8g", "mxfp4-a8g",
        "codebook4", "nf4",
    ),
    "int8-a8": ("int8-a8", "int8-a8g"),
    "int8": ("int8",),
    "low": (
        "codebook3-a8", "int3-g64-a8", "lutb-a8", "codebook2-a8", "int2-g64-a8",
        "codebook3", "int3-g64", "lutb", "codebook2", "int2-g64",
    ),
}  # fmt: skip
# Code of the native call, relative rounding of a result.
DTYPES = {"float32": (0, 0.0), "float16": (1, 2.0**-11), "bfloat16": (2, 2.0**-8)}


class Own(Peer):
    def __init__(self, kind: str, text: str, dtype: str):
        int8 = text.endswith(("-a8", "-a8g"))
        super().__init__(text, kind, "int8" if int8 else "float")
        self.dtype, rounding = DTYPES[dtype]
        self.tolerance += rounding
        self.tensor: qkern.QuantizedTensor | None = None

    def quantized(self, n: int, k: int) -> qkern.QuantizedTensor:
        if self.tensor is None or self.tensor.shape != (n, k):
            self.tensor = qkern.numpy.quantize(_data.weight(n, k), self.name)
        return self.tensor

    def weight_bytes(self, n: int, k: int) -> int:
        return self.quantized(n, k).packed().nbytes

    def build(self, n: int, k: int, copies: int) -> None:
        packed = self.quantized(n, k).packed()
        self.n, self.bytes = n, packed.nbytes
        # As a layer keeps its weights.
        self.blocks = [_arrays.empty_aligned(packed.nbytes, "numpy") for _ in range(copies)]
        for block in self.blocks:
            block[:] = packed.buffer

    def calls(self, x: np.ndarray, copies: int) -> list:
        raw = self.lowered(x)
        y = np.empty((len(x), self.n), raw.dtype)
        return [functools.partial(self.run, block, raw, y) for block in self.blocks[:copies]]

    def run(self, block: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        _core.linear(address(block), self.bytes, self.dtype, address(x), x.shape[0], x.shape[1],
                     1, 0, 0, self.dtype, address(y), self.n)  # fmt: skip

    def output(self, x: np.ndarray) -> np.ndarray:
        raw = self.lowered(x)
        y = np.empty((len(x), self.n), raw.dtype)
        self.run(self.blocks[0], raw, y)
        return self.raised(y)

    def weight(self) -> np.ndarray:
        return qkern.numpy.dequantize(self.tensor)

    def seen(self, x: np.ndarray) -> np.ndarray:
        return self.raised(self.lowered(x))

    def detail(self) -> str:
        return _core.last_kernel()

    def lowered(self, x: np.ndarray) -> np.ndarray:
        """x in the dtype of the call; bfloat16 as its bits."""
        if self.dtype == 2:
            bits = x.view(np.uint32)
            return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
        return x.astype(np.float16) if self.dtype else x

    def raised(self, y: np.ndarray) -> np.ndarray:
        if self.dtype == 2:
            return (y.astype(np.uint32) << 16).view(np.float32)
        return y.astype(np.float32)


def peers(settings: Settings) -> list[Peer]:
    _core.set_threads(settings.threads)
    return [Own(kind, text, settings.dtype) for kind, texts in FORMATS.items() for text in texts]
