# SPDX-License-Identifier: Apache-2.0
"""How near the best kernels come to the machine's limits, and to torch in float32.

    python bench/roofline.py [--shape 4096] [--threads 2] [--passes 9] [--json FILE]

Every pass runs each cell once between fresh measurements of the limits; a fraction is the median
over passes of (the larger of weight bytes / read bandwidth and operations / peak) / time, all from
the same pass. Weights rotate over copies that together exceed the last-level cache. Activation
quantization is included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from limits import LOOPS, measure
from qkern import _core
from qkern.testing import Case, Problem, address, aligned_bytes
from shapes import SHAPES

CACHE_BYTES = 96 << 20
ROWS = (1, 4, 16, 64, 256)
G128 = {"group": 128, "scale": "float16"}
CASES = {
    "int4-g128-a8": Case(4, "int8", **G128),
    "int4-g128-a8g": Case(4, "int8_group", **G128),
    "int4-g32-a8": Case(4, "int8", group=32, scale="float16"),
    "codebook4-a8": Case(4, "int8", table="row"),
    "nf4-g64-a8": Case(4, "int8", table="tensor", group=64, scale="float16"),
    "int8-a8": Case(8, "int8"),
    "codebook3-a8": Case(3, "int8", table="row"),
    "lutb-a8": Case(3, "int8", group=64, table="tile", scale="e8m0"),
    "int4-g128": Case(4, "float", **G128),
    "nf4-g64": Case(4, "float", table="tensor", group=64, scale="float16"),
    "codebook4": Case(4, "float", table="row", scale="none"),
    "lutb": Case(3, "float", group=64, table="tile", scale="none"),
    "int8": Case(8, "float"),
}
PEAKS = {
    "avx512amx": ("int8_tile_avx512amx", "float_tile_avx512"),
    "avx512vnni": ("int8_tile_avx512vnni", "float_tile_avx512"),
    "avx512": ("int8_avx2", "float_tile_avx512"),
    "avx2": ("int8_avx2", "float_avx2"),
}


class Cell:
    """One case and row count: calls over rotating copies of the weight."""

    def __init__(self, case: Case, problem: Problem, m: int):
        self.case, self.m, self.n, self.k = case, m, problem.n, problem.k
        self.bytes = problem.packed.size
        self.copies = 1 if m >= 256 else CACHE_BYTES // self.bytes + 1
        blocks = [problem.packed]
        for _ in range(self.copies - 1):
            copy = aligned_bytes(self.bytes)
            copy[:] = problem.packed
            blocks.append(copy)
        self.blocks = itertools.cycle(blocks)
        self.x = np.random.default_rng(0).standard_normal((m, self.k)).astype(np.float32)
        self.y = np.empty((m, self.n), np.float32)
        self.call()

    def call(self) -> None:
        block = next(self.blocks)
        _core.linear(address(block), self.bytes, 0, address(self.x), self.m, self.k, 1, 0, 0, 0,
                     address(self.y), self.n)  # fmt: skip

    def seconds(self) -> float:
        """Mean over one turn through the copies, at least 20 ms."""
        turns, start = 0, time.perf_counter()
        while turns < self.copies or time.perf_counter() - start < 0.02:
            self.call()
            turns += 1
        return (time.perf_counter() - start) / turns


def torch_seconds(n: int, k: int, m: int) -> Callable[[], float] | None:
    """torch.nn.functional.linear in float32 over rotating weights, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(_core.get_threads())
    weights = itertools.cycle([torch.randn(n, k) for _ in range(2)])
    x = torch.randn(m, k)

    def run() -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(2):
                torch.nn.functional.linear(x, next(weights))
            return (time.perf_counter() - start) / 2

    run()
    return run


def collect(shape: str, passes: int) -> dict[str, Any]:
    n, k = SHAPES[shape]
    peaks = PEAKS[_core.active_isa()]
    threads = _core.get_threads()
    rows = []
    for m in ROWS:
        reference = torch_seconds(n, k, m)
        for name, case in CASES.items():
            cell = Cell(case, Problem(case, n, k), m)
            peak = peaks[case.activations == "float"]
            times, fractions, ratios = [], [], []
            for _ in range(passes):
                limit = measure(threads, (peak,) if peak in LOOPS else ())
                seconds = cell.seconds()
                memory = cell.bytes / limit["read_gbs"] / 1e9
                compute = 2 * m * n * k / limit[peak] / 1e9
                times.append(seconds)
                fractions.append(max(memory, compute) / seconds)
                if reference:
                    ratios.append(reference() / seconds)
            rows.append({
                "case": name, "m": m, "kernel": _core.last_kernel(),
                "ms": 1e3 * statistics.median(times),
                "roofline": statistics.median(fractions),
                "over_torch_fp32": statistics.median(ratios) if ratios else None,
            })  # fmt: skip
    return {
        "shape": shape, "n": n, "k": k, "threads": threads, "isa": _core.active_isa(),
        "machine": machine(), "commit": commit(), "limits": measure(threads), "cells": rows,
    }  # fmt: skip


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {a.strip(): b.strip() for a, _, b in (x.partition(":") for x in lines)}
        return f"{facts['model name']}, family {facts['cpu family']} model {facts['model']}"
    except (OSError, KeyError):
        return platform.machine()


def commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def table(result: dict[str, Any]) -> str:
    lines = [
        "| case | " + " | ".join(f"M={m}" for m in ROWS) + " |",
        "|---" * (len(ROWS) + 1) + "|",
    ]
    for name in CASES:
        cells = [c for m in ROWS for c in result["cells"] if c["case"] == name and c["m"] == m]
        texts = [
            f"{c['ms']:.3g} ms, {100 * c['roofline']:.0f} %"
            + (f", {c['over_torch_fp32']:.1f}x" if c["over_torch_fp32"] else "")
            for c in cells
        ]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="4096")
    parser.add_argument("--threads", type=int, default=0, help="0: all there are")
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _core.set_threads(args.threads)
    result = collect(args.shape, args.passes)
    print(f"{result['machine']}, {result['threads']} threads, {result['isa']}")
    print("time, fraction of the roofline, speed-up over torch float32\n")
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
