# SPDX-License-Identifier: Apache-2.0
"""The formats of quantized weights. Each import line below registers the formats of one file."""

from qkern.formats._base import FORMATS, Format, Part, parse_format, register
from qkern.formats.codebook import Codebook
from qkern.formats.fixed import FP4, IQ4NL, MXFP4, NF4, NVFP4
from qkern.formats.integer import Int
from qkern.formats.lutb import LUTB

__all__ = [
    "FORMATS",
    "FP4",
    "IQ4NL",
    "LUTB",
    "MXFP4",
    "NF4",
    "NVFP4",
    "Codebook",
    "Format",
    "Int",
    "Part",
    "parse_format",
    "register",
]
