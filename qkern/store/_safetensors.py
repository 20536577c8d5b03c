# SPDX-License-Identifier: Apache-2.0
"""Reading and writing safetensors files tensor by tensor, with nothing in memory but one of them.

A file is 8 bytes (length of the header, little-endian), the header (JSON: name, dtype, shape,
offsets), and the bytes of the tensors without gaps. The reader trusts nothing: the header is parsed
here, from a bounded number of bytes, and every range is checked before a tensor is read.

The package `safetensors` reads and writes whole files; a file larger than memory needs the two
classes below. Files are the same (tests/test_safetensors.py exchanges them with the package).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qkern.errors import FormatError, UnsupportedError

HEADER_LIMIT = 100_000_000  # bytes; the limit of the package safetensors
CHUNK = 16 << 20  # bytes that are copied at a time
PADDING = "qkern.padding."  # names of tensors that only bring the next one to its alignment

# Name in files: name in torch, bytes of an element.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}
_CODES = {name: code for code, (name, _) in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: str  # as files name it
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


# ---- reading ----


class TensorFile:
    """One file, its header checked. Tensors are read one by one; nothing is mapped, so that a file
    that is cut while it is read gives an error and not a signal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self.entries, self.metadata = _read_header(path, self._file)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces that are valid until the next one."""
        entry = self.entries[name]
        buffer = memoryview(bytearray(min(CHUNK, entry.nbytes)))
        for start in range(entry.start, entry.stop, CHUNK):
            piece = buffer[: min(CHUNK, entry.stop - start)]
            self._fill(name, start, piece)
            yield piece

    def read(self, name: str) -> Any:
        """A fresh torch tensor."""
        import torch

        entry = self.entries[name]
        dtype = _torch_dtype(entry.dtype, f"{name} of {self.path}")
        flat = torch.empty(entry.nbytes, dtype=torch.uint8)
        if entry.nbytes:
            self._fill(name, entry.start, memoryview(flat.numpy().data))
        return flat.view(dtype).view(entry.shape)

    def _fill(self, name: str, start: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done:]], start + done)
            if count == 0:
                raise FormatError(f"{self.path} ended within the tensor {name}; it was cut.")
            done += count


def _torch_dtype(code: str, what: str) -> Any:
    import torch

    dtype = getattr(torch, DTYPES[code][0], None)
    if dtype is None:
        raise UnsupportedError(f"{what} is {code}, a dtype that this torch does not have.")
    return dtype


def _read_header(path: Path, file: Any) -> tuple[dict[str, Entry], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise FormatError(f"{path} is no safetensors file: it has {size} bytes, fewer than 8.")
    length = int.from_bytes(start, "little")
    if length > min(HEADER_LIMIT, size - 8):
        raise FormatError(
            f"{path} is no whole safetensors file: its header would have {length} bytes, "
            f"but {size - 8} follow (and {HEADER_LIMIT} are the limit)."
        )
    header = parse_json(os.pread(file.fileno(), length, 8), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        raise FormatError(f"__metadata__ of {path} must map names to texts.")
    entries = {
        name: _entry(f"{name!r} in {path}", facts, 8 + length) for name, facts in header.items()
    }
    place = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != place:
            raise FormatError(
                f"{name!r} in {path} begins at byte {entry.start}, but the tensor before it ends "
                f"at {place}: tensors must neither overlap nor leave gaps."
            )
        place = entry.stop
    if place != size:
        raise FormatError(
            f"{path} has {size} bytes, but its header describes {place}: "
            + ("it was cut." if place > size else "something was appended.")
        )
    return entries, metadata


def _entry(what: str, facts: Any, begin: int) -> Entry:
    try:
        dtype, shape, (start, stop) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
        numbers = (*shape, start, stop)
    except (TypeError, KeyError, ValueError):
        raise FormatError(f"The tensor {what} lacks a dtype, a shape or its two offsets.") from None
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise FormatError(f"The shape and offsets of {what} must be integers of at least 0.")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"The tensor {what} has the dtype {dtype!r}, which is not known here.")
    if stop - start != math.prod(shape) * DTYPES[dtype][1]:
        raise FormatError(
            f"The tensor {what} is {dtype} {list(shape)}, which takes "
            f"{math.prod(shape) * DTYPES[dtype][1]} bytes, but its offsets span {stop - start}."
        )
    return Entry(dtype, shape, begin + start, begin + stop)


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The object that a JSON text holds; one that names a key twice is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is there twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"JSON was expected in {what}, but it cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise FormatError(f"A JSON object was expected in {what}, not {type(value).__name__}.")
    return value


class TensorFolder(Mapping[str, Entry]):
    """The tensors of several files under one set of names."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder = folder
        self.files: dict[str, TensorFile] = {}
        self._home: dict[str, TensorFile] = {}
        try:
            for name in files:
                self._open(name)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> None:
        # A name out of a file of a stranger: only a plain name of a file within the folder.
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
            raise FormatError(f"{name!r} is not the plain name of a file in {self.folder}.")
        path = self.folder / name
        if not path.is_file():
            raise FormatError(f"{self.folder} should hold the file {name}, but does not.")
        file = self.files[name] = TensorFile(path)
        for tensor in file.entries:
            if tensor.startswith(PADDING):
                continue
            if tensor in self._home:
                other = self._home[tensor].path.name
                raise FormatError(
                    f"The tensor {tensor!r} is in both {other} and {name} of {self.folder}."
                )
            self._home[tensor] = file

    def __getitem__(self, name: str) -> Entry:
        return self._home[name].entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def file_of(self, name: str) -> str:
        return self._home[name].path.name

    def read(self, name: str) -> Any:
        return self._home[name].read(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        return self._home[name].chunks(name)

    def meta(self, name: str) -> Any:
        """A tensor of the same shape and dtype on the meta device."""
        import torch

        entry = self[name]
        dtype = _torch_dtype(entry.dtype, f"{name} of {self.folder}")
        return torch.empty(entry.shape, dtype=dtype, device="meta")

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


# ---- writing ----


def tensor_facts(tensor: Any, what: str) -> tuple[str, tuple[int, ...]]:
    """Dtype (as files name it) and shape of a torch tensor that can be written."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise UnsupportedError(
            f"{what} is a {type(tensor).__name__} ({getattr(tensor, 'layout', 'no tensor')}); "
            "only plain dense tensors can be saved."
        )
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device and has no numbers to save.")
    code = _CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise UnsupportedError(f"{what} is {tensor.dtype}, which safetensors cannot hold.")
    return code, tuple(tensor.shape)


def tensor_bytes(tensor: Any) -> memoryview:
    """The bytes of a dense torch tensor; a copy only where it is elsewhere or not contiguous."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def header_bound(names: Iterable[tuple[str, int]]) -> int:
    """Bytes that a header with these names and numbers of dimensions cannot exceed."""
    return 128 + sum(len(json.dumps(name)) + 64 + 16 * (rank + 2) for name, rank in names)


class ShardWriter:
    """Tensors into the files of a folder, one after another, a new file after `max_bytes`.

    The header comes first in a file but is known last, so that room for it is left and the rest
    filled with spaces, as the format allows. `folder` makes files: see _folder.NewFolder.
    """

    def __init__(self, folder: Any, room: int, max_bytes: int) -> None:
        self._folder, self._room, self._max = folder, -(-room // 8) * 8, max_bytes
        self._shards: list[dict[str, dict[str, Any]]] = []
        self._file: Any = None
        self._offset = 0
        self.total = 0  # bytes of all tensors

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Iterable[Any]) -> None:
        """`data`: the bytes in pieces."""
        size = DTYPES[dtype][1]
        nbytes = math.prod(shape) * size
        if self._file is None or (self._offset and self._offset + nbytes > self._max):
            self._finish_file()
            self._file = self._folder.create(f"part-{len(self._shards)}")
            self._file.write(bytes(8 + self._room))
            self._shards.append({})
            self._offset = 0
        if self._offset % size:
            skip = size - self._offset % size
            self._put(f"{PADDING}{len(self._shards[-1])}", "U8", (skip,), [bytes(skip)])
        self._put(name, dtype, shape, data)

    def add_tensor(self, name: str, tensor: Any) -> None:
        dtype, shape = tensor_facts(tensor, name)
        self.add(name, dtype, shape, [tensor_bytes(tensor)])

    def _put(self, name: str, dtype: str, shape: tuple[int, ...], data: Iterable[Any]) -> None:
        start = self._offset
        for piece in data:
            self._file.write(piece)
            self._offset += len(piece)
        assert self._offset - start == math.prod(shape) * DTYPES[dtype][1]
        self.total += self._offset - start
        self._shards[-1][name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [start, self._offset],
        }

    def _finish_file(self) -> None:
        if self._file is None:
            return
        header = {"__metadata__": {"format": "pt"}, **self._shards[-1]}
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= self._room
        self._file.write_at(0, self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file.close()
        self._file = None

    def finish(self) -> dict[str, str]:
        """Names the files as they are to stay; the file of every tensor."""
        self._finish_file()
        count = len(self._shards)
        home: dict[str, str] = {}
        for i, shard in enumerate(self._shards):
            name = f"model-{i + 1:05}-of-{count:05}.safetensors"
            if count == 1:
                name = "model.safetensors"
            self._folder.rename(f"part-{i}", name)
            home |= {tensor: name for tensor in shard if not tensor.startswith(PADDING)}
        return home
