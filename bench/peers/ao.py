# SPDX-License-Identifier: Apache-2.0
"""torchao modules on the CPU.

Its stable int4 configuration is for GPUs; the prototype one calls torch's int4pack kernel. What it
composes from torch operations is 30 times slower unless torch.compile joins it (`--compiled`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from peers import Peer, Settings, _data
from peers.torch_ops import Listed, start, tensor

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")

from torchao.prototype.quantization.int4 import inference_workflow  # noqa: E402
from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)


def module(
    name: str, kind: str, arithmetic: str, config: Callable[[], Any], dtype: torch.dtype,
    nbytes: Callable[[int, int], int], compiled: bool = False,
) -> Peer:  # fmt: skip
    def make(n: int, k: int, i: int) -> torch.nn.Module:
        linear = torch.nn.Linear(k, n, bias=False, dtype=dtype)
        values = tensor(_data.copy_of(_data.weight(n, k), i)).to(dtype)
        linear.weight = torch.nn.Parameter(values, requires_grad=False)
        quantize_(linear, config(), device=None)
        return torch.compile(linear.eval(), dynamic=False) if compiled else linear.eval()

    def dense(n: int, k: int, layer: torch.nn.Module) -> np.ndarray:
        if "Int4" not in name:
            return layer.weight.dequantize().float().numpy()
        # Packed without a way back: what it makes of the columns of the identity, once.
        if not hasattr(layer, "dense"):
            layer.dense = layer(torch.eye(k, dtype=dtype)).float().numpy().T
        return layer.dense

    label = f"torchao {name}" + (" compiled" if compiled else "")
    return Listed(label, kind, arithmetic, nbytes, make, lambda x, m: m(x), dense, dtype)


def int4(group: int) -> Peer:
    def config() -> Any:
        return inference_workflow.PrototypeInt4WeightOnlyConfig(
            group_size=group, set_inductor_config=False
        )

    return module(
        f"Int4WeightOnly g{group} bf16", "int4", "float", config, torch.bfloat16,
        lambda n, k: n * k // 2 + n * (k // group) * 4,
    )  # fmt: skip


def int8(name: str, kind: str, arithmetic: str, config: Callable, compiled: bool) -> Peer:
    return module(
        name, kind, arithmetic, lambda: config(set_inductor_config=False), torch.float32,
        lambda n, k: n * k + 4 * n, compiled,
    )  # fmt: skip


def peers(settings: Settings) -> list[Peer]:
    start(settings)
    found = [int4(group) for group in (32, 128)]
    for compiled in (False, True) if settings.compiled else (False,):
        found += [
            int8("Int8DynAct-Int8Weight fp32", "int8-a8", "int8",
                 Int8DynamicActivationInt8WeightConfig, compiled),
            int8("Int8WeightOnly fp32", "int8", "float", Int8WeightOnlyConfig, compiled),
        ]  # fmt: skip
    return found
