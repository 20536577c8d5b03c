# SPDX-License-Identifier: Apache-2.0
"""What compare.py does not show, each table with its target: `make bench-more`.

Odd shapes against rounded ones, small real layers and single calls against torch, dequantize and
embedding against a copy, the activation quantizer's share, products of int8, and clustering. What
is compared is timed in turn, pass after pass; a figure is the median over passes of what one pass
gave.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import bench_call
import numpy as np
import torch

import qkern
from qkern import _core
from qkern.tensor import PackedWeight
from qkern.testing import Case, Problem, address, aligned_bytes
from shapes import SHAPES

ROTATION = 96 << 20  # bytes that copies of one weight cover
Call = Callable[[], object]


class Row(NamedTuple):
    what: str
    figures: str
    value: float
    target: float | None = None
    below: bool = True  # whether the value has to be at most the target


def mean_seconds(call: Call, least: float) -> float:
    done, start = 0, time.perf_counter()
    while not done or time.perf_counter() - start < least:
        call()
        done += 1
    return (time.perf_counter() - start) / done


def interleaved(calls: list[Call], passes: int, least: float = 0.02) -> np.ndarray:
    """Seconds of each call in each pass, [passes, calls]."""
    for call in calls:
        call()
    return np.array([[mean_seconds(call, least) for call in calls] for _ in range(passes)])


def middle(values: np.ndarray) -> float:
    return statistics.median(values.tolist())


@functools.cache
def packed_weight(text: str, n: int, k: int) -> PackedWeight:
    weight = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
    return qkern.numpy.quantize(weight, text).packed()


class Layer:
    """Calls of the native linear over rotating copies of one weight."""

    def __init__(self, text: str, n: int, k: int, m: int):
        packed = packed_weight(text, n, k)
        blocks = [aligned_bytes(packed.nbytes) for _ in range(self.copies(packed.nbytes, m))]
        for block in blocks:
            block[:] = packed.buffer
        self.turn, self.bytes = itertools.cycle(blocks), packed.nbytes
        self.x = np.random.default_rng(1).standard_normal((m, k), dtype=np.float32)
        self.y = np.empty((m, n), np.float32)

    @staticmethod
    def copies(nbytes: int, m: int) -> int:
        return 2 if m >= 256 else min(64, ROTATION // nbytes + 1)

    def __call__(self) -> None:
        (m, k), n = self.x.shape, self.y.shape[1]
        _core.linear(address(next(self.turn)), self.bytes, 0, address(self.x), m, k, 1, 0, 0, 0,
                     address(self.y), n)  # fmt: skip


def odd_shapes(passes: int) -> Iterator[Row]:
    """Time per useful operation over that of the rounded neighbour."""
    pairs = (
        ((4097, 4096), (4096, 4096)), ((4096, 4100), (4096, 4096)), ((4097, 4100), (4096, 4096)),
        ((10, 4096), (16, 4096)), ((4096, 172), (4096, 176)), ((10, 172), (16, 176)),
    )  # fmt: skip
    for (odd, even), text, m in itertools.product(
        pairs, ("int4-g128-a8", "int4-g128", "codebook4-a8", "codebook4", "int8-a8"), (16, 64)
    ):
        times = interleaved([Layer(text, *odd, m), Layer(text, *even, m)], passes)
        useful = np.prod(even) / np.prod(odd)
        yield Row(
            f"{text} {odd[0]} x {odd[1]} to {even[0]} x {even[1]}, M={m}",
            f"{1e3 * middle(times[:, 0]):.3g} ms, {1e3 * middle(times[:, 1]):.3g} ms",
            middle(times[:, 0] / times[:, 1]) * useful, 1.15,
        )  # fmt: skip


def small_layers(passes: int) -> Iterator[Row]:
    """Times as fast as torch in float32, int8-a8 layers of MiniLM."""
    for name, m in itertools.product(("minilm-qkv", "minilm-up", "minilm-down"), (1, 16, 32, 128)):
        n, k = SHAPES[name]
        linear = torch.nn.Linear(k, n)
        ours = qkern.nn.Linear.from_float(linear, "int8-a8")
        x = torch.randn(m, k)
        with torch.inference_mode():
            times = interleaved([lambda: ours(x), lambda: linear(x)], passes)  # noqa: B023
        yield Row(
            f"{n} x {k}, M={m}",
            f"{1e6 * middle(times[:, 0]):.1f} us, {1e6 * middle(times[:, 1]):.1f} us",
            middle(times[:, 1] / times[:, 0]), 2.0 if m >= 16 else None, False,
        )  # fmt: skip


def one_call(passes: int) -> Iterator[Row]:
    """A call of a 64 x 64 layer at M = 1 from Python over torch's (bench_call.py has more)."""
    pairs = (("qkern.nn.Linear", "torch.nn.Linear"), ("qkern.linear", "torch.nn.functional.linear"))
    for text in ("int4-g32", "int4-g32-a8", "int8", "int8-a8", "codebook4", "codebook4-a8"):
        with torch.inference_mode():
            times = bench_call.measure(bench_call.contestants(64, 64, text, 1), 5 * passes, 200)
        for ours, theirs in pairs:
            mine, other = times[ours]["median"], times[theirs]["median"]
            yield Row(f"{text}, {ours}", f"{mine:.2f} us, {other:.2f} us", mine / other, 1.0)


