# SPDX-License-Identifier: Apache-2.0
"""What runs, why, and how to choose: info, kernels, explain, override, the environment.

Environment, read once when qkern is imported; a value that makes no sense, or an instruction set
that this machine lacks, is an error then, a backend that cannot run at its first use:

    QKERN_ISA      highest instruction set: scalar, avx2, avx512, avx512vnni, avx512amx, ...
    QKERN_THREADS  most threads of a call
    QKERN_BACKEND  cpu, cuda or triton, for every operation
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from qkern import _core, _threads, backends
from qkern.errors import UnsupportedError

_ENVIRONMENT = ("QKERN_ISA", "QKERN_THREADS", "QKERN_BACKEND")


class Facts(dict):
    """A dictionary of plain values that prints as lines."""

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def version() -> str:
    return _core.version()


def info() -> Facts:
    """Versions, processor, threads, backends: what is there, what is used, and why not more."""
    torch = _import_torch()
    if isinstance(torch, str):
        active = dict.fromkeys(backends.names(), torch)
        versions, cuda = torch, torch
    else:
        active = {name: backends.why_not(name) or "active" for name in backends.names()}
        versions = torch.__version__
        cuda = _cuda_devices(torch)
    return Facts(
        version=version(),
        python=platform.python_version(),
        torch=versions,
        triton=_installed("triton"),
        cuda=cuda,
        cpu=Facts(detected=_core.detected_isa(), isa=_core.active_isa()),
        threads=Facts(
            used=_core.get_threads(),
            limit=_threads.limit() or None,
            run_on=_threads.source(),
        ),
        backends=Facts(active),
        backend_forced=backends.forced(),
        environment=Facts({name: os.environ.get(name) for name in _ENVIRONMENT}),
    )


def kernels() -> list[dict[str, Any]]:
    """Every kernel: name, device, op, isa, weights, activations, and whether it can run here."""
    rows = [{"device": "cpu", **row} for row in _core.kernels()]
    if not isinstance(_import_torch(), str):
        for name in backends.names():
            if name != "cpu" and backends.why_not(name) is None:
                rows += backends.load(name).kernels()
    return rows


@dataclass(frozen=True)
class Explanation:
    """The choice of a kernel. `candidates` are (kernel, whether it runs, why), best first."""

    format: str
    shape: tuple[int, int]
    backend: str
    candidates: tuple[tuple[str, bool, str], ...]

    @property
    def kernel(self) -> str | None:
        """The one that runs."""
        return next((kernel for kernel, runs, _ in self.candidates if runs), None)

    def __str__(self) -> str:
        width = max((len(kernel) for kernel, _, _ in self.candidates), default=0)
        rows = [
            f"  {'>' if runs else ' '} {kernel:{width}}  {reason}"
            for kernel, runs, reason in self.candidates
        ]
        n, k = self.shape
        return "\n".join([f"{self.format} {n} x {k} on the backend {self.backend}", *rows])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kernel": self.kernel}


def explain(module_or_qt: Any, x: Any = None) -> Explanation:
    """Which kernel runs for this input, and why the better ones do not. Nothing is computed.

    Takes a module or a QuantizedTensor. Without x, an input on the weight's device is assumed.
    """
    import torch

    from qkern import ops

    weight = getattr(module_or_qt, "weight", module_or_qt)
    ops.check_weight(weight)
    if x is None:
        x = torch.empty(1, weight.shape[1], device=weight.device)
    ops.check_pair(weight, x)
    backend = backends.select(x.device.type)
    candidates = backend.explain(ops.held(weight, backend), weight.format, weight.shape, x)
    name = backend.__name__.rpartition(".")[2]
    return Explanation(str(weight.format), weight.shape, name, tuple(candidates))


@contextmanager
def override(
    isa: str | None = None, backend: str | None = None, threads: int | None = None
) -> Iterator[None]:
    """Within the block: at most this instruction set, this backend, at most this many threads.

    The choice holds for the whole process, other threads included, and what was in force before
    comes back at the end. A choice that cannot be made raises, and then nothing is changed.
    """
    before = (_core.active_isa(), backends.forced(), _threads.limit())
    try:
        if isa is not None:
            _set_isa(isa)
        if threads is not None:
            _set_threads(threads)
        if backend is not None:
            _set_backend(backend)
        yield
    finally:
        _core.set_isa(before[0])
        backends.force(before[1])
        _threads.set_limit(before[2])


def apply_environment() -> None:
    """Puts the environment's choices in force."""
    setters: tuple[Callable[[Any], None], ...] = (_set_isa, _set_threads, backends.force)
    for name, apply in zip(_ENVIRONMENT, setters, strict=True):
        text = os.environ.get(name, "").strip()
        if text:
            try:
                apply(int(text) if name == "QKERN_THREADS" and text.isdecimal() else text)
            except (ValueError, UnsupportedError) as error:
                raise type(error)(f"The environment has {name}={text}. {error}") from None


def _set_isa(isa: Any) -> None:
    if not isinstance(isa, str):
        raise TypeError(f"isa must be the name of an instruction set, but {isa!r} came.")
    _core.set_isa(isa)


def _set_threads(threads: Any) -> None:
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be an integer of at least 1, but {threads!r} came.")
    _threads.set_limit(threads)


def _set_backend(backend: str) -> None:
    backends.force(backend)
    reason = _import_torch()
    if not isinstance(reason, str):
        reason = backends.why_not(backend)
    if reason is not None:
        raise UnsupportedError(f"The backend {backend!r} cannot run here: {reason}.")


def _import_torch() -> Any:
    """The module with qkern's operations registered, or why it cannot be had."""
    try:
        import torch

        from qkern import ops  # noqa: F401  the CPU threads are chosen when it is imported
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return torch


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_devices(torch: Any) -> Any:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {torch.version.cuda}, but finds no device"
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _lines(facts: dict, indent: str = "") -> Iterator[str]:
    width = max((len(str(key)) for key in facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key:{width}}  {'-' if value is None else value}"
