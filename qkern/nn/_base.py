# SPDX-License-Identifier: Apache-2.0
"""What all modules with one quantized weight share: how the weight is held, moved and saved.

The parts of the weight are plain buffers in canonical storage. The first use on the CPU turns them
into one buffer `packed`, not part of the state dict, and drops them, so that one copy of the
weight remains. Everything that looks at the state sees canonical storage all the same:
state_dict, load_state_dict, copies, pickles, moves to other devices, `.codes`, `.scales` ...

Tied modules (an embedding and the layer that maps back to words) share one `_Shared`: the same
buffers, packed once, moved and copied together.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkern import _canonical, _library, backends
from qkern._arrays import dtype_name
from qkern._quantize import quantize
from qkern.errors import FormatError
from qkern.formats import Format, parse_format
from qkern.formats._base import Part
from qkern.formats._check import check_perm
from qkern.ops import held
from qkern.tensor import QuantizedTensor

if TYPE_CHECKING:
    from typing_extensions import Self

_PARTS = ("codes", "scales", "zeros", "codebook", "perm", "global_scale")

# Guards the change between the two states, which is rare: one lock for all modules, so that a
# module stays free of what cannot be copied or pickled.
_state_lock = threading.RLock()


def _new_lock() -> None:
    global _state_lock
    _state_lock = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)  # another thread may have held it


def _is_exported() -> bool:
    """Whether a program is being recorded that can be saved."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def _is_traced(codes: Tensor) -> bool:
    """Whether a program is being recorded, into which the way from codes to the packed weight
    must not go. (torch.compile looks at the packed weight of the module itself.)"""
    return _is_exported() or torch._C._len_torch_dispatch_stack() > 0 or type(codes) is not Tensor


def _part(name: str) -> property:
    def read(module: QuantizedModule) -> Tensor | None:
        return module.parts().get(name)

    return property(read, doc=f"{name} of the weight in canonical storage, or None.")


def canonical_parts(buffers: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: part for name, part in buffers.items() if part is not None and name != "packed"}


class _Shared:
    """The state of one weight: that of a module, or of several that are tied."""

    __slots__ = ("_seen", "buffers", "packed_weight", "tied")

    def __init__(self, buffers: dict[str, Tensor | None], tied: bool = False) -> None:
        self.buffers = buffers  # the parts, and "packed"; every module has this very dict
        self.packed_weight: Any = None  # in packed state: what knows the parts
        self.tied = tied
        # The parts that were unpacked last, and their versions: while somebody holds them, tied
        # modules give the same ones, so that a state dict or a copy has each of them once.
        self._seen: dict[str, tuple[weakref.ref, int]] = {}

    def parts(self, buffers: dict[str, Tensor | None]) -> dict[str, Tensor]:
        if self.packed_weight is None or buffers["codes"] is not None:
            return canonical_parts(buffers)
        if not self.tied:
            return self.packed_weight.parts()
        seen = {name: ref() for name, (ref, _) in self._seen.items()}
        if seen and all(p is not None and p._version == self._seen[n][1] for n, p in seen.items()):
            return seen  # type: ignore[return-value]
        parts = self.packed_weight.parts()
        self._seen = {name: (weakref.ref(part), part._version) for name, part in parts.items()}
        return parts

    def __reduce__(self) -> tuple:
        with _state_lock:
            return _Shared, (
                {**self.buffers, **self.parts(self.buffers), "packed": None},
                self.tied,
            )


