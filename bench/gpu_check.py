# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: builds the CUDA kernels, tests, sanitizes and measures them, in one command.

    python bench/gpu_check.py [--skip-build] [--skip-tests] [--skip-sanitizer] [--skip-bench]
                              [--only FORMAT] [--seconds N]

Needs a machine with an NVIDIA GPU (8.0 or newer), nvcc, torch with CUDA, pybind11,
scikit-build-core, cmake and ninja; no network. Without a GPU it says so and ends with status 0.
Every part has a share of --seconds (default 520); a part that runs out of it is cut short and the
summary says so.

Writes bench/results/gpu_check_<device>.json and .md. Times: median of CUDA-graph replays, weights
rotated over more than the L2 cache and the cache flushed in between ("graph"), and of plain
launches ("plain", what a caller without graphs sees).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

# name, N, K; the first is measured at every M.
SHAPES = (
    ("8192", 8192, 8192),
    ("llama-8b-qkv", 6144, 4096),
    ("llama-8b-o", 4096, 4096),
    ("llama-8b-gate-up", 28672, 4096),
    ("llama-8b-down", 4096, 14336),
)
ALL_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
FEW_M = (1, 16)
FORMATS = (
    "int4-g128", "int8", "codebook4-tensor-g64", "codebook4", "codebook3", "nf4", "int8-a8",
    "int4-g128-a8",
)  # fmt: skip
# Microseconds wanted on an H200, 8192 x 8192, graph replay, cold cache: (format, M).
TARGETS = {
    ("int4-g128", 1): 11.5,
    ("int4-g128", 16): 11.5,
    ("int4-g128", 32): 13,
    ("int4-g128", 64): 16,
    ("int4-g128", 128): 28,
    ("int8", 1): 20,
    ("int4-g128-a8", 1): 11.5,
    ("codebook3", 1): 10,
}
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def reason_to_skip() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return "no NVIDIA GPU is here"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA kernels need compute capability 8.0"
    return None


def run(command: list[str], seconds: float, log: Path, **options: Any) -> dict[str, Any]:
    """A command under a time limit; its output goes to a file."""
    begin = time.monotonic()
    with log.open("w") as out:
        try:
            status: int | str = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, timeout=max(seconds, 5), **options
            ).returncode
        except subprocess.TimeoutExpired:
            status = "cut short"
    tail = log.read_text(errors="replace").strip().splitlines()[-1:]
    took = round(time.monotonic() - begin, 1)
    print(f"{log.stem}: {status} in {took} s: {''.join(tail)[:200]}", flush=True)
    return {"status": status, "seconds": took, "last_line": "".join(tail)[:300]}


def build(seconds: float, logs: Path, arch: str) -> dict[str, Any]:
    """An editable install with the CUDA kernels for this device only."""
    command = [
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e",
        str(ROOT),
        "-C", "cmake.define.QKERN_CUDA=ON",
        "-C", f"cmake.define.QKERN_CUDA_ARCHITECTURES={arch}-real",
    ]  # fmt: skip
    environment = dict(os.environ)
    if shutil.which("nvcc") is None and Path("/usr/local/cuda/bin/nvcc").exists():
        environment["PATH"] = "/usr/local/cuda/bin:" + environment.get("PATH", "")
        environment["CUDACXX"] = "/usr/local/cuda/bin/nvcc"
    return run(command, seconds, logs / "build.log", env=environment, cwd=ROOT)


