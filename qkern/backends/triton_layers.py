# SPDX-License-Identifier: Apache-2.0
"""Triton: mixture of experts, as qkern/_layers.py asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qkern import triton_kernels
from qkern.backends import triton
from qkern.errors import UnsupportedError
from qkern.formats import Format
from qkern.triton_kernels import Spec


def grouped_linear(
    x: Tensor,
    weight: Mapping[str, Any],
    fmt: Format,
    shape: Sequence[int],
    offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    perm = weight.get("perm")
    if perm is not None and fmt.activations != "float":
        if not bool((perm == perm[:1]).all()):
            raise UnsupportedError(
                "The backend triton quantizes activations once for all experts, so that with int8 "
                "activations they must share one permutation of the columns; these do not."
            )
        perm = perm[0]
    # All experts along the first axis, as the kernel takes them.
    flat = {name: weight[name].flatten(0, 1) for name in ("codes", "scales", "zeros", "codebook")
            if name in weight}  # fmt: skip
    factors = None
    if "global_scale" in weight:
        factors = weight["global_scale"].flatten().float() * fmt.table_scale
    if fmt.table is not None:
        table = triton._fixed_table(fmt, weight["codes"].device)
        flat["codebook"] = table.expand(shape[0], -1).contiguous()
    return triton_kernels.grouped_linear(
        x, offsets, flat["codes"], flat.get("scales"), flat.get("zeros"), flat.get("codebook"),
        perm, None if bias is None else bias.contiguous(), factors,
        spec=Spec.from_format(fmt),
    )  # fmt: skip
