# SPDX-License-Identifier: Apache-2.0
"""Modules with quantized weights, in the place of torch.nn's."""

from qkern.nn._base import QuantizedModule
from qkern.nn.linear import Linear

__all__ = ["Linear", "QuantizedModule"]
