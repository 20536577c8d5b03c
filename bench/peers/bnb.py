# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes NF4: on most processors it dequantizes the whole weight in every call."""

from __future__ import annotations

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import torch

from peers import Peer, Settings, _data
from peers.torch_ops import Listed, start, tensor


def nf4(dtype: torch.dtype, name: str) -> Peer:
    def make(n: int, k: int, i: int) -> tuple:
        values = tensor(_data.copy_of(_data.weight(n, k), i)).to(dtype)
        return bnbf.quantize_4bit(values, quant_type="nf4", blocksize=64)

    return Listed(
        f"bitsandbytes NF4 g64 {name}", "codebook4", "float",
        lambda n, k: n * k // 2 + n * k // 64 * 4, make,
        lambda x, w: bnb.matmul_4bit(x, w[0].t(), quant_state=w[1]),
        lambda n, k, w: bnbf.dequantize_4bit(*w).float().numpy(), dtype,
    )  # fmt: skip


def peers(settings: Settings) -> list[Peer]:
    start(settings)
    return [nf4(torch.float32, "fp32"), nf4(torch.bfloat16, "bf16")]
