# SPDX-License-Identifier: Apache-2.0
"""info, kernels, explain, override, the environment: that they say and do what is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

import qkern
from qkern import _core

ABOVE = {
    "scalar": "avx2",
    "avx2": "avx512",
    "avx512": "avx512vnni",
    "avx512vnni": "avx512amx",
    "avx512amx": "neon",
}


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---- the public names ----


def test_every_public_name_can_be_had_and_is_listed() -> None:
    assert set(qkern.__all__) == set(qkern._HOME)
    for name in qkern.__all__:
        assert getattr(qkern, name) is not None
        assert name in dir(qkern)
    with pytest.raises(AttributeError, match="no attribute 'linaer'"):
        _ = qkern.linaer
    assert callable(qkern.quantize) and callable(qkern.linear)  # not the modules behind them


def test_without_torch_the_package_works_on_numpy() -> None:
    done = python(
        """
        import sys
        sys.modules["torch"] = None  # importing it fails from here on
        import numpy as np
        import qkern
        w = np.random.default_rng(0).standard_normal((16, 64), np.float32)
        qt = qkern.quantize(w, "int8")
        assert np.abs(qt.dequantize() - w).max() < 0.02
        assert qkern.kernels() and "cannot be imported" in qkern.info()["torch"]
        print(qkern.__version__, qkern.Int(4, 32))
        try:
            qkern.linear
        except ImportError as error:
            print("ImportError")
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [qkern.__version__, "int4-g32", "ImportError"]


