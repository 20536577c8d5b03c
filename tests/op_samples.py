# SPDX-License-Identifier: Apache-2.0
"""One list of arguments per operation of torch.ops.qkern, for torch's own checks of operations.

A new operation adds a line to `SAMPLES`; test_torch_compile.py fails for one that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch

import qkern

N, K = 37, 75  # no multiple of any tile; the last group is short
Arguments = tuple[Any, ...]


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int) -> torch.Tensor:
    return normal(*shape).mul(60).clamp(-128, 127).to(torch.int8)


def weight(fmt: str = "int4-g32-asym", n: int = N, k: int = K) -> qkern.QuantizedTensor:
    return qkern.quantize(normal(n, k, seed=0), fmt)


@lru_cache
def packed(fmt: str = "int4-g32-asym") -> torch.Tensor:
    return weight(fmt).packed().buffer


def _linear(grad: bool) -> Iterator[Arguments]:
    half = normal(2, 3, K, dtype=torch.bfloat16).transpose(0, 1)
    for x, bias in ((normal(3, K), normal(N)), (half, None)):
        yield x.detach().requires_grad_(grad), packed(), bias, N


def _linear_out() -> Iterator[Arguments]:
    for bias in (None, normal(N)):
        yield normal(3, K), packed(), bias, torch.empty(3, N)
        yield normal(2, 3, K), packed("int8-a8"), bias, torch.empty(2, 3, N + 3)[..., :N]


def _quantize_out() -> Iterator[Arguments]:
    for group, groups in ((0, 1), (32, 3)):
        codes = torch.empty(2, 3, K, dtype=torch.int8)
        yield normal(2, 3, K), group, codes, torch.empty(2, 3, groups)


def canonical(qt: qkern.QuantizedTensor) -> Arguments:
    names = ("codes", "scales", "zeros", "codebook", "perm", "global_scale")
    return (*[qt.parts().get(name) for name in names], str(qt.format), *qt.shape)


def _linear_canonical() -> Iterator[Arguments]:
    yield normal(3, K).requires_grad_(), *canonical(weight("nvfp4")), normal(N).requires_grad_()
    yield normal(2, 3, K, dtype=torch.bfloat16), *canonical(weight("codebook4")), None


GEOMETRY = ((3, 3), (1, 1), (1, 0, 1, 2), (1, 1), 2)  # kernel, stride, padding, dilation, groups


def _conv(grad: bool) -> Iterator[Arguments]:
    weight = qkern.nn.Conv2d(4, 6, 3, groups=2, format="int8-a8").weight.pack_().packed().buffer
    x = normal(2, 4, 5, 6)
    for image, bias in ((x, normal(6)), (x.to(memory_format=torch.channels_last), None)):
        yield image.detach().requires_grad_(grad), weight, bias, 6, *GEOMETRY


def _conv_grad_input() -> Iterator[Arguments]:
    for _, weight, _, _, *geometry in _conv(False):
        yield normal(2, 6, 5, 6), weight, (2, 4, 5, 6), *geometry


OFFSETS = torch.tensor([0, 3, 3, 7])


@lru_cache
def _stack() -> torch.Tensor:
    stack = qkern.QuantizedStack.from_tensors([weight("int4-g32") for _ in range(3)])
    return stack.pack_().packed().buffer


def _grouped(grad: bool) -> list[Arguments]:
    x, bias = normal(7, K).requires_grad_(grad), normal(3, N).requires_grad_(grad)
    return [(x, _stack(), OFFSETS, bias, N)]


IDS = torch.tensor([[1, 2], [0, N - 1]])
SAMPLES: dict[str, Callable[[], Iterator[Arguments] | list[Arguments]]] = {
    "conv": lambda: _conv(False),
    "conv_train": lambda: _conv(True),
    "conv_grad_input": _conv_grad_input,
    "grouped_linear": lambda: _grouped(False),
    "grouped_linear_train": lambda: _grouped(True),
    "grouped_linear_grad_input": lambda: [(normal(7, N), _stack(), OFFSETS, K)],
    "grouped_linear_grad_bias": lambda: [(normal(7, N), OFFSETS, torch.float32)],
    "int8_matmul": lambda: [(integers(2, 3, K), integers(K, 5)), (integers(K), integers(5, K).T)],
    "linear": lambda: _linear(False),
    "linear_train": lambda: _linear(True),
    "linear_grad_input": lambda: [(normal(4, N), packed(), K)],
    "linear_canonical": _linear_canonical,
    "linear_canonical_grad_input": lambda: [(normal(4, N), *canonical(weight()))],
    "linear_out": _linear_out,
    "dequantize": lambda: [(packed(), N, K, torch.float16)],
    "dequantize_canonical": lambda: [(*canonical(weight("int3-g24")), torch.bfloat16)],
    "dequantize_out": lambda: [(packed(), N, K, torch.empty(N, K))],
    "embedding": lambda: [(IDS, packed(), K, torch.float32)],
    "embedding_canonical": lambda: [(IDS, *canonical(weight("nf4-g32")), torch.float16)],
    "embedding_out": lambda: [(IDS, packed(), K, torch.empty(2, 2, K, dtype=torch.bfloat16))],
    "quantize_activations": lambda: [(normal(2, 3, K), 0), (normal(2, 3, K), 32)],
    "quantize_activations_out": _quantize_out,
}
