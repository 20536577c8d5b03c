# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark over every kernel of the registry: `make bench` (JSON in bench/out).

One benchmark per kernel, case, shape and row count. Weights rotate over enough copies to leave the
last-level cache behind (`extra_info` has bytes and operations, so that bandwidth and rate can be
computed from the file). `QKERN_BENCH_SHAPES=4096,llama-8b-gate` chooses shapes.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest

from qkern import _core
from qkern.testing import Case, Problem, address, aligned_bytes
from shapes import DEFAULT_SHAPES, ROWS, SHAPES

CACHE_BYTES = 64 << 20
NAMES = os.environ.get("QKERN_BENCH_SHAPES", ",".join(DEFAULT_SHAPES)).split(",")
CASES = [
    Case(4, "{a}", group=128, scale="float16"),
    Case(4, "{a}", group=32, scale="float16"),
    Case(8, "{a}"),
    Case(3, "{a}", group=64, scale="float16"),
    Case(2, "{a}", group=64, scale="float16"),
    Case(4, "{a}", group=64, scale="float16", table="tensor"),
    Case(4, "{a}", scale="none", table="row"),
    Case(3, "{a}", scale="none", table="row"),
]


def benchmarks() -> list:
    found = []
    for row in _core.kernels():
        if row["op"] != "linear" or not row["usable"]:
            continue
        for case, activations in itertools.product(CASES, row["activations"].split(", ")):
            case = Case(**{**case.__dict__, "activations": activations})
            slow = row["isa"] == "scalar"
            for shape, m in itertools.product(NAMES, ROWS):
                if case.served_by(row) and not (slow and (m > 1 or SHAPES[shape][0] > 2000)):
                    label = f"{row['name']}-{case.token}{case.bits}-g{case.group}-{activations}"
                    found.append(pytest.param(row["name"], case, shape, m,
                                              id=f"{label}-{shape}-m{m}"))  # fmt: skip
    return found


@pytest.mark.parametrize(("kernel", "case", "shape", "m"), benchmarks())
def test_linear(benchmark, kernel: str, case: Case, shape: str, m: int) -> None:
    n, k = SHAPES[shape]
    first = Problem(case, n, k)
    copies = max(1, min(64, CACHE_BYTES // first.packed.size + 1))
    problems = [first, *(Problem(case, n, k, seed=i) for i in range(1, min(copies, 2)))]
    blocks = [p.packed for p in problems]
    blocks += [_copy_of(blocks[i % len(blocks)]) for i in range(copies - len(blocks))]
    x = np.random.default_rng(0).standard_normal((m, k)).astype(np.float32)
    y = np.empty((m, n), np.float32)
    turn = itertools.cycle(blocks)

    def call() -> None:
        block = next(turn)
        _core.linear(address(block), block.size, 0, address(x), m, k, 1, 0, 0, 0, address(y), n,
                     kernel)  # fmt: skip

    benchmark.extra_info.update(
        kernel=kernel, weight_bytes=first.packed.size, operations=2 * m * n * k, rows=m, n=n, k=k,
        threads=_core.get_threads(),
    )  # fmt: skip
    benchmark(call)


def _copy_of(block: np.ndarray) -> np.ndarray:
    copy = aligned_bytes(block.size)
    copy[:] = block
    return copy
