# SPDX-License-Identifier: Apache-2.0
"""The machine code of kernels: what a level is for is what its kernels use. (What they must not
use and must not leak is in test_repo_rules.py.)"""

from __future__ import annotations

import re

import pytest
from test_repo_rules import level_of, objects, tool

# Level and activations of a kernel's name to what its code must contain.
EXPECTED = {
    ("avx2", "a8d"): r"vpmaddubsw.*ymm|vpmaddwd.*ymm",
    ("avx2", "a32"): r"vfmadd\w+ps.*ymm",
    ("avx512", "a8d"): r"vpmaddubsw.*zmm|vpmaddwd.*zmm",
    ("avx512", "a32"): r"vfmadd\w+ps.*zmm",
    ("avx512vnni", "a8d"): r"vpdpbusd.*zmm",
    ("avx512amx", "a8d"): r"tdpb[su]{2}d.*tmm",
    ("neon", "a8d"): r"smull|smlal|sadalp",
    ("neon", "a32"): r"fmla",
    ("neondot", "a8d"): r"[su]dot|usdot",
    ("neoni8mm", "a8d"): r"smmla|usmmla|usdot",
}


def kernels() -> dict[str, str]:
    """name: disassembly, of the linear kernels of the newest build."""
    found = {}
    for obj in objects():
        name = obj.name.removesuffix(".cpp.o")
        if name.startswith("linear_"):
            found[name] = tool("objdump", "-d", "--no-show-raw-insn", str(obj))
    return found


def test_kernels_use_the_instructions_of_their_level() -> None:
    checked = 0
    for name, code in kernels().items():
        act = re.search(r"(a8d|a32)", name)
        expected = EXPECTED.get((level_of(name), act[1])) if act else None
        if expected is None:
            continue
        assert re.search(expected, code), f"{name} has no {expected}"
        checked += 1
    if not checked:
        pytest.skip("this build has scalar kernels only")
    assert checked >= 3


def test_scalar_kernels_call_no_vector_code() -> None:
    """A portable object that called into one of a level would run there on any machine."""
    for obj in objects():
        name = obj.name.removesuffix(".cpp.o")
        if level_of(name) != "scalar" or name == "dispatch":
            continue
        wanted = [line.split()[-1] for line in tool("nm", "-u", str(obj)).splitlines()]
        bad = [s for s in wanted if re.search(r"_(avx2|avx512|avx512vnni|avx512amx|neon\w*)E", s)]
        assert not bad, (name, bad)
