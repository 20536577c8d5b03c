# SPDX-License-Identifier: Apache-2.0
"""qkern against its peers and against the machine's limits, taken in the same seconds.

    python bench/compare.py [--shapes 4096,11008x4096] [--rows 1,16,256] [--classes int4,int8-a8]
                            [--json bench/results/NAME.json [--resume]]

Each family of peers lives in a process of its own; only one is active at a time. All entries of a
class are timed in turn, pass after pass, with the limit loops before each pass. A fraction or a
ratio is the median over passes of what one pass gave. Weights rotate over copies beyond the
last-level cache (64 copies at most; 2 from M = 256, where time does not depend on it). Activation
quantization is included. Every entry is checked against float64 before it is timed.

ONNX Runtime, OpenVINO and ggml run all copies as one graph, so their cost per call is spread;
torch, torchao and bitsandbytes are called once per layer, and so are we.

`--isa avx2` keeps us to AVX2, and the peers that allow it: torch and torchao (ATEN_CPU_CAPABILITY,
ONEDNN_MAX_CPU_ISA), OpenVINO (its oneDNN, checked by the names of the kernels that run), ggml if
QKERN_BENCH_GGML names a build for AVX2. ONNX Runtime and bitsandbytes cannot be kept to it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import time
from pathlib import Path
from typing import Any

from roofline import PEAKS, commit, machine

from compare_report import report
from limits import LOOPS, measure
from peers import CLASSES, FAMILIES, Settings
from peers.worker import Failed, Worker
from qkern import _core
from shapes import SHAPES

CACHE_FLOOR = 96 << 20
# A guest is told the whole cache of a shared host (480 MiB on one whose reads run at memory speed
# from 192 MiB on); three times that would fill the machine with copies.
CACHE_CEILING = 256 << 20
SETTLE = 0.01  # seconds for the threads of one family to go to sleep before the next one runs
HOPELESS = 10  # times slower than the fastest: timed in one pass only
PACKAGES = (
    "torch", "torchao", "bitsandbytes", "onnxruntime", "openvino", "llama-cpp-python", "numpy",
)  # fmt: skip


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor, 0 if the system does not tell."""
    found = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text().strip()
            found.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(found)


def rotation() -> int:
    """Bytes that the copies of one weight cover together."""
    return min(max(CACHE_FLOOR, 3 * last_level_cache()), CACHE_CEILING)


class Entry:
    """One peer, or one format of ours, in one cell."""

    def __init__(self, worker: Worker, name: str, kind: str, arithmetic: str):
        self.worker, self.name, self.kind, self.arithmetic = worker, name, kind, arithmetic
        self.facts: dict[str, Any] = {}
        self.failed = ""
        self.times: dict[int, float] = {}  # by pass

    def check(self, n: int, k: int, m: int) -> None:
        self.times, self.failed = {}, ""
        try:
            self.facts = self.worker.ask("check", self.name, n, k, m, rotation())
        except Failed as failed:
            self.failed = str(failed)

    def run(self, n: int, k: int, m: int, number: int, budget: float) -> None:
        time.sleep(SETTLE)
        try:
            self.times[number] = self.worker.ask(
                "time", self.name, n, k, m, self.facts["copies"], budget
            )
        except Failed as failed:
            self.failed = str(failed)


def cell(entry: Entry, n: int, k: int, m: int, limits: list[dict], peaks: tuple) -> dict[str, Any]:
    row = {"class": entry.kind, "n": n, "k": k, "m": m, "family": entry.worker.family,
           "name": entry.name, "arithmetic": entry.arithmetic}  # fmt: skip
    if entry.failed or not entry.times:
        return row | {"failed": entry.failed}
    floors = []
    for number, seconds in entry.times.items():
        memory = entry.facts["bytes"] / limits[number]["read_gbs"]
        compute = 2 * m * n * k / limits[number][peaks[entry.arithmetic == "float"]]
        floors.append(max(memory, compute) / 1e9 / seconds)
    times = list(entry.times.values())
    return row | entry.facts | {
        "samples": len(times), "ms": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times),
        "roofline": statistics.median(floors),
        "gbs": entry.facts["bytes"] / statistics.median(times) / 1e9,
        "gops": 2 * m * n * k / statistics.median(times) / 1e9,
    }  # fmt: skip


def ratio(suffix: str, ours: Entry, peers: list[Entry]) -> dict[str, Any]:
    """The fastest of the peers by median, and how many times as long as we it took."""
    timed = [p for p in peers if p.times and not p.failed]
    if not timed or not ours.times or ours.failed:
        return {}
    best = min(timed, key=lambda p: statistics.median(p.times.values()))
    quotients = [best.times[i] / ours.times[i] for i in ours.times.keys() & best.times.keys()]
    if not quotients:
        return {}
    return {f"best_peer{suffix}": best.name, f"ratio{suffix}": statistics.median(quotients)}


