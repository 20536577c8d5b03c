# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: one session whose graph holds every copy as a layer, buffers bound beforehand.

MatMulNBits computes in int8 only with accuracy_level 4 (its default is the slow path). The 8-bit
one with a float level is left out: it dequantizes the whole weight in every call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from onnx import numpy_helper as arrays

from peers import Peer, Settings, _data

Nodes = tuple[list, list]  # nodes, initializers
INT4_CLASS = {32: "int4-g32-a8", 64: "int4-g64-a8", 128: "int4-g128-a8"}


class Graph(Peer):
    def __init__(
        self, threads: int, name: str, kind: str, arithmetic: str,
        nbytes: Callable[[int, int], int], layer: Callable[[int, int, int], Nodes],
        dense: Callable[[int, int], np.ndarray],
    ):  # fmt: skip
        super().__init__(f"ORT {name}", kind, arithmetic)
        self.threads, self.layer, self.dense = threads, layer, dense
        self.weight_bytes = nbytes  # type: ignore[method-assign]

    def weight_bytes(self, n: int, k: int) -> int:
        raise NotImplementedError  # given to the constructor

    def build(self, n: int, k: int, copies: int) -> None:
        self.n, self.k, self.per_call = n, k, copies
        layers = [self.layer(n, k, i) for i in range(copies)]
        float_type = TensorProto.FLOAT
        graph = helper.make_graph(
            [node for nodes, _ in layers for node in nodes],
            "layers",
            [helper.make_tensor_value_info("x", float_type, ["M", k])],
            [helper.make_tensor_value_info(f"y{i}", float_type, ["M", n]) for i in range(copies)],
            initializer=[weight for _, weights in layers for weight in weights],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def calls(self, x: np.ndarray, copies: int) -> list:
        if copies != self.per_call:
            self.build(self.n, self.k, copies)
        binding = self.session.io_binding()
        binding.bind_cpu_input("x", x)
        self.results = [np.empty((len(x), self.n), np.float32) for _ in range(copies)]
        for i, y in enumerate(self.results):
            binding.bind_output(f"y{i}", "cpu", 0, np.float32, y.shape, y.ctypes.data)
        return [lambda: self.session.run_with_iobinding(binding)]

    def output(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(["y0"], {"x": x})[0]

    def weight(self) -> np.ndarray:
        return self.dense(self.n, self.k)


def matmul_nbits(threads: int, bits: int, group: int, level: int, symmetric: bool) -> Peer:
    def quantized(n: int, k: int) -> _data.Quantized:
        return _data.quantized(n, k, bits, group, symmetric)

    def layer(n: int, k: int, i: int) -> Nodes:
        q = quantized(n, k)
        codes = _data.copy_of(_data.nibbles(q.codes) if bits == 4 else q.codes, i)
        weights = [
            arrays.from_array(codes.reshape(n, -1, group * bits // 8), f"w{i}"),
            arrays.from_array(_data.copy_of(q.scales, i).reshape(-1), f"s{i}"),
        ]
        if not symmetric:
            zeros = _data.copy_of(_data.nibbles(q.zeros) if bits == 4 else q.zeros, i)
            weights.append(arrays.from_array(zeros, f"z{i}"))
        node = helper.make_node(
            "MatMulNBits", ["x", *(w.name for w in weights)], [f"y{i}"], domain="com.microsoft",
            K=k, N=n, bits=bits, block_size=group, accuracy_level=level,
        )  # fmt: skip
        return [node], weights

    int8 = level == 4
    kind = ("int8-a8" if bits == 8 else INT4_CLASS[group]) if int8 else f"int{bits}"
    name = f"MatMulNBits {bits}b g{group} acc{level} {'sym' if symmetric else 'asym'}"
    return Graph(
        threads, name, kind, "int8" if int8 else "float",
        lambda n, k: n * k * bits // 8 + n * -(-k // group) * 4, layer,
        lambda n, k: quantized(n, k).weight(),
    )  # fmt: skip


def dynamic_quantize_matmul(threads: int) -> Peer:
    def layer(n: int, k: int, i: int) -> Nodes:
        q = _data.quantized(n, k, 8, k, True)
        weights = [
            arrays.from_array(np.ascontiguousarray(_data.copy_of(q.signed(), i).T), f"w{i}"),
            arrays.from_array(_data.copy_of(q.scales[:, 0], i), f"s{i}"),
        ]
        node = helper.make_node(
            "DynamicQuantizeMatMul", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft"
        )
        return [node], weights

    return Graph(
        threads, "DynamicQuantizeMatMul s8", "int8-a8", "int8", lambda n, k: n * k + 4 * n, layer,
        lambda n, k: _data.quantized(n, k, 8, k, True).weight(),
    )  # fmt: skip


def matmul(threads: int) -> Peer:
    def layer(n: int, k: int, i: int) -> Nodes:
        values = np.ascontiguousarray(_data.copy_of(_data.weight(n, k), i).T)
        node = helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"])
        return [node], [arrays.from_array(values, f"w{i}")]

    return Graph(
        threads, "MatMul fp32", "reference", "float", lambda n, k: 4 * n * k, layer, _data.weight
    )


def peers(settings: Settings) -> list[Peer]:
    threads = settings.threads
    return [
        *(matmul_nbits(threads, 4, g, 4, sym) for g in (128, 64, 32) for sym in (True, False)),
        *(matmul_nbits(threads, 4, g, 1, True) for g in (128, 32)),
        *(matmul_nbits(threads, 8, g, 4, True) for g in (128, 32)),
        dynamic_quantize_matmul(threads),
        matmul(threads),
    ]
