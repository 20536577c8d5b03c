# SPDX-License-Identifier: Apache-2.0
"""Offline search for the fastest configurations of this machine's GPU: ``qkern tune``.

Every candidate is timed on every wanted format, shape and batch class, with a cold second-level
cache. The table is saved after every decision, so that an interrupted search goes on where it was
stopped; what the table already holds is not measured again. Nothing here runs inside a call.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from . import configs
from .configs import CANDIDATES, SPLITS, Config, Device, Table
from .spec import Spec

SHAPES = "8192x8192,4096x14336,28672x4096"
FORMATS = "int4-g128,int8,int8-a8,nf4,codebook4"
ROWS_OF = {16: 16, 32: 32, 64: 64, 128: 128, 256: 1024}  # a typical M of each bucket


@dataclass(frozen=True)
class Job:
    """One entry of the table to be decided: ``slot`` is its name there, ``m`` the M it is timed
    at."""

    kind: str
    spec: Spec
    n: int
    k: int
    slot: str
    m: int

    @property
    def key(self) -> str:
        return Table.key(self.kind, self.spec, self.n, self.k)

    def __str__(self) -> str:
        return f"{self.key} {self.slot}"


# Seconds for (job, family, configuration, split); infinite where it cannot run.
Measure = Callable[[Job, str, Config, int], float]


def jobs(specs: Iterable[Spec], shapes: Iterable[tuple[int, int]], element: int) -> Iterator[Job]:
    """In the order of their dependence: tiles before the splits that are timed with them."""
    for spec in specs:
        kind = configs.loop_kind(spec, element)
        grad = "grad_f32" if element == 4 else "grad"
        for n, k in shapes:
            columns = spec.of_columns(k)
            for slot in ("gemv", "gemv_split"):
                yield Job(kind, columns, n, k, slot, 1)
            yield Job(kind, columns, n, k, "split", 16)
            for b in configs.BUCKETS:
                yield Job(kind, columns, n, k, f"m{b}", ROWS_OF[b])
            if spec.activations == "float":
                for b in configs.BUCKETS:
                    yield Job(grad, columns, n, k, f"m{b}", ROWS_OF[b])


def trials(
    job: Job, device: Device, table: Table, element: int
) -> Iterator[tuple[str, Config, int]]:
    """(family, configuration, split) of everything that a job chooses from."""
    start = configs.choose_linear(
        device,
        job.spec,
        element,
        job.m,
        job.n,
        job.k,
        job.slot not in ("gemv", "gemv_split"),
        table,
    )
    if job.slot in ("split", "gemv_split"):
        yield from ((start.family, start.config, split) for split in SPLITS)
        return
    family, split = start.family, start.split
    kind = family if family == "gemv" else job.kind
    if kind.startswith("grad"):
        family, split = "grad", 1
    elif family == "gemv":
        split = 1
    for config in CANDIDATES[kind]:
        summed = split if family == "tile" else 1
        if configs.fits(kind, config, job.spec, element, device, summed):
            yield family, config, split


def search(
    todo: list[Job],
    device: Device,
    table: Table,
    measure: Measure,
    element: int,
    save: Callable[[Table], None],
    tell: Callable[[str], None],
) -> int:
    """Decide every job that the table does not answer yet; returns how many were decided."""
    decided = 0
    for number, job in enumerate(todo, 1):
        known = table.find(device, job.kind, job.spec, job.n, job.k)
        if job.slot in known:
            tell(f"[{number}/{len(todo)}] {job}: known")
            continue
        best, chosen = math.inf, None
        for family, config, split in trials(job, device, table, element):
            seconds = measure(job, family, config, split)
            if seconds < best:
                best, chosen = seconds, split if job.slot.endswith("split") else config
        if chosen is None:
            tell(f"[{number}/{len(todo)}] {job}: no candidate runs")
            continue
        table.put(device, job.key, job.slot, chosen)
        save(table)
        decided += 1
        shown = list(astuple(chosen)) if isinstance(chosen, Config) else chosen
        tell(f"[{number}/{len(todo)}] {job}: {best * 1e6:.1f} us with {shown}")
    return decided


def random_parts(spec: Spec, n: int, k: int, device: str) -> tuple[Any, ...]:
    """codes, scales, zeros, codebook of a weight made of random bytes."""
    import torch

    codes = torch.randint(256, (n, -(-k * spec.bits // 8)), dtype=torch.uint8, device=device)
    scales = zeros = codebook = None
    groups = (n, spec.groups(k))
    if spec.kind == "int" or (spec.group is not None and spec.table_per != "group"):
        kind = torch.float16 if spec.group else torch.float32
        scales = torch.full(groups, 0.01, dtype=kind, device=device)
        if spec.scale_type != "float":
            scales = torch.full(groups, 120, dtype=torch.uint8, device=device)
    if spec.kind == "int" and not spec.symmetric:
        zeros = torch.ones(groups, dtype=torch.uint8, device=device)
    if spec.kind == "table":
        shape = (spec.tables(n, k), 2**spec.bits)
        codebook = torch.randint(56, 64, shape, dtype=torch.uint8, device=device)
        codebook = codebook if spec.table_type != "float" else codebook.float()
    return codes, scales, zeros, codebook


class Timer:
    """`Measure` on the current GPU: the median of cold runs, weights made of random bytes."""

    def __init__(self, dtype: Any, repeats: int = 20) -> None:
        import torch

        from . import ops

        self.torch, self.ops, self.dtype, self.repeats = torch, ops, dtype, repeats
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.parts = lru_cache(maxsize=1)(partial(random_parts, device="cuda"))

    def __call__(self, job: Job, family: str, config: Config, split: int) -> float:
        torch = self.torch
        weight = self.parts(job.spec, job.n, job.k)
        width = job.n if family == "grad" else job.k
        x = torch.randn((job.m, width), device="cuda", dtype=self.dtype)
        text, tile = job.spec.text, astuple(config)

        def run() -> None:
            if family == "grad":
                self.ops.linear_input_grad_chosen(x, *weight, None, None, text, job.k, *tile)
            else:
                self.ops.linear_chosen(x, *weight, None, None, None, text, family, *tile, split)

        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:
            # Too much shared memory or too many registers for this device: not a candidate here.
            if type(error).__name__ != "OutOfResources":
                raise
            return math.inf
        times = []
        for _ in range(self.repeats):
            self.flush.zero_()  # long enough for the launches below to queue up behind it
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e-3)
        return sorted(times)[len(times) // 2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command, but for --json, which all commands of qkern have."""
    parser.add_argument("--formats", default=FORMATS, help="comma-separated (default: %(default)s)")
    parser.add_argument("--shapes", default=SHAPES, help="NxK,... (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--output",
        type=Path,
        default=configs.user_table_path(),
        help="table to extend (default: %(default)s)",
    )
    parser.add_argument("--again", action="store_true", help="measure what the table holds already")
    parser.add_argument("--dry-run", action="store_true", help="list what would be measured")


