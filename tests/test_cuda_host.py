# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources without a GPU and without nvcc: csrc/cuda/host_test compiles the kernels' own
source for the host and runs it on an emulated device. What each part checks stands in its file;
here its number of checks is asserted too, so that no class of cases can become empty."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda" / "host_test"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # as nvcc compiles device code
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
]
# Fewest checks of each part.
PARTS = {
    "layout": 3_400_000,
    "converters": 14_900_000,
    "schedules": 4_500_000,
    "others": 1_100_000,
    "kernels": 1_200_000,
    "gradient": 150_000,
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("a C++ compiler is needed, and none was found")
    folder = tmp_path_factory.mktemp("cuda_host")
    program = folder / "host_test"
    command = [compiler, *FLAGS, "-I", str(ROOT / "csrc" / "include")]
    done = subprocess.run(
        [*command, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return program


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_host(driver: Path, part: str) -> None:
    done = subprocess.run([str(driver), part], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    name, count = done.stdout.split()
    assert name == part
    assert int(count) >= PARTS[part]


def test_every_kernel_of_the_list_has_its_source() -> None:
    folder = ROOT / "csrc" / "cuda"
    listed = {
        line.split("(")[1].split(",")[0]
        for line in (folder / "kernels.inc").read_text().splitlines()
        if line.startswith("QKERN_CUDA_LINEAR(")
    }
    assert listed == {path.stem for path in folder.glob("linear_*.cu")}
    for name in listed:
        assert f"qk_status {name}(" in (folder / f"{name}.cu").read_text()


def test_every_entry_point_that_reaches_a_device_guards_it() -> None:
    """Static: a function that launches or copies makes the caller's device current first."""
    guarded = 0
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for body in re.split(r'extern "C" |qk_status run\(', path.read_text())[1:]:
            if "stream" in body:
                assert "DeviceGuard guard(" in body, f"{path.name}: {body.splitlines()[0]}"
                guarded += 1
    assert guarded == 6  # pack, unpack, dequantize, quantize, linear, its gradient


def test_no_launch_allocates_or_waits() -> None:
    """Static: what a captured graph does not allow stands nowhere in the sources."""
    forbidden = ("cudaMalloc", "cudaFree", "Synchronize(", "atomicAdd", "cudaMemcpy(")
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.*")):
        text = path.read_text()
        for word in forbidden:
            assert word not in text, f"{path.name} contains {word}"
