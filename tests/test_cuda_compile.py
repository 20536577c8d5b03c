# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources with nvcc, where it is: the fast subset of csrc/cuda/tools/compile_check.py. All
architectures and files are `make cuda-compile`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "tools" / "compile_check.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_of_kernels_are_read(check: ModuleType) -> None:
    prefix = "_ZN5qkern4cuda13linear_kernelINS0_"
    tail = "EEEvNS0_12LinearParamsE"
    assert check.demangle(f"{prefix}4Int4INS0_3F16EEELi2{tail}") == ("Int4/F16", "F16", 2)
    rows, blocks = "ELNS0_6TablesE2EEELi0", "ELNS0_6TablesE3EEELi1"
    table = f"{prefix}5TableINS0_4BF16ELi3"
    assert check.demangle(f"{table}{rows}{tail}") == ("Table3", "BF16", 0)
    assert check.demangle(f"{table}{blocks}{tail}") == ("Table3/group", "BF16", 1)
    byte = f"{prefix}9ByteTableILi4{blocks}{tail}"
    assert check.demangle(byte) == ("ByteTable4/group", "S8", 1)
    assert check.demangle(f"{prefix}6Bytes8ELi3{tail}") == ("Bytes8", "S8", 3)
    assert check.demangle("_ZN5qkern4cuda10add_splits") is None


def test_the_main_loop_has_copies_and_all_products_but_no_single_steps(check: ModuleType) -> None:
    lines = [
        ("label", ".L_x_0"),
        ("label", ".L_x_1"),
        ("code", "LDGSTS.E.BYPASS.128 [R25], [R16.64], P0"),
        ("label", ".L_x_2"),
        ("code", "HMMA.16816.F32 R4, R8, R12, R4"),
        ("code", "@!P0 BRA `(.L_x_2)"),
        ("code", "HMMA.16816.F32 R4, R8, R12, R4"),
        ("code", "@P1 BRA `(.L_x_1)"),
        ("code", "@P2 BRA `(.L_x_0)"),
    ]
    assert check.main_loop(lines) == [lines[i][1] for i in (2, 6, 7)]
    assert check.main_loop(lines[:2] + lines[3:]) == []
    assert check.opcode("@!PT LDS.U.128 R4, [R2]") == "LDS.U.128"


def test_spills_and_missing_instructions_are_found(check: ModuleType) -> None:
    problems: list[str] = []
    check.check_resources("8 bytes stack frame, 4 bytes spill stores, 4 bytes spill", problems)
    assert len(problems) == 1
    symbol = "_ZN5qkern4cuda13linear_kernelINS0_6Bytes8ELi0EEEvNS0_12LinearParamsE"
    check.inspect_linear(symbol, [("code", "EXIT")], problems)
    assert sum("no " in problem for problem in problems) == 5


def test_every_kernel_of_the_list_has_a_budget(check: ModuleType) -> None:
    assert {name.removesuffix("/group") for name in check.BITS} == set(check.CONVERTER)
    assert all(check.budget(name) > check.CHASSIS for name in check.BITS)
    assert set(check.ARCHS) == set(check.LIMIT_PER_BYTE)
    row = {"arch": "80", "kernel": "Int4/F16", "integer_per_weight": 2.0}
    assert 1.2 < check.permitted(row) < 1.6


@pytest.mark.slow
def test_the_fast_subset_compiles_within_its_budgets(check: ModuleType) -> None:
    if check.find_tool("nvcc") is None or check.find_tool("nvdisasm") is None:
        pytest.skip("nvcc or nvdisasm was not found: the CUDA sources are compiled elsewhere")
    done = subprocess.run([sys.executable, str(SCRIPT), "--fast"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 problems" in done.stdout
