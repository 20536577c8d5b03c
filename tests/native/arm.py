# SPDX-License-Identifier: Apache-2.0
"""The core on 64-bit Arm without an Arm machine: compiled, run and read.

    python tests/native/arm.py [--cases N]      (`make test-arm`)

1. Cross-compiles the core and the native sweep with Debian's compiler, into build/arm.
2. Runs the sweep under qemu-user on a processor model per level, and on this machine with the
   scalar kernels. Every level must have run all its kernels, and the digests of the scalar results
   must be those of this machine.
3. Reads the machine code: no instruction above a level, no symbol that could leak, and in the inner
   loops of the 4-bit kernels the expected instructions, no spill, and no more than is budgeted.

On an Arm machine this is not needed: the ordinary tests run there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CROSS, HOST = ROOT / "build" / "arm", ROOT / "build" / "native"
TOOLCHAIN = ROOT / "csrc" / "cmake" / "aarch64-linux-gnu.cmake"
SYSROOT = "/usr/aarch64-linux-gnu"
PREFIX = "aarch64-linux-gnu-"

# What must be there, and the Debian package that has it.
TOOLS = {
    f"{PREFIX}g++": "g++-aarch64-linux-gnu",
    f"{PREFIX}objdump": "binutils-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "c++": "g++",
    "cmake": "cmake",
    "ninja": "ninja-build",
}
# A processor of each level that is not of the next.
MODELS = {"neon": "cortex-a53", "neondot": "neoverse-n1", "neoni8mm": "max"}
LEVELS = tuple(MODELS)

DOT, I8MM = r"[su]dot|", r"[su]?mmla|usdot|sudot|"
LATER = (  # bfloat16, half products, SVE, atomics of armv8.1
    r"bf(dot|mmla|mlal[bt]|cvt\w*)|fml[as]l2?|ld1rq\w|ptrue|whilelo|"
    r"(casp?|swp|(ld|st)(add|clr|eor|set|[su]max|[su]min))(a|l|al)?[bh]?"
)
FORBIDDEN = {
    "neon": re.compile(rf"\s({DOT}{I8MM}{LATER})\s|f(mla|mul|add|sub)\s+v\d+\.[48]h"),
    "neondot": re.compile(rf"\s({I8MM}{LATER})\s|f(mla|mul|add|sub)\s+v\d+\.[48]h"),
    "neoni8mm": re.compile(rf"\s({LATER})\s|f(mla|mul|add|sub)\s+v\d+\.[48]h"),
}


@dataclass(frozen=True)
class Budget:
    """The inner loop of a function: how often it has which instruction, and its whole length."""

    object: str
    function: str
    instructions: str
    count: int
    most: int


PRODUCTS = "smull2?|smlal2?"
BUDGETS = (
    Budget("linear_w4a8d_neon", "add_row<4>", PRODUCTS, 32, 64),
    Budget("linear_w8a8d_neon", "add_row<2>", PRODUCTS, 16, 40),
    Budget("linear_w4a8d_neondot", "add_direct_dwords<.*, 1>", "sdot", 8, 26),
    Budget("linear_w4a8d_neondot", "add_direct_dwords<.*, 4>", "sdot", 32, 54),
    Budget("linear_w4a8d_neondot", "add_tile<4>", "sdot", 64, 88),
    Budget("linear_w8a8d_neondot", "add_direct_dwords<.*, 1>", "sdot", 4, 20),
    Budget("linear_lut4a8d_neondot", "add_direct_dwords<.*, 1>", "sdot", 8, 34),
    Budget("linear_lut4a8d_row_neondot", "add_direct_rows<.*, 1>", "sdot", 8, 38),
    Budget("linear_lut4a8d_row_neondot", "add_direct_rows<.*, 4>", "sdot", 32, 76),
    Budget("linear_w4a8d_neoni8mm", "add_squares<2>", "smmla", 16, 34),
    Budget("linear_w4a8d_neoni8mm", "unpack<.*>", "zip[12]", 8, 32),
    Budget("linear_w4a32_neon", "add_direct<.*>", "fmla", 32, 124),
    Budget("linear_w4a32_neon", "add_tile<4>", "fmla", 64, 92),
    Budget("linear_w8a32_neon", "add_direct<.*>", "fmla", 16, 76),
    Budget("linear_lut4a32_neon", "add_direct<.*>", "fmla", 32, 162),
    Budget("linear_lut4a32_row_neon", "add_direct<4>", "tbl", 8, 48),
    Budget("linear_lut4a32_row_neon", "add_tile<4>", "fmla", 16, 30),
)


def missing() -> str:
    """Why nothing can be checked here, in a sentence; empty where all tools are there."""
    absent = [package for tool, package in TOOLS.items() if which(tool) is None]
    return f"Arm checks need Debian's packages {' '.join(absent)}" if absent else ""


def which(tool: str) -> str | None:
    # cmake and ninja may have come with pip, beside the interpreter.
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(tool, path=folders)


def output(*command: str | Path) -> str:
    tool = which(str(command[0])) or str(command[0])
    done = subprocess.run([tool, *map(str, command[1:])], capture_output=True, text=True)
    if done.returncode:
        words = " ".join(map(str, command))
        sys.exit(f"{words} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def build(folder: Path, *flags: str) -> None:
    source = ROOT / "tests" / "native"
    output("cmake", "-S", source, "-B", folder, "-G", "Ninja", *flags)
    output("cmake", "--build", folder, "--parallel", "2")


def parse_sweep(text: str) -> tuple[str, dict[str, str]]:
    """The level that was found, and the digest of each kernel that ran and was right."""
    level = re.search(r"detected (\w+)", text)
    rows = re.findall(r"^(\w+) +(\d+)  ok +([0-9a-f]{16})$", text, re.M)
    if level is None or not any(name == "total" for name, _, _ in rows):
        sys.exit(f"the sweep did not end well:\n{text[-3000:]}")
    return level[1], {name: digest for name, cases, digest in rows if int(cases) > 0}


def registry() -> dict[str, set[str]]:
    """The names of kernels.inc by level, of the operations that the sweep covers."""
    pattern = r"^QKERN_(?:LINEAR|QUANTIZE|CONVERT|DEQUANTIZE)\((\w+)"
    names = re.findall(pattern, (ROOT / "csrc/cpu/kernels.inc").read_text(), re.M)
    return {level: {n for n in names if n.endswith("_" + level)} for level in (*LEVELS, "scalar")}


def check_run(level: str, text: str, scalar: dict[str, str]) -> list[str]:
    """What is wrong with a run of the sweep on the processor of a level."""
    found, digests = parse_sweep(text)
    problems = [] if found == level else [f"{MODELS[level]} is taken for {found}, not {level}"]
    names = registry()
    for below in ("scalar", *LEVELS[: LEVELS.index(level) + 1]):
        absent = names[below] - digests.keys()
        problems += [f"{MODELS[level]}: {name} did not run" for name in sorted(absent)]
    above = LEVELS[LEVELS.index(level) + 1 :]
    ran = [name for name in digests if name.rpartition("_")[2] in above]
    problems += [f"{MODELS[level]}: {name} ran without its instructions" for name in ran]
    problems += [
        f"{MODELS[level]}: the digest of {name} is {digests.get(name)}, here it is {digest}"
        for name, digest in scalar.items()
        if name in names["scalar"] and digests.get(name) != digest
    ]
    return problems


def functions(text: str) -> dict[str, list[tuple[int, str, str]]]:
    """Of a disassembly: address, mnemonic and operands of every instruction, by function."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    current: list[tuple[int, str, str]] = []
    for line in text.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = found.setdefault(head[1].replace("(anonymous namespace)::", ""), [])
        elif code := re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*([^/]*)", line):
            current.append((int(code[1], 16), code[2], code[3].strip()))
    return found


