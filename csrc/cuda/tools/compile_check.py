# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA source for every architecture and reads the machine code.

Fails on: register spills, stack frames, static shared memory over 48 KB, a kernel of linear or its
gradient without its matrix instruction, 16-byte shared loads, asynchronous 16-byte copies or
ldmatrix, and more integer instructions per weight in a decode kernel's main loop than its budget.

    python csrc/cuda/tools/compile_check.py            all architectures
    python csrc/cuda/tools/compile_check.py --fast     sm_80 and sm_90a, one file per converter
    python csrc/cuda/tools/compile_check.py --table    and the figures into csrc/cuda/SASS.md
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "cuda"
TABLE = SOURCES / "SASS.md"
ARCHS = ["80", "86", "89", "90a", "100a", "120a"]
FAST_ARCHS = ["80", "90a"]
# One of each family of converters.
FAST_FILES = [
    "linear_w4a16_f16_sm80",
    "linear_w4a16_bf16_sm80",
    "linear_lut4a16_f16_sm80",
    "linear_lut3a16_group_f16_sm80",
    "linear_lut4a8d_sm80",
    "linear_w4a8d_sm80",
    "quantize",
    "linear",
]

GRADIENTS = 20  # orders of codes x types of dy

# Integer instructions per weight in the main loop of the 8-token kernel: what the converter takes
# (counted in its source, csrc/cuda/convert.cuh) and what the chassis may take besides: addresses,
# copies, scales, bookkeeping of groups. Instructions of both types of scales and of zeros are
# counted, of which one call runs some. Products are not: they run on the lanes of float32.
CONVERTER = {
    "Int4/F16": 0.5,
    "Int4/BF16": 0.5,
    "Int8/F16": 0.5,
    "Int8/BF16": 1.0,
    "Pairs4": 0.5,
    "Table2": 0.75,
    "Table3": 1.25,
    "Table4": 2.25,
    "Bytes8": 0.25,
    "Bytes4": 0.38,
    "ByteTable2": 0.38,
    "ByteTable3": 0.5,
    "ByteTable4": 1.0,
}
CHASSIS = 1.3
# Of sm_120, whose lanes for integers and floats are the same: ptxas adds the address of the table
# to that of an entry as an integer, which it does with a multiply-add elsewhere.
ADDITIONS = {("Pairs4", "120a"): 0.5}
# Instructions per byte of weights at which the integer lanes take as long as the memory: 64 lanes a
# multiprocessor (128 on 120a), at 90 % of the memory's speed.
#   80: A100, 108 x 64 x 1.41 GHz / 1.84 TB/s   90a: H200, 132 x 64 x 1.75 / 4.3
#   89: RTX 4090, 128 x 64 x 2.5 / 0.9          100a: B200, 148 x 64 x 1.85 / 7.2
#   86: A10, 72 x 64 x 1.7 / 0.54               120a: RTX 5090, 170 x 128 x 2.4 / 1.6
LIMIT_PER_BYTE = {"80": 5.3, "86": 14.5, "89": 22.8, "90a": 3.4, "100a": 2.4, "120a": 32.6}
# Bits per weight with scales and tables of the commonest format: g128, or 64 for tables.
BITS = {
    "Int4/F16": 4.125,
    "Int4/BF16": 4.125,
    "Int8/F16": 8,
    "Int8/BF16": 8,
    "Pairs4": 4.25,
    "Table2": 2,
    "Table3": 3,
    "Table4": 4,
    "Table2/group": 3.5,
    "Table3/group": 3.25,  # LUT-B
    "Table4/group": 8.5,
    "Bytes8": 8,
    "Bytes4": 4.125,
    "ByteTable2": 2,
    "ByteTable3": 3,
    "ByteTable4": 4,
    "ByteTable2/group": 3,
    "ByteTable3/group": 3.375,  # LUT-B
    "ByteTable4/group": 6.5,
}
# Uniform instructions run beside the integer lanes and are not counted.
INTEGER = re.compile(
    r"^(LOP3|SHF|PRMT|IADD3?|LEA|ISETP|IMNMX|VIADD|VIMNMX|I2I|LOP|SHL|SHR|BFE|SGXT)\b"
)


