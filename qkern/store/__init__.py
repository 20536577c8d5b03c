# SPDX-License-Identifier: Apache-2.0
"""Models in folders: tensors as safetensors, what they mean as qkern.json.

Loaded on first use, so that a folder can be inspected without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkern.store._load import load
    from qkern.store._save import save
    from qkern.store._stream import quantize_folder

__all__ = ["load", "quantize_folder", "save"]

_HOME = {"load": "_load", "quantize_folder": "_stream", "save": "_save"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qkern.store' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qkern.store.{_HOME[name]}"), name)
