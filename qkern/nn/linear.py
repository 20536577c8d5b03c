# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a quantized weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from qkern import _eager, _library
from qkern._quantize import quantize
from qkern.formats import Format
from qkern.nn._base import QuantizedModule, dtype_text, meta_like, meta_weight, require
from qkern.ops import check_weight
from qkern.tensor import QuantizedTensor


class Linear(QuantizedModule):
    """y = x . W^T + bias, W quantized; what torch.nn.Linear is for float weights.

    The constructor makes random weights as torch's does and quantizes them; on the meta device it
    only lays out the buffers. It computes in the dtype of its input. `compute_dtype` is that of
    the float layer it stands for: the dtype of `dequantize()` and of the bias.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: Format | str,
    ) -> None:
        module = torch.nn.Linear(in_features, out_features, bias, device, dtype)
        weight = module.weight.detach()
        quantized = (
            meta_weight(weight.shape, format) if weight.is_meta else quantize(weight, format)
        )
        self._set(quantized, module.bias, weight.dtype)

    def _set(
        self, weight: QuantizedTensor, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> None:
        super().__init__(weight, compute_dtype)
        self.out_features, self.in_features = weight.shape
        if bias is not None and not isinstance(bias, torch.nn.Parameter):
            bias = torch.nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def matrix_of(cls, module: torch.nn.Linear) -> Tensor:
        if is_transposed(module):  # weight [in_features, out_features]
            return module.weight.detach().t()
        require(module, torch.nn.Linear, "torch.nn.Linear")
        return module.weight.detach()

    @classmethod
    def like(cls, module: torch.nn.Linear, weight: QuantizedTensor) -> Linear:
        """The layer with this weight; the bias is shared."""
        layer = cls.from_weight(weight, module.bias, module.weight.dtype)
        return layer.train(module.training)

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> Linear:
        """The layer of a quantized weight [out_features, in_features]."""
        check_weight(weight)
        if bias is not None:
            _library.checked_bias(bias, weight.shape[0])
        module = cls.__new__(cls)
        module._set(weight, bias, compute_dtype)
        return module

    def config(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": dtype_text(self.bias),
            **super().config(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Linear:
        shape = config["out_features"], config["in_features"]
        return cls.from_weight(
            meta_weight(shape, config["format"]),
            meta_like(shape[:1], config["bias"]),
            getattr(torch, config["compute_dtype"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        # Not self.bias: a parameter that is looked up by attribute takes torch half a microsecond.
        bias = self._parameters["bias"]
        if not is_dynamo_compiling():
            buffers = self._buffers
            if buffers["codes"] is None:
                y = _eager.linear(x, buffers["packed"], bias, self.shape[0])
                if y is not None:
                    return y
        backend, weight = self._held_for(x)
        return backend.linear(x, weight, self.format, self.shape, bias)

    def dequantize(self) -> torch.nn.Linear:
        """The float layer with the same values, in `compute_dtype`."""
        weight = self.weight.dequantize(self.compute_dtype)
        module = torch.nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        module.weight = torch.nn.Parameter(weight)
        if self.bias is not None:
            module.bias = torch.nn.Parameter(self.bias.detach().clone())
        return module.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._weight_repr()}"
        )


def is_transposed(module: Any) -> bool:
    """Whether it is the Conv1D of Hugging Face transformers (GPT-2): a linear layer whose weight is
    stored transposed. It becomes a Linear, and `dequantize()` of that gives a torch.nn.Linear."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" == "transformers.pytorch_utils.Conv1D"
