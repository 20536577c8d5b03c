# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA source for every architecture and reads the machine code.

Fails on: register spills, stack frames, static shared memory over 48 KB, a linear kernel without
its matrix instruction, 16-byte shared loads, asynchronous 16-byte copies or ldmatrix, and more
integer instructions per weight in a decode kernel's main loop than BUDGET allows.

    python csrc/cuda/tools/compile_check.py            all architectures
    python csrc/cuda/tools/compile_check.py --fast     sm_80 and sm_90a, one file per converter
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "cuda"
ARCHS = ["80", "86", "89", "90a", "100a", "120a"]
FAST_ARCHS = ["80", "90a"]
# One of each converter; float16 and bfloat16 differ in the integer ones only.
FAST_FILES = [
    "linear_w4a16_f16_sm80",
    "linear_w4a16_bf16_sm80",
    "linear_lut4a16_f16_sm80",
    "linear_w8a8d_sm80",
    "quantize",
    "linear",
]

# Integer instructions (logic, shifts, permutes, additions, comparisons) per weight in the whole
# main loop of the 8-token kernel: conversion, addresses, copies, scales. The converter's own share
# is the table at the head of convert.cuh.
BUDGET = {
    "Int4/F16": 1.7,
    "Int4/BF16": 2.0,
    "Int8/F16": 1.6,
    "Int8/BF16": 2.4,
    "Pairs4": 2.2,
    "Table/2": 2.6,
    "Table/3": 2.8,
    "Table/4": 3.9,
    "Bytes8": 1.6,
    "Bytes4": 1.7,
}
INTEGER = re.compile(
    r"^(U?LOP3|U?SHF|U?PRMT|U?IADD3?|LEA|ISETP|IMNMX|VIADD|VIMNMX|I2I|LOP|SHL|SHR|BFE|SGXT|IADD)\b"
)


def find_tool(name: str) -> str | None:
    """nvcc's tools, or the copies that come with the triton package."""
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    return None


def demangle(symbol: str) -> tuple[str, str, int] | None:
    """(converter, number type, shape) of a linear kernel's symbol."""
    m = re.search(
        r"linear_kernelINS0_\d+(Int4|Int8|Pairs4|Table|Bytes8|Bytes4)(.*?)Li(\d)EEEv", symbol
    )
    if not m:
        return None
    name, rest, shape = m.group(1), m.group(2), int(m.group(3))
    kind = "BF16" if "BF16" in rest else "F16" if "F16" in rest else "S8"
    if name == "Table":
        name += "/" + re.search(r"Li(\d)E", rest).group(1)
    elif name in ("Int4", "Int8"):
        name += "/" + kind
    return name, kind, shape


