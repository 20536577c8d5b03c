# SPDX-License-Identifier: Apache-2.0
"""torch.func.vmap: a mapped input is one with more rows; a mapped weight is refused in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkern import _library
from qkern.errors import UnsupportedError


def map_rows(name: str) -> None:
    """For an operation whose result has a row for each row of its first argument."""
    op = getattr(torch.ops.qkern, name).default

    def rule(info: Any, in_dims: tuple, first: Tensor, *others: Any) -> tuple[Any, Any]:
        if any(dim is not None for dim in in_dims[1:]):
            raise UnsupportedError(
                f"vmap maps qkern::{name} over its first argument alone, but the weight or the "
                "bias is mapped too; call it once per weight."
            )
        result = op(first.movedim(in_dims[0], 0), *others)
        return result, tuple(0 for _ in result) if isinstance(result, tuple) else 0

    torch.library.register_vmap(f"qkern::{name}", rule, lib=_library.library)


for _name in ("linear", "linear_train", "linear_grad_input", "embedding", "quantize_activations"):
    map_rows(_name)
