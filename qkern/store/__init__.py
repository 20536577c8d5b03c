# SPDX-License-Identifier: Apache-2.0
"""Models in folders: tensors as safetensors, what they mean as qkern.json."""

from qkern.store._load import load
from qkern.store._save import save
from qkern.store._stream import quantize_folder

__all__ = ["load", "quantize_folder", "save"]
