# SPDX-License-Identifier: Apache-2.0
"""One set of threads for torch and qkern.

torch's CPU library runs its loops on an OpenMP runtime, which wheels bring along, sometimes under
another file name. The functions of that very runtime are handed to the native library; loading a
second runtime would give the process two sets of threads that fight for the processors.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from qkern import _core

_MOST_THREADS = 1024
_source = "qkern's own pool"
_limit = 0  # 0: none


def source() -> str:
    """Whose threads run the kernels, in words."""
    return _source


def limit() -> int:
    """The cap set by `set_limit`; 0 where there is none."""
    return _limit


def set_limit(threads: int) -> None:
    """At most this many threads per call, 0: as many as the host allows."""
    global _limit
    if threads > _MOST_THREADS:
        raise ValueError(f"At most {_MOST_THREADS} threads are possible, but {threads} came.")
    _core.set_threads(threads)
    _limit = threads


def adopt_torch() -> None:
    """Runs kernels on torch's OpenMP runtime; on the own pool where torch has none.

    Called once, when the first torch operation of qkern is set up.
    """
    global _source
    import torch

    scopes = _torch_scopes()
    # torch's own answer knows of set_num_threads also in threads that torch has not seen yet,
    # where OpenMP's would still be the default.
    count = _function(scopes, "_ZN2at15get_num_threadsEv", "omp_get_max_threads")
    parallel = _function(scopes, "GOMP_parallel")
    if "OpenMP" in torch.__config__.parallel_info() and parallel and count:
        _core.use_openmp(parallel, count)
        _source = f"torch's OpenMP runtime ({_file_at(parallel)})"
    elif not _limit:
        set_limit(torch.get_num_threads())
        _source = "qkern's own pool, as many threads as torch had at the first call"


def _torch_scopes() -> list[ctypes.CDLL]:
    """Where the dynamic linker looked when it bound torch's calls: what is visible to all, then
    the CPU library with what it depends on. Nothing is loaded by this."""
    scopes = [ctypes.CDLL(None)]
    for path in _loaded_files():
        if os.path.basename(path).startswith("libtorch_cpu."):
            scopes.append(ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY))
    return scopes


def _function(scopes: list[ctypes.CDLL], *names: str) -> int:
    """Address of the first of these functions that there is, else 0."""
    for name in names:
        for scope in scopes:
            function: Any = getattr(scope, name, None)
            if function is not None:
                return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def _mappings() -> list[tuple[int, int, str]]:
    """(begin, end, file) of what is mapped into this process; empty where the system does not
    tell."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            lines = [line.split(maxsplit=5) for line in maps]
    except OSError:
        return []
    rows = []
    for fields in lines:
        if len(fields) == 6 and fields[5].startswith("/"):
            begin, end = (int(x, 16) for x in fields[0].split("-"))
            rows.append((begin, end, fields[5].rstrip("\n")))
    return rows


def _loaded_files() -> list[str]:
    return list(dict.fromkeys(path for _, _, path in _mappings()))


def _file_at(address: int) -> str:
    for begin, end, path in _mappings():
        if begin <= address < end:
            return os.path.basename(path)
    return "unknown file"
