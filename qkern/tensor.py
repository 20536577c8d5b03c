# SPDX-License-Identifier: Apache-2.0
"""One quantized weight: its format, its shape, and its parts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qkern import _arrays, _core
from qkern._arrays import Array
from qkern.errors import UnsupportedError
from qkern.formats import Format, parse_format
from qkern.formats._check import check_parts, checked_shape
from qkern.formats._fit import TABLE_PER

_KINDS = {"int": 0, "table": 1}
_ACTIVATIONS = {"float": 0, "int8": 1, "int8_group": 2}
# What the machine layout holds, in the order in which `_core.unpack` takes the addresses.
_PACKABLE = ("codes", "scales", "zeros", "codebook", "perm")


class PackedWeight:
    """The machine layout of one weight: a block of bytes derived from the canonical parts.

    It is the same for all instruction sets of a CPU and is never to be written to disk.
    """

    __slots__ = ("address", "buffer", "nbytes")

    def __init__(self, buffer: Array) -> None:
        self.buffer = buffer  # uint8, one-dimensional, at a multiple of 64 bytes
        self.nbytes = int(buffer.shape[0])
        self.address = _arrays.address(buffer)

    def describe(self) -> dict[str, Any]:
        return _core.packed_describe(self.address, self.nbytes)


class QuantizedTensor:
    """A weight [N, K] in a low-bit format, its parts numpy arrays or torch tensors.

    The parts are in canonical storage, the only form that is ever saved; `format.parts(N, K)`
    lists them. On the CPU `pack_()` turns them into the machine layout, so that one copy of the
    weight remains; reading a part of a packed tensor then gives a fresh array. Parts are not to
    be modified in place.

    NVFP4 has one part more than the other formats: `global_scale`, float32 [1].
    """

    __slots__ = ("_layout", "_state", "format", "kind", "shape")

    format: Format
    shape: tuple[int, int]
    kind: str  # "numpy" or "torch": the library of the parts
    _layout: dict[str, tuple[tuple[int, ...], str]]  # shape and dtype of every part
    # (parts, packed): replaced as a whole, so that another thread sees one state or the other.
    # In packed state the parts are only those that the machine layout does not hold.
    _state: tuple[dict[str, Array], PackedWeight | None]

    def __init__(self) -> None:
        raise TypeError("Use qkern.quantize or QuantizedTensor.from_parts to make one.")

    @classmethod
    def from_parts(
        cls,
        format: Format | str,
        shape: tuple[int, int],
        *,
        check: bool = True,
        **parts: Array | None,
    ) -> QuantizedTensor:
        """The tensor of these parts: codes=, scales=, zeros=, codebook=, perm=, global_scale=.

        They are kept, not copied, where they are dense. Shapes, dtypes and devices are always
        checked; `check=False` leaves the numbers unread (finite scales, a true permutation,
        integers in a table for int8 activations). Bits of a row beyond its last code mean nothing.
        """
        fmt = parse_format(format)
        size = checked_shape(shape)
        given = {name: part for name, part in parts.items() if part is not None}
        kind, ready = check_parts(fmt, size, given, numbers=check)
        self = object.__new__(cls)
        self.format, self.shape, self.kind = fmt, size, kind
        self._layout = {name: (tuple(p.shape), _arrays.name_of(p)) for name, p in ready.items()}
        self._state = (ready, None)
        return self

    # ---- parts ----

    def parts(self) -> dict[str, Array]:
        """All canonical parts by name."""
        return {name: self._part(name) for name in self._layout}

    @property
    def codes(self) -> Array:
        return self._part("codes")

    @property
    def scales(self) -> Array | None:
        return self._part("scales")

    @property
    def zeros(self) -> Array | None:
        return self._part("zeros")

    @property
    def codebook(self) -> Array | None:
        """The learned table [tables, 2**bits]; None for formats with a fixed one (see `table`)."""
        return self._part("codebook")

    @property
    def perm(self) -> Array | None:
        return self._part("perm")

    @property
    def global_scale(self) -> Array | None:
        return self._part("global_scale")

    def _part(self, name: str) -> Array | None:
        if name not in self._layout:
            return None
        parts, packed = self._state
        if name in parts or packed is None:
            return parts[name]
        if name == "codebook" and self.format.table_encoding is not None:
            return self._unpacked_codebook(packed)
        shape, dtype = self._layout[name]
        part = _arrays.empty(shape, dtype, self.kind)
        targets = [_arrays.address(part) if name == other else 0 for other in _PACKABLE]
        _core.unpack(packed.address, packed.nbytes, *targets)
        return part

    def _unpacked_codebook(self, packed: PackedWeight) -> Array:
        """A table that the core holds in another form than the stored one."""
        shapes = self.format.core_shapes(*self.shape)
        core = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        targets = [_arrays.address(core.get(name)) for name in _PACKABLE]
        _core.unpack(packed.address, packed.nbytes, *targets)
        return _arrays.from_numpy(self.format.stored_codebook(core), self.kind, self.device)

    @property
    def table(self) -> Array | None:
        """Table as float32 [tables, 2**bits]: learned or fixed; None for ints."""
        if self.format.table is None and self.format.table_encoding is None:
            return self.codebook
        if self.format.table is None:
            values = self.format.decode_codebook(_arrays.to_numpy(self.codebook))
            return _arrays.from_numpy(values, self.kind, self.device)
        return _arrays.from_numpy(self.format.table[None].copy(), self.kind, self.device)

    @property
    def table_scale(self) -> float:
        """Factor of all table entries, the scale of the whole tensor included."""
        parts, _ = self._state
        return self.format.table_factor(parts)

    @property
    def device(self) -> Any:
        """ "cpu" for numpy parts, the torch.device of torch parts."""
        parts, packed = self._state
        return _arrays.device_of(parts["codes"] if packed is None else packed.buffer)

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical parts, whichever state the tensor is in."""
        sizes = {"bfloat16": 2}
        return sum(
            math.prod(shape) * (sizes.get(dtype) or np.dtype(dtype).itemsize)
            for shape, dtype in self._layout.values()
        )

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / math.prod(self.shape)

    def __repr__(self) -> str:
        packed = ", packed" if self.is_packed else ""
        return (
            f"QuantizedTensor({str(self.format)!r}, shape={self.shape}, device={str(self.device)!r}"
            f", {self.bits_per_weight:.3f} bits per weight{packed})"
        )

    # ---- the packed state ----

    @property
    def is_packed(self) -> bool:
        """Whether the machine layout is the only copy."""
        parts, _ = self._state
        return "codes" not in parts

    def packed(self) -> PackedWeight:
        """The machine layout. Made on the first call and kept; `pack_()` drops the other copy."""
        parts, packed = self._state
        if packed is None:
            self._require_cpu("the machine layout")
            weight, _kept = self._weight(parts)
            nbytes = _core.packed_bytes(weight)
            buffer = _arrays.empty_aligned(nbytes, self.kind)
            _core.pack(weight, _arrays.address(buffer), nbytes)
            packed = PackedWeight(buffer)
            self._state = (parts, packed)
        return packed

    def pack_into_(self, buffer: Array) -> QuantizedTensor:
        """`pack_()` into memory that the caller has: as many bytes as the layout takes."""
        parts, _ = self._state
        weight, _kept = self._weight(parts)
        _core.pack(weight, _arrays.address(buffer), int(buffer.shape[0]))
        self._state = (parts, PackedWeight(buffer))
        return self.pack_()

    def pack_(self) -> QuantizedTensor:
        """Keeps the machine layout alone."""
        packed = self.packed()
        parts, _ = self._state
        self._state = ({n: p for n, p in parts.items() if n not in _PACKABLE}, packed)
        return self

    def unpack_(self) -> QuantizedTensor:
        """Keeps the canonical parts alone."""
        self._state = (self.parts(), None)
        return self

    def _weight(self, stored: dict[str, Array]) -> tuple[_core.Weight, dict[str, Array]]:
        """The C description of canonical parts, valid as long as the caller holds the other."""
        fmt, (n, k) = self.format, self.shape
        parts = {**stored, **fmt.core_parts(stored, self.shape)}
        fields = {
            "kind": _KINDS[fmt.kind],
            "bits": fmt.bits,
            "activations": _ACTIVATIONS[fmt.activations],
            "n": n,
            "k": k,
            "group": min(fmt.group_size or k, k),
            "codes": _arrays.address(parts["codes"]),
            "codes_stride": parts["codes"].shape[1],
            "perm": _arrays.address(parts.get("perm")),
        }
        for name, prefix in (("scales", "scale"), ("zeros", "zero")):
            if name in parts:
                encoding = fmt.scale_encoding if name == "scales" else None
                fields[name] = _arrays.address(parts[name])
                fields[f"{prefix}_dtype"] = _arrays.dtype_code(parts[name], encoding)
                fields[f"{name}_stride"] = parts[name].shape[1]
        if fmt.table_per is not None:
            table = parts["codebook"] if fmt.table is None else fmt.table
            fields["codebook"] = _arrays.address(table)
            fields["table_per"] = TABLE_PER[fmt.table_per]
            fields["table_scale"] = fmt.table_factor(parts)
        return _core.Weight(**fields), parts

    def _require_cpu(self, what: str) -> None:
        device = self.device
        if getattr(device, "type", "cpu") != "cpu":
            raise UnsupportedError(
                f"{what} is for the CPU, but this tensor is on {device}; use .to('cpu') first."
            )

    # ---- values ----

    def dequantize(self, dtype: Any = "float32") -> Array:
        """The weight [N, K] as float32, float16 or bfloat16 (a numpy or torch dtype or its name),
        columns in input order.

        Parts on another device are dequantized on the CPU and the result is moved back.
        """
        return self._rows(None, dtype)

    def rows(self, ids: Array, dtype: Any = "float32") -> Array:
        """Rows `ids` (int64, one-dimensional, on the CPU) of the dequantized weight."""
        return self._rows(ids, dtype)

    def _rows(self, ids: Array | None, dtype: Any, out: Array | None = None) -> Array:
        """`out`, where given: memory for the result on the CPU, its rows dense."""
        name = _arrays.dtype_name(dtype)
        allowed = _arrays.FLOATS if self.kind == "torch" else _arrays.FLOATS[:2]
        if name not in allowed:
            raise UnsupportedError(
                f"A {self.kind} weight is dequantized to {', '.join(allowed)}, not to {name}."
            )
        device = self.device
        if getattr(device, "type", "cpu") != "cpu":
            return self.to("cpu")._rows(ids, dtype).to(device)
        n, k = self.shape
        count = n if ids is None else len(ids)
        if out is None:
            out = _arrays.empty((count, k), name, self.kind)
        parts, packed = self._state
        weight, _kept = self._weight(parts) if packed is None else (None, None)
        _core.dequantize(
            weight,
            packed.address if packed else 0,
            packed.nbytes if packed else 0,
            _arrays.DTYPE_CODES[name],
            _arrays.address(ids),
            0,
            count,
            _arrays.address(out),
            _arrays.strides(out)[0] if count > 1 else k,
        )
        return out

    # ---- moving ----

    def to(self, device: Any) -> QuantizedTensor:
        """A torch tensor's copy on `device` (itself where it is there already), in canonical
        state; parts in numpy become torch tensors."""
        import torch

        device = torch.device(device)
        if self.kind == "torch" and self.device == device:
            return self
        return self._with(
            {
                name: _arrays.from_numpy(part, "torch", device)
                if self.kind == "numpy"
                else part.to(device)
                for name, part in self.parts().items()
            }
        )

    def numpy(self) -> QuantizedTensor:
        """The same with numpy parts, on the CPU; bfloat16 scales become float32, which is exact."""
        if self.kind == "numpy":
            return self
        return self._with({name: _arrays.to_numpy(part) for name, part in self.parts().items()})

    def _with(self, parts: dict[str, Array]) -> QuantizedTensor:
        return QuantizedTensor.from_parts(self.format, self.shape, check=False, **parts)

    def __reduce__(self) -> tuple:
        # Copies and pickles travel in canonical storage: the machine layout never leaves a process.
        return _rebuild, (self.format, self.shape, self.parts())


def _rebuild(fmt: Format, shape: tuple[int, int], parts: dict[str, Array]) -> QuantizedTensor:
    return QuantizedTensor.from_parts(fmt, shape, **parts)
