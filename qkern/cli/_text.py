# SPDX-License-Identifier: Apache-2.0
"""What commands share: tables, sizes, a progress line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from qkern.errors import FormatError
from qkern.formats import Format, parse_format

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Aligned columns under a line; those of `right` end at the same place."""
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        aligned = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


class Progress:
    """One line on standard error that is written over, where that is a terminal."""

    def __init__(self, unit: str) -> None:
        self._unit, self._width = unit, 0
        self._seen = sys.stderr.isatty()

    def __call__(self, done: int, total: int, name: str) -> None:
        if self._seen:
            text = f"{done}/{total} {self._unit} {name}"[:100] if done < total else ""
            print("\r" + text.ljust(self._width), end="\r", file=sys.stderr, flush=True)
            self._width = len(text)

    def close(self) -> None:
        self(0, 0, "")


def format_argument(text: str) -> Format:
    """For argparse: a format, or wrong usage."""
    try:
        return parse_format(text)
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size_argument(text: str) -> int:
    """For argparse: bytes, as 5000000, 500MB or 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GB, got {text!r}")
    return count


def shape_argument(text: str) -> tuple[int, int]:
    """For argparse: NxK."""
    match = re.fullmatch(r"(\d{1,7})x(\d{1,7})", text)
    if match is None or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"expected NxK such as 4096x4096, got {text!r}")
    return int(match[1]), int(match[2])


def count_argument(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def shape_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def number(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
