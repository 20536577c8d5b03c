# SPDX-License-Identifier: Apache-2.0
"""What a format is, how it is written as text, and the registry of all formats.

A format says what the numbers of a quantized weight [N, K] mean. Two kinds are known to kernels:

    int     w = scale * (code - zero)
    table   w = (scale * table_scale) * table[code]

each step rounded to float32, in this order. A new format is one frozen dataclass with the
`@register` decorator in a file of its own, and one import line in `qkern/formats/__init__.py`.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from qkern.errors import FormatError
from qkern.formats._codes import E4M3, E8M0, stream_bytes, unpack_codes
from qkern.formats._fit import spread, table_count

ACTIVATIONS = {"float": "", "int8": "-a8", "int8_group": "-a8g"}
FLOAT_SCALES = ("float16", "bfloat16", "float32")
SMALLEST_GROUP = 8


class Part(NamedTuple):
    """Shape of one part of a tensor and the names of the dtypes it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class _Facts:
    """What every format states: as class attributes, or as dataclass fields where one may choose.

    A class of its own, since fields of a dataclass would come first in the constructors.
    """

    family: str  # first word of the text form, without the bits
    kind: str  # "int" or "table"
    bits: int
    group_size: int | None = None
    table_per: str | None = None  # "tensor", "row", "group", "tile"; None: no table
    scale_encoding: str | None = None  # "e8m0" or "e4m3" where scales are bytes
    table_encoding: str | None = None  # "e4m3" where a learned table is bytes
    words: dict[str, dict[str, Any]] = {}  # words of the text form and the fields they set
    uses_importance: bool = False