def reading_rows(passes: int) -> Iterator[Row]:
    """Bytes read and written per second over those of a copy (of the same output, float32)."""
    n, k = SHAPES["4096"]
    cases = {
        "int4-g128": Case(4, group=128, scale="float16"),
        "int4-g32": Case(4, group=32, scale="float16"),
        "nf4": Case(4, group=64, scale="float16", table="tensor"),
        "codebook4": Case(4, scale="none", table="row"),
        "int8": Case(8),
        "codebook3": Case(3, scale="none", table="row"),
        "int2-g64": Case(2, group=64, scale="float16"),
    }
    ids = np.random.default_rng(1).permutation(n).astype(np.int64)
    source, target = np.ones((n, k), np.float32), np.empty((n, k), np.float32)
    for text, case in cases.items():
        problem = Problem(case, n, k)

        def read(rows: int, weight: object, packed: np.ndarray = problem.packed) -> None:
            _core.dequantize(weight, address(packed), packed.size, 0, rows, 0, n,
                             address(target), k)  # fmt: skip

        whats = ["copy"]
        calls: list[Call] = [
            functools.partial(torch.from_numpy(target).copy_, torch.from_numpy(source))
        ]
        for form, weight in (("canonical", problem.weight), ("packed", None)):
            for what, rows in (("dequantize", 0), ("embedding", address(ids))):
                whats.append(f"{what}, {form}")
                calls.append(functools.partial(read, rows, weight))
        times = interleaved(calls, passes)
        moved = (4 * n * k + problem.packed.size) / (8 * n * k)
        for i, what in enumerate(whats[1:], 1):
            yield Row(
                f"{text}, {what}",
                f"{1e3 * middle(times[:, i]):.3g} ms, {1e3 * middle(times[:, 0]):.3g} ms",
                moved * middle(times[:, 0] / times[:, i]), 0.85, False,
            )  # fmt: skip


