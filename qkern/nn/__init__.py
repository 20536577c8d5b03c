# SPDX-License-Identifier: Apache-2.0
"""Modules with quantized weights, in the place of torch.nn's."""

from qkern.nn._base import Configured, QuantizedModule, unpack_
from qkern.nn.conv import Conv1d, Conv2d
from qkern.nn.embedding import Embedding
from qkern.nn.experts import Experts, GroupedLinear
from qkern.nn.linear import Linear

__all__ = [
    "Configured",
    "Conv1d",
    "Conv2d",
    "Embedding",
    "Experts",
    "GroupedLinear",
    "Linear",
    "QuantizedModule",
    "unpack_",
]
