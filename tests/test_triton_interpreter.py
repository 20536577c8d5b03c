# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of the Triton kernels in Triton's interpreter: a process of its own, because the
choice between interpreter and compiler is made when a kernel is defined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the Triton kernels need torch")
pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process is already interpreting", allow_module_level=True)

HERE = Path(__file__).parent


# The longest module in two halves, which run side by side.
LONG = "int8 or row_has"


@pytest.mark.parametrize("module,words", [
    ("linear", LONG), ("linear", f"not ({LONG})"), ("weights", ""), ("grouped", ""),
    ("backend", ""),
])  # fmt: skip
def test_in_the_interpreter(module: str, words: str, tmp_path: Path) -> None:
    test = str(HERE / f"test_triton_{module}.py")
    # From another directory: the root of the repository must not be on the path of imports.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    command += ["-k", words] if words else []
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                   "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