class Configured(torch.nn.Module):
    """A module that can be laid out again from values fit for JSON.

    One that lies within another belongs to it, and is not to be rebuilt by itself.
    """

    def config(self) -> dict[str, Any]:
        """What `from_config` of this class takes."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """A module like the one whose `config()` this is, on the meta device: load a state dict
        with assign=True, or use to_empty first."""
        raise NotImplementedError


class QuantizedModule(Configured):
    """Base of the modules. `shape` is that of the weight: (N, K), or (E, N, K) of a stack."""

    format: Format
    shape: tuple[int, ...]
    compute_dtype: torch.dtype
    _buffers: dict[str, Tensor | None]
    _format_text: str
    _shared: _Shared

    codes = _part("codes")
    scales = _part("scales")
    zeros = _part("zeros")
    codebook = _part("codebook")
    perm = _part("perm")
    global_scale = _part("global_scale")

    def __init__(self, weight: Any, compute_dtype: torch.dtype) -> None:
        super().__init__()
        _library.check_float_dtype(compute_dtype)
        self.format = weight.format
        self._format_text = str(weight.format)  # torch.export cannot make it
        self.shape = weight.shape
        self.compute_dtype = compute_dtype
        self._shared = _Shared(self._buffers)
        self._buffers["packed"] = None
        self._non_persistent_buffers_set.add("packed")
        for name, part in weight.parts().items():
            self._buffers[name] = torch.as_tensor(part)

    @classmethod
    def from_float(cls, module: Any, fmt: Format | str, **options: Any) -> Self:
        """The module with its weight quantized; `options` go to qkern.quantize. A bias is
        shared."""
        weight = quantize(cls.matrix_of(module), fmt, **options)
        return cls.like(module, weight)

    @classmethod
    def matrix_of(cls, module: Any) -> Tensor:
        """The float weight [N, K] of the module that is to be replaced, or why it cannot be."""
        raise NotImplementedError

    @classmethod
    def like(cls, module: Any, weight: Any) -> Self:
        """The module that does what `module` does, with this weight."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        return {
            "format": str(self.format),
            "compute_dtype": _library.name_of(self.compute_dtype),
        }

    # ---- the weight ----

    @property
    def weight(self) -> Any:
        """The weight, sharing memory with this module."""
        with _state_lock:
            packed = self._shared.packed_weight
            if packed is not None and self._buffers["codes"] is None:
                return packed
            return self._weight_of(self.parts())

    def _weight_of(self, parts: dict[str, Tensor]) -> Any:
        n, k = self.shape
        return QuantizedTensor.from_parts(self.format, (n, k), check=False, **parts)

    def _rules(self) -> dict[str, Part]:
        """Shape and dtypes of every part that the weight may have."""
        n, k = self.shape
        return {**self.format.parts(n, k), "perm": Part((k,), ("int32",))}

    def parts(self) -> dict[str, Tensor]:
        """The canonical parts of the weight by name; fresh tensors where it is packed."""
        with _state_lock:
            return self._shared.parts(self._buffers)

    def tie_(self, other: QuantizedModule) -> Self:
        """Takes the weight of another module and keeps sharing it: one copy of the bytes, packed
        once; what replaces the weight of one replaces that of both, and they move together."""
        if (self.format, self.shape) != (other.format, other.shape):
            raise ValueError(
                f"A weight {self.format} {self.shape} cannot be tied to one that is "
                f"{other.format} {other.shape}."
            )
        with _state_lock:
            self._shared = other._shared
            self._shared.tied = True
            self._buffers = other._buffers
        return self

    def is_tied_to(self, other: QuantizedModule) -> bool:
        """Whether both share one weight."""
        return self._shared is other._shared

    def _held_for(self, x: Tensor) -> tuple[Any, Any]:
        """What runs the operations for this input, and the weight as it reads it."""
        device_type = "cpu" if x.is_cpu else x.device.type  # the first is five times faster
        self._make_ready(device_type)
        backend = backends.select(device_type)
        if not backend.PACKED:
            # The buffers themselves where they are canonical: a lock cannot be traced.
            traced = self._buffers["codes"] is not None
            return backend, canonical_parts(self._buffers) if traced else self.parts()
        # Codes beside a packed weight are those that torch.func.functional_call puts in its place.
        if self._buffers["codes"] is None:
            return backend, self._buffers
        return _canonical, {**canonical_parts(self._buffers), "format": self._format_text}

    def _make_ready(self, device_type: str) -> None:
        if not backends.select(device_type).PACKED:
            return
        if self._buffers["packed"] is None:
            codes = self._buffers["codes"]
            assert codes is not None, "a weight is either packed or has its codes"
            if codes.device.type != "cpu" or not _is_traced(codes):
                with torch._C._DisableFuncTorch():  # within a transform new tensors are not plain
                    self._pack()
        elif self._buffers["codes"] is None and _is_exported():
            raise ValueError(
                f"This {self.__class__.__name__} has been used and holds its weight as kernels "
                "read it, which must not become part of a saved program; "
                "call qkern.nn.unpack_(model) before you export or trace it."
            )

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
            self._shared.packed_weight = weight.pack_()
            self._buffers["packed"] = held(weight, backends.load("cpu"))["packed"]
            for name in self._part_names():
                self._buffers[name] = None

    def _unpack(self) -> None:
        with _state_lock:
            if self._shared.packed_weight is not None:
                if self._buffers["codes"] is None:
                    self._buffers.update(self._shared.packed_weight.parts())
                self._buffers["packed"] = self._shared.packed_weight = None

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
        return {name: value for name, value in self.__dict__.items() if name != "_buffers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_buffers": state["_shared"].buffers})

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
        for name, rule in self._rules().items():
            part = state_dict.get(prefix + name)
            if part is None:
                continue
            if dtype_name(part.dtype) not in rule.dtypes:
                error_msgs.append(
                    f"{prefix}{name} must be {' or '.join(rule.dtypes)} in the format "
                    f"{self.format}, but the state dict has {dtype_name(part.dtype)}."
                )
                continue
            has_numbers = type(part) is Tensor and not part.is_meta
            if name == "perm" and tuple(part.shape) == rule.shape and has_numbers:
                try:
                    check_perm(part, self.shape[-1])
                except FormatError as error:
                    error_msgs.append(f"{prefix}{error}")
                    return
            # Copying would convert: the buffer takes the dtype of what comes.
            held_part = self._buffers.get(name)
            if held_part is None or held_part.dtype != part.dtype:
                self._buffers[name] = torch.empty(
                    rule.shape, dtype=part.dtype, device=self.weight.device
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


def meta_weight(shape: Sequence[int], fmt: Format | str) -> QuantizedTensor:
    """The layout of a weight [N, K] in a format, on the meta device."""
    fmt = parse_format(fmt)
    parts: dict[str, Any] = {
        name: torch.empty(part.shape, dtype=getattr(torch, part.dtypes[0]), device="meta")
        for name, part in fmt.parts(*shape).items()
    }
    return QuantizedTensor.from_parts(fmt, (shape[0], shape[1]), **parts)


def meta_like(shape: Sequence[int], dtype: str | None) -> torch.nn.Parameter | None:
    """A parameter without numbers; None for no dtype."""
    if dtype is None:
        return None
    return torch.nn.Parameter(torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))


def dtype_text(tensor: Tensor | None) -> str | None:
    """What `meta_like` takes for this parameter."""
    return None if tensor is None else _library.name_of(tensor.dtype)


def require(module: Any, kind: type, name: str) -> None:
    """from_float takes modules of one class."""
    if not isinstance(module, kind):
        raise TypeError(f"A {name} was expected, but {type(module).__name__} came.")


def unpack_(model: torch.nn.Module) -> torch.nn.Module:
    """Turns the weights of all quantized modules back into canonical storage, as they were before
    their first use; what torch.export and torch.jit.trace ask for."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            module._unpack()
    return model
