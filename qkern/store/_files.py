# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder hold weights."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

from qkern.errors import FormatError
from qkern.store._safetensors import parse_json

INDEX = "model.safetensors.index.json"
# Of any program: a folder that has them, but no qkern.json, is a model that qkern did not write.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt",
            "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ckpt")  # fmt: skip


def is_weights(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _WEIGHTS)


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files that hold the model of a folder."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder; name one with *.safetensors files.")
    index = folder / INDEX
    if index.is_file():
        table = parse_json(index.read_bytes(), str(index)).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise FormatError(f"'weight_map' of {index} must map names of tensors to files.")
        return sorted(set(table.values()))
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if not names:
        others = [name for name in sorted(os.listdir(folder)) if is_weights(name)]
        held = f"; {others[0]} is of a kind that is not read here" if others else ""
        raise FileNotFoundError(f"{folder} has no *.safetensors files{held}.")
    return names
