# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest


def _reason() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is here"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA kernels need compute capability 8.0"
    try:
        from qkern import _cuda  # noqa: F401
    except ImportError:
        return "this build of qkern has no CUDA kernels (QKERN_CUDA=ON)"
    return None


@pytest.fixture(autouse=True)
def cuda_backend() -> Iterator[None]:
    """Every test of this folder runs on the CUDA backend, or is skipped with the one reason."""
    reason = _reason()
    if reason is not None:
        pytest.skip(reason)
    import qkern

    with qkern.override(backend="cuda"):
        yield