def sanitize(seconds: float, logs: Path) -> dict[str, Any]:
    """Small shapes of every kernel under each tool of compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if tool is None:
        print("sanitizer: compute-sanitizer was not found")
        return {"status": "compute-sanitizer was not found"}
    found = {}
    for name in SANITIZERS:
        options = ["--racecheck-report", "analysis"] if name == "racecheck" else []
        command = [
            tool, "--tool", name, *options, "--error-exitcode", "9", "--kernel-regex",
            "kns=qkern", sys.executable, __file__, "--small-shapes",
        ]  # fmt: skip
        # initcheck must see torch's own allocations as fresh ones.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found[name] = run(command, seconds / 4, logs / f"{name}.log", env=environment, cwd=ROOT)
    return found


def small_shapes() -> int:
    """What runs under the sanitizer: every kernel, every shape of it, with tails and splits."""
    import torch

    import qkern

    formats = ("int4-g32-asym", "int8", "int3-g64", "int2-g32", "codebook4", "codebook3",
               "codebook4-tensor", "nvfp4", "int8-a8", "int4-g64-a8g")  # fmt: skip
    with qkern.override(backend="cuda"):
        for fmt in formats:
            for m, n, k in ((1, 65, 300), (13, 70, 2100), (30, 64, 256), (70, 130, 330)):
                qt = qkern.quantize(torch.randn(n, k), fmt).to("cuda")
                for dtype in (torch.float16, torch.bfloat16):
                    y = qkern.linear(torch.randn(m, k, device="cuda").to(dtype), qt)
                    assert y.isfinite().all(), (fmt, m, n, k)
                qkern.dequantize(qt, torch.float16)
        torch.cuda.synchronize()
    print("small shapes: done")
    return 0


# ---- measurements ----


class Timer:
    """Median microseconds of a list of calls that do the same on different weights."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.cache = cache
        self.flush = torch.empty(max(256 << 20, 4 * cache), dtype=torch.uint8, device="cuda")

    def copies(self, nbytes: int) -> int:
        """Weights enough to exceed the cache twice, at most eight."""
        return max(2, min(8, -(-2 * self.cache // max(nbytes, 1))))

    def graph(self, calls: list[Any], repeats: int = 12) -> float:
        torch = self.torch
        graphs = []
        for call in calls:
            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            graphs.append(graph)
        return self._median([graph.replay for graph in graphs], repeats)

    def plain(self, calls: list[Any], repeats: int = 12) -> float:
        for call in calls:
            call()
        return self._median(calls, repeats)

    def _median(self, calls: list[Any], repeats: int) -> float:
        torch = self.torch
        times = []
        for i in range(repeats * 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            begin.record()
            calls[i % len(calls)]()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times[repeats // 2 :])


def rivals(timer: Timer, m: int, n: int, k: int) -> dict[str, list[Any]]:
    """torch's own ways, as lists of calls on different weights; those it refuses are left out."""
    torch = timer.torch
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    count = timer.copies(n * k * 2)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    found = {"cublas bfloat16": [lambda w=w: torch.matmul(x, w.T) for w in weights]}
    try:
        quarters = [
            torch._convert_weight_to_int4pack(
                torch.randint(0, 255, (n, k // 2), device="cuda", dtype=torch.uint8), 8
            )
            for _ in range(timer.copies(n * k // 2))
        ]
        scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        if m <= 64:  # far slower than dense above
            torch._weight_int4pack_mm(x, quarters[0], 128, scales)
            found["torch int4pack"] = [
                lambda q=q: torch._weight_int4pack_mm(x, q, 128, scales) for q in quarters
            ]
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        print(f"torch int4pack: {str(error).splitlines()[0][:120]}")
    if m > 16:
        xi = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
        bytes_ = [
            torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
            for _ in range(timer.copies(n * k))
        ]
        found["torch _int_mm"] = [lambda w=w: torch._int_mm(xi, w.T) for w in bytes_]
    return found


def random_weight(fmt: str, n: int, k: int) -> Any:
    """A weight of random codes: fitting a real one would take longer than all measurements."""
    import torch

    import qkern

    format_ = qkern.parse_format(fmt)
    parts: dict[str, Any] = {}
    for name, part in format_.parts(n, k).items():
        kind = getattr(torch, part.dtypes[0])
        if name == "codes":
            parts[name] = torch.randint(0, 256, part.shape, dtype=torch.uint8, device="cuda")
        elif kind == torch.uint8:
            parts[name] = torch.randint(1, 8, part.shape, dtype=torch.uint8, device="cuda")
        else:
            parts[name] = (torch.rand(part.shape, device="cuda") * 0.01 + 0.001).to(kind)
        if name == "codebook" and format_.activations != "float":
            parts[name] = torch.randint(-127, 128, part.shape, device="cuda").float()
    return qkern.QuantizedTensor.from_parts(format_, (n, k), check=False, **parts)


def measure(seconds: float, only: str | None) -> list[dict[str, Any]]:
    import torch

    import qkern

    timer = Timer()
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    formats = (only,) if only else FORMATS

    def record(
        name: str, shape: tuple[str, int, int], m: int, calls: list[Any], bits: float
    ) -> None:
        graph, plain = timer.graph(calls), timer.plain(calls)
        _, n, k = shape
        row = {
            "what": name, "shape": shape[0], "n": n, "k": k, "m": m, "graph_us": round(graph, 2),
            "plain_us": round(plain, 2), "gb_per_s": round(n * k * bits / 8 / graph / 1e3, 1),
            "tflops": round(2 * m * n * k / graph / 1e6, 1),
        }  # fmt: skip
        if shape[0] == "8192" and (name, m) in TARGETS:
            row["target_us"] = TARGETS[name, m]
        rows.append(row)
        print(row, flush=True)

    with qkern.override(backend="cuda"):
        for shape in SHAPES:
            _, n, k = shape
            ms = ALL_M if shape[0] == "8192" else FEW_M
            weights = {}
            for fmt in formats:
                one = random_weight(fmt, n, k)
                more = timer.copies(one.nbytes) - 1
                weights[fmt] = [one, *(random_weight(fmt, n, k) for _ in range(more))]
            for m in ms:
                if time.monotonic() - begin > seconds:
                    print("measurements: out of time, the rest is left out")
                    return rows
                for name, calls in rivals(timer, m, n, k).items():
                    bits = {"cublas bfloat16": 16, "torch int4pack": 4.25}.get(name, 8)
                    record(name, shape, m, calls, bits)
                for fmt, copies in weights.items():
                    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                    calls = [lambda w=w, x=x: qkern.linear(x, w) for w in copies]
                    record(fmt, shape, m, calls, copies[0].bits_per_weight)
            for fmt, copies in weights.items():
                if shape[0] == "8192":
                    calls = [lambda w=w: qkern.dequantize(w, torch.bfloat16) for w in copies]
                    record(f"dequantize {fmt}", shape, 1, calls, copies[0].bits_per_weight + 16)
            del weights
            torch.cuda.empty_cache()
    return rows


# ---- the report ----


def summary(report: dict[str, Any]) -> str:
    lines = [f"# GPU check: {report['device']}", ""]
    lines += [f"- {key}: {report[key]}" for key in ("date", "torch", "cuda", "commit")]
    for part in ("build", "tests"):
        if part in report:
            facts = report[part]
            lines.append(f"- {part}: {facts['status']} ({facts['seconds']} s) {facts['last_line']}")
    for name, facts in report.get("sanitizer", {}).items():
        if isinstance(facts, dict):
            lines.append(f"- compute-sanitizer {name}: {facts['status']} {facts['last_line']}")
    rows = report.get("bench", [])
    for shape in dict.fromkeys(row["shape"] for row in rows):
        chosen = [row for row in rows if row["shape"] == shape]
        ms = list(dict.fromkeys(row["m"] for row in chosen))
        lines += ["", f"## {shape}: microseconds, graph replay (plain launch)", ""]
        lines.append("| M | " + " | ".join(map(str, ms)) + " |")
        lines.append("| --- " * (len(ms) + 1) + "|")
        for what in dict.fromkeys(row["what"] for row in chosen):
            cells = []
            for m in ms:
                row = next((r for r in chosen if r["what"] == what and r["m"] == m), None)
                text = "" if row is None else f"{row['graph_us']:.1f} ({row['plain_us']:.1f})"
                if row and "target_us" in row:
                    text += f", target {row['target_us']}"
                cells.append(text)
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    return done.stdout.strip() or "unknown"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for part in ("build", "tests", "sanitizer", "bench"):
        parser.add_argument(f"--skip-{part}", action="store_true")
    parser.add_argument("--only", metavar="FORMAT", help="measure one format")
    parser.add_argument("--seconds", type=float, default=520, help="for everything together")
    # What the command starts as processes of its own:
    parser.add_argument("--small-shapes", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    reason = reason_to_skip()
    if reason is not None:
        print(f"skipped: {reason}, so the GPU check did not run")
        return 0
    if args.small_shapes:
        return small_shapes()
    if args.measure:
        args.measure.write_text(json.dumps(measure(args.seconds, args.only)))
        return 0
    import torch

    begin = time.monotonic()
    left = lambda: args.seconds - (time.monotonic() - begin)  # noqa: E731
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    name = torch.cuda.get_device_name(0)
    RESULTS.mkdir(parents=True, exist_ok=True)
    logs = ROOT / "bench" / "out"
    logs.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": name,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
    }
    ok = True
    if not args.skip_build:
        report["build"] = build(min(180, left()), logs, arch)
        ok = report["build"]["status"] == 0
    if ok and not args.skip_tests:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "tests/gpu"]
        report["tests"] = run(command, min(150, left() - 120), logs / "tests.log", cwd=ROOT)
        ok = report["tests"]["status"] == 0
    if ok and not args.skip_sanitizer:
        report["sanitizer"] = sanitize(min(160, left() - 90), logs)
        found = [f for f in report["sanitizer"].values() if isinstance(f, dict)]
        ok = all(f["status"] in (0, "cut short") for f in found)
    if not args.skip_bench and report.get("build", {}).get("status", 0) == 0:
        # A process of its own: this one began before the package was installed.
        rows = logs / "bench.json"
        rows.write_text("[]")
        seconds = left() - 15
        command = [sys.executable, __file__, "--measure", str(rows), "--seconds", str(seconds)]
        command += ["--only", args.only] if args.only else []
        facts = run(command, seconds + 10, logs / "bench.log", cwd=ROOT)
        report["bench"] = json.loads(rows.read_text())
        if facts["status"] != 0:
            report["bench_error"] = facts
            ok = False
    stem = RESULTS / ("gpu_check_" + "_".join(name.lower().split()))
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = summary(report)
    stem.with_suffix(".md").write_text(text)
    print(text)
    print("GPU check:", "passed" if ok else "FAILED")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
