# SPDX-License-Identifier: Apache-2.0
"""Convolutions with a quantized weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from qkern import _layers, _library
from qkern._library_conv import Geometry
from qkern._quantize import quantize
from qkern.formats import Format
from qkern.nn._base import QuantizedModule, dtype_text, meta_like, meta_weight, require
from qkern.ops import check_weight
from qkern.tensor import QuantizedTensor

# What stays of a float convolution beside weight and bias.
_SETTINGS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode",
)  # fmt: skip


class _Conv(QuantizedModule):
    """The weight is [out_channels, in_channels / groups * kernel positions]: torch's weight viewed
    as a matrix, so that groups of a format run along (channel, kernel row, kernel column). It stays
    packed; patches of the input are gathered block by block, never all at once.

    With int8 activations the row that is quantized is the patch under one output position (of one
    group of channels), zeros of the padding included: every position has scales of its own, one
    per patch (`-a8`) or one per group of its columns (`-a8g`). The result has the same bits as
    `qkern.linear` on the rows of torch.nn.functional.unfold.

    Gradients reach x and bias. That of x is a float convolution with the dequantized weight.
    """

    DIMENSIONS: ClassVar[int]
    FLOAT: ClassVar[type]

    bias: torch.nn.Parameter | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: Format | str,
    ) -> None:
        module = self.FLOAT(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        weight = self.matrix_of(module)
        quantized = (
            meta_weight(weight.shape, format) if weight.is_meta else quantize(weight, format)
        )
        self._set(quantized, module, module.bias, weight.dtype)

    def _set(
        self,
        weight: QuantizedTensor,
        module: Any,
        bias: torch.nn.Parameter | None,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__(weight, compute_dtype)
        for name in _SETTINGS:
            setattr(self, name, getattr(module, name))
        self.register_parameter("bias", bias)
        # Left and right of each dimension; those of "same" may differ by one.
        self._pads: list[tuple[int, int]] = []
        for i in range(self.DIMENSIONS):
            if isinstance(self.padding, str):
                whole = self.dilation[i] * (self.kernel_size[i] - 1)
                whole = 0 if self.padding == "valid" else whole
                self._pads.append((whole // 2, whole - whole // 2))
            else:
                self._pads.append((self.padding[i], self.padding[i]))
        self._geometry = self._kernel_geometry()

    def _kernel_geometry(self) -> Geometry:
        """What the kernel is told: two dimensions, padding with zeros only."""
        extra = (1,) * (2 - self.DIMENSIONS)
        pads = [(0, 0)] * len(extra) + self._pads
        if self.padding_mode != "zeros":
            pads = [(0, 0), (0, 0)]
        return (
            (*extra, *self.kernel_size),
            (*extra, *self.stride),
            (pads[0][0], pads[1][0], pads[0][1], pads[1][1]),
            (*extra, *self.dilation),
            self.groups,
        )

    @classmethod
    def matrix_of(cls, module: Any) -> Tensor:
        require(module, cls.FLOAT, f"torch.nn.{cls.FLOAT.__name__}")
        return module.weight.detach().flatten(1)

    @classmethod
    def like(cls, module: Any, weight: QuantizedTensor) -> Any:
        """The layer with this weight; the bias is shared."""
        check_weight(weight)
        made = cls.__new__(cls)
        made._set(weight, module, module.bias, module.weight.dtype)
        return made.train(module.training)

    def config(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in _SETTINGS}
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        return {**settings, "bias": dtype_text(self.bias), **super().config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        settings = {name: config[name] for name in _SETTINGS}
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        module = cls.FLOAT(**settings, bias=False, device="meta")
        module.to(getattr(torch, config["compute_dtype"]))
        made = cls.like(module, meta_weight(module.weight.flatten(1).shape, config["format"]))
        made.register_parameter("bias", meta_like((made.out_channels,), config["bias"]))
        return made

    def forward(self, x: Tensor) -> Tensor:
        _library.check_input(x)
        dimensions = self.DIMENSIONS
        if x.dim() not in (dimensions + 1, dimensions + 2):
            raise ValueError(
                f"A {type(self).__name__} takes x [B, C, {'H, ' * (dimensions - 1)}W] or one "
                f"without B, but its shape is {tuple(x.shape)}."
            )
        if x.shape[-dimensions - 1] != self.in_channels:
            raise ValueError(
                f"This {type(self).__name__} takes {self.in_channels} channels, "
                f"but x has the shape {tuple(x.shape)}."
            )
        batched = x if x.dim() == dimensions + 2 else x.unsqueeze(0)
        if self.padding_mode != "zeros":
            sides = [side for pair in reversed(self._pads) for side in pair]
            batched = torch.nn.functional.pad(batched, sides, self.padding_mode)
        backend, weight = self._held_for(x)
        conv = _layers.function(backend, "conv")
        image = batched.unsqueeze(2) if dimensions == 1 else batched
        bias = self._parameters["bias"]
        y = conv(image, weight, self.format, self.shape, bias, self._geometry)
        if dimensions == 1:
            y = y.squeeze(2)
        return y if x.dim() == dimensions + 2 else y.squeeze(0)

    def dequantize(self) -> Any:
        """The float layer with the same values, in `compute_dtype`."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        module = self.FLOAT(**settings, bias=self.bias is not None, device="meta")
        weight = self.weight.dequantize(self.compute_dtype)
        module.weight = torch.nn.Parameter(weight.view(module.weight.shape))
        if self.bias is not None:
            module.bias = torch.nn.Parameter(self.bias.detach().clone())
        return module.train(self.training)

    def extra_repr(self) -> str:
        words = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        words.append(f"stride={self.stride}")
        for name, plain in (
            ("padding", (0,) * self.DIMENSIONS),
            ("dilation", (1,) * self.DIMENSIONS),
            ("groups", 1),
            ("padding_mode", "zeros"),
        ):
            if getattr(self, name) != plain:
                words.append(f"{name}={getattr(self, name)}")
        return ", ".join([*words, f"bias={self.bias is not None}", self._weight_repr()])


class Conv1d(_Conv):
    """torch.nn.Conv1d with a quantized weight: x [B, C, W] or [C, W], float32, float16 or bfloat16,
    to [B, N, W'] or [N, W'] in its dtype."""

    __doc__ = f"{__doc__}\n\n{_Conv.__doc__}"
    DIMENSIONS = 1
    FLOAT = torch.nn.Conv1d


class Conv2d(_Conv):
    """torch.nn.Conv2d with a quantized weight: x [B, C, H, W] or [C, H, W], float32, float16 or
    bfloat16, to [B, N, H', W'] or [N, H', W'] in its dtype. x is read where it lies, whatever its
    strides are; the memory format of the result is that of torch."""

    __doc__ = f"{__doc__}\n\n{_Conv.__doc__}"
    DIMENSIONS = 2
    FLOAT = torch.nn.Conv2d