def permitted(row: dict) -> float:
    """Share of the memory's speed that the integer lanes permit."""
    limit = LIMIT_PER_BYTE[row["arch"]] * BITS[row["kernel"]] / 8
    return limit / row["integer_per_weight"]


def converter_of(name: str) -> str:
    return name.removesuffix("/group")


def budget(name: str, arch: str | None = None) -> float:
    return CONVERTER[converter_of(name)] + CHASSIS + ADDITIONS.get((name, arch), 0.0)


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
        r"linear_kernelINS0_\d+(Int4|Int8|Pairs4|Table|ByteTable|Bytes8|Bytes4)(.*?)Li(\d)EEEv",
        symbol,
    )
    if not m:
        return None
    name, rest, shape = m.group(1), m.group(2), int(m.group(3))
    kind = "BF16" if "BF16" in rest else "F16" if "F16" in rest else "S8"
    if name in ("Table", "ByteTable"):
        name += re.search(r"Li(\d)E", rest).group(1)
        if "TablesE3" in rest:
            name += "/group"
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
    """Instructions of the smallest loop that holds every matrix instruction and the copies of the
    next stage, without loops inside it that hold some of the matrix instructions alone: those are
    the steps of blocks that a scale group cuts, where others are unrolled."""
    where = {text: i for i, (kind, text) in enumerate(lines) if kind == "label"}
    loops = []
    for i, (kind, text) in enumerate(lines):
        m = re.search(r"BRA.*?(\.L_\w+)", text) if kind == "code" else None
        if m and where.get(m.group(1), i) < i:
            loops.append(range(where[m.group(1)], i + 1))
    places = {
        pattern: {
            i for i, (kind, t) in enumerate(lines) if kind == "code" and re.search(pattern, t)
        }
        for pattern in (r"\b[HI]MMA", r"\bLDGSTS")
    }
    matrix, copies = places.values()
    whole = [loop for loop in loops if matrix <= set(loop) and copies & set(loop)]
    if not matrix or not whole:
        return []
    stage = min(whole, key=len)
    cut: set[int] = set()
    for loop in loops:
        if loop[0] > stage[0] and matrix & set(loop) and not matrix <= set(loop):
            cut |= set(loop)
    return [lines[i][1] for i in stage if lines[i][0] == "code" and i not in cut]


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split(" ")[0]


# What the kernels with matrix instructions have besides them. Bulk copies (UBLKCP, UTMALDG) and
# wgmma (HGMMA) belong to a Hopper family, which waits for a card: csrc/cuda/linear.cuh.
PATTERNS = {
    "16-byte shared load": r"^LDS.*\.128",
    "asynchronous 16-byte copy": r"^LDGSTS.*\.128",
    "ldmatrix": r"^LDSM",
}


def check_instructions(
    label: str, lines: list[tuple[str, str]], wanted: dict[str, str], problems: list[str]
) -> None:
    code = [opcode(t) for k, t in lines if k == "code"]
    for what, pattern in wanted.items():
        if not any(re.search(pattern, op) for op in code):
            problems.append(f"{label}: no {what}")
    if any(re.match(r"(LDL|STL)", op) for op in code):
        problems.append(f"{label}: local memory")


def inspect_gradient(symbol: str, lines: list[tuple[str, str]], problems: list[str]) -> bool:
    if "gradient_kernel" not in symbol:
        return False
    wanted = {
        "matrix instruction": r"^HMMA\.16816\.F32",
        "ldmatrix.trans": r"^LDSM.*\.MT",
        **PATTERNS,
    }
    del wanted["16-byte shared load"]  # a warp turns half of a vector's words into floats
    check_instructions(symbol, lines, wanted, problems)
    return True


