# SPDX-License-Identifier: Apache-2.0
"""What this build and machine can do, and which layers are active."""

from __future__ import annotations

import argparse
import json

import qkern


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernels", action="store_true", help="list every kernel of the registry")


def run(args: argparse.Namespace) -> int:
    info = qkern.info()
    if args.kernels:
        info["kernels"] = qkern.kernels()
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    for key, value in info.items():
        if key == "kernels":
            for row in value:
                mark = "+" if row["usable"] else "-"
                what = f"{row['weights']:40} {row['activations']}"
                print(f"  {mark} {row['name']:34} {row['op']:21} {what}")
        elif isinstance(value, dict):
            print(f"{key}:")
            for name, text in value.items():
                print(f"  {name}: {text}")
        else:
            print(f"{key}: {value}")
    return 0
