# SPDX-License-Identifier: Apache-2.0
"""Speed of one linear layer per format, against torch in float32 on the same shape.

Weights are used in turn, more of them than the last-level cache holds, as in a model; times are
medians of single calls. GB/s counts the bytes of the weight as kernels read it, GOPS two operations
for each weight and row. For more than a look, see bench/ beside the sources.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import qkern
from qkern.cli._text import Progress, count_argument, format_argument, shape_argument, table
from qkern.formats import Format

FORMATS = ("int8", "int8-a8", "int4-g128", "int4-g128-a8", "codebook4")
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_MEMORY = 2 << 30  # bytes of weights in all, at most (but never fewer than one weight)
_COPIES = 1000  # at most: a layer so small that more are needed is in the cache in a model too
_CALLS = (5, 200)  # fewest and most calls that are timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        nargs="+",
        type=format_argument,
        default=[qkern.parse_format(f) for f in FORMATS],
    )
    parser.add_argument(
        "--shape", nargs="+", type=shape_argument, default=[(4096, 4096)], metavar="NxK"
    )
    parser.add_argument("--m", nargs="+", type=count_argument, default=[1, 32], help="rows of x")
    parser.add_argument("--threads", type=count_argument, help="threads of torch and qkern")
    parser.add_argument("--seconds", type=float, default=0.5, help="per line, about")


def cache_bytes() -> int:
    """The last-level cache of the first processor; 64 MiB where the system does not tell."""
    sizes = [0]
    for file in _CACHE.glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
        sizes.append(int(text[:-1]) * unit if unit else 0)
    return max(sizes) or 64 << 20


def copies_for(nbytes: int, cache: int) -> int:
    """Weights in turn: twice the cache between two uses of the same one."""
    return max(1, min(math.ceil(2 * cache / nbytes) + 1, _MEMORY // nbytes, _COPIES))


def random_weight(fmt: Format, n: int, k: int, seed: int) -> Any:
    """Random codes; how fast a kernel is does not depend on what they are."""
    import torch

    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {}
    for name, part in fmt.parts(n, k).items():
        if name == "codes":
            value = rng.integers(0, 256, part.shape, np.uint8)
        elif name == "codebook":
            value = rng.integers(-100, 100, part.shape).astype(np.float32)
        elif part.dtypes == ("uint8",):  # scales in eight bits: near one
            value = np.full(part.shape, 127 if fmt.scale_encoding == "e8m0" else 56, np.uint8)
        elif name == "zeros":
            value = np.full(part.shape, 2 ** (fmt.bits - 1), np.uint8)
        else:
            value = np.full(part.shape, 0.01, part.dtypes[0])
        parts[name] = torch.from_numpy(value)
    return qkern.QuantizedTensor.from_parts(fmt, (n, k), **parts).pack_()


def timed(operation: Callable[..., Any], x: Any, weights: list[Any], seconds: float) -> float:
    """Median of single calls, the weights in turn, the first two calls left out."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 + _CALLS[0] or (len(times) < 2 + _CALLS[1] and time.perf_counter() < end):
        weight = weights[len(times) % len(weights)]
        start = time.perf_counter()
        operation(x, weight)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def collect(args: argparse.Namespace, tell: Any) -> dict[str, Any]:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    cache = cache_bytes()
    rows: list[dict[str, Any]] = []
    total = len(args.shape) * len(args.m) * (len(args.format) + 1)
    with torch.inference_mode():
        for n, k in args.shape:
            inputs = {m: torch.randn(m, k) for m in args.m}
            tell(len(rows), total, "float32")
            weights: list[Any] = [torch.randn(n, k) for _ in range(copies_for(4 * n * k, cache))]
            base = {}
            for m, x in inputs.items():
                base[m] = timed(torch.nn.functional.linear, x, weights, args.seconds)
                rows.append(_row("float32", n, k, m, base[m], base[m], 4 * n * k, "torch"))
            for fmt in args.format:
                tell(len(rows), total, str(fmt))
                weights = [random_weight(fmt, n, k, 0)]
                size = weights[0].packed().nbytes
                more = range(1, copies_for(size, cache))
                weights += [random_weight(fmt, n, k, i) for i in more]
                for m, x in inputs.items():
                    seconds = timed(qkern.linear, x, weights, args.seconds)
                    kernel = qkern.explain(weights[0], x).kernel or "-"
                    rows.append(_row(str(fmt), n, k, m, seconds, base[m], size, kernel))
        threads = torch.get_num_threads()
    return {
        "isa": qkern.info()["cpu"]["isa"],
        "threads": threads,
        "cache_bytes": cache,
        "rows": rows,
    }


def _row(
    fmt: str, n: int, k: int, m: int, seconds: float, base: float, size: int, kernel: str
) -> dict[str, Any]:
    return {
        "format": fmt,
        "n": n,
        "k": k,
        "m": m,
        "microseconds": 1e6 * seconds,
        "weight_bytes": size,
        "gigabytes_per_second": size / seconds / 1e9,
        "gigaops": 2 * m * n * k / seconds / 1e9,
        "times_float32": base / seconds,
        "kernel": kernel,
    }


def text(found: dict[str, Any]) -> str:
    rows = [
        (
            row["format"],
            f"{row['n']}x{row['k']}",
            str(row["m"]),
            f"{row['microseconds']:.1f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['gigaops']:.1f}",
            f"{row['times_float32']:.2f}",
            row["kernel"],
        )
        for row in found["rows"]
    ]
    head = ("format", "N x K", "M", "us", "GB/s", "GOPS", "x fp32", "kernel")
    cache = found["cache_bytes"] / (1 << 20)
    where = f"{found['isa']}, {found['threads']} threads, last-level cache {cache:.0f} MiB"
    return f"{where}\n\n{table(head, rows, (2, 3, 4, 5, 6))}"


def run(args: argparse.Namespace) -> int:
    progress = Progress("lines measured:")
    try:
        found = collect(args, progress)
    finally:
        progress.close()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0
