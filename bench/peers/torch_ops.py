# SPDX-License-Identifier: Apache-2.0
"""Operations of torch itself.

Not here: `_weight_int8pack_mm` in float32 (a scalar loop), `_int_mm` (packs the weight on each
call) and `_dyn_quant_matmul_4bit` (Arm; a scalar reference elsewhere).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from peers import Absent, Peer, Settings, _data

BFLOAT16_ROUNDING = 1e-2  # of activations, scales and the result together


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


class Listed(Peer):
    """A peer whose copies are objects that a function takes one at a time."""

    def __init__(
        self, name: str, kind: str, arithmetic: str, nbytes: Callable[[int, int], int],
        make: Callable[[int, int, int], Any], run: Callable[[torch.Tensor, Any], torch.Tensor],
        dense: Callable[[int, int, Any], np.ndarray], dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(name, kind, arithmetic)
        self.weight_bytes = nbytes  # type: ignore[method-assign]
        self.make, self.run, self.dense, self.dtype = make, run, dense, dtype
        if dtype == torch.bfloat16:
            self.tolerance = BFLOAT16_ROUNDING

    def weight_bytes(self, n: int, k: int) -> int:
        raise NotImplementedError  # given to the constructor

    def build(self, n: int, k: int, copies: int) -> None:
        self.n, self.k = n, k
        self.layers = [self.make(n, k, i) for i in range(copies)]

    def calls(self, x: np.ndarray, copies: int) -> list:
        given = tensor(x).to(self.dtype)
        return [functools.partial(self.run, given, layer) for layer in self.layers[:copies]]

    def output(self, x: np.ndarray) -> np.ndarray:
        return self.run(tensor(x).to(self.dtype), self.layers[0]).float().numpy()

    def weight(self) -> np.ndarray:
        return self.dense(self.n, self.k, self.layers[0])

    def seen(self, x: np.ndarray) -> np.ndarray:
        return tensor(x).to(self.dtype).float().numpy()


def start(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    found = torch.backends.cpu.get_cpu_capability()
    if settings.isa == "avx2" and found != "AVX2":
        raise Absent(f"torch did not follow ATEN_CPU_CAPABILITY=avx2, it uses {found}")


def plain(dtype: torch.dtype, name: str) -> Peer:
    size = dtype.itemsize
    return Listed(
        f"torch F.linear {name}", "reference", "float", lambda n, k: n * k * size,
        lambda n, k, i: tensor(_data.copy_of(_data.weight(n, k), i)).to(dtype, copy=True),
        F.linear, lambda n, k, w: w.float().numpy(), dtype,
    )  # fmt: skip


def int4pack(group: int) -> Peer:
    ops = torch.ops.aten

    def make(n: int, k: int, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        _data.whole_groups(k, group)
        q = _data.quantized(n, k, 4, group, False)
        codes = tensor(_data.copy_of(q.codes, i)).int()
        pairs = [q.scales, (8 - q.zeros.astype(np.float32)) * q.scales]  # w = (code - 8) s + z
        pairs = tensor(np.stack([_data.copy_of(p, i).T for p in pairs], -1)).bfloat16()
        return ops._convert_weight_to_int4pack_for_cpu(codes, 1), pairs.contiguous()

    def dense(n: int, k: int, layer: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
        codes = _data.quantized(n, k, 4, group, False).codes.reshape(n, -1, group)
        scales, offsets = layer[1].float().numpy().transpose(2, 1, 0)[..., None]
        return ((codes.astype(np.float32) - 8) * scales + offsets).reshape(n, k)

    return Listed(
        f"torch int4pack g{group} bf16", "int4", "float",
        lambda n, k: n * k // 2 + n * (k // group) * 4, make,
        lambda x, w: ops._weight_int4pack_mm_for_cpu(x, w[0], group, w[1]), dense, torch.bfloat16,
    )  # fmt: skip


def channel_codes(n: int, k: int, i: int) -> tuple[torch.Tensor, np.ndarray]:
    q = _data.quantized(n, k, 8, k, True)
    return tensor(_data.copy_of(q.signed(), i)), _data.copy_of(q.scales[:, 0], i)


def int8pack() -> Peer:
    def make(n: int, k: int, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = channel_codes(n, k, i)
        return codes.clone(), tensor(scales).bfloat16()

    return Listed(
        "torch int8pack bf16", "int8", "float", lambda n, k: n * k + 2 * n, make,
        lambda x, w: torch.ops.aten._weight_int8pack_mm(x, w[0], w[1]),
        lambda n, k, w: (w[0].float() * w[1].float()[:, None]).numpy(), torch.bfloat16,
    )  # fmt: skip


def dynamic(engine: str) -> Peer:
    def make(n: int, k: int, i: int) -> Any:
        torch.backends.quantized.engine = engine
        codes, scales = channel_codes(n, k, i)
        made = torch._make_per_channel_quantized_tensor(
            codes, tensor(scales).double(), torch.zeros(n, dtype=torch.long), 0
        )
        return torch.ops.quantized.linear_prepack(made, None)

    def dense(n: int, k: int, layer: Any) -> np.ndarray:
        return _data.quantized(n, k, 8, k, True).weight()

    return Listed(
        f"torch linear_dynamic {engine}", "int8-a8", "int8", lambda n, k: n * k + 4 * n, make,
        lambda x, w: torch.ops.quantized.linear_dynamic(x, w, False), dense,
    )  # fmt: skip


def peers(settings: Settings) -> list[Peer]:
    start(settings)
    return [
        plain(torch.float32, "fp32"),
        plain(torch.bfloat16, "bf16"),
        *(int4pack(group) for group in (32, 64, 128)),
        int8pack(),
        *(dynamic(engine) for engine in ("x86", "fbgemm", "onednn")),
    ]
