# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` without a GPU: its arguments, its parts with commands that end, fail and hang,
and the report of a made-up run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

import gpu_check
import gpu_measure
import gpu_triton
import qkern

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check runs here")


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 0
    assert "skipped: no NVIDIA GPU is here" in capsys.readouterr().out


def test_arguments(tmp_path: Path) -> None:
    args = gpu_check.parse(["--skip-tests", "--only", "int8", "--out", str(tmp_path)])
    assert args.skip_tests and not args.skip_build
    assert (args.only, args.out, args.seconds) == ("int8", tmp_path, 520)
    measure = gpu_measure.parse(["measure", "rows.json", "--seconds", "3", "--only", "int8"])
    assert (measure.command, measure.file, measure.seconds) == ("measure", Path("rows.json"), 3)
    assert gpu_measure.parse(["small"]).command == "small"
    triton = gpu_triton.parse(["rows.json", "--tune", "0.25"])
    assert (triton.rows, triton.tune, triton.seconds) == (Path("rows.json"), 0.25, 500)
    for module in (gpu_check, gpu_measure, gpu_triton):
        with pytest.raises(SystemExit):
            module.parse(["--unknown"])


def test_wheels_are_installed_where_they_lie_and_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(gpu_check, "run", lambda name, command, *_, **__: asked.append(command))
    monkeypatch.setattr(
        gpu_check,
        "WHEELS",
        {"no_such_rival": ["no-such", "helper"], "other": ["other"], "json": ["no-such"]},
    )
    (tmp_path / "no_such-1.0-py3-none-any.whl").touch()
    gpu_check.install_wheels(tmp_path, tmp_path)
    assert [command[-3:] for command in asked] == [["--no-deps", "no-such", "helper"]]


def test_the_parts_fit_into_the_time() -> None:
    """Under nine minutes, with a minute for measurements where all others take their share."""
    seconds = gpu_check.parse([]).seconds
    assert seconds < 540
    assert sum(gpu_check.SHARES.values()) + 60 <= seconds


def test_commands_end_fail_and_are_cut_short(tmp_path: Path) -> None:
    programs = {
        "good": "print('3 passed')",
        "bad": "print('FAILED tests/gpu::test_x'); print('1 failed'); raise SystemExit(1)",
        "hung": "print('begun', flush=True); import time; time.sleep(60)",
    }
    commands = {name: [sys.executable, "-c", text] for name, text in programs.items()}
    found = gpu_check.run_all(commands, 1, tmp_path)
    assert found["good"] == {
        "status": 0,
        "seconds": found["good"]["seconds"],
        "last_line": "3 passed",
    }
    assert found["bad"]["status"] == 1
    assert found["bad"]["lines"] == ["FAILED tests/gpu::test_x"]
    assert found["hung"]["status"] == "cut short" and found["hung"]["last_line"] == "begun"
    assert found["hung"]["seconds"] < 30


PLAIN = Path(__file__).parent / "gpu" / "without_pytest.py"