def measure_cell(
    entries: list[Entry], n: int, k: int, m: int, options: argparse.Namespace, peaks: tuple
) -> list[dict[str, Any]]:
    for entry in entries:
        entry.check(n, k, m)
    limits: list[dict[str, float]] = []
    slow: set[str] = set()
    for number in range(options.passes):
        limits.append(measure(options.threads, tuple(p for p in peaks if p in LOOPS)))
        # No entry always comes right after the limits.
        shift = number * len(entries) // options.passes
        for entry in entries[shift:] + entries[:shift]:
            if not entry.failed and entry.name not in slow:
                entry.run(n, k, m, number, options.budget)
        best = min((e.times[number] for e in entries if number in e.times), default=0.0)
        slow |= {e.name for e in entries if e.times.get(number, 0) > HOPELESS * best}
    peers = [e for e in entries if e.worker.family != "qkern"]
    rows = []
    for entry in entries:
        row = cell(entry, n, k, m, limits, peaks)
        if entry not in peers:
            # Int8 is held against everything, float activations against those that keep them too.
            fair = [p for p in peers if entry.arithmetic in ("int8", p.arithmetic)]
            row |= ratio("", entry, fair) | ratio("_any", entry, peers)
        middle = {f: statistics.median(x[f] for x in limits) for f in limits[0]}
        rows.append(row | {"limits": middle})
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(options.threads, options.isa, options.dtype, options.compiled)
    isa = options.isa or _core.detected_isa()
    if isa not in PEAKS:
        raise SystemExit(f"There are limit loops for {', '.join(PEAKS)}, but not for {isa}.")
    workers = [Worker(family, settings) for family in options.families]
    facts = {
        "machine": machine(), "isa": isa, "threads": options.threads, "dtype": options.dtype,
        "compiled": options.compiled,
    }  # fmt: skip
    result = start(options, facts)
    result["absent"] = {w.family: w.absent for w in workers if w.absent}
    done = {(c["class"], c["n"], c["k"], c["m"]) for c in result["cells"]}
    entries = [Entry(worker, *peer) for worker in workers for peer in worker.peers]
    for (n, k), kind in ((s, c) for s in options.shapes for c in options.classes):
        group = [e for e in entries if e.kind == kind]
        missing = [m for m in options.rows if (kind, n, k, m) not in done]
        for m in missing if group else ():
            began = time.perf_counter()
            result["cells"] += measure_cell(group, n, k, m, options, PEAKS[isa])
            took = time.perf_counter() - began
            print(f"{n} x {k}, {kind}, M = {m}: {len(group)} entries, {took:.0f} s", flush=True)
            save(options.json, result)
        for worker in workers:
            worker.drop()
    for worker in workers:
        worker.stop()
    return result


def start(options: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """An empty result, or the one to go on with."""
    if options.resume and options.json.exists():
        old = json.loads(options.json.read_text())
        changed = [key for key, value in facts.items() if old.get(key) != value]
        if changed:
            raise SystemExit(f"{options.json} was taken with another {', '.join(changed)}.")
        return old
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return facts | {
        "commit": commit(), "versions": versions, "passes": options.passes,
        "last_level_cache": last_level_cache(), "rotation": rotation(), "absent": {}, "cells": [],
    }  # fmt: skip


def save(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    cells = ",\n  ".join(json.dumps(rounded(c)) for c in result["cells"])
    head = json.dumps({**result, "cells": []}, indent=1)
    unfinished.write_text(head.replace('"cells": []', f'"cells": [\n  {cells}\n ]') + "\n")
    unfinished.replace(path)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def names(known: Any):
    """Reads a comma-separated list of names out of `known`."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not in {', '.join(known)}")
        return found

    return read


def shapes(text: str) -> list[tuple[int, int]]:
    found = []
    for name in text.split(","):
        try:
            found.append(SHAPES[name] if name in SHAPES else tuple(map(int, name.split("x"))))
            _, _ = found[-1]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{name} is neither N x K as in 4096x11008 nor one of {', '.join(SHAPES)}"
            ) from None
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    default = [c for c in CLASSES if c not in ("int4-g64-a8", "reference")]
    add("--shapes", type=shapes, default=[SHAPES["4096"]], help="names of shapes.py, or NxK")
    add("--rows", type=lambda t: [int(m) for m in t.split(",")], default=[1, 16, 256])
    add("--classes", type=names(CLASSES), default=default, help=", ".join(CLASSES))
    add("--families", type=names(FAMILIES), default=list(FAMILIES), help=", ".join(FAMILIES))
    add("--threads", type=int, default=_core.get_threads())
    add("--passes", type=int, default=5)
    add("--budget", type=float, default=0.02, help="least seconds per entry and pass")
    add("--isa", choices=list(PEAKS), help="ours, and with avx2 the peers' that can be limited")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="ours")
    add("--compiled", action="store_true", help="also torchao with torch.compile: minutes more")
    add("--json", type=Path, help="where to save, after every cell")
    add("--resume", action="store_true", help="keep the cells that the file has")
    options = parser.parse_args()
    if options.resume and not options.json:
        parser.error("--resume needs --json, the file to go on with")
    return options


def main() -> None:
    options = arguments()
    began = time.perf_counter()
    result = run(options)
    print(f"\n{time.perf_counter() - began:.0f} s\n")
    print(report(result))


if __name__ == "__main__":
    main()
