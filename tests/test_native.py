# SPDX-License-Identifier: Apache-2.0
"""The native tests (tests/native) against the library of this package: a quick sweep of every
kernel with guard pages around its operands, damaged packed weights, and the light stress."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qkern import _core

HERE = Path(__file__).resolve().parent
LIBRARY = next((Path(_core.__file__).parent / "lib").glob("libqkern.so*"))


# Digests of results with --cases 12 and the first seed, the same on every machine and level. A
# change here is a change of what the library computes and belongs into the changelog.
ON_RECORD = {
    "linear_w4a8d_": "61c54a71dd6f027f",
    "linear_w4a32_": "35b3d5eaf7b80a63",
    "quantize_a8_": "61813483078e461e",
    "convert_a16_": "b41bcca9d448086d",
    "codes": "640539bbad158ad7",
    "fit_rtn": "8a79fe4d22a2c603",
    "fit_table": "36d1a70f1e816664",
    "fit_kmeans": "0a6fcd5e49307036",
}


def run(*command: object, timeout: int = 300) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs, built once for all workers of a run and again after changes."""
    if sys.platform != "linux":
        pytest.skip("the native tests use mmap and fork")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler or no CMake on this machine")
    build = HERE.parent / "build" / "native-tests"
    if not os.access(HERE.parent, os.W_OK):
        build = tmp_path_factory.mktemp("native")
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # -O1: compiling takes longer than these runs.
        run(cmake, "-S", HERE / "native", "-B", build, f"-DQKERN_LIBRARY={LIBRARY}",
            "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")  # fmt: skip
        run(cmake, "--build", build, "--parallel", "2")
    return build


def table(text: str) -> dict[str, list[str]]:
    """name: cases, result, digest"""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: row[1:] for row in rows if len(row) == 4 and row[1].isdigit()}


@pytest.fixture(scope="module")
def quick(programs: Path) -> dict[str, list[str]]:
    return table(run(programs / "sweep", "--cases", 12))


def test_every_kernel_between_guard_pages(quick: dict[str, list[str]]) -> None:
    found = quick
    usable = [row["name"] for row in _core.kernels() if row["usable"]]
    assert set(usable) < set(found)
    for name in usable:
        assert int(found[name][0]) >= 12 and found[name][1] == "ok", (name, found[name])


def test_results_are_those_on_record(quick: dict[str, list[str]]) -> None:
    checked = 0
    for name, (_, _, digest) in quick.items():
        for start, expected in ON_RECORD.items():
            if name.startswith(start):
                assert digest == expected, name
                checked += 1
    assert checked >= 6


def test_another_seed_gives_other_cases(programs: Path) -> None:
    """The digest is of results, so that it tells runs apart and machines do not change it."""
    digests = set()
    for seed in (1, 1, 2):
        found = table(run(programs / "sweep", "--cases", 2, "--seed", seed, "--isa", "scalar"))
        digests.add(found["linear_any_a32_scalar"][2])
    assert len(digests) == 2


def test_damaged_weights_are_refused(programs: Path) -> None:
    found = table(run(programs / "sweep", "--kernel", "packed_header", "--cases", 500))
    assert int(found["packed_header"][0]) > 4 * 8 * 256 and found["packed_header"][1] == "ok"


@pytest.mark.parametrize("part", ["threads", "settings", "fork", "repeats", "strides"])
def test_stress(programs: Path, part: str) -> None:
    assert re.search(rf"^{part} +ok$", run(programs / "stress", "--light", "--only", part), re.M)


@pytest.mark.parametrize(("model", "level"), [("Haswell", "avx2"), ("Nehalem", "scalar")])
def test_emulated_processors_pick_their_level_and_give_the_same_scalar_results(
    programs: Path, model: str, level: str
) -> None:
    """A processor without AVX-512 and one without AVX2, by qemu; `make test-isa` has the rest."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or platform.machine() != "x86_64":
        pytest.skip("needs an x86-64 machine with qemu-x86_64 (Debian package qemu-user)")
    # Faults of qemu that are stepped around: see native/isa.sh.
    sweep = (programs / "sweep", "--cases", 1, "--skip", "dequantize_any_avx2")
    emulated = run(emulator, "-cpu", model, *sweep, "--slack", 64)
    assert f"detected {level}," in emulated.splitlines()[0]
    here, there = table(run(*sweep)), table(emulated)
    vector = {"avx2", "avx512", "avx512vnni", "avx512amx"}
    suffixes = {name.rpartition("_")[2] for name in there} & vector
    assert suffixes == ({"avx2"} if level == "avx2" else set())
    scalar = [name for name in there if name.endswith("_scalar")]
    assert len(scalar) >= 5
    assert all(there[name][1:] == ["ok", here[name][2]] for name in scalar)
