# SPDX-License-Identifier: Apache-2.0
"""Whether the parts of a tensor keep the rules of its format, each breach with its sentence."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from qkern import _arrays
from qkern._arrays import Array
from qkern.errors import FormatError
from qkern.formats._base import Format, Part

# Names that numpy (ml_dtypes) and torch give to the encodings that are stored as bytes.
_BYTE_FLOATS = {"float8_e8m0fnu": "e8m0", "float8_e4m3fn": "e4m3"}
_COLUMN_LIMIT = 2**31  # perm is int32


def checked_shape(shape: Any) -> tuple[int, int]:
    """(N, K) as plain integers."""
    try:
        n, k = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        raise FormatError(f"shape must be two integers (N, K), but {shape!r} came.") from None
    if n < 1 or k < 1:
        raise FormatError(f"A weight needs at least one row and one column, but has {n} x {k}.")
    if k >= _COLUMN_LIMIT:
        raise FormatError(f"A weight may have at most 2**31 - 1 columns, but has {k}.")
    return n, k


def check_parts(
    fmt: Format, shape: tuple[int, int], given: dict[str, Array], numbers: bool
) -> tuple[str, dict[str, Array]]:
    """The library that holds the parts and the parts as dense arrays.

    Names, libraries, devices, shapes and dtypes are checked always, the values with `numbers`.
    """
    n, k = shape
    required = fmt.parts(n, k)
    _check_names(fmt, given, required)
    kind, device = _home(given)
    rules = required | {"perm": Part((k,), ("int32",))}
    parts = {}
    for name, part in given.items():
        encoding = _BYTE_FLOATS.get(_arrays.name_of(part))
        wanted = {"scales": fmt.scale_encoding, "codebook": fmt.table_encoding}.get(name)
        if encoding is not None and encoding == wanted:
            part = part.view(np.uint8 if kind == "numpy" else _torch_uint8())
        _check_layout(f"{fmt} with a weight of {n} x {k}", name, part, rules[name])
        parts[name] = _arrays.contiguous(part)
    if numbers and getattr(device, "type", "cpu") != "meta":
        _check_numbers(fmt, parts, k)
    return kind, parts


def _torch_uint8() -> Any:
    import torch

    return torch.uint8


def _check_names(fmt: Format, given: dict[str, Array], required: dict[str, Part]) -> None:
    whole = ", ".join(required)
    for name in required:
        if name not in given:
            raise FormatError(f"{fmt} needs {name}, but none came; its parts are {whole}.")
    for name in given:
        if name not in required and name != "perm":
            hint = " Formats with zeros end in '-asym'." if name == "zeros" else ""
            raise FormatError(
                f"{fmt} has no part {name}; its parts are {whole} and, if wished, perm.{hint}"
            )


def _home(given: dict[str, Array]) -> tuple[str, Any]:
    """Library and device that all parts share."""
    homes = {
        name: (_arrays.kind_of(part, name), _arrays.device_of(part)) for name, part in given.items()
    }
    first, home = next(iter(homes.items()))
    for name, other in homes.items():
        if other[0] != home[0]:
            raise FormatError(
                f"All parts must be of one library, but {first} is of {home[0]} "
                f"and {name} of {other[0]}."
            )
        if other[1] != home[1]:
            raise FormatError(
                f"All parts must be on one device, but {first} is on {home[1]} "
                f"and {name} on {other[1]}."
            )
    return home


def _check_layout(owner: str, name: str, part: Array, rule: Part) -> None:
    if tuple(part.shape) != rule.shape:
        raise FormatError(
            f"{name} must have shape {rule.shape} for {owner}, but has {tuple(part.shape)}."
        )
    if _arrays.name_of(part) not in rule.dtypes:
        raise FormatError(
            f"{name} must be {' or '.join(rule.dtypes)} for {owner}, "
            f"but is {_arrays.name_of(part)}."
        )


def _check_numbers(fmt: Format, parts: dict[str, Array], k: int) -> None:
    for name in ("scales", "zeros", "codebook", "global_scale"):
        if name in parts:
            stored = _arrays.to_numpy(parts[name])
            decode = {"scales": fmt.decode_scales, "codebook": fmt.decode_codebook}.get(name)
            values = stored if decode is None else decode(stored)
            _refuse(name, values, ~np.isfinite(values), "must be finite")
    if "codebook" in parts and fmt.activations != "float":
        table = _arrays.to_numpy(parts["codebook"])
        bad, rule = fmt.refused_entries(table)
        _refuse("codebook", fmt.decode_codebook(table), bad, rule)
    if "perm" in parts:
        check_perm(parts["perm"], k)


def check_perm(part: Array, k: int) -> None:
    """FormatError unless perm [K], or each of a stack [E, K], holds every column once: kernels
    index memory with it."""
    perm = _arrays.to_numpy(part)
    _refuse("perm", perm, (perm < 0) | (perm >= k), f"must hold columns 0..{k - 1}")
    for row in perm.reshape(-1, k):
        counts = np.bincount(row, minlength=k)
        if counts.max() > 1:
            raise FormatError(
                f"perm must hold every column once, but holds {int(counts.argmax())} repeatedly."
            )


def _refuse(name: str, values: np.ndarray, bad: np.ndarray, rule: str) -> None:
    """FormatError with the place of the first bad value."""
    if bad.any():
        place = np.unravel_index(int(bad.argmax()), bad.shape)
        where = ", ".join(str(int(i)) for i in place)
        raise FormatError(f"{name} {rule}, but {name}[{where}] is {values[place]}.")