def test_importing_the_package_imports_neither_torch_nor_the_compiler() -> None:
    done = python(
        """
        import sys, qkern
        print("torch" in sys.modules)
        qkern.linear
        print("torch._dynamo" in sys.modules)
        """
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


# ---- info and kernels ----


def test_info_tells_what_is_in_force() -> None:
    info = qkern.info()
    assert info["version"] == _core.version()
    assert info["cpu"] == {"detected": _core.detected_isa(), "isa": _core.active_isa()}
    with qkern.override(isa="scalar", threads=1):
        inside = qkern.info()
    assert inside["cpu"]["isa"] == "scalar"
    assert (inside["threads"]["used"], inside["threads"]["limit"]) == (1, 1)
    assert qkern.info() == info
    assert json.loads(json.dumps(info)) == info
    for key in info:
        assert key in str(info)


def test_kernels_lists_the_registry() -> None:
    rows = {row["name"]: row for row in qkern.kernels()}
    assert (
        rows["linear_any_a32_scalar"]["usable"] and rows["linear_any_a32_scalar"]["op"] == "linear"
    )
    assert {row["name"] for row in _core.kernels()} <= rows.keys()
    with qkern.override(isa="scalar"):
        for row in qkern.kernels():
            if row["device"] == "cpu":
                assert row["usable"] == (row["isa"] == "scalar")


# ---- explain ----


@pytest.mark.parametrize("fmt", ("int4-g32", "int8-a8", "codebook4", "nf4-a8g"))
def test_explain_names_the_kernel_that_runs(fmt: str, isa: str) -> None:
    torch = pytest.importorskip("torch")
    module = qkern.nn.Linear(64, 48, format=fmt)
    x = torch.randn(3, 64)
    for weight in (module, module.weight):
        told = qkern.explain(weight, x)
        module(x)
        assert told.kernel == _core.last_kernel() == qkern.explain(weight).kernel
        assert told.backend == "cpu" and told.format == fmt
        names = [name for name, _, _ in told.candidates]
        assert names == [row["name"] for row in _core.kernels() if row["op"] == "linear"]
        better = told.candidates[: names.index(told.kernel)]
        assert all(not runs and reason for _, runs, reason in better)
        assert f"> {told.kernel}" in str(told)
        assert json.loads(json.dumps(told.to_dict()))["kernel"] == told.kernel
    with pytest.raises(ValueError, match="64 columns of the weight"):
        qkern.explain(module, x[:, 1:])
    with pytest.raises(TypeError, match="A QuantizedTensor was expected, but Parameter came"):
        qkern.explain(torch.nn.Linear(64, 48), x)


# ---- override ----


def test_override_restores_what_was_before() -> None:
    before = _core.active_isa(), _core.get_threads()
    with qkern.override(threads=1):
        with qkern.override(isa="scalar", backend="cpu"):
            assert (_core.active_isa(), _core.get_threads()) == ("scalar", 1)
            assert qkern.info()["backend_forced"] == "cpu"
        assert qkern.info()["backend_forced"] is None
        with pytest.raises(KeyError), qkern.override(isa="scalar"):
            raise KeyError
        assert (_core.active_isa(), _core.get_threads()) == (before[0], 1)
    assert (_core.active_isa(), _core.get_threads()) == before


def test_an_impossible_choice_is_an_error_and_changes_nothing() -> None:
    pytest.importorskip("torch")
    before = qkern.info()
    for error, sentence, choice in (
        (qkern.UnsupportedError, "this machine has no", {"isa": ABOVE[_core.detected_isa()]}),
        (ValueError, "no instruction set is called sse9", {"isa": "sse9"}),
        (TypeError, "isa must be the name", {"isa": 2}),
        (ValueError, "threads must be an integer of at least 1, but 0 came", {"threads": 0}),
        (ValueError, "but True came", {"threads": True}),
        (ValueError, "At most 1024 threads", {"threads": 5000}),
        (ValueError, "The backends are cpu, cuda, triton, but 'tpu' came", {"backend": "tpu"}),
    ):
        with pytest.raises(error, match=sentence), qkern.override(**{"threads": 1, **choice}):
            pass
        assert qkern.info() == before


def test_a_backend_that_cannot_serve_is_never_replaced_by_another() -> None:
    torch = pytest.importorskip("torch")
    from qkern import backends

    absent = next((name for name in backends.names() if backends.why_not(name)), None)
    if absent is None:
        pytest.skip("every backend can run here")
    qt = qkern.quantize(torch.randn(8, 16), "int8")
    refusal = pytest.raises(qkern.UnsupportedError, match=f"backend '{absent}' cannot run here: ")
    with refusal, qkern.override(backend=absent):
        pass
    done = python(
        """
        import torch, qkern
        qt = qkern.quantize(torch.randn(8, 16), "int8")
        try:
            qkern.linear(torch.randn(1, 16), qt)
        except qkern.UnsupportedError as error:
            print(error)
        """,
        QKERN_BACKEND=absent,
    )
    assert done.stdout.startswith(f"No backend can run this on cpu tensors ({absent}: "), (
        done.stderr
    )
    assert qkern.linear(torch.randn(1, 16), qt).shape == (1, 8)


# ---- the environment ----


def test_the_environment_is_put_in_force() -> None:
    done = python(
        """
        import json, qkern
        print(json.dumps(qkern.info()))
        """,
        QKERN_ISA="scalar",
        QKERN_THREADS="1",
        QKERN_BACKEND="cpu",
    )
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["cpu"]["isa"] == "scalar" and info["threads"]["used"] == 1
    assert info["backend_forced"] == "cpu"
    assert info["environment"]["QKERN_ISA"] == "scalar"


@pytest.mark.parametrize(
    "name,value,sentence",
    (
        ("QKERN_ISA", "sse9", "QKERN_ISA=sse9. no instruction set is called sse9"),
        ("QKERN_ISA", ABOVE[_core.detected_isa()], "this machine has no"),
        ("QKERN_THREADS", "many", "must be an integer of at least 1, but 'many' came"),
        ("QKERN_THREADS", "0", "must be an integer of at least 1, but 0 came"),
        ("QKERN_BACKEND", "tpu", "The backends are cpu, cuda, triton, but 'tpu' came"),
    ),
)
def test_a_bad_environment_is_an_error(name: str, value: str, sentence: str) -> None:
    done = python("import qkern", **{name: value})
    assert done.returncode != 0
    assert sentence in done.stderr.splitlines()[-1] and name in done.stderr
