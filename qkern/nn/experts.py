# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: stacks of quantized weights, and the module that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qkern import _layers
from qkern._quantize import quantize
from qkern.errors import UnsupportedError
from qkern.formats import Format, parse_format
from qkern.formats._base import Part
from qkern.nn._base import Configured, QuantizedModule, dtype_text, meta_like
from qkern.stack import QuantizedStack, stack_rules


class GroupedLinear(QuantizedModule):
    """One linear layer per expert, all of one shape: rows offsets[e] .. offsets[e + 1] of x [T, K]
    go through expert e, to [T, N] in the dtype of x (qkern.grouped_linear).

    Buffers are those of a Linear with a first dimension [experts]; `weight` is a QuantizedStack.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        weight: QuantizedStack,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(weight, QuantizedStack):
            raise TypeError(f"A QuantizedStack was expected, but {type(weight).__name__} came.")
        super().__init__(weight, compute_dtype)
        self.experts, self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != weight.shape[:2]:
            raise ValueError(f"bias must be {weight.shape[:2]}, but it is {tuple(bias.shape)}.")
        if bias is not None and not isinstance(bias, torch.nn.Parameter):
            bias = torch.nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_stack(cls, weight: Tensor, fmt: Format | str, **options: Any) -> GroupedLinear:
        """The layer of float weights [E, N, K]; `options` go to qkern.quantize."""
        weight = weight.detach()
        each = [quantize(w, fmt, **options) for w in weight]
        return cls(QuantizedStack.from_tensors(each), None, weight.dtype)

    def _weight_of(self, parts: dict[str, Tensor]) -> QuantizedStack:
        experts, n, k = self.shape
        return QuantizedStack.from_parts(self.format, (experts, n, k), check=False, **parts)

    def _rules(self) -> dict[str, Part]:
        return stack_rules(self.format, self.shape)

    def config(self) -> dict[str, Any]:
        return {
            "experts": self.experts,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": dtype_text(self.bias),
            **super().config(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GroupedLinear:
        shape = config["experts"], config["out_features"], config["in_features"]
        return cls(
            _meta_stack(shape, config["format"]),
            meta_like(shape[:2], config["bias"]),
            getattr(torch, config["compute_dtype"]),
        )

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        _layers.check_grouped(x, offsets, bias, *self.shape)
        backend, weight = self._held_for(x)
        run = _layers.function(backend, "grouped_linear")
        return run(x, weight, self.format, self.shape, offsets, bias)

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._weight_repr()}"
        )


class Experts(Configured):
    """The experts of a mixture in the form that Hugging Face transformers give them: float stacks
    gate_up_proj [E, 2 I, H] and down_proj [E, H, I], here two GroupedLinear.

    forward(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]) sums, for each token,
    down(act(gate(x)) * up(x)) of its experts times their weights, ascending by expert, to [T, H]
    in the dtype of hidden_states. An index E or above contributes nothing.
    """

    def __init__(
        self, gate_up_proj: GroupedLinear, down_proj: GroupedLinear, act_fn: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        experts, outputs, hidden = gate_up_proj.shape
        if outputs % 2 or down_proj.shape != (experts, hidden, outputs // 2):
            raise ValueError(
                f"gate_up_proj {gate_up_proj.shape} and down_proj {down_proj.shape} do not fit; "
                "they must be [E, 2 I, H] and [E, H, I]."
            )
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, act_fn
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, hidden, outputs // 2

    @property
    def format(self) -> Format:
        return self.gate_up_proj.format

    @staticmethod
    def obstacle(module: torch.nn.Module) -> str | None:
        """Why this module is no float counterpart; None where it is one.

        Classes under transformers' `use_experts_implementation` say in attributes how they use
        their stacks, which is what their forward functions in all implementations go by.
        """
        kind = type(module).__name__
        stacks = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
        gate = getattr(type(module), "_apply_gate", None)
        said = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
        if gate is None or not all(hasattr(module, name) for name in said[:4]):
            return f"{kind} does not declare how it uses its stacks of weights"
        wanted = (True, False, False, True, False)
        for name, value in zip(said, wanted, strict=True):
            if getattr(module, name, False) != value:
                return f"{kind} has {name}={getattr(module, name)}, which no quantized stack does"
        if gate.__name__ != "_default_apply_gate" or not callable(getattr(module, "act_fn", None)):
            return f"{kind} combines gate and up in its own way"
        if getattr(module, "_is_expert_parallel", False):
            return f"{kind} has its experts on several processes"
        if not all(isinstance(w, torch.nn.Parameter) and w.dim() == 3 for w in stacks):
            return f"{kind} has no stacks gate_up_proj and down_proj"
        return None

    @classmethod
    def from_float(cls, module: Any, fmt: Format | str, **options: Any) -> Experts:
        """The module with both stacks quantized; `options` go to qkern.quantize."""
        reason = cls.obstacle(module)
        if reason is not None:
            raise UnsupportedError(f"This module cannot be replaced: {reason}.")
        made = cls(
            GroupedLinear.from_stack(module.gate_up_proj, fmt, **options),
            GroupedLinear.from_stack(module.down_proj, fmt, **options),
            module.act_fn,
        )
        return made.train(module.training)

    def config(self) -> dict[str, Any]:
        name = next((n for n, make in _ACTIVATIONS.items() if _is_like(self.act_fn, make())), None)
        if name is None:
            raise UnsupportedError(
                f"The activation {type(self.act_fn).__name__} of these experts has no name here; "
                f"those that have one: {', '.join(_ACTIVATIONS)}."
            )
        return {
            "gate_up_proj": self.gate_up_proj.config(),
            "down_proj": self.down_proj.config(),
            "act_fn": name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Experts:
        return cls(
            GroupedLinear.from_config(config["gate_up_proj"]),
            GroupedLinear.from_config(config["down_proj"]),
            _ACTIVATIONS[config["act_fn"]](),
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.reshape(-1)
        share = torch.where(chosen < self.num_experts, top_k_weights.reshape(-1), 0)
        expert, order = torch.sort(chosen.clamp(max=self.num_experts - 1), stable=True)
        token = order // top_k_index.shape[-1]
        bounds = torch.arange(self.num_experts + 1, device=expert.device, dtype=expert.dtype)
        offsets = torch.searchsorted(expert, bounds)
        gate, up = self.gate_up_proj(hidden_states[token], offsets).chunk(2, dim=-1)
        y = self.down_proj(self.act_fn(gate) * up, offsets) * share[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, token, y.to(hidden_states.dtype))

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}"


# Activations by the name that a configuration has for them.
_ACTIVATIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "silu": torch.nn.SiLU,
    "gelu": torch.nn.GELU,
    "gelu_tanh": lambda: torch.nn.GELU(approximate="tanh"),
    "relu": torch.nn.ReLU,
}


def _is_like(ours: Any, known: torch.nn.Module) -> bool:
    """Whether both compute the same on numbers that tell the known activations apart."""
    x = torch.linspace(-6, 6, 97)
    try:
        return torch.equal(ours(x), known(x))
    except (TypeError, ValueError, RuntimeError):
        return False


def _meta_stack(shape: Sequence[int], fmt: Format | str) -> QuantizedStack:
    fmt, size = parse_format(fmt), (shape[0], shape[1], shape[2])
    parts: dict[str, Any] = {
        name: torch.empty(part.shape, dtype=getattr(torch, part.dtypes[0]), device="meta")
        for name, part in stack_rules(fmt, size).items()
        if name != "perm"
    }
    return QuantizedStack.from_parts(fmt, size, check=False, **parts)
