# SPDX-License-Identifier: Apache-2.0
"""Modules with quantized weights, in the place of torch.nn's."""

from qkern.nn._base import Configured, QuantizedModule
from qkern.nn.linear import Linear

__all__ = ["Configured", "Linear", "QuantizedModule"]
