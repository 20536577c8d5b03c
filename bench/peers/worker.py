# SPDX-License-Identifier: Apache-2.0
"""A process that holds one family, and the driver's handle on it.

The process does nothing until a request arrives on its pipe; the driver sends one at a time, so
only one family is ever active.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from peers import AVX2_ENVIRONMENT, Absent, Peer, Settings, load

PATIENCE = 600.0  # seconds for one request
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "QKERN_THREADS")
WARM_UP = 0.12  # seconds


@dataclass
class Held:
    """A peer that has been built, and its calls for one number of rows."""

    peer: Peer
    copies: int
    rows: int = 0
    turn: Iterator[Any] = field(default_factory=lambda: iter(()))


class Server:
    def __init__(self, family: str, settings: Settings):
        self.family, self.settings = family, settings
        self.peers = {peer.name: peer for peer in load(family, settings)}
        self.held: dict[str, Held] = {}

    def ready(self, name: str, n: int, k: int, copies: int) -> Held:
        held = self.held.get(name)
        if held is None or held.copies < copies:
            held = Held(self.peers[name], copies)
            held.peer.build(n, k, copies)
            self.held[name] = held
        return held

    def check(self, name: str, n: int, k: int, m: int, rotation: int) -> dict[str, Any]:
        """Builds the peer if need be; its relative error, and what it needs to be timed."""
        from peers import _data

        peer = self.peers[name]
        copies = copies_for(peer.weight_bytes(n, k), m, rotation)
        self.ready(name, n, k, copies)
        x = _data.activations(m, k)
        y, detail = peer.output(x), peer.detail()
        wrong = _data.relative_error(y, peer.seen(x), peer.weight())
        if not wrong <= peer.tolerance:
            raise ValueError(f"wrong result: relative error {wrong:.3g} over {peer.tolerance:.3g}")
        return {
            "bytes": peer.weight_bytes(n, k),
            "copies": copies,
            "relative_error": wrong,
            "detail": detail,
        }

    def time(self, name: str, n: int, k: int, m: int, copies: int, budget: float) -> float:
        """Seconds per layer: the mean over at least `budget` seconds of calls."""
        from peers import _data

        held = self.ready(name, n, k, copies)
        if held.rows != m:
            calls = held.peer.calls(_data.activations(m, k), copies)
            held.rows, held.turn = m, itertools.cycle(calls)
        # A processor that was idle for half a second is two to three times slower for a while
        # (seen on virtual machines), and every family is idle while the others have their turn.
        start = time.perf_counter()
        while time.perf_counter() - start < WARM_UP:
            next(held.turn)()
        done, start = 0, time.perf_counter()
        while not done or time.perf_counter() - start < budget:
            next(held.turn)()
            done += 1
        return (time.perf_counter() - start) / (done * held.peer.per_call)

    def drop(self) -> None:
        """Forgets everything that was built."""
        for held in self.held.values():
            held.peer.close()
        self.held.clear()
        self.peers = {peer.name: peer for peer in load(self.family, self.settings)}
        gc.collect()


def copies_for(weight_bytes: int, m: int, rotation: int) -> int:
    """Copies whose sum leaves the last-level cache behind; few where time does not depend on it."""
    if m >= 256:
        return 2
    return max(2, min(64, rotation // (1 if m <= 16 else 2) // weight_bytes + 1))


def serve(family: str, settings: Settings, pipe: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        server = Server(family, settings)
    except Absent as absent:
        pipe.send({"absent": str(absent)})
        return
    except Exception as error:
        pipe.send({"absent": f"cannot start: {one_line(error)}"})
        return
    pipe.send({"peers": [(p.name, p.kind, p.arithmetic) for p in server.peers.values()]})
    while True:
        command, *arguments = pipe.recv()
        if command == "quit":
            return
        try:
            pipe.send({"result": getattr(server, command)(*arguments)})
        except Exception as error:
            pipe.send({"failed": one_line(error)})


def one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r" with name '\w+'", "", text)[:300]  # made-up names of nodes


class Failed(Exception):
    """A request that the family could not serve."""


class Worker:
    """The driver's side of one family. A process that dies is started again when next needed."""

    def __init__(self, family: str, settings: Settings):
        self.family, self.settings = family, settings
        self.process: Any = None
        self.absent: str | None = None
        self.peers: list[tuple[str, str, str]] = []
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        added = dict.fromkeys(THREAD_VARIABLES, str(self.settings.threads))
        if self.settings.isa == "avx2":
            added |= AVX2_ENVIRONMENT
        elif self.settings.isa:
            added["QKERN_ISA"] = self.settings.isa
        saved = dict(os.environ)
        os.environ.update(added)
        try:
            arguments = (self.family, self.settings, theirs)
            self.process = context.Process(target=serve, args=arguments, daemon=True)
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(saved)
        theirs.close()
        try:
            hello = self.receive()
        except Failed as failed:
            hello = {"absent": f"cannot start: {failed}"}
        self.absent, self.peers = hello.get("absent"), hello.get("peers", [])
        if self.absent:
            self.stop()

    def receive(self) -> dict[str, Any]:
        try:
            if self.pipe.poll(PATIENCE):
                return self.pipe.recv()
            reason = f"no answer in {PATIENCE:.0f} seconds"
        except (EOFError, OSError):
            self.process.join(10)
            reason = f"its process ended (exit status {self.process.exitcode})"
        self.stop()
        raise Failed(reason)

    def ask(self, command: str, *arguments: Any) -> Any:
        if self.process is None:
            self.start()
            if self.absent:
                raise Failed(self.absent)
        with contextlib.suppress(OSError):  # receive() tells why
            self.pipe.send((command, *arguments))
        answer = self.receive()
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer["result"]

    def drop(self) -> None:
        if self.process is not None:
            self.ask("drop")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None
