# SPDX-License-Identifier: Apache-2.0
"""The quantized weights of all experts of a mixture, held together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qkern import _arrays, _core
from qkern._arrays import Array
from qkern.errors import FormatError
from qkern.formats import Format, parse_format
from qkern.formats._base import Part
from qkern.tensor import QuantizedTensor

_ALIGNMENT = 64


class QuantizedStack:
    """E quantized weights [N, K] of one format: the parts of a QuantizedTensor with E in front.

    `stack[e]` is one of them. On the CPU `pack_()` turns all into one block in the machine layout,
    so that one copy remains; reading a part then gives a fresh array.
    """

    __slots__ = ("_state", "format", "kind", "shape")

    format: Format
    shape: tuple[int, int, int]
    kind: str  # "numpy" or "torch"
    # (parts, packed): one of them.
    _state: tuple[dict[str, Array], _PackedStack | None]

    def __init__(self) -> None:
        raise TypeError("Use QuantizedStack.from_tensors or QuantizedStack.from_parts to make one.")

    @classmethod
    def from_parts(
        cls,
        format: Format | str,
        shape: tuple[int, int, int],
        *,
        check: bool = True,
        **parts: Array | None,
    ) -> QuantizedStack:
        """The stack of these parts, codes [E, N, bytes], scales [E, N, G] ...; they are kept, not
        copied, where they are dense. `check` as in QuantizedTensor.from_parts."""
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be (E, N, K), each at least 1, but {shape} came.")
        self = object.__new__(cls)
        self.format, self.shape = parse_format(format), (shape[0], shape[1], shape[2])
        given = {name: part for name, part in parts.items() if part is not None}
        rules = stack_rules(self.format, self.shape)
        for name, part in given.items():
            if name not in rules or tuple(part.shape) != rules[name].shape:
                expected = f"{name} {rules[name].shape}" if name in rules else "no " + name
                raise FormatError(
                    f"A stack {self.shape} in the format {self.format} has {expected}, but "
                    f"{name} {tuple(part.shape)} came."
                )
        self._state = ({name: _arrays.contiguous(part) for name, part in given.items()}, None)
        # The rest is what a single weight checks: names, dtypes, devices, numbers.
        kept = self._state[0]
        each = [self._weight_of(kept, e, check) for e in range(shape[0] if check else 1)]
        self.kind = each[0].kind
        return self

    @classmethod
    def from_tensors(cls, tensors: Sequence[QuantizedTensor]) -> QuantizedStack:
        """A copy of these weights as one stack. Dtypes that differ become float32, which is exact,
        and where some have a permutation the others get the one that changes nothing."""
        if not tensors:
            raise ValueError("A stack has at least one weight.")
        first = tensors[0]
        for e, tensor in enumerate(tensors):
            if not isinstance(tensor, QuantizedTensor):
                raise TypeError(f"Weight {e} is no QuantizedTensor, but {type(tensor).__name__}.")
            if (tensor.format, tensor.shape, tensor.kind) != (
                first.format, first.shape, first.kind
            ):  # fmt: skip
                raise ValueError(
                    f"Weight {e} is {tensor.format} {tensor.shape} ({tensor.kind}), "
                    f"but weight 0 is {first.format} {first.shape} ({first.kind})."
                )
        each = [tensor.parts() for tensor in tensors]
        if any("perm" in parts for parts in each):
            same = _arrays.from_numpy(
                np.arange(first.shape[1], dtype=np.int32), first.kind, first.device
            )
            each = [{"perm": same, **parts} for parts in each]
        stacked = {name: _stacked([parts[name] for parts in each]) for name in each[0]}
        return cls.from_parts(first.format, (len(tensors), *first.shape), check=False, **stacked)

    # ---- parts ----

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[QuantizedTensor]:
        parts = self.parts()
        return (self._weight_of(parts, e) for e in range(len(self)))

    def __getitem__(self, e: int) -> QuantizedTensor:
        """Weight e, sharing memory with this stack where it is not packed."""
        if not -len(self) <= e < len(self):
            raise IndexError(f"The stack has {len(self)} weights; there is none at {e}.")
        return self._weight_of(self.parts(), range(len(self))[e])

    def _weight_of(self, parts: dict[str, Array], e: int, check: bool = False) -> QuantizedTensor:
        return QuantizedTensor.from_parts(
            self.format,
            self.shape[1:],
            check=check,
            **{name: part[e] for name, part in parts.items()},
        )

    def parts(self) -> dict[str, Array]:
        """All canonical parts by name; fresh arrays where the stack is packed."""
        parts, packed = self._state
        return dict(parts) if packed is None else packed.parts()

    @property
    def codes(self) -> Array:
        return self.parts()["codes"]

    @property
    def device(self) -> Any:
        parts, packed = self._state
        return _arrays.device_of(parts["codes"] if packed is None else packed.buffer)

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical parts, whichever state the stack is in."""
        parts, packed = self._state
        return sum(part.nbytes for part in parts.values()) if packed is None else packed.canonical

    @property
    def bits_per_weight(self) -> float:
        e, n, k = self.shape
        return 8 * self.nbytes / (e * n * k)

    def __repr__(self) -> str:
        return (
            f"QuantizedStack({str(self.format)!r}, shape={self.shape}, "
            f"device={str(self.device)!r}, {self.bits_per_weight:.3f} bits per weight)"
        )

    def dequantize(self, dtype: Any = "float32") -> Array:
        """All weights [E, N, K] as float32, float16 or bfloat16."""
        values = [weight.dequantize(dtype) for weight in self]
        return _stacked(values)

    def to(self, device: Any) -> QuantizedStack:
        """A copy on `device` with torch parts (itself where it is there already)."""
        import torch

        device = torch.device(device)
        if self.kind == "torch" and self.device == device:
            return self
        return QuantizedStack.from_tensors([weight.to(device) for weight in self])

    # ---- the packed state ----

    @property
    def is_packed(self) -> bool:
        return self._state[1] is not None

    def pack_(self) -> QuantizedStack:
        """Keeps the machine layouts alone, in one block."""
        if not self.is_packed:
            self._state = ({}, _PackedStack(self))
        return self

    def packed(self) -> _PackedStack:
        """All machine layouts; the stack must be packed."""
        packed = self.pack_()._state[1]
        assert packed is not None
        return packed

    def unpack_(self) -> QuantizedStack:
        """Keeps the canonical parts alone."""
        self._state = (self.parts(), None)
        return self

    def __reduce__(self) -> tuple:
        return _rebuild, (self.format, self.shape, self.parts())


