# SPDX-License-Identifier: Apache-2.0
"""What all modules with one quantized weight share: how the weight is held, moved and saved.

The parts of the weight are plain buffers in canonical storage. The first use on the CPU turns them
into one buffer `packed`, not part of the state dict, and drops them, so that one copy of the
weight remains. Everything that looks at the state sees canonical storage all the same:
state_dict, load_state_dict, copies, pickles, moves to other devices, `.codes`, `.scales` ...
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkern import _library, backends
from qkern._arrays import dtype_name
from qkern.errors import UnsupportedError
from qkern.formats import Format, parse_format
from qkern.ops import held
from qkern.tensor import QuantizedTensor

_PARTS = ("codes", "scales", "zeros", "codebook", "perm", "global_scale")

# Guards the change between the two states, which is rare: one lock for all modules, so that a
# module stays free of what cannot be copied or pickled.
_state_lock = threading.RLock()


def _new_lock() -> None:
    global _state_lock
    _state_lock = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)  # another thread may have held it


def _part(name: str) -> property:
    def read(module: QuantizedModule) -> Tensor | None:
        return module.parts().get(name)

    return property(read, doc=f"{name} of the weight in canonical storage, or None.")


class QuantizedModule(torch.nn.Module):
    """Base of the modules. `shape` is that of the weight matrix, (N, K)."""

    format: Format
    shape: tuple[int, int]
    compute_dtype: torch.dtype
    _packed_weight: QuantizedTensor | None

    codes = _part("codes")
    scales = _part("scales")
    zeros = _part("zeros")
    codebook = _part("codebook")
    perm = _part("perm")
    global_scale = _part("global_scale")

    def __init__(self, weight: QuantizedTensor, compute_dtype: torch.dtype) -> None:
        super().__init__()
        _library.check_float_dtype(compute_dtype)
        self.format = weight.format
        self.shape = weight.shape
        self.compute_dtype = compute_dtype
        self._packed_weight = None
        self._buffers["packed"] = None
        self._non_persistent_buffers_set.add("packed")
        for name, part in weight.parts().items():
            self._buffers[name] = torch.as_tensor(part)

    @classmethod
    def from_float(cls, module: Any, fmt: Format | str, **options: Any) -> QuantizedModule:
        """The module with its weight quantized; `options` go to qkern.quantize."""
        raise NotImplementedError

    # ---- the weight ----

    @property
    def weight(self) -> QuantizedTensor:
        """The weight, sharing memory with this module."""
        with _state_lock:
            return self._packed_weight or QuantizedTensor.from_parts(
                self.format, self.shape, check=False, **self.parts()
            )

    def parts(self) -> dict[str, Tensor]:
        """The canonical parts of the weight by name; fresh tensors where it is packed."""
        with _state_lock:
            if self._packed_weight is not None:
                return self._packed_weight.parts()
            return {name: part for name, part in self._buffers.items() if part is not None}

    def _held_for(self, x: Tensor) -> tuple[Any, Any]:
        """The backend for this input, and the weight as it reads it."""
        device_type = "cpu" if x.is_cpu else x.device.type  # the first is five times faster
        self._make_ready(device_type)
        backend = backends.select(device_type)
        return backend, self._buffers if backend.PACKED else self.parts()

    def _make_ready(self, device_type: str) -> None:
        if self._buffers["packed"] is None and backends.select(device_type).PACKED:
            self._pack()

    # torch.compile runs it while tracing, on the module itself, and records nothing.
    # (torch.compiler.assume_constant_result sets the same mark but imports the compiler.)
    _make_ready._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _pack(self) -> None:
        with _state_lock:
            if self._buffers["packed"] is not None:
                return
            weight = self.weight
            where = torch.device(weight.device)
            if where.type == "meta":
                raise ValueError(
                    f"The weight of this {self.__class__.__name__} is on the meta device and has "
                    "no numbers; load a state dict with assign=True or use to_empty first."
                )
            if where.type != "cpu":
                raise ValueError(
                    f"The input is on the CPU, but the weight is on {where}; "
                    "move one to the other with .to()."
                )
            if torch._C._len_torch_dispatch_stack() or type(weight.codes) is not Tensor:
                raise UnsupportedError(
                    "The weight is packed at the first call, which cannot be traced; "
                    "run the module once before you export it."
                )
            self._packed_weight = weight.pack_()
            self._buffers["packed"] = held(weight, backends.load("cpu"))["packed"]
            for name in self._part_names():
                self._buffers[name] = None

    def _unpack(self) -> None:
        with _state_lock:
            if self._packed_weight is not None:
                self._buffers.update(self._packed_weight.parts())
                self._buffers["packed"] = self._packed_weight = None

    def _part_names(self) -> list[str]:
        return [name for name in self._buffers if name != "packed"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PARTS:
            self._unpack()
        super().__setattr__(name, value)

    # ---- moving and copying ----

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        probe = fn(torch.empty(1, dtype=self.compute_dtype, device="cpu"))
        packed = self._buffers["packed"]
        if packed is not None and (probe.device.type != "cpu" or fn(packed) is not packed):
            self._unpack()
        parts = {id(part) for part in self._buffers.values() if part is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in parts and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)
        self.compute_dtype = probe.dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        with _state_lock:
            state["_buffers"] = {**self._buffers, **self.parts(), "packed": None}
            state["_packed_weight"] = None
        return state

    # ---- state dict ----

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, part in self.parts().items():
            destination[prefix + name] = part

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._unpack()
        if prefix + "codes" in state_dict and prefix + "perm" not in state_dict:
            self._buffers.pop("perm", None)
        rules = self.format.parts(*self.shape)
        for name in _PARTS:
            part = state_dict.get(prefix + name)
            if part is None or (name not in rules and name != "perm"):
                continue
            allowed = rules[name].dtypes if name in rules else ("int32",)
            if dtype_name(part.dtype) not in allowed:
                error_msgs.append(
                    f"{prefix}{name} must be {' or '.join(allowed)} in the format {self.format}, "
                    f"but the state dict has {dtype_name(part.dtype)}."
                )
                continue
            # Copying would convert: the buffer takes the dtype of what comes.
            held_part = self._buffers.get(name)
            if held_part is None or held_part.dtype != part.dtype:
                shape = (self.shape[1],) if name == "perm" else rules[name].shape
                self._buffers[name] = torch.empty(
                    shape, dtype=part.dtype, device=self.weight.device
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    # ---- in words ----

    def _weight_repr(self) -> str:
        group = self.format.group_size
        return (
            f"format={self.format}, bits={self.format.bits}, "
            f"group={'row' if group is None else group}, bytes={self.weight.nbytes}"
        )


def meta_weight(weight: Tensor, fmt: Format | str) -> QuantizedTensor:
    """The layout of this weight in a format, on the meta device."""
    fmt = parse_format(fmt)
    parts: dict[str, Any] = {
        name: torch.empty(part.shape, dtype=getattr(torch, part.dtypes[0]), device="meta")
        for name, part in fmt.parts(*weight.shape).items()
    }
    return QuantizedTensor.from_parts(fmt, (weight.shape[0], weight.shape[1]), **parts)
