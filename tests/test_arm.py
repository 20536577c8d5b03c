# SPDX-License-Identifier: Apache-2.0
"""64-bit Arm, cross-compiled and emulated: the fast subset of tests/native/arm.py. All levels are
`make test-arm`."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent / "native" / "arm.py"


@pytest.fixture(scope="module")
def arm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("arm", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["arm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


LOOP = """
0000000000000000 <void qkern::(anonymous namespace)::add_tile<4>(long)>:
   0:\tsub\tsp, sp, #0x10
   4:\tldr\tq0, [x0], #16
   8:\tsdot\tv1.4s, v0.16b, v2.4b[0]
   c:\tldr\tq3, [{base}]
  10:\tb.ne\t4 <void qkern::(anonymous namespace)::add_tile<4>(long)+0x4>  // b.any
  14:\tret
"""


def test_loops_and_spills_are_found(arm: ModuleType) -> None:
    (code,) = arm.functions(LOOP.format(base="x1")).values()
    (loop,) = arm.straight_loops(code)
    assert [mnemonic for _, mnemonic, _ in loop] == ["ldr", "sdot", "ldr", "b.ne"]
    assert arm.check_loops("other", LOOP.format(base="x1")) == []
    (problem,) = arm.check_loops("other", LOOP.format(base="sp, #8"))
    assert "uses the stack" in problem
    problems = arm.check_loops("linear_w4a8d_neondot", LOOP.format(base="x1"))
    assert len(problems) == 3
    assert all("no such loop" in text for text in problems)


@pytest.mark.parametrize(
    ("level", "line", "above"),
    [
        ("neon", "   8:\tsdot\tv1.4s, v0.16b, v2.4b[0]", True),
        ("neondot", "   8:\tsdot\tv1.4s, v0.16b, v2.4b[0]", False),
        ("neondot", "   8:\tsmmla\tv1.4s, v0.16b, v2.16b", True),
        ("neoni8mm", "   8:\tsmmla\tv1.4s, v0.16b, v2.16b", False),
        ("neoni8mm", "   8:\tfmla\tv1.8h, v0.8h, v2.8h", True),
        ("neon", "   8:\tfmla\tv1.4s, v0.4s, v2.s[0]", False),
        ("neondot", "   8:\tldaddal\tw1, w0, [x2]", True),
        ("neon", "   8:\tcasal\tw1, w0, [x2]", True),
        ("neon", "   8:\tldar\tw1, [x2]", False),
        ("neon", "   8:\tbfi\tw1, w0, #3, #4", False),
        ("neon", "   8:\tcsel\tw1, w0, w2, eq", False),
    ],
)
def test_instructions_above_a_level_are_found(
    arm: ModuleType, level: str, line: str, above: bool
) -> None:
    assert bool(arm.FORBIDDEN[level].search(line)) == above


def test_a_level_that_did_not_run_is_found(arm: ModuleType) -> None:
    names = arm.registry()
    assert all(len(names[level]) > 10 for level in arm.LEVELS)
    text = "qkern 0, detected {}, in force x\n" + "total  1  ok  0123456789abcdef\n"
    lines = "".join(
        f"{name:36} {24:9}  ok       0123456789abcdef\n"
        for level in ("scalar", "neon", "neondot")
        for name in sorted(names[level])
    )
    scalar = dict.fromkeys(names["scalar"], "0123456789abcdef")
    assert arm.check_run("neondot", text.format("neondot") + lines, scalar) == []
    assert "is taken for neon, not" in arm.check_run("neondot", text.format("neon"), {})[0]
    assert any("without its" in p for p in arm.check_run("neon", text.format("neon") + lines, {}))
    other = {"linear_any_a8d_scalar": "f" * 16}
    (problem,) = arm.check_run("neondot", text.format("neondot") + lines, other)
    assert "the digest of linear_any_a8d_scalar" in problem
    without = lines.replace("linear_w4a8d_neondot", "linear_w9a8d_neondot")
    (problem,) = arm.check_run("neondot", text.format("neondot") + without, scalar)
    assert "linear_w4a8d_neondot did not run" in problem


@pytest.mark.slow
def test_every_kernel_runs_emulated_with_the_bits_of_this_machine(
    arm: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where `make test-arm` has compiled the core for Arm, which takes over a minute."""
    if why := arm.missing():
        pytest.skip(why)
    if not (arm.CROSS / "sweep").exists() or not (arm.HOST / "sweep").exists():
        pytest.skip("`make test-arm` has not been run here: nothing is built for Arm")
    arm.main(["--cases", "2"])
    lines = re.findall(r"^(\w+) on .* (\d+) kernels of the level, 0 problems$",
                       capsys.readouterr().out, re.M)  # fmt: skip
    assert [level for level, _ in lines] == list(arm.LEVELS)
    assert all(int(count) > 10 for _, count in lines)
