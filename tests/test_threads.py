# SPDX-License-Identifier: Apache-2.0
"""Threads: one set for torch and qkern, torch's number of them, concurrent calls, fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="the threads are torch's")

import qkern  # noqa: E402
from qkern import _core, _threads, nn  # noqa: E402

LINUX = sys.platform == "linux"
OPENMP = "OpenMP" in torch.__config__.parallel_info()


def python(code: str, timeout: int = 60) -> str:
    """What the code prints in a fresh interpreter."""
    code = PRELUDE + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PRELUDE = """
import os, sys, threading
import torch, qkern
from qkern import _core

def tasks():
    return len(os.listdir("/proc/self/task"))

def layer(fmt="int8-a8"):
    torch.manual_seed(0)
    return qkern.nn.Linear(512, 512, format=fmt).requires_grad_(False)

x = torch.randn(32, 512, generator=torch.Generator().manual_seed(1))
"""


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- one set of threads ----


@pytest.mark.skipif(not OPENMP, reason="this torch does not run on OpenMP")
def test_torchs_runtime_is_found() -> None:
    assert _threads.source().startswith("torch's OpenMP runtime (lib")


def test_set_num_threads_is_respected() -> None:
    for count in (1, 3, 2):
        torch.set_num_threads(count)
        assert _core.get_threads() == count
        found = []
        # A thread that torch has not seen yet.
        thread = threading.Thread(target=lambda found=found: found.append(_core.get_threads()))
        thread.start()
        thread.join()
        assert found == [count]
        with qkern.override(threads=2):
            assert _core.get_threads() == min(count, 2)


@pytest.mark.skipif(not LINUX, reason="counts threads in /proc")
def test_no_thread_is_started_beside_torchs() -> None:
    counts = python(
        """
        torch.set_num_threads(1)
        module, before = layer(), tasks()
        module(x)
        print(tasks() - before)        # one thread: nothing is started
        torch.set_num_threads(3)
        before = tasks()
        torch.randn(2000, 2000).exp()  # torch starts its two
        print(tasks() - before)
        module(x)
        print(tasks() - before)        # qkern uses them
        """
    )
    started = [int(count) for count in counts.split()]
    assert started[0] == 0 and started[2] == started[1]


@pytest.mark.skipif(not (LINUX and OPENMP), reason="reads /proc")
def test_no_second_runtime_is_loaded() -> None:
    files = python(
        """
        def runtimes():
            with open("/proc/self/maps") as maps:
                return sorted({line.split()[-1] for line in maps if "omp" in line.split("/")[-1]})
        import qkern.tensor
        before = runtimes()
        layer()(x)
        print(before == runtimes(), len(before))
        """
    )
    assert files.split() == ["True", "1"]


def test_work_is_spread_over_the_threads() -> None:
    """One call on two threads must see processor time on both."""
    if not LINUX:
        pytest.skip("reads /proc")
    shares = python(
        """
        def busy():
            times = {}
            for task in os.listdir("/proc/self/task"):
                with open(f"/proc/self/task/{task}/schedstat") as file:
                    times[task] = int(file.read().split()[0])
            return times
        torch.set_num_threads(2)
        module = layer("codebook4")
        module(x)
        # On a busy machine one thread may do the whole of some calls: it must not be so always.
        for _ in range(40):
            before = busy()
            for _ in range(30):
                module(x)
            after = busy()
            spent = sorted(after[t] - before.get(t, 0) for t in after)
            shares = len([s for s in spent if s > 0.05 * spent[-1]])
            if shares > 1:
                break
        print(shares)
        """
    )
    assert int(shares) == 2


# ---- concurrent calls ----


@pytest.mark.parametrize("fmt", ("int4-g32", "int8-a8", "int4-g32-asym-a8g", "codebook4"))
def test_eight_threads_get_the_serial_bits(fmt: str) -> None:
    shared = nn.Linear(96, 80, format=fmt).requires_grad_(False)
    inputs = [torch.randn(1 + i, 96) for i in range(8)]
    expected = [shared(x) for x in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        own = nn.Linear.from_weight(shared.weight.to("cpu"), shared.bias)
        for step in range(60):
            module = own if step % 3 == 0 else shared
            if not torch.equal(module(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- fork ----


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("first", ("qkern", "torch", "both", "neither"))
def test_use_after_fork(first: str) -> None:
    """The child calls qkern after the parent used threads; SIGALRM ends a child that hangs."""
    result = python(
        f"""
        import signal
        torch.set_num_threads(2)
        module, fresh, expected = layer(), layer("codebook4"), None
        if {first!r} in ("torch", "both"):
            torch.randn(2000, 2000).exp()
        if {first!r} in ("qkern", "both"):
            expected = module(x)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            y, z = module(x), fresh(x)
            sums = y.double().sum().item(), z.double().sum().item()
            same = expected is None or torch.equal(y, expected)
            print(same, _core.get_threads(), *sums, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(status, module(x).double().sum().item(), fresh(x).double().sum().item())
        """
    )
    child, parent = (line.split() for line in result.splitlines())
    assert child[:2] == ["True", "2"] and parent[0] == "0"
    assert child[2:] == parent[1:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_that_another_thread_held_does_not_stop_the_child() -> None:
    result = python(
        """
        import signal
        from qkern.nn import _base
        held, done = threading.Event(), threading.Event()
        def hold():
            with _base._state_lock:
                held.set()
                done.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            print(layer()(x).shape[0], flush=True)
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        done.set()
        """
    )
    assert result.split() == ["32", "0"]