def main(argv: list[str] | None = None) -> int:
    """The command by itself; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="qkern tune", description="Find the fastest Triton configurations for this GPU."
    )
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """The command with its arguments parsed; returns its exit status."""
    try:
        shapes = [(int(n), int(k)) for n, k in (s.split("x") for s in args.shapes.split(","))]
    except ValueError:
        print(
            f"--shapes must be like 4096x14336,8192x8192, but is {args.shapes!r}.", file=sys.stderr
        )
        return 2
    from qkern import parse_format

    try:
        specs = [Spec.from_format(parse_format(text)) for text in args.formats.split(",")]
    except ValueError as error:
        print(f"--formats: {error}", file=sys.stderr)
        return 2
    element = 4 if args.dtype == "float32" else 2
    todo = list(jobs(specs, shapes, element))
    if args.dry_run:
        print(json.dumps([str(job) for job in todo]) if args.json else "\n".join(map(str, todo)))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("Tuning measures on a GPU, but torch sees none.", file=sys.stderr)
        return 1
    from . import ops

    device = ops.device_of(torch.empty(0, device="cuda"))
    table = Table.read(args.output) if args.output.is_file() and not args.again else Table()
    begun = time.monotonic()
    decided = search(
        todo,
        device,
        table,
        Timer(getattr(torch, args.dtype)),
        element,
        lambda found: found.write(args.output),
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    result = {
        "device": device.name,
        "decided": decided,
        "jobs": len(todo),
        "seconds": round(time.monotonic() - begun, 1),
        "table": str(args.output),
    }
    print(
        json.dumps(result)
        if args.json
        else f"{decided} of {len(todo)} entries decided for {device.name}, saved in {args.output}"
    )
    return 0
