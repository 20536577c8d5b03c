# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: builds the CUDA kernels, tests, sanitizes and measures them, in one command.

    python bench/gpu_check.py [--skip-build] [--skip-tests] [--skip-sanitizer] [--skip-bench]
                              [--skip-triton] [--only FORMAT] [--seconds N] [--out FOLDER]
                              [--wheels FOLDER]

Needs a machine with an NVIDIA GPU (8.0 or newer), nvcc, torch with CUDA, pybind11,
scikit-build-core, cmake and ninja; no network. Without a GPU it says so and ends with status 0.
pytest and rivals (bitsandbytes, humming) are installed from --wheels (default bench/wheels, which
`make gpu-wheels` fills where there is a network) where they are missing. Without pytest the tests
run by tests/gpu/without_pytest.py; a rival that is not there is not measured.

Every part has a share of --seconds (default 520); one that runs out of it is cut short, and the
summary says so. Writes gpu_check_<device>.json and .md to --out (default bench/results), and the
logs of all parts to bench/out, or beside the report where --out is given. How times are taken is
said in bench/gpu_measure.py. The Triton kernels are tuned and measured last (bench/gpu_triton.py):
what was found is in triton_configs.json beside the report, and a next run with the same --out goes
on from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_triton

ROOT = Path(__file__).resolve().parents[1]
MEASURE = ROOT / "bench" / "gpu_measure.py"
TRITON = ROOT / "bench" / "gpu_triton.py"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SHARES = {"build": 170.0, "tests": 150.0, "sanitizer": 110.0}  # seconds at most
WHEELS = {  # of a module: its package, and what else it imports that may be missing
    "pytest": ["pytest"],
    "bitsandbytes": ["bitsandbytes"],
    "humming": ["humming-kernels", "tabulate", "tqdm", "safetensors"],
}
KEPT_LINES = 40  # of what failed, in the report

Facts = dict[str, Any]


def reason_to_skip() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return "no NVIDIA GPU is here"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA kernels need compute capability 8.0"
    return None


# ---- parts ----


def run_all(commands: dict[str, list[str]], seconds: float, logs: Path, **options: Any) -> Facts:
    """Commands at the same time, under one time limit; each writes into its own log."""
    begin = time.monotonic()
    running = {}
    for name, command in commands.items():
        out = (logs / f"{name}.log").open("w")
        running[name] = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            **options,
        )
        out.close()
    found: Facts = {}
    for name, process in running.items():
        status: int | str
        try:
            status = process.wait(max(seconds - (time.monotonic() - begin), 5))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
            status = "cut short"
        found[name] = outcome(name, status, time.monotonic() - begin, logs / f"{name}.log")
    return found


def run(name: str, command: list[str], seconds: float, logs: Path, **options: Any) -> Facts:
    return run_all({name: command}, seconds, logs, **options)[name]


def outcome(name: str, status: int | str, seconds: float, log: Path) -> Facts:
    """What the report keeps of a log: its last line, and where it failed the lines that say how."""
    lines = log.read_text(errors="replace").strip().splitlines()
    last = lines[-1][:300] if lines else ""
    facts: Facts = {"status": status, "seconds": round(seconds, 1), "last_line": last}
    if status != 0:
        telling = re.compile(r"FAILED|ERROR|[Ee]rror\b|Traceback|=========")
        facts["lines"] = [line[:300] for line in lines if telling.search(line)][:KEPT_LINES]
        facts["lines"] = facts["lines"] or [line[:300] for line in lines[-KEPT_LINES:]]
    print(f"{name}: {status} in {seconds:.0f} s: {last}", flush=True)
    return facts


def install_wheels(folder: Path, logs: Path) -> None:
    """What is missing and lies there; of rivals not what they ask for, as torch is there."""
    for module, packages in WHEELS.items():
        wheel = packages[0].replace("-", "_")
        if importlib.util.find_spec(module) is None and list(folder.glob(f"{wheel}-*.whl")):
            command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links"]
            command += [str(folder), *([] if module == "pytest" else ["--no-deps"]), *packages]
            run(f"wheel-{module}", command, 60, logs, env=pip_environment())