def is_branch(mnemonic: str) -> bool:
    return re.fullmatch(r"b(\.\w+)?|cbn?z|tbn?z|bl|blr|br|ret", mnemonic) is not None


def straight_loops(code: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """Loops without any branch but the one that closes them."""
    places = {address: i for i, (address, _, _) in enumerate(code)}
    loops = []
    for last, (_, mnemonic, operands) in enumerate(code):
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if not is_branch(mnemonic) or target is None:
            continue
        first = places.get(int(target[1], 16), last + 1)
        if first <= last and not any(is_branch(m) for _, m, _ in code[first:last]):
            loops.append(code[first : last + 1])
    return loops


def check_loops(name: str, text: str) -> list[str]:
    """The hot loops of one object against its budgets; spills in any of them."""
    problems = []
    code = functions(text)
    hot = re.compile(r"::(add_\w+|unpack\w*)<")
    for function, instructions in code.items():
        if not hot.search(function):
            continue
        for loop in straight_loops(instructions):
            spills = sum(bool(re.search(r"\[(sp|x29)\b", operands)) for _, _, operands in loop)
            # Units of 3 and 5 bits have eight steps in three or five registers: 2 % are let pass.
            if spills > (len(loop) // 50 if re.search(r"_(w|lut)[35]a", name) else 0):
                problems.append(f"{name}: the inner loop of {function} uses the stack")
    for budget in (b for b in BUDGETS if b.object == name):
        bodies = [f for f in code if re.search(rf"::{budget.function}\(", f)]
        loops = [loop for f in bodies for loop in straight_loops(code[f])]
        counts = [Counter(m for _, m, _ in loop) for loop in loops]
        wanted = re.compile(budget.instructions)
        fits = [
            sum(count.values())
            for count in counts
            if sum(n for m, n in count.items() if wanted.fullmatch(m)) == budget.count
        ]
        what = f"{name}: {budget.function} with {budget.count} {budget.instructions}"
        if not fits:
            problems.append(f"{what}: no such loop")
        elif min(fits) > budget.most:
            problems.append(f"{what}: {min(fits)} instructions, expected {budget.most} at most")
    return problems


def check_objects(folder: Path) -> list[str]:
    problems = []
    objects = sorted((folder / "qkern/CMakeFiles/qkern.dir/cpu").glob("*.o"))
    for path in objects:
        name = path.name.removesuffix(".cpp.o")
        level = name.rpartition("_")[2]
        text = output(f"{PREFIX}objdump", "-dC", "--no-show-raw-insn", path)
        bad = [s for s in text.splitlines() if FORBIDDEN.get(level, FORBIDDEN["neon"]).search(s)]
        problems += [f"{name}: above its level: {line.strip()}" for line in bad[:3]]
        if level in LEVELS:
            letters = re.findall(r"^[0-9a-f ]{16} (\w) ", output(f"{PREFIX}nm", path), re.M)
            if letters.count("T") != 1 or {"W", "V", "w", "v", "u"} & set(letters):
                problems.append(f"{name}: defines more than its kernel: {sorted(set(letters))}")
            problems += check_loops(name, text)
    if len(objects) < 40:
        problems.append(f"{folder} has {len(objects)} objects only")
    return problems


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=24, help="per class of weights")
    cases = str(parser.parse_args(argv).cases)
    if why := missing():
        sys.exit(why)
    build(CROSS, f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}")
    build(HOST)
    problems = check_objects(CROSS)
    print(f"{len(BUDGETS)} loops and all objects read: {len(problems)} problems", flush=True)
    flags = ["--cases", cases]
    _, scalar = parse_sweep(output(HOST / "sweep", *flags, "--isa", "scalar"))
    for level, model in MODELS.items():
        text = output("qemu-aarch64", "-L", SYSROOT, "-cpu", model, CROSS / "sweep", *flags)
        found = check_run(level, text, scalar)
        names = [name for name in parse_sweep(text)[1] if name.endswith("_" + level)]
        print(f"{level} on {model}: {len(names)} kernels of the level, {len(found)} problems")
        print("".join(f"  {name}\n" for name in names), end="", flush=True)
        problems += found
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
