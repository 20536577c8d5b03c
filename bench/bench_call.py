# SPDX-License-Identifier: Apache-2.0
"""What one call from Python costs: a small layer in eager inference against torch's float layer.

Module against module, function against function, one row of x. The contestants take turns, many
times; the table has the fastest and the median turn in microseconds per call. The weight is so
small that what is seen is the way to the kernel, not the kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn import functional

import qkern

MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad enabled, nothing needs one": nullcontext,
}


def contestants(n: int, k: int, fmt: str, rows: int) -> dict[str, Callable[[], object]]:
    layer = torch.nn.Linear(k, n).eval().requires_grad_(False)
    quick = qkern.nn.Linear.from_float(layer, fmt).eval().requires_grad_(False)
    weight, bias, x = layer.weight, layer.bias, torch.randn(rows, k)
    qt = qkern.quantize(weight, fmt)
    return {
        "torch.nn.Linear": lambda: layer(x),
        "qkern.nn.Linear": lambda: quick(x),
        "torch.nn.functional.linear": lambda: functional.linear(x, weight, bias),
        "qkern.linear": lambda: qkern.linear(x, qt, bias),
        "torch.ops.qkern.linear": lambda: torch.ops.qkern.linear(x, qt.packed().buffer, bias, n),
    }


def microseconds(call: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - begin) / calls / 1000


def measure(calls: dict[str, Callable[[], object]], turns: int, repeat: int) -> dict[str, dict]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        microseconds(call, repeat)
    for _ in range(turns):
        for name, call in calls.items():
            times[name].append(microseconds(call, repeat))
    return {
        name: {"min": min(found), "median": statistics.median(found)}
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(64, 64), metavar=("N", "K"))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--format", default="int4-g32")
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=500, help="calls per turn")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    calls = contestants(*options.shape, options.format, options.rows)
    results = {}
    for mode, context in MODES.items():
        with context():
            results[mode] = measure(calls, options.turns, options.repeat)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for mode, rows in results.items():
        print(f"{mode}\n  {'us per call':28} {'min':>7} {'median':>7}")
        for name, row in rows.items():
            print(f"  {name:28} {row['min']:7.2f} {row['median']:7.2f}")


if __name__ == "__main__":
    main()