def inspect_linear(
    symbol: str, lines: list[tuple[str, str]], problems: list[str], arch: str | None = None
) -> dict | None:
    named = demangle(symbol)
    if named is None:
        return None
    name, kind, shape = named
    label = f"{name} {kind} shape {shape}"
    matrix = r"^IMMA\.16832" if kind == "S8" else r"^HMMA\.16816\.F32"
    check_instructions(label, lines, {"matrix instruction": matrix, **PATTERNS}, problems)
    loop = [opcode(t) for t in main_loop(lines)]
    fragments = (1, 2, 4, 4)[shape]
    products = sum(bool(re.match(r"[HI]MMA", op)) for op in loop)
    # Per step four products per fragment, and one with ones where the format can have zeros.
    without_zeros = name in ("Pairs4", "Table4", "ByteTable4") or name.endswith("/group")
    per_step = fragments * (4 if without_zeros else 5)
    weights = products / per_step * 4 * (16 if kind == "S8" else 8)
    if weights == 0:
        problems.append(f"{label}: no main loop found")
        return None
    integer = sum(bool(INTEGER.match(op)) for op in loop) / weights
    convert = sum(bool(re.match(r"(LOP3|SHF|PRMT)", op)) for op in loop) / weights
    most = budget(name, arch)
    if shape == 0 and integer > most:
        problems.append(
            f"{label}: {integer:.2f} integer instructions per weight, budget {most:.2f}"
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


@dataclass
class Checked:
    """One file compiled for one architecture."""

    source: str
    arch: str
    problems: list[str] = field(default_factory=list)
    registers: int = 0  # of the kernel with the most
    rows: list[dict] = field(default_factory=list)  # figures of its linear kernels


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


def check_resources(log: str, problems: list[str]) -> dict[str, int]:
    """Registers of every kernel, by its symbol."""
    for m in re.finditer(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log
    ):
        if any(int(v) for v in m.groups()):
            problems.append(f"{m.group(0)} loads")
    for m in re.finditer(r"(\d+) bytes smem", log):
        if int(m.group(1)) > 48 * 1024:
            problems.append(f"{m.group(1)} bytes of static shared memory")
    kernels = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL)
    return {symbol: int(registers) for symbol, registers in kernels}


def check_source(tools: tuple[str, str], source: Path, arch: str, folder: Path) -> Checked:
    """Compiles one file, says what is wrong with it and keeps the figures of its kernels."""
    nvcc, nvdisasm = tools
    found = Checked(source.stem, arch)
    log, cubin = compile_one(nvcc, source, arch, folder)
    registers = check_resources(log, found.problems)
    found.registers = max(registers.values(), default=0)
    linear = source.stem.startswith("linear_")
    if not linear and source.stem != "gradient":
        return found
    sass = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
    cubin.unlink()
    if sass.returncode != 0:
        found.problems.append(f"machine code not read: {sass.stderr.strip()[:200]}")
        return found
    kernels = 0
    for symbol, lines in functions(sass.stdout).items():
        row = inspect_linear(symbol, lines, found.problems, arch)
        if row:
            found.rows.append(
                {"arch": arch, "source": source.stem, **row, "registers": registers[symbol]}
            )
        kernels += row is not None or inspect_gradient(symbol, lines, found.problems)
    if kernels != (wanted := 4 if linear else GRADIENTS):
        found.problems.append(f"{kernels} of {wanted} kernels in the machine code")
    return found


