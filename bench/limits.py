# SPDX-License-Identifier: Apache-2.0
"""The machine's limits: read bandwidth and multiply-add peaks, measured by loops of limits.cpp.

`python bench/limits.py` prints them. Benchmarks call :func:`measure` between their own passes,
because on a shared machine a fraction counts only against a limit taken in the same seconds.
"""

from __future__ import annotations

import ctypes
import functools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from qkern import _core

SOURCE = Path(__file__).with_name("limits.cpp")
# Loop: level it needs, multiply-adds of one round.
LOOPS = {
    "int8_avx512vnni": ("avx512vnni", 12 * 64),
    "int8_tile_avx512vnni": ("avx512vnni", 12 * 64),
    "int8_avx512amx": ("avx512amx", 8 * 16 * 16 * 64),
    "int8_tile_avx512amx": ("avx512amx", 8 * 16 * 16 * 64),
    "float_avx512": ("avx512", 12 * 16),
    "float_tile_avx512": ("avx512", 12 * 16),
    "float_avx2": ("avx2", 12 * 8),
    "int8_avx2": ("avx2", 4 * 32),
}
LEVELS = ("scalar", "avx2", "avx512", "avx512vnni", "avx512amx")
ROUNDS = 1_000_000
BUFFER = 192 << 20
WARM_UP = 0.12  # seconds


@functools.cache
def library() -> ctypes.CDLL:
    folder = tempfile.mkdtemp(prefix="qkern-limits-")
    target = Path(folder) / "limits.so"
    subprocess.run(["c++", "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(target)], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.read_memory.restype = ctypes.c_uint64
    for name in LOOPS:
        getattr(loaded, name).argtypes = [ctypes.c_int64]
    return loaded


@functools.cache
def buffer() -> np.ndarray:
    return np.ones(BUFFER, np.uint8)


def on_threads(threads: int, work) -> float:
    """Seconds that `work(thread)` takes on all threads at once (ctypes releases the GIL)."""
    barrier = threading.Barrier(threads + 1)

    def body(i: int) -> None:
        barrier.wait()
        work(i)

    workers = [threading.Thread(target=body, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def read_gbs(threads: int) -> float:
    """Gigabytes per second read from memory."""
    read = library().read_memory
    part = BUFFER // threads & ~4095
    base = -(-buffer().ctypes.data // 64) * 64
    seconds = on_threads(threads, lambda i: read(base + i * part, part - 4096))
    return threads * part / seconds / 1e9


def loop_gops(name: str, threads: int) -> float:
    """Giga-operations per second (two per multiply-add) of one loop."""
    loop = getattr(library(), name)
    seconds = on_threads(threads, lambda _: loop(ROUNDS))
    return threads * ROUNDS * LOOPS[name][1] * 2 / seconds / 1e9


def warm_up(threads: int) -> None:
    """Keeps the processors busy until they run as in a long calculation: after half a second of
    idling they were two to three times slower for a tenth of one (virtual machines)."""
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:
        read_gbs(threads)


def measure(threads: int, names: tuple[str, ...] = tuple(LOOPS)) -> dict[str, float]:
    warm_up(threads)
    have = LEVELS.index(_core.detected_isa())
    found = {"read_gbs": read_gbs(threads)}
    for name in names:
        if LEVELS.index(LOOPS[name][0]) <= have:
            found[name] = loop_gops(name, threads)
    return found


if __name__ == "__main__":
    counts = sorted({1, _core.get_threads()})
    rows = {t: [measure(t) for _ in range(7)] for t in counts}
    result = {
        str(t): {key: float(np.median([r[key] for r in runs])) for key in runs[0]}
        for t, runs in rows.items()
    }
    json.dump(result, sys.stdout, indent=2)
    print()
