# SPDX-License-Identifier: Apache-2.0
"""Lists what a folder or file holds: modules, tensors, formats, bits per weight, bytes.

PATH is a folder that qkern wrote, a folder with *.safetensors files, or one such file. Headers and
sizes are checked on the way (a file that was cut or damaged is an error); numbers are not read.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from qkern.cli._text import number, shape_text, table
from qkern.errors import FormatError
from qkern.formats import parse_format
from qkern.report import size_text
from qkern.store._files import weight_files
from qkern.store._manifest import NAME, Manifest
from qkern.store._safetensors import DTYPES, TensorFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH")


def collect(path: Path) -> dict[str, Any]:
    manifest = None
    if path.is_file():
        tensors = TensorFolder(path.parent, [path.name])
    elif (path / NAME).is_file():
        manifest = Manifest.read(path)
        tensors = manifest.open(path)
    else:
        tensors = TensorFolder(path, weight_files(path))
    with tensors:
        modules = [] if manifest is None else _modules(manifest, tensors)
        within = {name for module in modules for name in module["tensors"]}
        rest = [_tensor(name, tensors) for name in tensors if name not in within]
        total = sum(tensors[name].nbytes for name in tensors)
        files = {name: file.path.stat().st_size for name, file in tensors.files.items()}
    weights = sum(math.prod(m["shape"]) for m in modules if m["shape"])
    spent = sum(m["weight_bytes"] for m in modules if m["shape"])
    return {
        "path": str(path),
        "kind": "safetensors" if manifest is None else "qkern",
        "modules": modules,
        "tensors": rest,
        "files": files,
        "tied": {} if manifest is None else {**manifest.shared, **manifest.tied_weights},
        "tied_tensors": {} if manifest is None else manifest.tied_tensors,
        "total_bytes": total,
        "quantized_weights": weights,
        "bits_per_weight": 8 * spent / weights if weights else None,
    }


def _modules(manifest: Manifest, tensors: TensorFolder) -> list[dict[str, Any]]:
    rows = []
    for name, facts in manifest.modules.items():
        prefix = f"{name}." if name else ""
        own = [tensor for tensor in tensors if tensor.startswith(prefix)]
        shape = facts.get("shape")
        row: dict[str, Any] = {
            "name": name,
            "class": facts["class"],
            "format": facts.get("format"),
            "shape": shape,
            "bytes": sum(tensors[tensor].nbytes for tensor in own),
            "weight_bytes": 0,
            "bits_per_weight": None,
            "tensors": own,
        }
        if shape and name not in manifest.tied_weights:
            parts = _check_parts(name, facts, tensors)
            row["weight_bytes"] = sum(tensors[part].nbytes for part in parts)
            row["bits_per_weight"] = 8 * row["weight_bytes"] / math.prod(shape)
        elif shape:
            row["shape"] = None  # counted where the weight is
        rows.append(row)
    return rows


def _check_parts(name: str, facts: dict[str, Any], tensors: TensorFolder) -> list[str]:
    """The tensors of the weight; shapes and dtypes must be those of its format."""
    shape, prefix = facts["shape"], f"{name}." if name else ""
    if not all(type(size) is int and size > 0 for size in shape) or len(shape) not in (2, 3):
        raise FormatError(f"The shape {shape} of the module {name!r} is that of no weight.")
    rules = parse_format(facts["format"]).parts(*shape[-2:])
    for word, rule in rules.items():
        entry = tensors.get(prefix + word)
        if entry is None:
            raise FormatError(f"The module {name!r} ({facts['format']}) lacks {word}.")
        whole = (*shape[:-2], *rule.shape)
        if entry.shape != whole or DTYPES[entry.dtype][0] not in rule.dtypes:
            raise FormatError(
                f"{prefix}{word} must be {' or '.join(rule.dtypes)} {list(whole)} for "
                f"{facts['format']} {shape}, but is {DTYPES[entry.dtype][0]} {list(entry.shape)}."
            )
    perm = [f"{prefix}perm"] if f"{prefix}perm" in tensors else []
    return [prefix + word for word in rules] + perm


def _tensor(name: str, tensors: TensorFolder) -> dict[str, Any]:
    entry = tensors[name]
    return {
        "name": name,
        "dtype": DTYPES[entry.dtype][0],
        "shape": list(entry.shape),
        "bytes": entry.nbytes,
        "file": tensors.file_of(name),
    }


def text(found: dict[str, Any]) -> str:
    rows = [
        (
            m["name"] or "(root)",
            m["class"],
            m["format"] or "-",
            shape_text(m["shape"]) if m["shape"] else "-",
            number(m["bits_per_weight"], 3),
            size_text(m["bytes"]),
        )
        for m in found["modules"]
    ]
    for t in found["tensors"]:
        bits = f"{8 * t['bytes'] / math.prod(t['shape']):.3f}" if math.prod(t["shape"]) else "-"
        rows.append(
            (t["name"], "tensor", t["dtype"], shape_text(t["shape"]), bits, size_text(t["bytes"]))
        )
    lines = [table(("name", "kind", "format", "shape", "bits", "size"), rows, (3, 4, 5))]
    for name, owner in {**found["tied"], **found["tied_tensors"]}.items():
        lines.append(f"{name} is the same as {owner}")
    bits = found["bits_per_weight"]
    kind = f"{len(found['modules'])} quantized modules" + (
        f" ({bits:.3f} bits per weight)" if bits else ""
    )
    count = len(found["files"])
    lines.append(
        f"{kind}, {len(found['tensors'])} other tensors, {size_text(found['total_bytes'])} "
        f"in {count} file{'s' if count != 1 else ''}; headers and sizes are in order"
    )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    found = collect(args.path)
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0
