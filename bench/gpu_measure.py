# SPDX-License-Identifier: Apache-2.0
"""What `make gpu-check` runs on the device in processes of its own: measurements, and small shapes
for the sanitizer.

    python bench/gpu_measure.py measure FILE [--seconds N] [--only FORMAT]
    python bench/gpu_measure.py small

Times: median of CUDA-graph replays, weights rotated over more than the L2 cache and the cache
flushed in between ("graph"), and of plain launches ("plain", what a caller without graphs sees).
Rivals: cuBLAS, torch's own int4 and int8 products (torchao's are these), bitsandbytes and humming
where they are installed, and the Triton backend of this package. gemlite has no wheel to carry.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qkern

# name, N, K; the first is measured at every M.
SHAPES = (
    ("8192", 8192, 8192),
    ("llama-8b-qkv", 6144, 4096),
    ("llama-8b-o", 4096, 4096),
    ("llama-8b-gate-up", 28672, 4096),
    ("llama-8b-down", 4096, 14336),
)
ALL_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
FEW_M = (1, 16)
FORMATS = (
    "int4-g128", "int8", "codebook4-tensor-g64", "codebook4", "codebook3", "codebook4-group-g128",
    "lutb", "nf4", "int8-a8", "int4-g128-a8", "codebook4-a8",
)  # fmt: skip
HUMMING_M = (1, 16, 1024)  # of the first shape: it compiles each, for seconds
TRITON_FORMATS, TRITON_M = ("int4-g128", "codebook4", "int8-a8"), (1, 16, 256)  # it compiles each
GRADIENT_M = (512, 4096)
EXPERTS, EXPERT_M = 8, (16, 512)

# What is wanted on an H200, graph replay, cold cache: microseconds of 8192 x 8192 by (format, M),
# and of the Llama layers at M = 1 with int4-g128; else TOPS, or a share of cuBLAS.
MICROSECONDS = {
    ("int4-g128", 1): 11.5,
    ("int4-g128", 16): 11.5,
    ("int4-g128", 32): 13,
    ("int4-g128", 64): 16,
    ("int4-g128", 128): 28,
    ("int8", 1): 20,
    ("int4-g128-a8", 1): 11.5,
    ("codebook3", 1): 10,
}
LAYER_MICROSECONDS = {
    "llama-8b-qkv": 6.4,
    "llama-8b-o": 5.3,
    "llama-8b-gate-up": 18,
    "llama-8b-down": 10.6,
}
TOPS = {("int8-a8", 1024): 1250, ("int8-a8", 4096): 1250, ("int4-g128-a8", 4096): 1200}


def target(what: str, shape: str, m: int) -> str | None:
    """The figure that this measurement is held against, in words."""
    if shape != "8192":
        wanted = LAYER_MICROSECONDS.get(shape) if (what, m) == ("int4-g128", 1) else None
        return f"<= {wanted} us" if wanted else None
    if (what, m) in MICROSECONDS:
        return f"<= {MICROSECONDS[what, m]} us"
    if (what, m) in TOPS:
        return f">= {TOPS[what, m]} TOPS"
    if what in ("int4-g128", "int8") and m >= 512:
        return ">= 95 % of cuBLAS"
    if what.startswith("gradient"):
        return ">= 80 % of cuBLAS"
    if what.startswith("dequantize"):
        return ">= 85 % of copy"
    return None


class Timer:
    """Median microseconds of a list of calls that do the same on different weights."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.cache = cache
        self.flush = torch.empty(max(256 << 20, 4 * cache), dtype=torch.uint8, device="cuda")

    def copies(self, nbytes: int) -> int:
        """Weights enough to exceed the cache twice, at most eight."""
        return max(2, min(8, -(-2 * self.cache // max(nbytes, 1))))

    def graph(self, calls: list[Any], repeats: int = 12) -> float:
        graphs = []
        for call in calls:
            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            graphs.append(graph)
        return self._median([graph.replay for graph in graphs], repeats)

    def plain(self, calls: list[Any], repeats: int = 12) -> float:
        for call in calls:
            call()
        return self._median(calls, repeats)

    def _median(self, calls: list[Any], repeats: int) -> float:
        times = []
        for i in range(repeats * 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            begin.record()
            calls[i % len(calls)]()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times[repeats // 2 :])


Calls = list[Callable[[], Any]]  # the same on different weights


def rivals(timer: Timer, m: int, n: int, k: int) -> dict[str, tuple[Calls, float]]:
    """Other ways to this product and their bits per weight; those that refuse are left out."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    found: dict[str, tuple[Calls, float]] = {}

    def offer(name: str, bits: float, make: Callable[[], Any], use: Callable[[Any], Any]) -> None:
        try:
            first = make()
            use(first)
            rest = [make() for _ in range(timer.copies(int(n * k * bits / 8)) - 1)]
        except Exception as error:  # whatever a rival raises, it is out
            print(f"{name}: {str(error).splitlines()[0][:120] if str(error) else error!r}")
            return
        found[name] = ([lambda w=w: use(w) for w in (first, *rest)], bits)

    def dense() -> torch.Tensor:
        return torch.randn(n, k, device="cuda", dtype=torch.bfloat16)

    offer("cublas bfloat16", 16, dense, lambda w: torch.matmul(x, w.T))
    if m <= 64:  # far slower than dense above
        scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        offer(
            "torch int4pack",
            4.25,
            lambda: torch._convert_weight_to_int4pack(
                torch.randint(0, 255, (n, k // 2), device="cuda", dtype=torch.uint8), 8
            ),
            lambda w: torch._weight_int4pack_mm(x, w, 128, scales),
        )
    if m > 16:
        xi = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
        offer(
            "torch _int_mm",
            8,
            lambda: torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8),
            lambda w: torch._int_mm(xi, w.T),
        )
    if (bnb := installed("bitsandbytes")) is not None:
        offer(
            "bitsandbytes nf4",
            4.5,
            lambda: bnb.functional.quantize_4bit(dense(), blocksize=64, quant_type="nf4"),
            lambda w: bnb.matmul_4bit(x, w[0].t(), w[1]),
        )
    wanted = (n, k) == SHAPES[0][1:] and m in HUMMING_M
    if wanted and (humming := installed("humming.layer")) is not None:

        def layer() -> Any:
            config = {"dtype": "int4", "group_size": 128}
            made = humming.HummingLayer(
                shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16
            ).cuda()
            made.load_from_unquantized(dense())
            made.transform()
            return made

        offer("humming int4-g128", 4.125, layer, lambda w: w(x))
    return found


def installed(module: str) -> Any:
    """The module of a rival; None where it is not there, or not for this torch."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        print(f"{module}: {str(error).splitlines()[0][:120] if str(error) else error!r}")
        return None


def random_weight(fmt: str, n: int, k: int) -> Any:
    """A weight of random codes: fitting a real one would take longer than all measurements."""
    format_ = qkern.parse_format(fmt)
    parts: dict[str, Any] = {}
    for name, part in format_.parts(n, k).items():
        kind = getattr(torch, part.dtypes[0])
        if name == "codes":
            parts[name] = torch.randint(0, 256, part.shape, dtype=torch.uint8, device="cuda")
        elif kind == torch.uint8:  # small scales, or float8 entries of about one
            parts[name] = torch.randint(1, 64, part.shape, dtype=torch.uint8, device="cuda")
        else:
            parts[name] = (torch.rand(part.shape, device="cuda") * 0.01 + 0.001).to(kind)
        if name == "codebook" and format_.activations != "float":
            parts[name] = torch.randint(-127, 128, part.shape, device="cuda").float()
    return qkern.QuantizedTensor.from_parts(format_, (n, k), check=False, **parts)


class Measurement:
    """Rows of results, written to a file as they come."""

    def __init__(self, file: Path, seconds: float) -> None:
        self.file, self.end = file, time.monotonic() + seconds
        self.timer = Timer()
        self.rows: list[dict[str, Any]] = []

    def out_of_time(self) -> bool:
        return time.monotonic() > self.end

    def record(
        self, what: str, shape: tuple[str, int, int], m: int, calls: Calls, bits: float
    ) -> None:
        if self.out_of_time():
            return
        graph, plain = self.timer.graph(calls), self.timer.plain(calls)
        name, n, k = shape
        row = {
            "what": what, "shape": name, "n": n, "k": k, "m": m, "graph_us": round(graph, 2),
            "plain_us": round(plain, 2), "gb_per_s": round(n * k * bits / 8 / graph / 1e3, 1),
            "tflops": round(2 * m * n * k / graph / 1e6, 1), "target": target(what, name, m),
        }  # fmt: skip
        self.rows.append(row)
        self.file.write_text(json.dumps(self.rows))
        print(row, flush=True)

    def products(self, shape: tuple[str, int, int], ms: tuple[int, ...], formats: Any) -> None:
        _, n, k = shape
        weights = {}
        for fmt in formats:
            one = random_weight(fmt, n, k)
            more = self.timer.copies(one.nbytes) - 1
            weights[fmt] = [one, *(random_weight(fmt, n, k) for _ in range(more))]
        for m in ms:
            if self.out_of_time():
                return
            for name, (calls, bits) in rivals(self.timer, m, n, k).items():
                self.record(name, shape, m, calls, bits)
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            for fmt, copies in weights.items():
                calls = [lambda w=w, x=x: qkern.linear(x, w) for w in copies]
                self.record(fmt, shape, m, calls, copies[0].bits_per_weight)
        if shape[0] == SHAPES[0][0]:
            self.others(shape, weights)

    def others(self, shape: tuple[str, int, int], weights: dict[str, list[Any]]) -> None:
        """Copy, dequantize, gradient, experts and the Triton backend, on one shape."""
        _, n, k = shape
        source, copy = (torch.empty(n * k, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self.record("copy bfloat16", shape, 1, [lambda: copy.copy_(source)] * 2, 32)
        for fmt, copies in weights.items():
            calls = [lambda w=w: qkern.dequantize(w, torch.bfloat16) for w in copies]
            self.record(f"dequantize {fmt}", shape, 1, calls, copies[0].bits_per_weight + 16)
        for fmt in [f for f in ("int4-g128", "codebook4") if f in weights]:
            for m in GRADIENT_M:
                calls = [gradient(w, m) for w in weights[fmt]]
                self.record(f"gradient {fmt}", shape, m, calls, weights[fmt][0].bits_per_weight)
        for fmt in [f for f in ("int4-g128", "codebook4") if f in weights]:
            small = [random_weight(fmt, 4096, 4096) for _ in range(EXPERTS)]
            stack = qkern.QuantizedStack.from_tensors(small)
            layer = ("experts", EXPERTS * 4096, 4096)
            for m in EXPERT_M:
                x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
                offsets = torch.arange(EXPERTS + 1, device="cuda") * m // EXPERTS
                calls = [lambda x=x, o=offsets, s=stack: qkern.grouped_linear(x, s, o)] * 2
                self.record(f"experts {fmt}", layer, m, calls, stack.bits_per_weight)
        try:
            with qkern.override(backend="triton"):
                for fmt in [f for f in TRITON_FORMATS if f in weights]:
                    for m in TRITON_M:
                        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                        calls = [lambda w=w, x=x: qkern.linear(x, w) for w in weights[fmt]]
                        bits = weights[fmt][0].bits_per_weight
                        self.record(f"triton {fmt}", shape, m, calls, bits)
        except qkern.UnsupportedError as error:
            print(f"triton: {error}")


def gradient(weight: Any, m: int) -> Callable[[], Any]:
    """The product's gradient to its input alone, as the backward pass calls it."""
    from qkern.backends import cuda

    n, k = weight.shape
    grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    packed = cuda.pack(weight.parts(), weight.format, weight.shape)
    return lambda: cuda.grad_input(grad, packed.arguments, k)


def measure(file: Path, seconds: float, only: str | None) -> None:
    measurement = Measurement(file, seconds)
    with qkern.override(backend="cuda"):
        for i, shape in enumerate(SHAPES):
            measurement.products(shape, FEW_M if i else ALL_M, (only,) if only else FORMATS)
            torch.cuda.empty_cache()
    if measurement.out_of_time():
        print("measurements: out of time, the rest is left out")


# ---- the sanitizer ----

SMALL_FORMATS = (
    "int4-g32-asym", "int8", "int3-g64", "int2-g32", "codebook4", "codebook3", "codebook4-tensor",
    "codebook4-group-g64", "codebook3-group-g64", "codebook2-group-g64", "lutb", "nvfp4", "int8-a8",
    "int4-g64-a8g", "codebook4-a8", "codebook3-group-g64-a8", "int2-a8", "lutb-a8",
)  # fmt: skip
SMALL_SHAPES = ((1, 65, 300), (13, 70, 2100), (30, 64, 256), (70, 130, 330))


def small() -> None:
    """Every kernel, in every shape of it, with tails and splits."""
    for fmt in SMALL_FORMATS:
        for i, (m, n, k) in enumerate(SMALL_SHAPES):
            qt = qkern.quantize(torch.randn(n, k), fmt).to("cuda")
            dtypes = (torch.float16, torch.bfloat16) if qt.format.activations == "float" else ()
            with qkern.override(backend="cuda"):
                for dtype in dtypes or (torch.float16,):
                    x = torch.randn(m, k, device="cuda").to(dtype).requires_grad_(i == 1)
                    y = qkern.linear(x, qt)
                    assert y.isfinite().all(), (fmt, m, n, k)
                    if i == 1:
                        y.backward(torch.ones_like(y))
                        assert x.grad is not None and x.grad.isfinite().all(), fmt
                qkern.dequantize(qt, torch.float16)
    with qkern.override(backend="cuda"):
        for fmt, k in (
            ("int4-g32-asym", 2304),  # few rows of many columns split K
            ("codebook3", 264),
            ("nvfp4", 264),
            ("int8-a8", 264),
        ):
            each = [qkern.quantize(torch.randn(70, k), fmt) for _ in range(4)]
            stack = qkern.QuantizedStack.from_tensors(each).to("cuda")
            offsets = torch.tensor([0, 3, 3, 40, 41], device="cuda")
            x = torch.randn(43, k, device="cuda").half()
            assert qkern.grouped_linear(x, stack, offsets).isfinite().all(), fmt
        torch.cuda.synchronize()
    print("small shapes: done")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("small")
    one = commands.add_parser("measure")
    one.add_argument("file", type=Path)
    one.add_argument("--seconds", type=float, default=240)
    one.add_argument("--only", metavar="FORMAT", help="one format")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.command == "small":
        small()
    else:
        measure(args.file, args.seconds, args.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
