# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on a GPU: tuned for it, measured beside their rivals, held against their
targets.

    python bench/gpu_triton.py ROWS.json [--seconds N] [--tune SHARE] [--table FILE] [--dry-run]

First `qkern tune` searches for the cells that count most, for SHARE of the time (default a half);
what it has found is in --table (default beside ROWS.json) after every decision, in the form of
triton_kernels/configs.json, and is used by the measurements after it. A second run goes on from
there. `make gpu-check` runs this with what is left of its time; 500 seconds by itself are enough
for all of it. --dry-run says what would be done.

Rivals: gemlite, bitsandbytes and torch where they are installed, and this package's CUDA kernels.
How times are taken is said in bench/gpu_measure.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkern.triton_kernels import tune

Facts = dict[str, Any]
SHAPES = ((8192, 8192), (4096, 14336), (28672, 4096))
FORMATS = ("int4-g128", "int8", "int8-a8", "nf4", "codebook4")
ALL_M = (1, 16, 4096, 256, 64, 4, 1024, 2, 8, 32, 128, 512)  # the telling ones first
RIVAL_OF = {  # what else multiplies by such weights
    "int4-g128": ("gemlite int4-g128", "torch int4pack"),
    "int8": ("gemlite int8",),
    "int8-a8": ("gemlite int8-a8", "torch _int_mm"),
    "nf4": ("bitsandbytes nf4",),
    "codebook4": (),
}
GB_PER_S = {"H200": 4800, "H100": 3350, "A100": 2039, "B200": 8000}  # by the maker's word
BYTE_SHARE, PREFILL_SHARE, CODEBOOK_RATIO, PREFILL_M = 0.45, 0.85, 1.5, 1024
COMPILERS = 12  # processes that compile candidates ahead of their timing


# ---- what is done, in which order ----


def shape_name(n: int, k: int) -> str:
    return f"{n}x{k}"


def cells() -> Iterator[tuple[int, int, int]]:
    """(M, N, K) in the order of importance; every format has each."""
    for m in ALL_M:
        for n, k in SHAPES:
            yield m, n, k


def tuning_jobs() -> list[tune.Job]:
    """Of `qkern tune`'s: decode first, then prefill, then what lies between; and last what serves
    those who give up batch invariance, and gradients."""
    import qkern
    from qkern.triton_kernels import Spec, tune

    specs = [Spec.from_format(qkern.parse_format(fmt)) for fmt in FORMATS]
    jobs = list(tune.jobs(specs, SHAPES, 2))
    order = ("m16", "split", "m256", "m64", "m32", "m128", "gemv", "gemv_split")

    def rank(job: tune.Job) -> int:
        return len(order) if job.kind.startswith("grad") else order.index(job.slot)

    # Within a rank the order of `jobs` stays.
    return sorted(jobs, key=rank)


# ---- tuning ----


def compile_candidates(jobs: list[tune.Job]) -> None:
    """Run every candidate of some jobs once, so that it lies in Triton's cache: in a process of its
    own, as compiling takes longer than all timings."""
    import torch

    from qkern.triton_kernels import configs, ops, tune

    timer = tune.Timer(torch.bfloat16, repeats=1)
    device = ops.device_of(torch.empty(0, device="cuda"))
    for job in jobs:
        for family, config, split in tune.trials(job, device, configs.Table(), 2):
            timer(job, family, config, split)


def search(table: Path, seconds: float) -> Facts:
    """Decide what there is time for; the table is saved after each decision."""
    import torch

    from qkern.triton_kernels import ops, tune
    from qkern.triton_kernels.configs import Table

    end = time.monotonic() + seconds
    jobs = tuning_jobs()
    first = [job for job in jobs if (job.n, job.k) == SHAPES[0]]  # the others use the same kernels
    context = get_context("spawn")
    with context.Pool(min(COMPILERS, os.cpu_count() or 1)) as pool:
        waiting = [pool.apply_async(compile_candidates, ([job],)) for job in first]
        for result in waiting:
            try:
                result.get(max(end - seconds / 2 - time.monotonic(), 1))
            except Exception as error:  # what it cannot compile, the search below meets again
                print(f"compiling ahead: {type(error).__name__}: {error}", flush=True)
                break
    device = ops.device_of(torch.empty(0, device="cuda"))
    found = Table.read(table) if table.is_file() else Table()
    timer = tune.Timer(torch.bfloat16)
    decided = 0
    for number, job in enumerate(jobs):
        if time.monotonic() > end:
            return {"decided": decided, "left": len(jobs) - number}
        decided += tune.search(
            [job], device, found, timer, 2, lambda t: t.write(table), lambda line: print(line)
        )
    return {"decided": decided, "left": 0}


# ---- measuring ----


