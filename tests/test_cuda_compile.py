# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources with nvcc, where it is: the fast subset of csrc/cuda/tools/compile_check.py. All
architectures and files are `make cuda-compile`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
SCRIPT = CUDA / "tools" / "compile_check.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its data classes look for their types
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


def test_budgets_are_those_of_the_file_heads(check: ModuleType) -> None:
    rows = re.findall(r"^//   (\w+)(?:<(\w+)>)? +(\d\.\d\d) ", read("convert.cuh"), re.MULTILINE)
    counted = {name + (f"/{kind}" if kind else ""): float(value) for name, kind, value in rows}
    rows = re.findall(r"^//   (\w*Table\d) +(\d+) ", read("convert_tables.cuh"), re.MULTILINE)
    counted |= {name: int(value) / 8 for name, value in rows}
    assert set(counted) == set(check.CONVERTER)
    assert all(abs(check.CONVERTER[name] - value) < 0.01 for name, value in counted.items())


def read(name: str) -> str:
    return (CUDA / name).read_text()


def test_registers_are_those_of_each_kernel(check: ModuleType) -> None:
    log = "".join(
        f"ptxas info    : Compiling entry function '{name}' for 'sm_80'\n"
        f"ptxas info    : Function properties for {name}\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        f"ptxas info    : Used {count} registers, used 1 barriers, 49 bytes smem\n"
        for name, count in (("first", 40), ("second", 255))
    )
    problems: list[str] = []
    assert check.check_resources(log, problems) == {"first": 40, "second": 255}
    assert not problems


def test_the_table_has_a_line_per_source_and_a_column_per_architecture(check: ModuleType) -> None:
    def checked(arch: str, integer: float) -> object:
        rows = [
            {
                "arch": arch, "source": "linear_w4a16_f16_sm80", "kernel": "Int4/F16",
                "type": "F16", "shape": shape, "integer_per_weight": integer,
                "registers": 100 + shape,
            }
            for shape in range(4)
        ]  # fmt: skip
        return check.Checked("linear_w4a16_f16_sm80", arch, [], 103, rows)

    runs = [checked("80", 1.4), checked("90a", 3.5), check.Checked("pack", "80", [], 64)]
    runs.append(check.Checked("pack", "90a", [], 62))
    lines = check.table(runs, "nvcc 13.0.88").splitlines()
    assert "| linear_ | converter | budget | sm_80 | sm_90a |" in lines
    assert "| w4a16_f16 | 0.50 | 1.80 | 1.40, 100% | 3.50, 50% |" in lines
    assert "| w4a16_f16 | 100 101 102 103 | 100 101 102 103 |" in lines
    assert "| pack | 64 | 62 |" in lines


def test_the_table_that_is_kept_has_every_kernel(check: ModuleType) -> None:
    lines = read("SASS.md").splitlines()
    columns = " | ".join(f"sm_{arch}" for arch in check.ARCHS)
    assert f"| linear_ | converter | budget | {columns} |" in lines
    for path in CUDA.glob("linear_*.cu"):
        name = path.stem.removeprefix("linear_").removesuffix("_sm80")
        figures, registers = (line.split(" | ") for line in lines if line.startswith(f"| {name} |"))
        budget = float(figures[2])
        for cell in figures[3:]:  # "1.41, 100%", or "1.41 of 1.80, 100%" with a budget of its own
            integer, _, own = cell.split(",")[0].partition(" of ")
            assert float(integer) <= float(own or budget)
        assert len(figures) == 3 + len(check.ARCHS) == 2 + len(registers)


@pytest.mark.slow
def test_the_fast_subset_compiles_within_its_budgets(check: ModuleType) -> None:
    if check.find_tool("nvcc") is None or check.find_tool("nvdisasm") is None:
        pytest.skip("nvcc or nvdisasm was not found: the CUDA sources are compiled elsewhere")
    done = subprocess.run([sys.executable, str(SCRIPT), "--fast"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 problems" in done.stdout
