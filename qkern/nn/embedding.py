# SPDX-License-Identifier: Apache-2.0
"""A table of embeddings with quantized rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkern import _canonical, _library
from qkern._quantize import quantize
from qkern.errors import UnsupportedError
from qkern.formats import Format
from qkern.nn._base import QuantizedModule, canonical_parts, meta_weight, require
from qkern.ops import check_weight
from qkern.tensor import QuantizedTensor


class Embedding(QuantizedModule):
    """Rows of a quantized table [num_embeddings, embedding_dim]: what torch.nn.Embedding is for
    float tables.

    ids are int64 or int32 of any shape [...]; the result is [..., embedding_dim] in
    `compute_dtype`. An id out of range is a ValueError on the CPU. `padding_idx` is kept and
    reported; it matters for gradients of the table alone, which a quantized one does not have.
    `max_norm`, `scale_grad_by_freq` and `sparse` are refused: they change the table, or its
    gradient.

    On the CPU rows are read from canonical storage, where they lie together; a table that is tied
    to a linear layer is packed with it, and LUT-B is always packed.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: Format | str,
    ) -> None:
        module = torch.nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
            sparse, device=device, dtype=dtype,
        )  # fmt: skip
        weight = self.matrix_of(module)
        quantized = (
            meta_weight(weight.shape, format) if weight.is_meta else quantize(weight, format)
        )
        self._set(quantized, module.padding_idx, weight.dtype)

    def _set(
        self, weight: QuantizedTensor, padding_idx: int | None, compute_dtype: torch.dtype
    ) -> None:
        super().__init__(weight, compute_dtype)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    @classmethod
    def matrix_of(cls, module: torch.nn.Embedding) -> Tensor:
        require(module, torch.nn.Embedding, "torch.nn.Embedding")
        for name, plain, why in (
            ("max_norm", None, "renormalizes rows of the table at each call"),
            ("scale_grad_by_freq", False, "is about the gradient of the table"),
            ("sparse", False, "is about the gradient of the table"),
        ):
            if getattr(module, name) != plain:
                raise UnsupportedError(
                    f"{name}={getattr(module, name)} {why}, which a quantized table cannot follow; "
                    f"set {name} to {plain} first."
                )
        return module.weight.detach()

    @classmethod
    def like(cls, module: torch.nn.Embedding, weight: QuantizedTensor) -> Embedding:
        """The table with this weight."""
        made = cls.from_weight(weight, module.padding_idx, module.weight.dtype)
        return made.train(module.training)

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedTensor,
        padding_idx: int | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> Embedding:
        """The table of a quantized weight [num_embeddings, embedding_dim]."""
        check_weight(weight)
        if padding_idx is not None:
            n = weight.shape[0]
            if not -n <= padding_idx < n:
                raise ValueError(f"padding_idx must be within the {n} rows, not {padding_idx}.")
            padding_idx %= n
        module = cls.__new__(cls)
        module._set(weight, padding_idx, compute_dtype)
        return module

    def config(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            **super().config(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Embedding:
        shape = config["num_embeddings"], config["embedding_dim"]
        return cls.from_weight(
            meta_weight(shape, config["format"]),
            config["padding_idx"],
            getattr(torch, config["compute_dtype"]),
        )

    def _held_for(self, x: Tensor) -> tuple[Any, Any]:
        # A weight that a linear layer shares is packed, for its sake.
        codes = self._buffers["codes"]
        canonical = codes is not None and not self._shared.tied and x.is_cpu and codes.is_cpu
        if canonical and _canonical.rows_lie_ready(self.format):
            parts = canonical_parts(self._buffers)
            return _canonical, {**parts, "format": self._format_text}
        return super()._held_for(x)

    def forward(self, ids: Tensor) -> Tensor:
        _library.check_ids(ids)
        backend, weight = self._held_for(ids)
        return backend.embedding(ids, weight, self.format, self.shape, self.compute_dtype)

    def dequantize(self) -> torch.nn.Embedding:
        """The float table with the same values, in `compute_dtype`."""
        module = torch.nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        module.weight = torch.nn.Parameter(self.weight.dequantize(self.compute_dtype))
        return module.train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self._weight_repr()}"
