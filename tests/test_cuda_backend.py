# SPDX-License-Identifier: Apache-2.0
"""qkern.backends.cuda without a GPU: what the library answers before it reaches a device, and that
calls fit its binding. Needs a build with the CUDA kernels (QKERN_CUDA=ON)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("qkern._cuda", reason="this build has no CUDA kernels")

import qkern  # noqa: E402
from qkern.backends import cuda, cuda_layers  # noqa: E402
from qkern.formats import FORMATS, Format  # noqa: E402

N, K = 24, 200


def all_formats() -> list[Format]:
    return [fmt for cls in FORMATS.values() for fmt in cls.variants((24, 64))]


def parts_of(fmt: Format) -> dict[str, torch.Tensor]:
    """Parts of the right shapes, of ones: no description looks further."""
    parts = {}
    for name, part in fmt.parts(N, K).items():
        parts[name] = torch.ones(part.shape, dtype=getattr(torch, part.dtypes[0]))
    return parts


def has_linear(fmt: Format) -> bool:
    return fmt.bits in (2, 3, 4) or (fmt.bits == 8 and fmt.kind == "int")


def test_every_format_has_a_kernel_or_a_sentence() -> None:
    extension = cuda._extension()
    names = {row["name"] for row in extension.kernels()}
    used = set()
    for fmt in all_formats():
        parts = parts_of(fmt)
        dtypes = (torch.float16, torch.bfloat16)
        for dtype in dtypes if fmt.activations == "float" else (*dtypes, torch.float32):
            rows = cuda.explain(parts, fmt, (N, K), torch.zeros(2, K, dtype=dtype))
            assert rows, (fmt, dtype)
            name, runs, reason = rows[0]
            assert runs == has_linear(fmt), (fmt, reason)
            if runs:
                used.add(name)
            else:
                assert "the CUDA" in reason or "no CUDA kernel" in reason, reason
        if has_linear(fmt):
            description, _ = cuda._describe(parts, fmt, (N, K))
            assert extension.packed_bytes(description) % 128 == 0
    assert used == names


def test_packed_bytes_grow_with_the_weight_alone() -> None:
    """Of a large weight: codes, scales and tables, a few percent of padding."""
    extension = cuda._extension()
    for fmt, limit in (("int4-g128", 4.2), ("codebook4", 4.3), ("lutb", 4.2)):
        n, k = 4096, 4096
        parsed = qkern.parse_format(fmt)
        parts = {
            name: torch.ones(part.shape, dtype=getattr(torch, part.dtypes[0]))
            for name, part in parsed.parts(n, k).items()
        }
        description, _ = cuda._describe(parts, parsed, (n, k))
        assert 8 * extension.packed_bytes(description) / (n * k) < limit, fmt


def test_float32_activations_are_refused_in_a_sentence() -> None:
    fmt = qkern.parse_format("int4-g64")
    rows = cuda.explain(parts_of(fmt), fmt, (N, K), torch.zeros(2, K))
    assert rows == [
        ("none", False, "the CUDA kernels take float16 or bfloat16 activations, got float32")
    ]


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("a device is here: tests/gpu runs the calls")
    monkeypatch.setattr(cuda, "_where", lambda tensor: (0, 0))
    yield


def packed(experts: int = 0) -> cuda.Packed:
    """What `pack` makes, with nothing packed in it."""
    fmt = qkern.parse_format("int4-g64")
    description, _ = cuda._describe(parts_of(fmt), fmt, (N, K))
    size = cuda._extension().packed_bytes(description)
    block = torch.zeros(max(experts, 1) * size + 128, dtype=torch.uint8)
    block = block[-block.data_ptr() % 128 :][: max(experts, 1) * size]
    return cuda.Packed(description, block, experts, None, ())


def test_calls_fit_the_binding_and_end_in_the_sentence_of_the_runtime(no_device: None) -> None:
    """Every call passes its arguments on and stops where a device is needed."""
    x = torch.zeros(3, K, dtype=torch.float16)
    grad = torch.zeros(3, N, dtype=torch.float16)
    offsets = torch.tensor([0, 1, 3])
    one, two = packed(), packed(2)
    weight = {name: part[None] for name, part in parts_of(qkern.parse_format("int4-g64")).items()}
    calls: list[Callable[[], object]] = [
        lambda: cuda.product(x, one, N, None),
        lambda: cuda.product(x, two, N, torch.zeros(2, N), offsets),
        lambda: cuda.grad_input(grad, one.arguments, K),
        lambda: cuda.grad_input(grad, two.of_expert(1), K),
        lambda: cuda.grad_input(grad.float(), one.arguments, K),
        lambda: cuda.quantize_activations(x, 64),
        lambda: cuda._dequantize_into(torch.empty(N, K), one.arguments, None, 0),
        lambda: cuda.pack(
            parts_of(qkern.parse_format("lutb-a8")), qkern.parse_format("lutb-a8"), (N, K)
        ),
        lambda: cuda_layers.grouped_linear(
            x, weight, qkern.parse_format("int4-g64"), (1, N, K), torch.tensor([0, 3]), None
        ),
    ]
    for i, call in enumerate(calls):
        # Memory of the host need not have the alignment that a device gives.
        with pytest.raises(ValueError, match=r"the CUDA runtime says|must be aligned to 128 bytes"):
            call()
            pytest.fail(f"call {i} ended without a device")


def test_what_the_host_can_check_is_a_sentence(no_device: None) -> None:
    x = torch.zeros(3, K, dtype=torch.float16)
    one = packed()
    short = cuda.Packed(one.description, one.block[:128], 0, None, ())
    with pytest.raises(ValueError, match=r"needs \d+ bytes in layout version \d"):
        cuda.product(x, short, N, None)
    few = cuda.Packed(one.description, one.block, 2, None, ())
    with pytest.raises(ValueError, match="weights of 2 experts need"):
        cuda.product(x, few, N, None, torch.tensor([0, 1, 3]))
    assert cuda.product(x[:0], one, N, None).shape == (0, N)


def test_tables_of_every_format_reach_the_library_as_it_wants_them() -> None:
    """float32 entries, integers with int8 activations: of float8 tables too."""
    for fmt in (qkern.LUTB(), qkern.LUTB(activations="int8"), qkern.NF4(activations="int8")):
        qt = qkern.quantize(torch.randn(N, K), fmt)
        _, kept = cuda._describe(qt.parts(), fmt, (N, K))
        table = kept[0].numpy()
        assert table.dtype == np.float32
        if fmt.activations != "float":
            assert (table == np.rint(table)).all() and np.abs(table).max() <= 127
