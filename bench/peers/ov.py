# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: one model that holds every copy as a layer, weights as compressed constants.

An `openvino.Tensor` over a numpy array shares its memory, and weights are packed at the first
inference: the arrays must live as long as the request. Dynamic quantization of activations has the
group of the weight, which must be a multiple of it.
"""

from __future__ import annotations

import numpy as np
import openvino
from openvino import opset13 as op

from peers import Peer, Settings, _data
from qkern import NF4

CORE = openvino.Core()
INT4_CLASS = {32: "int4-g32-a8", 64: "int4-g64-a8", 128: "int4-g128-a8"}


class Compressed(Peer):
    """`store`: f32, nf4, or i/u and bits; group 0: one scale per row; dynamic 0: float."""

    def __init__(self, settings: Settings, store: str, group: int, dynamic: int, kind: str):
        detail = f" g{group}" if group else ""
        mode = "" if store in ("f32", "nf4") else f" DQ{dynamic}" if dynamic else " DQ off"
        super().__init__(f"OpenVINO {store}{detail}{mode}", kind, "int8" if dynamic else "float")
        self.settings, self.store, self.group, self.dynamic = settings, store, group, dynamic
        self.bits = {"f32": 32, "nf4": 4}.get(store) or int(store[1:])

    def weight_bytes(self, n: int, k: int) -> int:
        if self.store == "f32":
            return 4 * n * k
        groups = k // self.group if self.group else 1
        return n * k * self.bits // 8 + 2 * n * groups

    def build(self, n: int, k: int, copies: int) -> None:
        if self.group:
            _data.whole_groups(k, self.group)
        self.n, self.k, self.per_call, self.kept = n, k, copies, []
        x = op.parameter([-1, k], openvino.Type.f32)
        layers = [op.matmul(x, self.constant(i), False, True) for i in range(copies)]
        model = openvino.Model([op.result(layer) for layer in layers], [x], "layers")
        compiled = CORE.compile_model(model, "CPU", {
            "INFERENCE_NUM_THREADS": self.settings.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.dynamic,
            "PERFORMANCE_HINT": "LATENCY",
        })  # fmt: skip
        self.request = compiled.create_infer_request()

    def constant(self, i: int) -> openvino.Output:
        """Copy i of the weight as a graph that yields float32 [N, K]."""
        n, k = self.n, self.k
        if self.store == "f32":
            return op.constant(_data.copy_of(_data.weight(n, k), i))
        codes, scales, zeros = self.parts()
        shape = [n, k // self.group, self.group] if self.group else [n, k]
        signed = self.store.startswith("i")
        if signed:
            codes = (codes - 2 ** (self.bits - 1)).astype(np.uint8) & (2**self.bits - 1)
        value = self.shared(_data.copy_of(codes, i), shape)
        if self.store.startswith("u"):
            value = op.subtract(value, self.shared(_data.copy_of(zeros, i), [*shape[:-1], 1]))
        scales = _data.copy_of(scales, i)
        value = op.multiply(value, op.constant(scales[..., None] if self.group else scales))
        if self.group:
            value = op.reshape(value, op.constant(np.array([n, k], np.int64)), False)
        return op.convert(value, "f32")

    def shared(self, values: np.ndarray, shape: list[int]) -> openvino.Output:
        raw = np.ascontiguousarray(
            _data.nibbles(values.reshape(1, -1))[0] if self.bits == 4 else values.reshape(-1)
        )
        kind = getattr(openvino.Type, self.store)
        made = openvino.Tensor(raw, openvino.Shape(shape), kind)
        self.kept += [raw, made]
        return op.convert(openvino.op.Constant(made), "f16")

    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Codes uint8 [N, K], scales float16 [N, groups], zeros uint8 or None."""
        n, k, group = self.n, self.k, self.group or self.k
        if self.store == "nf4":
            table = NF4().table
            w = _data.weight(n, k).reshape(n, -1, group)
            scales = np.abs(w).max(-1).astype(np.float16)
            nearest = np.searchsorted((table[1:] + table[:-1]) / 2, w / scales[..., None])
            return nearest.astype(np.uint8).reshape(n, k), scales, None
        q = _data.quantized(n, k, self.bits, group, self.store.startswith("i"))
        return q.codes, q.scales.astype(np.float16), q.zeros

    def calls(self, x: np.ndarray, copies: int) -> list:
        if copies != self.per_call:
            self.build(self.n, self.k, copies)
        self.bind(x)
        return [self.request.infer]

    def bind(self, x: np.ndarray) -> None:
        self.input = (x, openvino.Tensor(x, shared_memory=True))
        self.request.set_input_tensor(0, self.input[1])

    def output(self, x: np.ndarray) -> np.ndarray:
        self.bind(x)
        try:
            self.request.infer()
        except RuntimeError as error:  # each layer of its sources puts a line in front
            lines = [x for x in str(error).splitlines() if x and not x.startswith("Exception")]
            raise ValueError(" ".join(lines)) from None
        return np.array(self.request.get_output_tensor(0).data)

    def weight(self) -> np.ndarray:
        if self.store == "f32":
            return _data.weight(self.n, self.k)
        codes, scales, zeros = self.parts()
        if self.store == "nf4":
            wide = scales.astype(np.float32)[..., None]
            return (NF4().table[codes].reshape(self.n, -1, self.group) * wide).reshape(codes.shape)
        group = self.group or self.k
        q = _data.Quantized(codes, scales.astype(np.float32), zeros, group, self.k)
        return q.weight()

    def detail(self) -> str:
        model = self.request.get_compiled_model().get_runtime_model()
        found = set()
        for node in model.get_ops():
            facts = node.get_rt_info()
            if facts["layerType"].astype(str) in ("FullyConnected", "MatMul"):
                found.add(facts["primitiveType"].astype(str))
        names = ", ".join(sorted(found))
        if self.settings.isa == "avx2" and ("avx512" in names or "mlas" in names):
            raise ValueError(f"runs {names}, which ONEDNN_MAX_CPU_ISA=AVX2 does not limit")
        return names


def peers(settings: Settings) -> list[Peer]:
    found = [Compressed(settings, "f32", 0, 0, "reference")]
    for group, kind in INT4_CLASS.items():
        found += [Compressed(settings, store, group, group, kind) for store in ("i4", "u4")]
    found += [Compressed(settings, "u4", group, 0, "int4") for group in (32, 128)]
    found += [Compressed(settings, "i4", 128, 0, "int4")]
    found += [Compressed(settings, "nf4", 64, 0, "codebook4")]
    found += [Compressed(settings, "i8", 0, dynamic, "int8-a8") for dynamic in (32, 128)]
    found += [Compressed(settings, "u8", 128, 128, "int8-a8")]
    return [*found, Compressed(settings, "i8", 0, 0, "int8")]