def functions(sass: str) -> dict[str, list[tuple[str, str]]]:
    """Symbol -> list of (kind, text) where kind is "label" or "code"."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in sass.splitlines():
        if m := re.match(r"\s*\.text\.(\S+):", line):
            current = found.setdefault(m.group(1), [])
        elif m := re.match(r"(\.L_\w+):", line):
            current.append(("label", m.group(1)))
        elif m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            current.append(("code", m.group(1).strip()))
    return found


def main_loop(lines: list[tuple[str, str]]) -> list[str]:
    """Instructions of the smallest loop that holds every matrix instruction."""
    where = {text: i for i, (kind, text) in enumerate(lines) if kind == "label"}
    matrix = [
        i for i, (kind, t) in enumerate(lines) if kind == "code" and re.search(r"\b[HI]MMA", t)
    ]
    best: tuple[int, int] | None = None
    for i, (kind, text) in enumerate(lines):
        m = re.search(r"BRA.*?(\.L_\w+)", text) if kind == "code" else None
        if not m or m.group(1) not in where or where[m.group(1)] > i:
            continue
        start = where[m.group(1)]
        if (
            matrix
            and start < matrix[0]
            and i > matrix[-1]
            and (best is None or i - start < best[1] - best[0])
        ):
            best = (start, i)
    if best is None:
        return []
    return [t for kind, t in lines[best[0] : best[1] + 1] if kind == "code"]


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split(" ")[0]


def inspect_linear(symbol: str, lines: list[tuple[str, str]], problems: list[str]) -> dict | None:
    named = demangle(symbol)
    if named is None:
        return None
    name, kind, shape = named
    code = [opcode(t) for k, t in lines if k == "code"]
    wanted = {
        "matrix instruction": r"^IMMA\.16832" if kind == "S8" else r"^HMMA\.16816\.F32",
        "16-byte shared load": r"^LDS.*\.128",
        "asynchronous 16-byte copy": r"^LDGSTS.*\.128",
        "ldmatrix": r"^LDSM",
    }
    label = f"{name} {kind} shape {shape}"
    for what, pattern in wanted.items():
        if not any(re.search(pattern, op) for op in code):
            problems.append(f"{label}: no {what}")
    if any(re.match(r"(LDL|STL)", op) for op in code):
        problems.append(f"{label}: local memory")
    loop = [opcode(t) for t in main_loop(lines)]
    fragments = (1, 2, 4, 4)[shape]
    products = sum(bool(re.match(r"[HI]MMA", op)) for op in loop)
    # Per step four products per fragment, and one with ones where the format can have zeros.
    per_step = fragments * (4 if name in ("Pairs4", "Table/4") else 5)
    weights = products / per_step * 4 * (16 if kind == "S8" else 8)
    if weights == 0:
        problems.append(f"{label}: no main loop found")
        return None
    integer = sum(bool(INTEGER.match(op)) for op in loop) / weights
    convert = sum(bool(re.match(r"(LOP3|SHF|PRMT)", op)) for op in loop) / weights
    if shape == 0 and integer > BUDGET[name]:
        problems.append(
            f"{label}: {integer:.2f} integer instructions per weight, budget {BUDGET[name]}"
        )
    return {
        "kernel": name,
        "type": kind,
        "shape": shape,
        "loop_instructions": len(loop),
        "integer_per_weight": round(integer, 3),
        "logic_per_weight": round(convert, 3),
        "issue_per_weight": round(len(loop) / weights, 3),
    }


def compile_one(nvcc: str, source: Path, arch: str, out: Path) -> tuple[str, Path]:
    cubin = out / f"{source.stem}.{arch}.cubin"
    command = [
        nvcc, "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-I", str(ROOT / "csrc" / "include"), str(source), "-o", str(cubin),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source.name} sm_{arch}: nvcc failed\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr, cubin


def check_resources(label: str, log: str, problems: list[str]) -> int:
    registers = 0
    for m in re.finditer(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log
    ):
        if any(int(v) for v in m.groups()):
            problems.append(f"{label}: {m.group(0)} loads")
    for m in re.finditer(r"Used (\d+) registers", log):
        registers = max(registers, int(m.group(1)))
    for m in re.finditer(r"(\d+) bytes smem", log):
        if int(m.group(1)) > 48 * 1024:
            problems.append(f"{label}: {m.group(1)} bytes of static shared memory")
    return registers


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="two architectures, one file per kind")
    parser.add_argument("--archs", help="comma separated, instead of " + ",".join(ARCHS))
    parser.add_argument("--files", help="comma separated stems, instead of all")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    nvcc, nvdisasm = find_tool("nvcc"), find_tool("nvdisasm")
    if nvcc is None or nvdisasm is None:
        missing = "nvcc" if nvcc is None else "nvdisasm (CUDA toolkit or the triton package)"
        print(f"skipped: {missing} was not found, so the CUDA sources were not compiled")
        return 0
    archs = args.archs.split(",") if args.archs else FAST_ARCHS if args.fast else ARCHS
    files = args.files.split(",") if args.files else FAST_FILES if args.fast else None
    sources = [s for s in sorted(SOURCES.glob("*.cu")) if files is None or s.stem in files]
    problems: list[str] = []
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            for source in sources:
                log, cubin = compile_one(nvcc, source, arch, Path(folder))
                label = f"{source.stem} sm_{arch}"
                registers = check_resources(label, log, problems)
                print(f"{label}: {registers} registers at most", flush=True)
                if not source.stem.startswith("linear_"):
                    continue
                sass = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
                if sass.returncode != 0:
                    print(f"{label}: machine code not read: {sass.stderr.strip()[:200]}")
                    continue
                found = 0
                for symbol, lines in functions(sass.stdout).items():
                    row = inspect_linear(symbol, lines, problems)
                    if row:
                        rows.append({"arch": arch, **row})
                        found += 1
                if found != 4:
                    problems.append(f"{label}: {found} of 4 kernels found in the machine code")
                cubin.unlink()
    for row in rows:
        if row["shape"] == 0:
            print(
                f"sm_{row['arch']:5} {row['kernel']:10} {row['type']:5} integer per weight "
                f"{row['integer_per_weight']:.2f} (logic {row['logic_per_weight']:.2f}), all "
                f"{row['issue_per_weight']:.2f}"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for problem in problems:
        print("FAILED:", problem)
    print(f"{len(sources)} files x {len(archs)} architectures, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
