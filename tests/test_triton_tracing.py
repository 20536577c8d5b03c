# SPDX-License-Identifier: Apache-2.0
"""What torch.compile and AOTInductor see of the Triton kernels, without a GPU: graphs traced with
fake tensors hold the kernels themselves, not opaque operations. Nothing is launched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels need torch")
triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel has nothing to trace", allow_module_level=True)

from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import qkern  # noqa: E402
import qkern.triton_kernels as tk  # noqa: E402
from qkern import backends  # noqa: E402
from qkern.backends import triton as backend  # noqa: E402
from qkern.triton_kernels import Spec  # noqa: E402

INT4 = Spec("int", 4, 128)
N, K = 256, 4096


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing asks the driver for its target, and reads the compiler's first stage for it."""
    if torch.cuda.is_available():
        return
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(tk, "_check_place", lambda *tensors: None)


def kernels_in(graph: torch.fx.GraphModule) -> Iterator[str]:
    for node in graph.graph.nodes:
        assert "qkern_triton" not in str(node.target), "an operation that hides its kernels"
        if "triton_kernel_wrapper" in str(node.target):
            yield kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__


def traced(run: Callable[..., torch.Tensor], *shapes: tuple, grad: bool = False) -> list[str]:
    """Names of kernels in the graphs of one call (and of its backward pass), compiled whole."""
    names: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        names.extend(kernels_in(graph))
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(shape, dtype=dtype) for *shape, dtype in shapes]
        tensors[0].requires_grad_(grad)
        compiler = aot_autograd(fw_compiler=look, bw_compiler=look)
        y = torch.compile(run, backend=compiler, fullgraph=True)(*tensors)
        if grad:
            y.sum().backward()
            assert tensors[0].grad.shape == tensors[0].shape
    return names


CODES, SCALES = (N, K // 2, torch.uint8), (N, K // 128, torch.float16)


@pytest.mark.parametrize("activations,kernels", [
    ("float", ["linear_dot_kernel"]),
    ("int8", ["quantize_activations_kernel", "linear_int8_kernel"]),
    ("int8_group", ["linear_int8_kernel"]),
])  # fmt: skip
def test_linear(activations: str, kernels: list[str], target: None) -> None:
    """Few rows: parts of K, and their sum."""
    spec = Spec("int", 4, 128, activations=activations)
    seen = traced(lambda x, c, s: tk.linear(x, c, s, spec=spec),
                  (2, 3, K, torch.bfloat16), CODES, SCALES)  # fmt: skip
    assert seen == [*kernels, "sum_parts_kernel"]


def test_tables(target: None) -> None:
    """Look-ups are instructions written out: the compiler's first stage must read them."""
    spec = Spec("table", 4, table_per="row")
    assert traced(lambda x, c, t: tk.linear(x, c, codebook=t, spec=spec),
                  (300, K, torch.float16), CODES, (N, 16, torch.float32)) == [
        "linear_dot_kernel"]  # fmt: skip


def test_gradients(target: None) -> None:
    seen = traced(lambda x, c, s: tk.linear(x, c, s, spec=INT4),
                  (300, K, torch.bfloat16), CODES, SCALES, grad=True)  # fmt: skip
    assert seen == ["linear_dot_kernel", "linear_grad_kernel"]
    seen = traced(lambda x, o, c, s: tk.grouped_linear(x, o, c, s, spec=INT4),
                  (9, K, torch.float16), (5, torch.int32), CODES, SCALES, grad=True)  # fmt: skip
    assert seen == ["grouped_dot_kernel", "grouped_grad_kernel"]


def test_the_other_operations(target: None) -> None:
    weight = {"spec": INT4, "k": K, "dtype": torch.float16}
    assert traced(lambda c, s: tk.dequantize(c, s, **weight), CODES, SCALES) == [
        "dequantize_kernel"]  # fmt: skip
    assert traced(lambda i, c, s: tk.embedding(i, c, s, **weight),
                  (2, 7, torch.int64), CODES, SCALES) == ["dequantize_kernel"]  # fmt: skip
    assert traced(lambda x: tk.quantize_activations(x, 128)[1], (5, K, torch.float32)) == [
        "quantize_activations_kernel"]  # fmt: skip
    assert traced(lambda x, o, c, s: tk.grouped_linear(x, o, c, s, spec=INT4),
                  (9, K, torch.float16), (5, torch.int32), CODES, SCALES) == [
        "grouped_dot_kernel"]  # fmt: skip


@pytest.mark.parametrize("fmt", ["int4-g32-asym", "nf4", "mxfp4-a8", "nvfp4", "nvfp4-a8g",
                                 "codebook4", "lutb"])  # fmt: skip
def test_modules_are_traced_whole(fmt: str, target: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From qkern.nn.Linear to the kernel there is no break."""
    if torch.cuda.is_available():
        pytest.skip("traced where nothing can run")
    monkeypatch.setattr(backend, "DEVICES", ("cpu",))
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    names: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list) -> None:
        names.extend(kernels_in(graph))
        raise NotImplementedError("seen")

    layer = qkern.nn.Linear.from_float(torch.nn.Linear(256, 64), fmt).requires_grad_(False)
    torch._dynamo.reset()
    with qkern.override(backend="triton"):
        backends.select("cpu")  # which a first call does
        compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=look), fullgraph=True)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="seen"):
            compiled(torch.randn(3, 256))
    assert names[-1] == ("linear_int8_kernel" if "-a8" in fmt else "linear_dot_kernel")
    assert not any(isinstance(table, FakeTensor) for table in backend._fixed_tables.values())
