# SPDX-License-Identifier: Apache-2.0
"""ggml through ctypes: the libraries inside llama-cpp-python, or those in QKERN_BENCH_GGML.

The fast kernels read weights from the "repack" buffer; Q8_0 has none on x86. One graph holds every
copy. The instruction set is chosen when ggml is built: for --isa avx2 name a build with
GGML_NATIVE=OFF, GGML_AVX512=OFF, GGML_AVX2=ON, GGML_FMA=ON, GGML_F16C=ON, GGML_BMI2=ON. The folder
vendor/llama.cpp/ggml of llama-cpp-python's sources builds alone with CMake in a few minutes; it
asks for a file ggml.pc.in, which may be empty.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from peers import Absent, Peer, Settings, _data

TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "IQ4_NL": 20, "MXFP4": 39}
CLASS = {
    "Q4_0": "int4-g32-a8", "Q4_K": "int4-g32-a8", "IQ4_NL": "codebook4", "MXFP4": "codebook4",
    "Q8_0": "int8-a8",
}  # fmt: skip
LIBRARIES = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
METADATA = 4 << 20  # bytes for descriptions of tensors and graphs


class InitParams(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool)]


class TypeTraits(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p), ("block", c_int64), ("interleave", c_int64), ("size", c_size_t),
        ("quantized", c_bool), ("to_float", c_void_p),
    ]  # fmt: skip


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_version": (c_char_p,),
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (
        c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p,
    ),
    "ggml_get_type_traits": (POINTER(TypeTraits), c_int),
    "ggml_cpu_has_avx512": (c_int,),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
}  # fmt: skip


class Ggml:
    """The functions of SIGNATURES without their prefix, a CPU backend and its repack buffer."""

    def __init__(self, threads: int):
        folder = find_libraries()
        opened = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
        for name, (result, *arguments) in SIGNATURES.items():
            home = next((one for one in opened if hasattr(one, name)), None)
            if home is None:
                raise Absent(f"the libraries in {folder} have no {name}")
            function = getattr(home, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.cpu = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.cpu, threads)
        self.repack = self.find_repack()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # only those of SIGNATURES, set by the constructor

    def find_repack(self) -> int | None:
        device = self.backend_get_device(self.cpu)
        address = self.backend_reg_get_proc_address(
            self.backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
        )
        if not address:
            return None
        listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        i = 0
        while listed and listed[i]:
            if b"REPACK" in self.backend_buft_name(listed[i]):
                return listed[i]
            i += 1
        return None

    def context(self) -> int:
        return self.init(InitParams(METADATA, None, True))


@functools.cache
def started(threads: int) -> Ggml:
    return Ggml(threads)


def find_libraries() -> Path:
    named = os.environ.get("QKERN_BENCH_GGML")
    if named:
        folder = Path(named)
    else:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("No module named 'llama_cpp'")
        folder = Path(spec.submodule_search_locations[0]) / "lib"
    missing = [name for name in LIBRARIES if not (folder / name).exists()]
    if missing:
        raise Absent(f"{folder} has no {', '.join(missing)}")
    return folder


class Product(Peer):
    def __init__(self, ggml: Ggml, kind: str, repack: bool):
        super().__init__(f"ggml {kind} {'repack' if repack else 'plain'}", CLASS[kind], "int8")
        self.ggml, self.type, self.repack = ggml, TYPES[kind], repack
        self.weights: tuple[int, int] | None = None  # context and buffer
        self.graph: tuple[int, int] | None = None

    def weight_bytes(self, n: int, k: int) -> int:
        return n * self.ggml.row_size(self.type, k)

    def build(self, n: int, k: int, copies: int) -> None:
        self.close()
        g = self.ggml
        block = g.get_type_traits(self.type)[0].block
        _data.whole_groups(k, block)
        if self.repack and not g.repack:
            raise ValueError("this build has no repack buffer")
        self.n, self.k = n, k
        source = np.ascontiguousarray(_data.weight(n, k))
        self.data = np.empty((n, g.row_size(self.type, k)), np.uint8)
        g.quantize_chunk(self.type, source.ctypes.data, self.data.ctypes.data, 0, n, k, None)
        context = g.context()
        self.tensors = [g.new_tensor_2d(context, self.type, k, n) for _ in range(copies)]
        kind = g.repack if self.repack else g.backend_cpu_buffer_type()
        buffer = g.backend_alloc_ctx_tensors_from_buft(context, kind)
        for i, tensor in enumerate(self.tensors):
            rows = _data.copy_of(self.data, i)
            g.backend_tensor_set(tensor, rows.ctypes.data, 0, rows.nbytes)
        self.weights = (context, buffer)

    def calls(self, x: np.ndarray, copies: int) -> list:
        self.free("graph")
        g, m = self.ggml, len(x)
        context = g.context()
        given = g.new_tensor_2d(context, TYPES["F32"], self.k, m)
        graph = g.new_graph_custom(context, 2 * copies + 8, False)
        self.results = [g.mul_mat(context, tensor, given) for tensor in self.tensors[:copies]]
        for result in self.results:
            g.build_forward_expand(graph, result)
        self.graph = (context, g.backend_alloc_ctx_tensors(context, g.cpu))
        g.backend_tensor_set(given, x.ctypes.data, 0, x.nbytes)
        self.per_call = copies
        return [lambda: g.backend_graph_compute(g.cpu, graph)]

    def output(self, x: np.ndarray) -> np.ndarray:
        self.calls(x, 1)[0]()
        y = np.empty((len(x), self.n), np.float32)
        self.ggml.backend_tensor_get(self.results[0], y.ctypes.data, 0, y.nbytes)
        return y

    def weight(self) -> np.ndarray:
        to_float = self.ggml.get_type_traits(self.type)[0].to_float
        w = np.empty((self.n, self.k), np.float32)
        convert = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)(to_float)
        convert(self.data.ctypes.data, w.ctypes.data, w.size)
        return w

    def detail(self) -> str:
        return f"ggml {self.ggml.version().decode()}"

    def free(self, name: str) -> None:
        held = getattr(self, name)
        if held:
            self.ggml.backend_buffer_free(held[1])
            self.ggml.free(held[0])
            setattr(self, name, None)

    def close(self) -> None:
        self.free("graph")
        self.free("weights")


def peers(settings: Settings) -> list[Peer]:
    ggml = started(settings.threads)
    if settings.isa == "avx2" and ggml.cpu_has_avx512():
        raise Absent("this build uses AVX-512; name one for AVX2 in QKERN_BENCH_GGML")
    plans = [(kind, True) for kind in ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4")]
    return [Product(ggml, *plan) for plan in [*plans, ("Q4_K", False), ("Q8_0", False)]]
