# SPDX-License-Identifier: Apache-2.0
"""Programs without Python that link the installed package: C++ by CMake, C by flags."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the weights are saved by torch modules")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="the weights are saved with it")

import qkern  # noqa: E402
from qkern import _link  # noqa: E402

SOURCES = Path(__file__).parent / "downstream"
# What run_saved.cpp is told of each format: kind, bits, group, activations.
LAYERS = {
    "int4-g64": "int 4 64 float",
    "int4-g32-asym-a8": "int 4 32 int8",
    "int3-g40-a8g": "int 3 40 int8_group",
    "int8": "int 8 0 float",
    "int8-a8": "int 8 0 int8",
    "codebook4": "table 4 0 float",
    "codebook4-a8": "table 4 0 int8",
    "codebook3-tensor-g32": "table 3 32 float",
}


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def needs(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The downstream project, built with what find_package finds in the installed package."""
    folder = tmp_path_factory.mktemp("downstream")
    cmake = needs("cmake")
    run(cmake, "-S", SOURCES, "-B", folder, f"-Dqkern_DIR={qkern.get_cmake_dir()}")
    run(cmake, "--build", folder, "-j", "2")
    return folder


def test_a_cpp_program_runs_saved_weights_to_the_same_bits(built: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            name: qkern.nn.Linear.from_float(torch.nn.Linear(200, 150, bias=False), name)
            for name in LAYERS
        }
    )
    cases = {}
    with torch.no_grad():
        for name, layer in model.items():
            cases[f"{name}.x"] = torch.randn(9, 200)
            cases[f"{name}.y"] = layer(cases[f"{name}.x"])
    qkern.save(model, tmp_path / "saved")
    safetensors_torch.save_file(cases, tmp_path / "cases.safetensors")
    (weights,) = (tmp_path / "saved").glob("*.safetensors")
    for name, facts in LAYERS.items():
        out = run(
            built / "run_saved", weights, tmp_path / "cases.safetensors", name, *facts.split()
        )
        assert "same bits" in out


def test_a_c99_program_gets_numbers_and_sentences(built: Path) -> None:
    out = run(built / "plain")
    assert f"qkern {qkern.__version__}" in out
    assert "0 failures" in out


def test_the_printed_flags_compile_and_link(tmp_path: Path) -> None:
    flags = run(sys.executable, "-m", "qkern", "--cflags", "--libs").split()
    program = tmp_path / "plain"
    strict = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
    run(needs("cc"), *strict, SOURCES / "plain.c", *flags, "-lm", "-o", program)
    assert "0 failures" in run(program)


def test_pkg_config_compiles_and_links(tmp_path: Path) -> None:
    path = {"PKG_CONFIG_PATH": _link.get_pkgconfig_dir()}
    flags = run(needs("pkg-config"), "--cflags", "--libs", "qkern", **path).split()
    assert run(needs("pkg-config"), "--modversion", "qkern", **path).strip() == qkern.__version__
    program = tmp_path / "plain"
    run(needs("cc"), "-std=c99", SOURCES / "plain.c", *flags, "-lm", "-o", program)
    assert "0 failures" in run(program, LD_LIBRARY_PATH=_link.get_library_dir())


def test_cmake_finds_the_package_through_its_entry_point(tmp_path: Path) -> None:
    """scikit-build-core adds the folder of this module to CMAKE_PREFIX_PATH."""
    points = importlib.metadata.entry_points(group="cmake.prefix", name="qkern")
    if not points:
        pytest.skip("qkern runs from its sources, not from an install")
    (point,) = points
    prefix = Path(point.load().__file__).parent
    out = run(needs("cmake"), "-S", SOURCES, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}")
    assert "Configuring done" in out
    cache = (tmp_path / "CMakeCache.txt").read_text()
    assert f"qkern_DIR:PATH={qkern.get_cmake_dir()}" in cache


def test_cmake_refuses_another_minor_version(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(other LANGUAGES CXX)\n"
        "find_package(qkern 7.3 CONFIG REQUIRED)\n"
    )
    done = subprocess.run(
        [
            needs("cmake"),
            "-S",
            tmp_path,
            "-B",
            tmp_path / "b",
            f"-Dqkern_DIR={qkern.get_cmake_dir()}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "7.3" in done.stderr