def gemlite_calls(fmt: str, n: int, k: int) -> Callable[[], Callable[[Any], Any]]:
    """Makes a layer of gemlite's for a format; ImportError where gemlite is not installed."""
    import torch
    from gemlite.helper import A16W8, A8W8_int8_dynamic, A16Wn

    def make() -> Callable[[Any], Any]:
        if fmt == "int4-g128":
            codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
            scales = torch.full((n, k // 128), 0.01, dtype=torch.bfloat16, device="cuda")
            zeros = torch.full_like(scales, 8)
            return A16Wn(device="cuda:0").from_weights(codes, scales, zeros, 4, 128)
        weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
        return (A16W8 if fmt == "int8" else A8W8_int8_dynamic)(device="cuda:0").from_weights(weight)

    return make


def measure(rows: Path, seconds: float) -> None:
    """Every cell there is time for, with all that compete in it one after the other."""
    import torch

    import gpu_measure

    measurement = gpu_measure.Measurement(rows, seconds)
    for m, n, k in cells():
        shape = (shape_name(n, k), n, k)
        for name, (calls, bits) in gpu_measure.rivals(measurement.timer, m, n, k).items():
            measurement.record(name, shape, m, calls, bits)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        for fmt in FORMATS:
            if measurement.out_of_time():
                return
            measure_format(measurement, fmt, shape, m, x)
        torch.cuda.empty_cache()


def measure_format(measurement: Any, fmt: str, shape: tuple[str, int, int], m: int, x: Any) -> None:
    import gpu_measure
    import qkern

    _, n, k = shape
    one = gpu_measure.random_weight(fmt, n, k)
    copies = measurement.timer.copies(one.nbytes)
    weights = [one, *(gpu_measure.random_weight(fmt, n, k) for _ in range(copies - 1))]
    calls = [lambda w=w: qkern.linear(x, w) for w in weights]
    for backend in ("triton", "cuda"):
        try:
            with qkern.override(backend=backend):
                measurement.record(f"{backend} {fmt}", shape, m, calls, one.bits_per_weight)
        except qkern.UnsupportedError as error:
            print(f"{backend} {fmt}: {error}", flush=True)
    if f"gemlite {fmt}" in RIVAL_OF[fmt]:
        try:
            make = gemlite_calls(fmt, n, k)
            theirs = [partial(make(), x) for _ in range(copies)]
            measurement.record(f"gemlite {fmt}", shape, m, theirs, one.bits_per_weight)
        except Exception as error:  # not there, or not for this torch: it is out
            print(f"gemlite {fmt}: {str(error).splitlines()[:1]}", flush=True)


# ---- the report ----


def verdicts(cell: dict[str, Facts], fmt: str, m: int, peak: float) -> list[str]:
    """What a cell is held against, and whether it holds. `cell`: rows by what they measure."""
    ours = cell[f"triton {fmt}"]["graph_us"]
    said = []

    def hold(words: str, held: bool) -> None:
        said.append(f"{words}: {'yes' if held else 'NO'}")

    if f"gemlite {fmt}" in cell:
        share = cell[f"gemlite {fmt}"]["graph_us"] / ours
        hold(f"{share:.2f} x gemlite's speed, 1 wanted", share >= 1)
    if m == 1 and peak:
        share = cell[f"triton {fmt}"]["gb_per_s"] / peak
        hold(f"{share:.0%} of the byte limit, {BYTE_SHARE:.0%} wanted", share >= BYTE_SHARE)
    if m >= PREFILL_M and "cublas bfloat16" in cell:
        share = cell["cublas bfloat16"]["graph_us"] / ours
        hold(f"{share:.0%} of cuBLAS, {PREFILL_SHARE:.0%} wanted", share >= PREFILL_SHARE)
    if fmt == "codebook4" and "triton int4-g128" in cell:
        ratio = ours / cell["triton int4-g128"]["graph_us"]
        hold(f"{ratio:.2f} x the time of int4, {CODEBOOK_RATIO} allowed", ratio <= CODEBOOK_RATIO)
    return said


def summary(rows: list[Facts], device: str) -> str:
    """A table for each shape: microseconds by graph replay, and what they are held against."""
    peak = next((speed for name, speed in GB_PER_S.items() if name in device), 0)
    lines = [f"## Triton kernels: {device}"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        by_m: dict[int, dict[str, Facts]] = {}
        for row in rows:
            if row["shape"] == shape:
                by_m.setdefault(row["m"], {})[row["what"]] = row
        lines += ["", f"### {shape}: microseconds, graph replay", ""]
        lines.append("| format | M | Triton | CUDA | rivals | cuBLAS bfloat16 | targets |")
        lines.append("| --- " * 7 + "|")
        for fmt in FORMATS:
            for m in sorted(by_m):
                cell = by_m[m]
                if f"triton {fmt}" not in cell:
                    continue
                rivals = [f"{name.split()[0]} {cell[name]['graph_us']:.1f}"
                          for name in RIVAL_OF[fmt] if name in cell]  # fmt: skip
                names = (f"triton {fmt}", f"cuda {fmt}", "cublas bfloat16")
                figures = [
                    f"{cell[name]['graph_us']:.1f}" if name in cell else "" for name in names
                ]
                said = "; ".join(verdicts(cell, fmt, m, peak))
                lines.append(
                    f"| {fmt} | {m} | {figures[0]} | {figures[1]} | {', '.join(rivals)} "
                    f"| {figures[2]} | {said} |"
                )
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="file for the measurements")
    parser.add_argument("--seconds", type=float, default=500, help="for everything together")
    parser.add_argument("--tune", type=float, default=0.5, help="share of the time, 0 to 1")
    parser.add_argument("--table", type=Path, help="table of configurations to extend")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    # Where the kernels look for what was found on this machine.
    cache = args.rows.resolve().parent
    table = args.table or cache / "qkern" / "triton_configs.json"
    if args.dry_run:
        print("\n".join(f"tune {job}" for job in tuning_jobs()))
        print("\n".join(f"measure {fmt} {n}x{k} M={m}" for m, n, k in cells() for fmt in FORMATS))
        return 0
    import torch

    from qkern.triton_kernels import configs

    begin = time.monotonic()
    args.rows.write_text("[]")
    if args.tune > 0:
        print(json.dumps(search(table, args.seconds * args.tune)), flush=True)
    if table.is_file():
        os.environ["XDG_CACHE_HOME"] = str(cache)
        kept = configs.user_table_path()
        if kept.resolve() != table.resolve():
            configs.Table.read(table).write(kept)
    configs.table.cache_clear()
    measure(args.rows, args.seconds - (time.monotonic() - begin))
    rows = json.loads(args.rows.read_text())
    print(summary(rows, torch.cuda.get_device_name(0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