@dataclass(frozen=True, repr=False)
class Format(_Facts):
    """Base of all formats: immutable, hashable, comparable."""

    activations: str = field(default="float", kw_only=True)

    def __post_init__(self) -> None:
        if self.activations not in tuple(ACTIVATIONS):
            raise FormatError(
                f"activations must be one of {_listed(ACTIVATIONS)}, but {self.activations!r} came."
            )

        table = self.table  # kernels read it by its address
        if table is not None and (table.shape != (2**self.bits,) or table.dtype != np.float32):
            raise FormatError(
                f"The table of {type(self).__name__} must be float32 [{2**self.bits}], "
                f"but is {table.dtype} {list(table.shape)}."
            )

    # ---- text ----

    def __str__(self) -> str:
        return "-".join([self.head(), *self.options()]) + ACTIVATIONS[self.activations]

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in sorted(fields(self), key=lambda f: f.kw_only is True)
            if f.default is MISSING or getattr(self, f.name) != f.default
        ]
        return f"qkern.{type(self).__name__}({', '.join(changed)})"

    def head(self) -> str:
        return self.family + (str(self.bits) if "bits" in self._field_names() else "")

    def options(self) -> list[str]:
        """The words between the head and the activations, those that change nothing left out."""
        words = [
            word
            for word, changes in self.words.items()
            if all(getattr(self, name) == value for name, value in changes.items())
        ]
        if "group_size" in self._field_names() and self.group_size != self._default_group():
            words.append(f"g{self.group_size}")
        return words

    @classmethod
    def _field_names(cls) -> set[str]:
        return {f.name for f in fields(cls)}

    @classmethod
    def _default_group(cls) -> Any:
        return next(f.default for f in fields(cls) if f.name == "group_size")

    @classmethod
    def from_words(cls, bits: int | None, words: list[str]) -> Format:
        """The format of a head's number (None: no number there) and the words that follow."""
        chosen: dict[str, Any] = {}
        if (bits is not None) != ("bits" in cls._field_names()):
            raise FormatError(
                f"{cls.family!r} must "
                + ("not " if bits is not None else "")
                + "be followed by a number of bits."
            )
        if bits is not None:
            chosen["bits"] = bits
        known = dict(cls.words)
        known |= {suffix[1:]: {"activations": a} for a, suffix in ACTIVATIONS.items() if suffix}
        for word in words:
            if re.fullmatch(r"g\d{1,9}", word) and "group_size" in cls._field_names():
                changes = {"group_size": int(word[1:])}
            elif word in known:
                changes = known[word]
            else:
                sized = ["g<size>"] if "group_size" in cls._field_names() else []
                raise FormatError(
                    f"{word!r} is not one of the words that may follow here: "
                    f"{', '.join([*known, *sized])}."
                )
            if chosen.keys() & changes.keys():
                raise FormatError(f"{word!r} repeats or contradicts a word before it.")
            chosen |= changes
        return cls(**chosen)

    @classmethod
    def variants(cls, group_sizes: tuple[int, ...] = (32, 64, 128)) -> Iterator[Format]:
        """Every combination of options, with these group sizes: for tests and suggestions."""
        yield from (cls(activations=a) for a in ACTIVATIONS)

    def with_activations(self, activations: str) -> Format:
        return replace(self, activations=activations)

    # ---- numbers ----

    @property
    def table(self) -> np.ndarray | None:
        """float32 [2^bits] of a fixed table as kernels read it; None where it is learned or absent.

        With int8 activations its entries are integers and `table_scale` makes up for it.
        """
        return None

    @property
    def table_scale(self) -> float:
        return 1.0

    def table_factor(self, parts: dict[str, Any]) -> float:
        """`table_scale` times what the parts add to it (a scale of the whole tensor)."""
        return self.table_scale

    def groups(self, k: int) -> int:
        """Scales (and zeros) per row."""
        return 1 if self.group_size is None else -(-k // self.group_size)

    # ---- storage ----

    def parts(self, n: int, k: int) -> dict[str, Part]:
        """Every part that a tensor [n, k] must have. `perm` may come on top."""
        parts = {"codes": Part((n, stream_bytes(k, self.bits)), ("uint8",))}
        if self.has_scales:
            dtypes = FLOAT_SCALES if self.scale_encoding is None else ("uint8",)
            parts["scales"] = Part((n, self.groups(k)), dtypes)
        if self.table_per is not None and self.table is None:
            tables = table_count(self.table_per, n, self.groups(k))
            parts["codebook"] = Part((tables, 2**self.bits), ("float32",))
        return parts

    @property
    def has_scales(self) -> bool:
        return True

    def decode_scales(self, scales: np.ndarray) -> np.ndarray:
        """Stored scales as float32, exactly."""
        if self.scale_encoding is None:
            return scales.astype(np.float32, copy=False)
        return {"e8m0": E8M0, "e4m3": E4M3}[self.scale_encoding][scales]

    def decode_codebook(self, codebook: np.ndarray) -> np.ndarray:
        """A stored table as float32, exactly."""
        return codebook

    def refused_entries(self, codebook: np.ndarray) -> tuple[np.ndarray, str]:
        """Which entries of a table int8 activations cannot take, and the rule they break."""
        bad = (codebook != np.rint(codebook)) | (codebook < -128) | (codebook > 127)
        return bad, f"must hold integers in -128..127 for {self} (activations {self.activations!r})"

    def core_parts(self, parts: dict[str, Any], shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """Parts that the core takes in another form than they are stored in."""
        return {}

    def core_shapes(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of `core_parts`."""
        return {}

    def stored_codebook(self, core: dict[str, np.ndarray]) -> np.ndarray:
        """The stored table of what `core_parts` made."""
        raise NotImplementedError

    def quantize(
        self, w: np.ndarray, *, importance: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Parts of the dense float32 weight [N, K], finite, by rounding to nearest."""
        raise NotImplementedError

    def dequantize(self, parts: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        """float32 [N, K] with columns in input order: the definition of what the parts mean."""
        k = shape[1]
        codes = unpack_codes(parts["codes"], k, self.bits)
        scales = np.ones((1, 1), np.float32)
        if "scales" in parts:
            scales = spread(self.decode_scales(parts["scales"]), k, self.group_size)
        if self.kind == "int":
            zeros: Any = np.float32(2 ** (self.bits - 1))
            if "zeros" in parts:
                zeros = spread(parts["zeros"].astype(np.float32), k, self.group_size)
            w = scales * (codes.astype(np.float32) - zeros)
        else:
            scale = scales * np.float32(self.table_factor(parts))
            w = scale * self._entries(codes, parts)
        if "perm" in parts:
            stored, w = w, np.empty_like(w)
            w[:, parts["perm"]] = stored
        return w

    def _entries(self, codes: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
        """table[code] of every weight."""
        n, k = codes.shape
        tables = parts["codebook"] if self.table is None else self.table[None]
        first = np.zeros((1, 1), np.int64)
        if self.table_per == "row":
            first = np.arange(n)[:, None]
        elif self.table_per == "group":
            groups = self.groups(k)
            first = spread(np.arange(n * groups).reshape(n, groups), k, self.group_size)
        return tables[first, codes]


# ---- the registry and the text form ----

FORMATS: dict[str, type[Format]] = {}


def register(cls: type[Format]) -> type[Format]:
    """Class decorator: makes the format known to `parse_format` and to the tests."""
    if cls.family in FORMATS:
        raise ValueError(f"A format family {cls.family!r} is already registered.")
    FORMATS[cls.family] = cls
    return cls


def parse_format(text: str | Format) -> Format:
    """The format of a text such as "int4-g128-asym-a8"; a Format is returned as it is."""
    if isinstance(text, Format):
        return text
    if not isinstance(text, str):
        raise TypeError(f"A format or its text was expected, but {type(text).__name__} came.")
    head, *words = text.strip().lower().split("-")
    # The longest family first, so that a number that belongs to a family's name (nf4) stays there.
    for family in sorted(FORMATS, key=len, reverse=True):
        rest = head.removeprefix(family)
        if head.startswith(family) and re.fullmatch(r"\d{0,3}", rest):
            try:
                return FORMATS[family].from_words(int(rest) if rest else None, words)
            except FormatError as error:
                near = _suggestion(text, [FORMATS[family]])
                raise FormatError(f"{text!r} is not a format. {error}{near}") from None
    raise FormatError(
        f"{text!r} is not a format: it must begin with one of {', '.join(FORMATS)}."
        + _suggestion(text, list(FORMATS.values()))
    )


def _suggestion(text: str, classes: list[type[Format]]) -> str:
    """The nearest texts of these classes, as a sentence; nothing where none is near."""
    sizes = {int(size) for size in re.findall(r"g(\d{1,9})", text)} | {32, 64, 128}
    valid = tuple(size for size in sorted(sizes) if size >= SMALLEST_GROUP)
    known = [str(fmt) for cls in classes for fmt in cls.variants(valid)]
    close = difflib.get_close_matches(text.strip().lower(), known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


# ---- checks shared by constructors ----


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def set_checked(fmt: Format, name: str, value: Any) -> None:
    """Assigns a field of a frozen format from its constructor."""
    object.__setattr__(fmt, name, value)


def checked_bits(bits: Any, allowed: tuple[int, ...]) -> int:
    bits = _integer("bits", bits)
    if bits not in allowed:
        raise FormatError(f"bits must be one of {', '.join(map(str, allowed))}, but {bits} came.")
    return bits


def checked_group(group_size: Any) -> int:
    group_size = _integer("group_size", group_size)
    if group_size < SMALLEST_GROUP:
        raise FormatError(
            f"group_size must be at least {SMALLEST_GROUP}, or None for one scale per row "
            f"where the format allows it, but {group_size} came."
        )
    return group_size


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise FormatError(f"{name} must be an integer, but {value!r} came.")
