# SPDX-License-Identifier: Apache-2.0
"""Quantizes a Hugging Face folder (config.json, *.safetensors) into another folder.

Tensors go from file to file: the memory needed is that of one layer. The output appears whole or
not at all; `qkern.load(None, OUT)` loads it, `qkern inspect OUT` lists it. Everything else in the
folder (tokenizer, templates) is copied.

Which tensors belong to linear layers is told by the transformers class that config.json names.
Without it, every float matrix named *.weight counts as one, unless a part of its name is that of an
embedding or a norm; the output says when that was so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qkern._quantize import METHODS
from qkern.cli._text import Progress, format_argument, size_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument(
        "--format", type=format_argument, required=True, help="such as int4-g64, int8-a8, codebook4"
    )
    parser.add_argument(
        "--map",
        nargs="+",
        default=[],
        type=_mapping,
        metavar="PATTERN=FORMAT",
        help="other formats for modules of these names; the first match counts; 'none': left alone",
    )
    parser.add_argument(
        "--skip",
        nargs="*",
        default=["lm_head"],
        metavar="PATTERN",
        help="names of modules that are left alone (default: lm_head)",
    )
    parser.add_argument("--method", default="rtn", choices=list(METHODS))
    parser.add_argument(
        "--strict", action="store_true", help="a layer that cannot be quantized is an error"
    )
    parser.add_argument(
        "--max-shard-size", type=size_argument, default="5GB", metavar="SIZE", help="default: 5GB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model in OUT")


def _mapping(text: str) -> tuple[str, Any]:
    pattern, equals, fmt = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"expected PATTERN=FORMAT, got {text!r}")
    return pattern, None if fmt == "none" else format_argument(fmt)


def run(args: argparse.Namespace) -> int:
    if args.output.exists() and not args.overwrite and any(args.output.iterdir()):
        raise FileExistsError(
            f"{args.output} is there and not empty; name another folder, or add --overwrite"
        )
    from qkern.store import quantize_folder

    progress = Progress("modules quantized:")
    try:
        result = quantize_folder(
            args.model,
            args.output,
            {**dict(args.map), "*": args.format},
            skip=args.skip,
            method=args.method,
            strict=args.strict,
            max_shard_bytes=args.max_shard_size,
            tell=progress,
        )
    finally:
        progress.close()
    if args.json:
        told = {"source": str(args.model), "output": str(args.output), **result.to_dict()}
        print(json.dumps(told, indent=2))
    else:
        print(result)
        print(f"Saved in {args.output}")
    return 0
