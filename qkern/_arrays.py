# SPDX-License-Identifier: Apache-2.0
"""What numpy arrays and torch tensors have in common, behind one set of functions.

Nothing here imports torch unless a torch tensor (or the wish for one) is at hand. A dtype is named
by its bare name ("float32", "bfloat16", "uint8"), the same for both libraries.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from typing import Any

import numpy as np

from qkern.errors import UnsupportedError

Array = Any  # numpy.ndarray or torch.Tensor

# qk_dtype of qkern.h
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "uint8": 3, "int8": 4, "int32": 5}
ENCODING_CODES = {"e8m0": 6, "e4m3": 7}
FLOATS = ("float32", "float16", "bfloat16")
ALIGNMENT = 64  # of packed weights, as qkern.h asks
HUGE_PAGE = 2 << 20  # bytes


def is_torch(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def kind_of(x: object, what: str) -> str:
    """ "numpy" or "torch"; `what` names the value in the sentence for anything else."""
    if isinstance(x, np.ndarray):
        return "numpy"
    if is_torch(x):
        return "torch"
    raise TypeError(
        f"{what} must be a numpy array or a torch tensor, but it is {type(x).__name__}."
    )


def as_numpy(x: object, what: str) -> np.ndarray:
    """A numpy array itself, or a view of the memory of what another library offers by DLPack."""
    if isinstance(x, np.ndarray):
        return x
    if not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"{what} must be a numpy array or offer its memory by DLPack, "
            f"but it is {type(x).__name__}."
        )
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"numpy cannot take {what}, a {type(x).__name__}, by DLPack: {error}"
        ) from error


def dtype_name(dtype: Any) -> str:
    """Name of a numpy dtype, numpy scalar type, torch dtype or text."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    if dtype in ("bfloat16", "torch.bfloat16"):
        return "bfloat16"
    try:
        return np.dtype(dtype).name
    except TypeError:
        raise TypeError(f"A dtype was expected, but {dtype!r} came.") from None


def name_of(x: Array) -> str:
    return dtype_name(x.dtype)


def device_of(x: Array) -> Any:
    """ "cpu" for numpy, the torch.device otherwise."""
    return "cpu" if isinstance(x, np.ndarray) else x.device


def is_cpu(x: Array) -> bool:
    return isinstance(x, np.ndarray) or x.device.type == "cpu"


def is_meta(x: Array) -> bool:
    return not isinstance(x, np.ndarray) and x.device.type == "meta"


def address(x: Array | None) -> int:
    """Address of the first element; 0 for None."""
    if x is None:
        return 0
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data_ptr()


def dtype_code(x: Array, encoding: str | None = None) -> int:
    """qk_dtype of an array; `encoding` where its bytes stand for something else."""
    return DTYPE_CODES[name_of(x)] if encoding is None else ENCODING_CODES[encoding]


def strides(x: Array) -> tuple[int, ...]:
    """In elements."""
    if isinstance(x, np.ndarray):
        return tuple(s // x.itemsize for s in x.strides)
    return tuple(x.stride())


def contiguous(x: Array) -> Array:
    """Dense, aligned to its elements and of native byte order; a copy only where it must be."""
    if isinstance(x, np.ndarray):
        if x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative:
            return x
        return np.require(x, dtype=x.dtype.newbyteorder("="), requirements=("C", "A"))
    return x.detach().contiguous()


def addressable(x: np.ndarray) -> np.ndarray:
    """The array itself where an address and strides in elements describe it, else a copy."""
    whole = all(s % x.itemsize == 0 for s in x.strides)
    return x if x.dtype.isnative and x.flags.aligned and whole else contiguous(x)


def empty(shape: tuple[int, ...], dtype: str, kind: str) -> Array:
    """A new CPU array of the library that `kind` names."""
    if kind == "numpy":
        return np.empty(shape, dtype)
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype))


def empty_aligned(nbytes: int, kind: str) -> Array:
    """A one-dimensional uint8 CPU array that begins at a multiple of ALIGNMENT, or of HUGE_PAGE
    where it is large.

    Reading weights at memory speed takes huge pages: one thread reads a weight of 8.6 MB at 18.3
    GB/s (int4-g128, M = 1), at 16.1 from memory of numpy, which asks for those huge pages that lie
    whole in what malloc gives, and slower still from memory of torch, which asks for none.
    """
    block = _huge_pages(nbytes)
    if block is None:
        block = np.empty(nbytes + ALIGNMENT - 1, np.uint8)
        skip = -block.ctypes.data % ALIGNMENT
        block = block[skip : skip + nbytes]
    return from_numpy(block, kind)


def _huge_pages(nbytes: int) -> np.ndarray | None:
    """Memory that begins at a huge page and asks for huge pages, but not for what is left over, so
    that nothing is wasted. None where it is too small or the system has no such call."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or nbytes < 2 * HUGE_PAGE:
        return None
    try:
        pages = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None  # what is tried next says better what is missing
    block = np.frombuffer(pages, np.uint8)
    skip = -block.ctypes.data % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel that was built without them
        pages.madvise(advice, skip, nbytes // HUGE_PAGE * HUGE_PAGE)
    return block[skip : skip + nbytes]


def to_numpy(x: Array) -> np.ndarray:
    """On the CPU as numpy; bfloat16 and the float8 types, which numpy lacks, become float32."""
    if isinstance(x, np.ndarray):
        return x
    x = x.detach().cpu()
    if x.is_floating_point() and name_of(x) not in ("float16", "float32", "float64"):
        x = x.float()
    return x.numpy()


def from_numpy(x: np.ndarray, kind: str, device: Any = "cpu") -> Array:
    """The same memory where possible: as numpy, or as a torch tensor on `device`."""
    if kind == "numpy":
        return x
    import torch

    return torch.from_numpy(x if x.flags.writeable else x.copy()).to(device)
