# SPDX-License-Identifier: Apache-2.0
"""Rules that the sources and the built objects keep: names, lists, sizes, symbols, instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qkern import _core

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "csrc" / "cpu"
LEVELS = ("avx2", "avx512", "avx512vnni", "avx512amx", "neon", "neondot", "neoni8mm")
NAME = re.compile(
    r"(linear|dequantize|quantize|convert|unpack|int8_matmul)(_any|_w[2-8]|_lut[2-8])?(_?(a8d|a8|a32|a16))?(_row|_tile)?"
    r"_(scalar|avx2|avx512|avx512vnni|avx512amx|neon|neondot|neoni8mm)"
)
# Instructions of extensions that no level includes; then what each level forbids.
NEVER = (
    r"vpermb|vperm[it]2b|vpmultishiftqb|vp(compress|expand)[bw]|vpsh[lr]d|vpopcnt|vpshufbitqmb|"
    r"vdpbf16ps|vcvtne2?ps2bf16|v?gf2p8|vpmadd52|vp2intersect|tdp(bf16|fp16)ps|vpdpb[us]{2}ds?$"
)
TILES = r"(ld|st)tilecfg|tile(zero|loaddt?1?|stored|release)|tdpb[us]{2}d"
FORBIDDEN = {
    "scalar": re.compile(r"\b[yz]mm|\sv[a-df-z]\w+\s"),
    "avx2": re.compile(rf"\bzmm|%k[0-7]|[xy]mm(1[6-9]|2\d|3[01])|\svpdp|\s({NEVER}|{TILES})"),
    "avx512": re.compile(rf"\svpdp(bu|ws)sds?\s|\s({NEVER}|{TILES})\s"),
    "avx512vnni": re.compile(rf"\s({NEVER}|{TILES})\s"),
    "avx512amx": re.compile(rf"\s({NEVER})\s"),
}


def kernel_files() -> list[Path]:
    op = re.compile(r"^(linear|dequantize|quantize|convert|unpack|int8_matmul)_")
    return [f for f in CPU.glob("*.cpp") if op.match(f.stem)]


def level_of(stem: str) -> str:
    return next((level for level in LEVELS if stem.endswith("_" + level)), "scalar")


def objects() -> list[Path]:
    """The object files of the newest build of the core."""
    found = sorted(
        (ROOT / "build").glob("*/CMakeFiles/qkern.dir/cpu/linear_any_a8d_scalar.cpp.o"),
        key=lambda p: p.stat().st_mtime,
    )
    if not found:
        pytest.skip("no build folder beside the sources: nothing to inspect")
    return sorted(found[-1].parent.glob("*.o"))


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_names_follow_the_grammar() -> None:
    for row in _core.kernels():
        assert NAME.fullmatch(row["name"]), row["name"]


def test_every_kernel_file_is_in_the_list_and_back() -> None:
    listed = set(re.findall(r"QKERN_\w+\((\w+)", (CPU / "kernels.inc").read_text()))
    files = {f.stem for f in kernel_files()}
    assert listed == files


def test_files_can_be_read_in_one_sitting() -> None:
    tracked = tool("git", "-C", str(ROOT), "ls-files").split()
    code = [ROOT / f for f in tracked if f.endswith((".py", ".cpp", ".h", ".cu", ".cuh"))]
    long = {f.name: n for f in code if f.exists() and (n := len(f.read_text().splitlines())) > 600}
    assert not long


def test_no_torch_and_no_python_outside_the_bindings() -> None:
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix not in {".h", ".cpp", ".cu", ".cuh"} or "bindings" in file.parts:
            continue
        found = re.findall(
            r'#include\s*[<"](torch|ATen|c10|Python|pybind11)[/.>"]', file.read_text()
        )
        assert not found, f"{file.name} includes {found}"


def test_vector_objects_leak_no_symbol() -> None:
    """A weak symbol compiled with AVX-512 could be linked in place of a portable one."""
    for obj in objects():
        if level_of(obj.name.removesuffix(".cpp.o")) == "scalar":
            continue
        symbols = [line.split()[-2:] for line in tool("nm", "-C", str(obj)).splitlines() if line]
        kinds = [re.match(r"(?:[0-9a-f]+)?\s*([A-Za-z])\s", line.strip() + " ") for line in
                 tool("nm", str(obj)).splitlines()]  # fmt: skip
        letters = [k[1] for k in kinds if k]
        assert letters.count("T") == 1, (obj.name, symbols)
        assert not {"W", "V", "w", "v", "u"} & set(letters), (obj.name, symbols)


def test_no_instruction_above_the_level() -> None:
    checked = 0
    for obj in objects():
        level = level_of(obj.name.removesuffix(".cpp.o"))
        forbidden = FORBIDDEN.get(level)
        if forbidden is None:
            continue
        text = tool("objdump", "-d", "--no-show-raw-insn", str(obj))
        bad = [line for line in text.splitlines() if ":\t" in line and forbidden.search(line)]
        # AVX-512 VNNI shares a name with AVX-VNNI; only its EVEX forms are in the level.
        assert not bad, f"{obj.name}: {bad[:3]}"
        checked += 1
    assert checked >= 10


def test_the_core_exports_only_its_interface() -> None:
    library = next((Path(_core.__file__).parent / "lib").glob("libqkern.so*"))
    exported = [
        line.split()[-1] for line in tool("nm", "-D", "--defined-only", str(library)).splitlines()
    ]
    stray = [s for s in exported if not s.startswith("qk_")]
    assert not stray
    needed = tool("objdump", "-p", str(library))
    assert not re.search(r"NEEDED\s+lib(gomp|iomp|omp|torch|python)", needed)


def test_triton_kernels_is_no_top_level_name() -> None:
    """Other programs probe for a package of that name, which is not ours."""
    code = (
        "import importlib.util as u; s = u.find_spec('triton_kernels');"
        "assert s is None or 'qkern' not in str(s.origin), s.origin;"
        "assert u.find_spec('qkern.triton_kernels') is not None"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd="/")