class _PackedStack:
    """The machine layouts of a stack, one after the other in one buffer."""

    __slots__ = ("buffer", "canonical", "weights")

    def __init__(self, stack: QuantizedStack) -> None:
        self.canonical = stack.nbytes
        self.weights = list(stack)
        self.weights[0]._require_cpu("the machine layout")
        whole = 0
        places = []
        for weight in self.weights:
            description, _kept = weight._weight(weight.parts())
            size = _core.packed_bytes(description)
            places.append(slice(whole, whole + size))
            whole += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.buffer = _arrays.empty_aligned(whole, stack.kind)
        for weight, place in zip(self.weights, places, strict=True):
            weight.pack_into_(self.buffer[place])

    def parts(self) -> dict[str, Array]:
        each = [weight.parts() for weight in self.weights]
        return {name: _stacked([parts[name] for parts in each]) for name in each[0]}


def stack_rules(fmt: Format, shape: tuple[int, ...]) -> dict[str, Part]:
    """Shape and dtypes of every part that a stack (E, N, K) may have."""
    e, n, k = shape
    rules = {**fmt.parts(n, k), "perm": Part((k,), ("int32",))}
    return {name: Part((e, *part.shape), part.dtypes) for name, part in rules.items()}


def _stacked(arrays: list[Array]) -> Array:
    """The arrays with a first dimension; float32 where their dtypes differ."""
    mixed = len({_arrays.name_of(array) for array in arrays}) > 1
    if isinstance(arrays[0], np.ndarray):
        return np.stack([a.astype(np.float32) if mixed else a for a in arrays])
    import torch

    return torch.stack([a.float() if mixed else a for a in arrays])


def _rebuild(fmt: Format, shape: tuple[int, int, int], parts: dict[str, Array]) -> QuantizedStack:
    return QuantizedStack.from_parts(fmt, shape, check=False, **parts)
