# SPDX-License-Identifier: Apache-2.0
"""The comparison benchmark: its quantizer, its targets, and the processes that hold the peers."""

from __future__ import annotations

import numpy as np
import pytest

import targets
from peers import Absent, Settings, _data, load
from peers.worker import Failed, Worker, copies_for


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [64, 70])
def test_codes_lie_within_half_a_step_of_the_weight(k: int, symmetric: bool) -> None:
    q = _data.quantized(5, k, 4, 32, symmetric)
    step = np.repeat(q.scales, 32, axis=1)[:, :k]
    # Half a step, and where the zero is rounded or the range is clipped half a step more.
    assert (np.abs(q.weight() - _data.weight(5, k)) <= step * 1.0001).all()
    assert (q.codes[:, k:] == np.repeat(q.zeros, 32, axis=1)[:, k:]).all()


def test_nibbles_put_the_first_code_low() -> None:
    assert _data.nibbles(np.array([[1, 2, 3]], np.uint8)).tolist() == [[0x21, 0x03]]


def test_relative_error_is_that_of_the_product() -> None:
    x, w = _data.activations(40, 64), _data.weight(5, 64)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    assert _data.relative_error(exact, x, w) == 0
    assert _data.relative_error(exact * 1.25, x, w) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("nbytes", "m", "copies"),
    [(10, 1, 64), (50, 1, 3), (50, 64, 2), (10, 256, 2), (1000, 1, 2)],
)
def test_copies_leave_the_cache_behind(nbytes: int, m: int, copies: int) -> None:
    rotation = 100 if nbytes > 10 else 1000
    assert copies_for(nbytes, m, rotation) == copies


def test_shortfalls_name_what_is_missing() -> None:
    cell = {"name": "codebook4-a8", "n": 4096, "k": 4096, "m": 4, "ms": 3.0, "roofline": 0.5,
            "ratio": 1.2, "best_peer": "peer"}  # fmt: skip
    found = targets.shortfalls(cell, {"int4-g128-a8": 2.0})
    assert found == [
        "50% of the roofline, 85% asked",
        "1.20 x peer, 1.25 asked",
        "1.50 times the time of int4-g128-a8, 1.1 allowed",
    ]
    assert targets.shortfalls(cell | {"roofline": 0.93}, {"int4-g128-a8": 3.0}) == []
    assert targets.shortfalls(cell | {"n": 384}, {}) == []


def test_a_family_that_cannot_be_limited_says_so() -> None:
    with pytest.raises(Absent, match="AVX2"):
        load("onnxruntime", Settings(1, isa="avx2"))


def test_a_worker_checks_times_fails_and_comes_back() -> None:
    worker = Worker("qkern", Settings(1, dtype="bfloat16"))
    try:
        assert ("int4-g128-a8", "int4-g128-a8", "int8") in worker.peers
        facts = worker.ask("check", "int4-g128", 33, 200, 3, 1 << 16)
        assert 0 < facts["relative_error"] < 4e-3  # half a step of bfloat16
        assert facts["detail"].startswith("linear_")
        assert worker.ask("time", "int4-g128", 33, 200, 3, facts["copies"], 0.0) > 0
        with pytest.raises(Failed, match="KeyError"):
            worker.ask("time", "no such peer", 33, 200, 3, 2, 0.0)
        worker.process.kill()
        with pytest.raises(Failed, match="its process ended"):
            worker.ask("time", "int4-g128", 33, 200, 3, 2, 0.0)
        assert worker.ask("time", "int4-g128", 33, 200, 3, 2, 0.0) > 0
    finally:
        worker.stop()