# ---- what is written down ----


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def table(checked: list[Checked], compiler: str) -> str:
    """SASS.md: the figures of a run, one line per source and one column per architecture."""
    archs = list(dict.fromkeys(c.arch for c in checked))
    rows = {(r["source"], r["arch"], r["shape"]): r for c in checked for r in c.rows}
    linear = list(dict.fromkeys(source for source, _, _ in rows))
    columns = [f"sm_{arch}" for arch in archs]

    def short(source: str) -> str:
        return source.removeprefix("linear_").removesuffix("_sm80")

    def speed(source: str, arch: str) -> str:
        row = rows[source, arch, 0]
        own = (row["kernel"], arch) in ADDITIONS
        limit = f" of {budget(row['kernel'], arch):.2f}" if own else ""
        return f"{row['integer_per_weight']:.2f}{limit}, {min(1.0, permitted(row)):.0%}"

    lines = [
        "# Machine code of the CUDA kernels",
        "",
        f"Written by `make cuda-compile ARGS=--table` with {compiler}. No spills, no stack frames, "
        "no local memory, and",
        "every expected instruction is there, or the run fails.",
        "",
        "## Integer instructions per weight",
        "",
        "In the main loop of the kernel for at most 8 tokens, and what they permit of 90 % of the "
        "memory's speed on one card",
        "of each architecture (`LIMIT_PER_BYTE` in `tools/compile_check.py`). Counted in the code, "
        "with its branches for",
        "scales, zeros and groups, of which a call takes some: an upper bound.",
        "",
    ]
    lines += markdown(
        ["linear_", "converter", "budget", *columns],
        [
            [
                short(source), f"{CONVERTER[converter_of(name)]:.2f}", f"{budget(name):.2f}",
                *(speed(source, arch) for arch in archs),
            ]
            for source in linear
            for name in [rows[source, archs[0], 0]["kernel"]]
        ],
    )  # fmt: skip
    lines += ["", "## Registers", "", "For 8, 16, 32 and 64 tokens per block of threads.", ""]
    lines += markdown(
        ["linear_", *columns],
        [
            [
                short(source),
                *(" ".join(str(rows[source, a, s]["registers"]) for s in range(4)) for a in archs),
            ]
            for source in linear
        ],
    )
    lines += ["", "The most of any kernel in each other file:", ""]
    most = {(c.source, c.arch): c.registers for c in checked if c.registers}
    others = [s for s in dict.fromkeys(source for source, _ in most) if s not in linear]
    lines += markdown(
        ["file", *columns], [[s, *(str(most[s, arch]) for arch in archs)] for s in others]
    )
    return "\n".join(lines) + "\n"


def compiler_name(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    return f"nvcc {found.group(1)}" if found else "nvcc"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="two architectures, one file per kind")
    parser.add_argument("--archs", help="comma separated, instead of " + ",".join(ARCHS))
    parser.add_argument("--files", help="comma separated stems, instead of all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="files at the same time")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--table", type=Path, nargs="?", const=TABLE, help="write them as a table, to SASS.md"
    )
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    nvcc, nvdisasm = find_tool("nvcc"), find_tool("nvdisasm")
    if nvcc is None or nvdisasm is None:
        missing = "nvcc" if nvcc is None else "nvdisasm (CUDA toolkit or the triton package)"
        print(f"skipped: {missing} was not found, so the CUDA sources were not compiled")
        return 0
    archs = args.archs.split(",") if args.archs else FAST_ARCHS if args.fast else ARCHS
    files = args.files.split(",") if args.files else FAST_FILES if args.fast else None
    sources = [s for s in sorted(SOURCES.glob("*.cu")) if files is None or s.stem in files]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        work = [
            pool.submit(check_source, (nvcc, nvdisasm), source, arch, Path(folder))
            for arch in archs
            for source in sources
        ]
        for done in as_completed(work):  # what is wrong is said at once
            one = done.result()
            print(f"{one.source} sm_{one.arch}: {one.registers} registers at most", flush=True)
            for problem in one.problems:
                print(f"FAILED: {one.source} sm_{one.arch}: {problem}", flush=True)
    checked = [done.result() for done in work]
    rows = [row for one in checked for row in one.rows]
    for row in rows:
        if row["shape"] == 0:
            print(
                f"sm_{row['arch']:5} {row['kernel']:16} {row['type']:5} integer per weight "
                f"{row['integer_per_weight']:.2f} (logic {row['logic_per_weight']:.2f}), all "
                f"{row['issue_per_weight']:.2f}; of the memory's speed "
                f"{min(1.0, permitted(row)):.0%}"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = sum(len(one.problems) for one in checked)
    if args.table and not failed:
        args.table.write_text(table(checked, compiler_name(nvcc)))
    print(f"{len(sources)} files x {len(archs)} architectures, {failed} problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