def activation_quantizer(passes: int) -> Iterator[Row]:
    """Time of the activation quantizer over that of the linear layer it feeds."""
    for (n, k), (text, group), m in itertools.product(
        ((1024, 1024), (1024, 4096), (4096, 4096)),
        (("int4-g128-a8", 0), ("int4-g128-a8g", 128), ("int8-a8", 0)), (1, 16, 256),
    ):  # fmt: skip
        layer = Layer(text, n, k, m)
        codes = np.empty((m, k), np.int8)
        scales = np.empty((m, -(-k // group) if group else 1), np.float32)

        def quantize(m=m, k=k, group=group, x=layer.x, codes=codes, scales=scales) -> None:
            _core.quantize_activations(0, address(x), m, k, group, k, 1, address(codes), k,
                                       address(scales))  # fmt: skip

        times = interleaved([quantize, layer], passes)
        yield Row(
            f"{text} {n} x {k}, M={m}",
            f"{1e6 * middle(times[:, 0]):.1f} us, {1e6 * middle(times[:, 1]):.1f} us",
            middle(times[:, 0] / times[:, 1]), 0.05,
        )  # fmt: skip


def int8_products(passes: int) -> Iterator[Row]:
    """int8_matmul, times as fast as torch._int_mm (which takes 17 rows and more)."""
    n, k = SHAPES["4096"]
    copies = ROTATION // (n * k) + 1
    stored = [torch.randint(-128, 128, (n, k), dtype=torch.int8) for _ in range(copies)]
    forms = {"a transposed weight": [w.t() for w in stored], "columns dense": stored}
    for (form, weights), m in itertools.product(forms.items(), (17, 64, 256, 1024)):
        a, turn = torch.randint(-128, 128, (m, k), dtype=torch.int8), itertools.cycle(weights)

        def ours(a: torch.Tensor = a, turn: Iterator[torch.Tensor] = turn) -> object:
            return qkern.int8_matmul(a, next(turn))

        def theirs(a: torch.Tensor = a, turn: Iterator[torch.Tensor] = turn) -> object:
            return torch._int_mm(a, next(turn))

        times = interleaved([ours, theirs], passes, 0.1)
        yield Row(
            f"{n} x {k}, {form}, M={m}",
            f"{1e3 * middle(times[:, 0]):.3g} ms, {1e3 * middle(times[:, 1]):.3g} ms",
            middle(times[:, 1] / times[:, 0]), 1.25, False,
        )  # fmt: skip


def clustering(passes: int) -> Iterator[Row]:
    """Seconds for exact 16-entry tables per row, and what a billion weights would take."""
    n, k = SHAPES["4096"]
    weight = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
    repeats = min(passes, 3)
    seconds = middle(
        interleaved([lambda: qkern.numpy.quantize(weight, "codebook4")], repeats)[:, 0]
    )
    yield Row(f"codebook4, {n} x {k}", f"{seconds:.2f} s", seconds, 1.6)
    billion = seconds * 1e9 / weight.size
    yield Row("codebook4, a billion weights", f"{billion:.0f} s (extrapolated)", billion, 120.0)


TABLES = {
    "odd": odd_shapes,
    "small": small_layers,
    "call": one_call,
    "rows": reading_rows,
    "activations": activation_quantizer,
    "products": int8_products,
    "clustering": clustering,
}


def show(title: str, rows: Iterator[Row]) -> tuple[int, int]:
    """Prints the rows as they come; how many have a target, and how many of them met it."""
    print(f"\n### {title}\n\n| | measured | value | target | met |\n|---|---|---|---|---|")
    asked = met = 0
    for row in rows:
        target, verdict = "", ""
        if row.target is not None:
            good = row.value <= row.target if row.below else row.value >= row.target
            target = f"{'<=' if row.below else '>='} {row.target:g}"
            verdict, asked, met = "yes" if good else "**no**", asked + 1, met + good
        print(
            f"| {row.what} | {row.figures} | {row.value:.3g} | {target} | {verdict} |", flush=True
        )
    return asked, met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default=",".join(TABLES), help="which, of the default")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: all there are")
    args = parser.parse_args()
    unknown = [name for name in args.tables.split(",") if name not in TABLES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not in {', '.join(TABLES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
        _core.set_threads(args.threads)
    print(f"{_core.get_threads()} threads, {_core.active_isa()}")
    counts = [
        show(TABLES[name].__doc__.splitlines()[0], TABLES[name](args.passes))
        for name in args.tables.split(",")
    ]
    asked, met = (sum(column) for column in zip(*counts, strict=True))
    print(f"\n{met} of {asked} targets met")


if __name__ == "__main__":
    main()