def pip_environment() -> dict[str, str]:
    """The interpreter may be the system's own."""
    return {**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1"}


def build(seconds: float, logs: Path, arch: str) -> Facts:
    """An editable install with the CUDA kernels for this device only."""
    command = [
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e",
        str(ROOT),
        "-C", "cmake.define.QKERN_CUDA=ON",
        "-C", f"cmake.define.QKERN_CUDA_ARCHITECTURES={arch}-real",
    ]  # fmt: skip
    environment = pip_environment()
    if shutil.which("nvcc") is None and Path("/usr/local/cuda/bin/nvcc").exists():
        environment["PATH"] = "/usr/local/cuda/bin:" + environment.get("PATH", "")
        environment["CUDACXX"] = "/usr/local/cuda/bin/nvcc"
    return run("build", command, seconds, logs, env=environment)


def test(seconds: float, logs: Path) -> Facts:
    command = [
        sys.executable, "-m", "pytest", "-q", "--maxfail", "30", "--tb", "short",
        "-p", "no:cacheprovider",
        # The options of pyproject.toml ask for plugins that need not be here.
        "-o", "addopts=--import-mode=importlib --strict-markers -ra",
        "tests/gpu",
    ]  # fmt: skip
    # In a process of its own: a wheel installed a moment ago is not seen by this one.
    if subprocess.run([sys.executable, "-c", "import pytest"], capture_output=True).returncode:
        print("tests: pytest was not found in this Python or in --wheels; they run without it")
        command = [sys.executable, "tests/gpu/without_pytest.py"]
    # `-m` puts the current folder first, where qkern lies as sources without its compiled core.
    facts = run("tests", command, seconds, logs, env={**os.environ, "PYTHONSAFEPATH": "1"})
    if facts["status"] == 0 and " passed" not in facts["last_line"]:
        facts["status"] = "no test ran"
    return facts


def sanitize(seconds: float, logs: Path) -> Facts:
    """Small shapes of every kernel under all tools of compute-sanitizer, at the same time."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if tool is None:
        print("sanitizer: compute-sanitizer was not found")
        return {name: {"status": "not found", "last_line": ""} for name in SANITIZERS}
    commands = {}
    for name in SANITIZERS:
        options = ["--racecheck-report", "analysis"] if name == "racecheck" else []
        commands[name] = [
            tool, "--tool", name, *options, "--error-exitcode", "9", "--kernel-regex",
            "kns=qkern", sys.executable, str(MEASURE), "small",
        ]  # fmt: skip
    # initcheck must see torch's own allocations as fresh ones.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return run_all(commands, seconds, logs, env=environment)


def measure(seconds: float, logs: Path, only: str | None) -> tuple[list[Facts], Facts]:
    rows = logs / "bench.json"
    rows.write_text("[]")
    command = [sys.executable, str(MEASURE), "measure", str(rows), "--seconds", str(seconds)]
    command += ["--only", only] if only else []
    facts = run("bench", command, seconds + 20, logs)
    return json.loads(rows.read_text()), facts


def measure_triton(seconds: float, logs: Path, folder: Path) -> tuple[list[Facts], Facts]:
    rows = logs / "triton.json"
    rows.write_text("[]")
    command = [sys.executable, str(TRITON), str(rows), "--seconds", str(seconds)]
    command += ["--table", str(folder / "triton_configs.json")]
    facts = run("triton", command, seconds + 20, logs)
    return json.loads(rows.read_text()), facts


# ---- the report ----


def passed(report: Facts) -> bool:
    """Everything that ran ended well; a sanitizer that was cut short found nothing so far."""
    ended = [
        report[part]["status"] == 0
        for part in ("build", "tests", "bench_run", "triton_run")
        if part in report
    ]
    sanitized = [
        facts["status"] in (0, "cut short") for facts in report.get("sanitizer", {}).values()
    ]
    return all(ended) and all(sanitized)


def ratios(row: Facts, rows: list[Facts]) -> str:
    """The measured figure beside its target, in the target's own unit."""
    target = row["target"]
    if target.endswith("us"):
        figure = f"{row['graph_us']:.1f} us"
    elif target.endswith("TOPS"):
        figure = f"{row['tflops']:.0f} TOPS"
    else:
        what = "copy bfloat16" if target.endswith("copy") else "cublas bfloat16"
        field = "gb_per_s" if target.endswith("copy") else "tflops"
        same = [
            r for r in rows
            if r["what"] == what and r["shape"] == row["shape"]
            and (field == "gb_per_s" or r["m"] == row["m"])
        ]  # fmt: skip
        figure = f"{row[field] / same[0][field]:.0%}" if same else "not measured"
    return f"| {row['what']} | {row['shape']} | {row['m']} | {figure} | {target} |"


def summary(report: Facts) -> str:
    lines = [f"# GPU check: {report['device']}", ""]
    lines += [f"- {key}: {report[key]}" for key in ("date", "torch", "cuda", "commit")]
    parts = {name: report[name] for name in ("build", "tests") if name in report}
    parts |= {f"compute-sanitizer {n}": f for n, f in report.get("sanitizer", {}).items()}
    if report.get("bench_run", {}).get("status", 0) != 0:
        parts["measurements"] = report["bench_run"]
    if report.get("triton_run", {}).get("status", 0) != 0:
        parts["Triton kernels"] = report["triton_run"]
    for name, facts in parts.items():
        spent = f" ({facts['seconds']} s)" if "seconds" in facts else ""
        lines.append(f"- {name}: {facts['status']}{spent} {facts['last_line']}".rstrip())
        lines += [f"      {line}" for line in facts.get("lines", ())]
    lines.append(f"- all of it: {'passed' if passed(report) else 'FAILED'}")
    rows = report.get("bench", [])
    held = [row for row in rows if row.get("target")]
    if held:
        lines += ["", "## Against the targets", "", "| what | layer | M | measured | target |"]
        lines += ["| --- | --- | --- | --- | --- |", *(ratios(row, rows) for row in held)]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        chosen = [row for row in rows if row["shape"] == shape]
        ms = sorted({row["m"] for row in chosen})
        lines += ["", f"## {shape}: microseconds, graph replay (plain launch)", ""]
        lines.append("| M | " + " | ".join(map(str, ms)) + " |")
        lines.append("| --- " * (len(ms) + 1) + "|")
        for what in dict.fromkeys(row["what"] for row in chosen):
            by_m = {row["m"]: row for row in chosen if row["what"] == what}
            cells = [
                f"{by_m[m]['graph_us']:.1f} ({by_m[m]['plain_us']:.1f})" if m in by_m else ""
                for m in ms
            ]
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    if report.get("triton"):
        lines += ["", gpu_triton.summary(report["triton"], report["device"])]
    return "\n".join(lines) + "\n"


def write(report: Facts, folder: Path) -> Path:
    """The report as JSON and as text; the path without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / ("gpu_check_" + re.sub(r"\W+", "_", report["device"].lower()))
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(summary(report))
    return stem


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    return done.stdout.strip() or "unknown"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for part in ("build", "tests", "sanitizer", "bench", "triton"):
        parser.add_argument(f"--skip-{part}", action="store_true")
    parser.add_argument("--only", metavar="FORMAT", help="measure one format")
    parser.add_argument("--seconds", type=float, default=520, help="for everything together")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the report and the logs")
    parser.add_argument("--wheels", type=Path, default=ROOT / "bench" / "wheels")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    reason = reason_to_skip()
    if reason is not None:
        print(f"skipped: {reason}, so the GPU check did not run")
        return 0
    import torch

    begin = time.monotonic()

    def share(part: str, kept: float) -> float:
        """Seconds for a part; `kept` stay for those behind it."""
        return min(SHARES[part], args.seconds - (time.monotonic() - begin) - kept)

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    folder = args.out or ROOT / "bench" / "results"
    logs = args.out / "logs" if args.out else ROOT / "bench" / "out"
    logs.mkdir(parents=True, exist_ok=True)
    report: Facts = {
        "device": torch.cuda.get_device_name(0),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
    }
    install_wheels(args.wheels, logs)
    if not args.skip_build:
        report["build"] = build(share("build", 60), logs, arch)
        write(report, folder)
    built = report.get("build", {}).get("status", 0) == 0
    if built and not args.skip_tests:
        report["tests"] = test(share("tests", 120), logs)
        write(report, folder)
    if built and not args.skip_sanitizer:
        report["sanitizer"] = sanitize(share("sanitizer", 90), logs)
        write(report, folder)
    if built and not args.skip_bench:
        left = args.seconds - (time.monotonic() - begin) - 25
        left *= 1 if args.skip_triton or args.only else 0.5
        report["bench"], report["bench_run"] = measure(max(left, 20), logs, args.only)
        write(report, folder)
    if built and not args.skip_triton and not args.only:
        left = args.seconds - (time.monotonic() - begin) - 25
        report["triton"], report["triton_run"] = measure_triton(max(left, 20), logs, folder)
    stem = write(report, folder)
    print(stem.with_suffix(".md").read_text())
    print("GPU check:", "passed" if passed(report) else "FAILED", f"({stem}.md)")
    return 0 if passed(report) else 1


if __name__ == "__main__":
    sys.exit(main())
