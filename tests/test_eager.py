# SPDX-License-Identifier: Apache-2.0
"""The way without torch's dispatcher: taken where nobody could tell, the same bits, the same
sentences; and qkern among torch's modes, transforms and processes."""

from __future__ import annotations

import copy
import os

import pytest

torch = pytest.importorskip("torch", reason="it is about torch tensors")

import torch.autograd.forward_ad as forward_ad  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import qkern  # noqa: E402
from op_samples import K, N, normal, packed, weight  # noqa: E402
from qkern import _eager, _library, nn  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
needs_table = pytest.mark.skipif(
    not _eager.ACTIVE, reason="this torch offers no exchange table (it came with torch 2.10)"
)


def short(x: object, bias: object = None, fmt: str = "int4-g32-asym") -> object:
    return _eager.linear(x, packed(fmt), bias, N)


def layer(fmt: str = "int4-g32-asym") -> nn.Linear:
    return nn.Linear.from_weight(weight(fmt), normal(N, seed=3))


# ---- where it is taken ----


@needs_table
@pytest.mark.parametrize("fmt", ("int4-g32-asym", "int8-a8", "codebook4", "nvfp4-a8g"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_it_gives_the_bits_of_the_operation(fmt: str, dtype: torch.dtype) -> None:
    x, bias = normal(2, 3, K, dtype=dtype), normal(N)
    bytes_ = packed(fmt)
    for view in (x, x[0], x[0, 0], x[:, 1], x[..., :K], x[:1].expand(4, 3, K)[:, 0]):
        for b in (None, bias, bias.bfloat16(), torch.nn.Parameter(bias, requires_grad=False)):
            y = _eager.linear(view, bytes_, b, N)
            expected = _library.linear(view, bytes_, b, N)
            assert y is not None and torch.equal(y, expected)
            assert y.dtype == expected.dtype and y.stride() == expected.stride()
            assert not y.requires_grad and y.data_ptr() % 64 == 0


@needs_table
def test_it_is_taken_in_every_mode_of_inference() -> None:
    x, bias = normal(1, K).requires_grad_(), torch.nn.Parameter(normal(N))
    assert short(x, bias) is None and short(x.detach(), bias) is None
    with torch.no_grad():
        assert short(x, bias) is not None
    with torch.inference_mode():
        y = short(x, bias)
        assert y is not None and y.is_inference()
    assert short(x.detach(), bias.detach()) is not None


class _Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = getattr(self, "seen", [])
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_table
def test_whoever_watches_sees_the_operation() -> None:
    x = normal(2, K)
    found: dict[str, object] = {}
    assert short(x) is not None
    with _Watcher():
        found["dispatch mode"] = short(x)
    with torch.device("cpu"):
        found["function mode"] = short(x)
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = short(x)
    for name, transform in (("vmap", torch.func.vmap), ("functionalize", torch.func.functionalize)):
        transform(lambda a, name=name: found.update({name: short(a)}) or a)(x)
    torch.func.grad(lambda a: found.update(grad=short(a)) or a.sum())(x)
    torch.jit.trace(lambda a: found.setdefault("trace", short(a)) or a * 1, x, check_trace=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        found["profiler"] = short(x)
    with forward_ad.dual_level():
        found["forward gradients"] = short(forward_ad.make_dual(x, x))
    assert len(found) == 9 and set(found.values()) == {None}, found
    assert short(x) is not None


@needs_table
def test_what_is_no_plain_tensor_goes_the_ordinary_way() -> None:
    x = normal(2, K)

    class Own(torch.Tensor):
        pass

    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    others = {
        "subclass": x.as_subclass(Own),
        "fake": fake,
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "functional": torch._to_functional_tensor(x),
        "yet to be negated": torch.randn(2, K, dtype=torch.complex64).conj().imag,
        "zeros without memory": torch._efficientzerotensor(2, K),
        "array": x.numpy(),
        "float64": x.double(),
        "no rows": x[:0],
        "no columns": x[:, :0],
        "a number": x[0, 0],
        "wrong columns": x[:, 1:],
        "rows at two distances": normal(2, 3, K).transpose(0, 1),
        "nothing": None,
    }
    assert {name: short(other) for name, other in others.items()} == dict.fromkeys(others)
    for bias in (normal(N + 1), normal(N).double(), normal(2 * N)[::2], 1):
        assert short(x, bias) is None
    bytes_ = packed()
    for block in (None, bytes_[1:], bytes_[:-64], bytes_[::2], bytes_.view(1, -1), bytes_.float()):
        assert _eager.linear(x, block, None, N) is None
    assert _eager.linear(x, bytes_, None, N + 1) is None
    assert _eager.linear(x, bytes_, None, 1 << 70) is None
    assert _eager.linear(x, bytes_, None, "n") is None
    negated = others["yet to be negated"]
    assert torch.equal(layer()(negated), layer()(negated.resolve_neg()))


@needs_table
def test_another_backend_is_not_passed_by() -> None:
    from qkern import backends

    x = normal(2, K)
    try:
        backends.force("triton")
        assert short(x) is None
        backends.force("cpu")
        assert short(x) is not None
    finally:
        backends.force(None)
    assert short(x) is not None


def test_modules_and_functions_give_the_same_either_way() -> None:
    module, x = layer().requires_grad_(False), normal(3, K)
    qt, bias = weight(), module.bias
    first, second = module(x), module(x)
    with _Watcher() as watcher:
        third = module(x)
    assert "qkern.linear.default" in watcher.seen
    assert torch.equal(first, second) and torch.equal(first, third)
    assert torch.equal(qkern.linear(x, qt, bias), first)
    assert torch.equal(qkern.linear(x, qt, bias), first)
    for bad, sentence in ((x[:, 1:], "but the input has"), (x.double(), "it is float64")):
        with pytest.raises((TypeError, ValueError), match=sentence):
            module(bad)


def test_the_profiler_names_the_operation() -> None:
    module, x = layer().requires_grad_(False), normal(3, K)
    module(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)
    assert "qkern::linear" in {event.key for event in profile.key_averages()}


# ---- autocast ----


def test_autocast_is_that_of_torchs_linear() -> None:
    plain, module = torch.nn.Linear(K, N), layer()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = normal(2, K, dtype=dtype)
        for region in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", region):
                y = module(x)
                assert y.dtype == plain(x).dtype == region
                fresh = torch.export.export(layer(), (x,)).module()(x)
            assert torch.equal(y, module(x.to(region))) and torch.equal(fresh, y)
            with torch.autocast("cpu", region), torch.autocast("cpu", enabled=False):
                assert torch.equal(module(x), layer()(x))


# ---- transforms ----


def test_vmap_maps_rows_and_refuses_weights() -> None:
    x, qt, block = normal(4, 3, K), weight(), packed()
    for module in (layer(), layer("int8-a8")):
        expected = copy.deepcopy(module)(x)
        assert torch.equal(torch.func.vmap(module)(x), expected)
        assert torch.equal(torch.func.vmap(module, in_dims=1, out_dims=1)(x), expected)
        assert torch.equal(torch.func.vmap(torch.func.vmap(module))(x), expected)
    assert torch.equal(torch.func.vmap(lambda a: qkern.linear(a, qt))(x), qkern.linear(x, qt))
    ids = torch.tensor([[1, 2], [3, 4]])
    rows = torch.func.vmap(lambda i: _library.embedding(i, block, K, torch.float32))(ids)
    assert torch.equal(rows, weight().dequantize()[ids])
    codes, scales = torch.func.vmap(lambda a: _library.quantize_activations(a, 0))(x)
    assert torch.equal(codes, qkern.quantize_activations(x)[0])
    assert torch.equal(scales, qkern.quantize_activations(x)[1])
    biases = normal(2, N)
    with pytest.raises(qkern.UnsupportedError, match="over its first argument alone"):
        torch.func.vmap(lambda b: _library.linear(x[0], block, b, N))(biases)


def test_functional_gradients() -> None:
    module, x = layer(), normal(3, K)
    leaf = x.clone().requires_grad_()
    module(leaf).sum().backward()
    assert torch.equal(torch.func.grad(lambda a: module(a).sum())(x), leaf.grad)
    each = torch.func.vmap(torch.func.grad(lambda a: module(a).sum()))(x)
    assert torch.equal(each, leaf.grad)


def test_forward_gradients_are_refused_in_words() -> None:
    module, x = layer().requires_grad_(False), normal(3, K)
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jvp(module, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        module(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("used", (False, True))
def test_functional_call_computes_with_what_it_is_given(used: bool) -> None:
    module, other, x = layer(), nn.Linear(K, N, format="int4-g32-asym"), normal(3, K)
    expected, foreign = copy.deepcopy(module)(x), copy.deepcopy(other)(x)
    state = copy.deepcopy(module.state_dict())
    if used:
        module(x)
    assert torch.equal(torch.func.functional_call(module, other.state_dict(), x), foreign)
    assert torch.equal(module(x), expected)
    assert all(torch.equal(part, state[name]) for name, part in module.state_dict().items())
    zero = {"bias": torch.zeros(N)}
    assert torch.equal(
        torch.func.functional_call(module, zero, x), qkern.linear(x, weight(), zero["bias"])
    )


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(reentrant: bool) -> None:
    module, grads = layer(), []
    for recompute in (False, True):
        x = normal(3, K).requires_grad_()
        y = (
            torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)
            if recompute
            else module(x)
        )
        y.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_inference_tensors_serve_as_weights_and_inputs() -> None:
    with torch.inference_mode():
        module, x = layer(), normal(3, K)
        y = module(x)
        exported = torch.ops.qkern.linear_canonical(
            x, *[module.parts().get(n) for n in ("codes", "scales", "zeros")], None, None, None,
            "int4-g32-asym", N, K, module.bias,
        )  # fmt: skip
    assert y.is_inference() and torch.equal(exported, y) and torch.equal(module(x), y)


@pytest.mark.parametrize("used", (False, True))
def test_jit_trace_records_canonical_storage(used: bool, tmp_path) -> None:
    module, x = layer().requires_grad_(False), normal(3, K)
    expected = copy.deepcopy(module)(x)
    if used:
        module(x)
        with pytest.raises(ValueError, match=r"call qkern\.nn\.unpack_\(model\) before"):
            torch.jit.trace(module, x)
        assert nn.unpack_(module) is module
    traced = torch.jit.trace(module, x)
    traced.save(tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    assert {name for name, _ in loaded.named_buffers()} == {"codes", "scales", "zeros"}
    assert torch.equal(loaded(x), expected) and torch.equal(loaded(x[:1]), expected[:1])
    assert torch.equal(module(x), expected)


# ---- processes ----


class _Rows(torch.utils.data.Dataset):
    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.module(normal(1, K, seed=i))[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("used", (False, True))
def test_workers_of_a_data_loader(used: bool) -> None:
    module = layer().requires_grad_(False)
    if used:
        module(normal(64, K))
    loader = torch.utils.data.DataLoader(
        _Rows(module), batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=30
    )
    expected = torch.stack([copy.deepcopy(module)(normal(1, K, seed=i))[0] for i in range(4)])
    assert torch.equal(torch.cat(list(loader)), expected)


def test_the_meta_device_gives_shapes_without_numbers() -> None:
    module, x = layer().to("meta"), torch.empty(2, 3, K, device="meta", dtype=torch.float16)
    y = module(x)
    assert y.is_meta and y.shape == (2, 3, N) and y.dtype == torch.float16
    with pytest.raises(ValueError, match="is on the meta device and has no numbers"):
        module(normal(2, K))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_everything_says_so() -> None:
    facts = str(qkern.info())
    assert "cuda" in facts
    refused = pytest.raises(qkern.UnsupportedError, match="backend 'triton' cannot run here")
    with refused, qkern.override(backend="triton"):
        pass
    assert not torch.cuda.is_initialized()
