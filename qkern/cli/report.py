# SPDX-License-Identifier: Apache-2.0
"""Size of every layer of a quantized folder and, given the original, its error.

QUANTIZED was written by `qkern quantize` or `qkern.save`; ORIGINAL is the Hugging Face folder that
it was made from. The error is the Frobenius norm of the weight's change over that of the weight,
and the same as a signal-to-noise ratio in dB (6 dB are one bit).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from qkern.cli._text import Progress, number, shape_text, table
from qkern.errors import UnsupportedError
from qkern.report import size_text
from qkern.store._files import weight_files
from qkern.store._manifest import Manifest
from qkern.store._safetensors import TensorFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("quantized", type=Path, metavar="QUANTIZED")
    parser.add_argument("original", type=Path, nargs="?", metavar="ORIGINAL")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs matplotlib)")


def collect(quantized: Path, original: Path | None, tell: Any) -> dict[str, Any]:
    from qkern.nn import QuantizedModule
    from qkern.store._load import modules_of

    manifest = Manifest.read(quantized)
    floats = TensorFolder(original, weight_files(original)) if original else None
    rows: list[dict[str, Any]] = []
    try:
        with manifest.open(quantized) as tensors:
            for name, module in modules_of(manifest, tensors):
                tell(len(rows), len(manifest.modules), name)
                for inner, part in module.named_modules(prefix=name):
                    if isinstance(part, QuantizedModule):
                        rows.append(_row(inner, type(module).__name__, part.weight, floats))
            total = sum(tensors[name].nbytes for name in tensors)
    finally:
        if floats is not None:
            floats.close()
    known = [row for row in rows if row["norm"] is not None]
    change = math.sqrt(sum((row["error"] * row["norm"]) ** 2 for row in known))
    norm = math.sqrt(sum(row["norm"] ** 2 for row in known))
    error = change / norm if norm else None
    weights = sum(math.prod(row["shape"]) for row in rows)
    return {
        "quantized": str(quantized),
        "original": None if original is None else str(original),
        "modules": rows,
        "total_bytes": total,
        "bits_per_weight": 8 * sum(row["bytes"] for row in rows) / weights if weights else None,
        "error": error,
        "snr_db": _decibel(error),
    }


def _row(name: str, kind: str, weight: Any, floats: TensorFolder | None) -> dict[str, Any]:
    row = {
        "name": name,
        "class": kind,
        "format": str(weight.format),
        "shape": list(weight.shape),
        "bytes": weight.nbytes,
        "bits_per_weight": 8 * weight.nbytes / math.prod(weight.shape),
        "error": None,
        "snr_db": None,
        "norm": None,
        "note": None,
    }
    if floats is None:
        return row
    import torch

    source = _original_of(name, floats)
    if source is None:
        return {**row, "note": f"the original has no tensor {name}.weight"}
    old = floats.read(source).float()
    new = weight.dequantize().float()
    if old.numel() != new.numel():
        return {**row, "note": f"{source} has the shape {list(old.shape)}"}
    # A transposed matrix is that of a Hugging Face Conv1D; filters are the rows of a matrix.
    old = old.T if old.shape == new.shape[::-1] != new.shape else old.reshape(new.shape)
    norm = float(torch.linalg.vector_norm(old))
    error = float(torch.linalg.vector_norm(new - old)) / norm if norm else 0.0
    return {**row, "error": error, "snr_db": _decibel(error), "norm": norm}


def _original_of(name: str, floats: TensorFolder) -> str | None:
    """A class with a head has its body under a prefix that files of the body alone lack."""
    wanted = f"{name}.weight"
    for exact in (wanted, name):  # the second: experts, whose weights are parameters of theirs
        if exact in floats:
            return exact
    inner = [f for f in floats if wanted.endswith(f".{f}") or f.endswith(f".{wanted}")]
    return inner[0] if len(inner) == 1 else None


def _decibel(error: float | None) -> float | None:
    return -20 * math.log10(error) if error else None


def text(found: dict[str, Any]) -> str:
    rows = [
        (
            row["name"] or "(root)",
            row["class"],
            row["format"],
            shape_text(row["shape"]),
            size_text(row["bytes"]),
            number(row["bits_per_weight"], 3),
            number(row["error"], 5),
            number(row["snr_db"], 1),
            row["note"] or "",
        )
        for row in found["modules"]
    ]
    head = ("module", "kind", "format", "shape", "size", "bits", "error", "dB", "")
    whole = f"{len(rows)} quantized modules, {size_text(found['total_bytes'])} in all"
    if found["bits_per_weight"]:
        whole += f", {found['bits_per_weight']:.3f} bits per weight"
    if found["error"] is not None:
        whole += f", error {found['error']:.5f} ({number(found['snr_db'], 1)} dB)"
    return f"{table(head, rows, (3, 4, 5, 6, 7))}\n{whole}"


def draw(found: dict[str, Any], target: Path) -> None:
    """One bar per module: its error where it is known, else its bits per weight."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"--plot needs matplotlib, which cannot be imported ({error}): pip install matplotlib"
        ) from None
    rows = found["modules"]
    if not rows:
        raise UnsupportedError("there is no quantized module to draw")
    key, label = ("bits_per_weight", "bits per weight")
    if any(row["error"] is not None for row in rows):
        key, label = ("error", "relative error of the weight")
    figure = Figure(figsize=(8, 1 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, fmt in enumerate(sorted({row["format"] for row in rows})):
        places = [p for p, row in enumerate(rows) if row["format"] == fmt and row[key] is not None]
        axes.barh(places, [rows[p][key] for p in places], color=f"C{i % 10}", label=fmt)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend()
    figure.savefig(target, dpi=150)


def run(args: argparse.Namespace) -> int:
    progress = Progress("modules compared:")
    try:
        found = collect(args.quantized, args.original, progress)
    finally:
        progress.close()
    if args.plot:
        draw(found, args.plot)
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0