def run_plainly(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Where `import pytest` fails unless something stands in for it."""
    code = "import runpy, sys; sys.modules['pytest'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(PLAIN), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_without_pytest_the_same_tests_run(cases_of_pytest: int) -> None:
    done = run_plainly()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{cases_of_pytest} skipped in ") and last.endswith("without pytest")
    assert done.stdout.count("no NVIDIA GPU is here") == cases_of_pytest


@pytest.fixture
def cases_of_pytest() -> int:
    """Cases that pytest finds in tests/gpu."""
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(PLAIN.parent)],
        capture_output=True,
        text=True,
        cwd=PLAIN.parents[2],
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # not the sources beside it
    )
    return sum("::" in line for line in done.stdout.splitlines())


def test_without_pytest_cases_pass_fail_and_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import pytest\n@pytest.fixture(autouse=True)\ndef cuda_backend():\n    yield\n"
    )
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "slow = pytest.param(2, marks=pytest.mark.slow)\n"
        "@pytest.mark.parametrize('a', (1, slow))\n"
        "@pytest.mark.parametrize('b, c', ((1, 2), (3, 4)))\n"
        "def test_sum(a, b, c):\n"
        "    assert (a, b) != (2, 3), 'two and three'\n"
        "    assert c == b + 1\n"
        "def test_skipped():\n"
        "    pytest.skip('not here')\n"
        "def test_raises():\n"
        "    with pytest.raises(ValueError, match='b.d'):\n"
        "        raise ValueError('a bad value')\n"
        "def test_raises_nothing():\n"
        "    with pytest.raises(ValueError):\n"
        "        pass\n"
    )
    (tmp_path / "test_two.py").write_text(
        "import pytest\nnothing = pytest.importorskip('no_such_module')\n"
    )
    done = run_plainly(str(tmp_path))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("2 failed, 4 passed, 2 skipped in ")
    assert "FAILED test_one.py::test_sum[3-4-2]: two and three" in lines
    assert "FAILED test_one.py::test_raises_nothing: ValueError was not raised" in lines
    assert "SKIPPED test_two.py: no_such_module is not installed" in lines


def test_tests_run_with_and_without_pytest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here every test is skipped, which is a failure of the check and its reason."""
    for path, runner in (("", "pytest"), (str(tmp_path), "without pytest")):
        monkeypatch.setenv("PYTHONPATH", path)
        (tmp_path / "pytest.py").write_text("raise ImportError")
        facts = gpu_check.test(120, tmp_path)
        assert facts["status"] == "no test ran" and "skipped" in facts["last_line"]
        assert facts["last_line"].endswith("without pytest") == (runner == "without pytest")
    assert "they run without it" in capsys.readouterr().out


def row(what: str, m: int, graph: float, **other: Any) -> dict[str, Any]:
    shape = other.get("shape", "8192")
    return {
        "what": what, "shape": shape, "n": 8192, "k": 8192, "m": m, "graph_us": graph,
        "plain_us": graph + 3, "gb_per_s": 3000.0, "tflops": 2 * m * 8192 * 8192 / graph / 1e6,
        "target": gpu_measure.target(what, shape, m), **other,
    }  # fmt: skip


def made_up(**parts: Any) -> dict[str, Any]:
    good = {"status": 0, "seconds": 30.0, "last_line": "done"}
    return {
        "device": "NVIDIA H200 (made up)",
        "date": "2026-01-01",
        "torch": "2.11.0",
        "cuda": "13.0",
        "commit": "abc1234",
        "build": good,
        "tests": {**good, "last_line": "321 passed in 60 s"},
        "sanitizer": dict.fromkeys(gpu_check.SANITIZERS, good),
        "bench_run": good,
        "bench": [
            row("cublas bfloat16", 1, 35.0),
            row("cublas bfloat16", 1024, 200.0),
            row("int4-g128", 1, 11.0),
            row("int4-g128", 1024, 250.0),
            row("int8-a8", 1024, 100.0),
            row("copy bfloat16", 1, 70.0),
            row("dequantize int4-g128", 1, 45.0, gb_per_s=2400.0),
            row("int4-g128", 1, 6.0, shape="llama-8b-qkv"),
        ],
        **parts,
    }


def test_the_report_of_a_good_run(tmp_path: Path) -> None:
    report = made_up()
    stem = gpu_check.write(report, tmp_path / "results")
    assert stem.name == "gpu_check_nvidia_h200_made_up_"
    assert json.loads(stem.with_suffix(".json").read_text()) == report
    text = stem.with_suffix(".md").read_text()
    assert "- tests: 0 (30.0 s) 321 passed in 60 s" in text
    assert "- compute-sanitizer initcheck: 0 (30.0 s) done" in text
    assert "all of it: passed" in text
    for line in (
        "| int4-g128 | 8192 | 1 | 11.0 us | <= 11.5 us |",
        "| int4-g128 | 8192 | 1024 | 80% | >= 95 % of cuBLAS |",
        "| int8-a8 | 8192 | 1024 | 1374 TOPS | >= 1250 TOPS |",
        "| dequantize int4-g128 | 8192 | 1 | 80% | >= 85 % of copy |",
        "| int4-g128 | llama-8b-qkv | 1 | 6.0 us | <= 6.4 us |",
        "| M | 1 | 1024 |",
        "| int4-g128 | 11.0 (14.0) | 250.0 (253.0) |",
        "| int8-a8 |  | 100.0 (103.0) |",
    ):
        assert line in text.splitlines(), line


def test_the_report_of_a_bad_run() -> None:
    bad = {"status": 1, "seconds": 9.0, "last_line": "1 failed", "lines": ["FAILED test_x"]}
    for parts in (
        {"tests": bad},
        {"sanitizer": {"racecheck": bad}},
        {"bench_run": bad, "bench": []},
        {"tests": {"status": "no test ran", "seconds": 1.0, "last_line": "300 skipped"}},
    ):
        report = made_up(**parts)
        assert not gpu_check.passed(report)
        assert "all of it: FAILED" in gpu_check.summary(report)
    assert "      FAILED test_x" in gpu_check.summary(made_up(tests=bad)).splitlines()
    cut = {"status": "cut short", "seconds": 100.0, "last_line": ""}
    assert gpu_check.passed(made_up(sanitizer={"racecheck": cut}))
    only_built = {key: made_up()[key] for key in ("device", "date", "torch", "cuda", "commit")}
    assert gpu_check.passed(only_built) and "targets" not in gpu_check.summary(only_built)


def test_what_is_measured_and_sanitized_are_formats() -> None:
    for fmt in (*gpu_measure.FORMATS, *gpu_measure.SMALL_FORMATS, *gpu_measure.TRITON_FORMATS):
        assert str(qkern.parse_format(fmt)) == fmt
    measured = set(gpu_measure.FORMATS)
    assert {what for what, _ in (*gpu_measure.MICROSECONDS, *gpu_measure.TOPS)} <= measured
    assert set(gpu_measure.LAYER_MICROSECONDS) <= {name for name, *_ in gpu_measure.SHAPES}


def test_what_is_tuned_and_measured_in_triton(capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell of the targets once, the decisions that decode needs first; every rival known."""
    assert gpu_triton.main(["rows.json", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    measured = [line for line in lines if line.startswith("measure ")]
    assert len(measured) == len(set(measured)) == 3 * 5 * len(gpu_measure.ALL_M)
    tuned = [line for line in lines if line.startswith("tune ")]
    assert len(tuned) == len(set(tuned)) and all(line.endswith(" m16") for line in tuned[:15])
    assert "grad" in tuned[-1]
    assert sorted(gpu_triton.ALL_M) == sorted(gpu_measure.ALL_M)
    assert set(gpu_triton.RIVAL_OF) == set(gpu_triton.FORMATS) <= set(gpu_measure.FORMATS)


def test_triton_is_held_against_its_targets() -> None:
    def cell(what: str, m: int, graph: float, gb: float = 3000.0) -> dict[str, Any]:
        return row(what, m, graph, shape="8192x8192", gb_per_s=gb)

    rows = [
        cell("triton int4-g128", 1, 14.0, gb=2400.0),
        cell("cuda int4-g128", 1, 11.0),
        cell("gemlite int4-g128", 1, 12.0),
        cell("torch int4pack", 1, 20.0),
        cell("triton codebook4", 1, 28.0, gb=1200.0),
        cell("triton int8", 1024, 220.0),
        cell("cublas bfloat16", 1024, 200.0),
    ]
    lines = gpu_triton.summary(rows, "NVIDIA H200").splitlines()
    for line in (
        "| int4-g128 | 1 | 14.0 | 11.0 | gemlite 12.0, torch 20.0 |  | 0.86 x gemlite's speed, "
        "1 wanted: NO; 50% of the byte limit, 45% wanted: yes |",
        "| codebook4 | 1 | 28.0 |  |  |  | 25% of the byte limit, 45% wanted: NO; 2.00 x the time "
        "of int4, 1.5 allowed: NO |",
        "| int8 | 1024 | 220.0 |  |  | 200.0 | 91% of cuBLAS, 85% wanted: yes |",
    ):
        assert line in lines, lines
    report = made_up(triton=rows, triton_run={"status": 0, "seconds": 9.0, "last_line": ""})
    assert "## Triton kernels: NVIDIA H200 (made up)" in gpu_check.summary(report)
    report["triton_run"] = {"status": "cut short", "seconds": 9.0, "last_line": "row"}
    assert not gpu_check.passed(report)
    assert "- Triton kernels: cut short" in gpu_check.summary(report)
