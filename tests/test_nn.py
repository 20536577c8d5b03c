# SPDX-License-Identifier: Apache-2.0
"""The quantized modules: canonical state seen from everywhere, one copy of the weight."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest

torch = pytest.importorskip("torch", reason="modules are torch modules")

import qkern  # noqa: E402
from qkern import nn  # noqa: E402

FORMATS = ("int4-g32", "int4-g32-asym-a8g", "int8-a8", "codebook4", "nf4-g32", "mxfp4", "nvfp4",
           "lutb")  # fmt: skip
N, K = 40, 70


def float_layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(K, N, bias, dtype=dtype)


def layer(fmt: str = "int4-g32", bias: bool = True) -> nn.Linear:
    return nn.Linear.from_float(float_layer(bias), fmt).requires_grad_(False)


def permuted(fmt: str = "int4-g32") -> nn.Linear:
    qt = qkern.quantize(float_layer().weight.detach(), fmt)
    perm = torch.randperm(K, generator=torch.Generator().manual_seed(1)).int()
    qt = qkern.QuantizedTensor.from_parts(qt.format, qt.shape, **qt.parts(), perm=perm)
    return nn.Linear.from_weight(qt)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def equal_states(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def is_packed(module: nn.QuantizedModule) -> bool:
    return dict(module.named_buffers()).keys() == {"packed"} or {
        name for name, _ in module.named_buffers()
    } == {"packed", "global_scale"}


# ---- what it computes ----


@pytest.mark.parametrize("fmt", FORMATS)
def test_it_computes_what_the_function_does(fmt: str) -> None:
    module, x = layer(fmt), normal(2, 3, K)
    qt = qkern.quantize(float_layer().weight.detach(), fmt)
    y = module(x)
    assert torch.equal(y, qkern.linear(x, qt, float_layer().bias.detach()))
    assert torch.equal(module(x), y)
    assert torch.equal(module.weight.dequantize(), qt.dequantize())


def test_dequantize_gives_the_float_layer_back() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        source = float_layer(dtype=dtype).eval()
        module = nn.Linear.from_float(source, "int8")
        module(normal(1, K).to(dtype))
        back = module.dequantize()
        assert type(back) is torch.nn.Linear and not back.training
        assert back.weight.dtype == dtype and back.weight.requires_grad
        assert torch.equal(back.weight, module.weight.dequantize(dtype))
        assert torch.equal(back.bias, source.bias)
        back.bias.data.zero_()
        assert not torch.equal(back.bias, module.bias)


def test_the_constructor_is_torchs_with_a_format() -> None:
    torch.manual_seed(3)
    plain = torch.nn.Linear(K, N, dtype=torch.float16)
    torch.manual_seed(3)
    module = nn.Linear(K, N, dtype=torch.float16, format="int8-a8")
    assert equal_states(module.state_dict(), nn.Linear.from_float(plain, "int8-a8").state_dict())
    assert (module.in_features, module.out_features, module.compute_dtype) == (K, N, torch.float16)
    assert nn.Linear(K, N, False, format=qkern.Int(4, 32)).bias is None
    assert not isinstance(module, torch.nn.Linear)


def test_gradients_reach_input_and_bias() -> None:
    module = nn.Linear.from_float(float_layer(), "int4-g32")
    x = normal(3, K).requires_grad_()
    module(x).sum().backward()
    expected = module.weight.dequantize().sum(0)
    assert torch.allclose(x.grad, expected.expand(3, K), rtol=0, atol=N * 2.0**-22)
    assert torch.equal(module.bias.grad, torch.full((N,), 3.0))


def test_repr_names_what_matters() -> None:
    module = layer()
    text = repr(module)
    assert "in_features=70, out_features=40, bias=True, format=int4-g32, bits=4, group=32" in text
    assert f"bytes={module.weight.nbytes})" in text
    module(normal(1, K))
    assert repr(module) == text


# ---- one copy ----


@pytest.mark.parametrize("fmt", FORMATS)
def test_one_copy_remains_after_the_first_call(fmt: str) -> None:
    module = nn.Linear.from_float(torch.nn.Linear(512, 256, bias=False), fmt)
    canonical = sum(part.nbytes for part in module.buffers())
    assert canonical == module.weight.nbytes
    module(normal(1, 512))
    assert is_packed(module)
    # 5 % for padding, and the header of the packed layout (at most a page).
    assert sum(b.nbytes for b in module.buffers()) <= 1.05 * canonical + 4096


def test_threads_that_call_it_first_together_agree() -> None:
    expected = layer()(normal(4, K))
    for _ in range(20):
        module, results, barrier = layer(), [], threading.Barrier(8)

        def call(module=module, results=results, barrier=barrier) -> None:
            barrier.wait()
            results.append((module(normal(4, K)), module.state_dict()["codes"]))

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 8 and all(torch.equal(y, expected) for y, _ in results)
        assert all(torch.equal(codes, results[0][1]) for _, codes in results)


# ---- canonical state ----


@pytest.mark.parametrize("make", (*(lambda f=f: layer(f) for f in FORMATS), permuted))
def test_the_state_dict_is_canonical_before_and_after_packing(make, isa: str) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    assert "packed" not in before and "codes" in before
    y = module(normal(3, K))
    assert is_packed(module) and equal_states(before, module.state_dict())
    for name in ("codes", "scales", "zeros", "codebook", "perm", "global_scale"):
        part = getattr(module, name)
        assert (part is None) == (name not in before)
        assert part is None or torch.equal(part, before[name])
    with qkern.override(isa="scalar"):
        other = nn.Linear(K, N, format=module.format, device="meta", bias=module.bias is not None)
        other.load_state_dict(before, strict=True, assign=True)
        assert torch.equal(other(normal(3, K)), y)
        assert equal_states(before, other.state_dict())


@pytest.mark.parametrize("assign", (False, True))
@pytest.mark.parametrize("called", (False, True))
def test_loading_replaces_the_weight(assign: bool, called: bool) -> None:
    source, target = permuted("int8"), nn.Linear(K, N, False, format="int8")
    if called:
        target(normal(1, K))
    target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert torch.equal(target(normal(3, K)), source(normal(3, K)))
    plain = layer("int8", bias=False)
    target.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    assert target.perm is None
    assert torch.equal(target(normal(3, K)), plain(normal(3, K)))


def test_loading_keeps_the_dtypes_that_come() -> None:
    source = layer("int4-g32", bias=False)
    state = source.state_dict()
    state["scales"] = state["scales"].float() * 1.000001
    target = layer("int4-g32", bias=False)
    target.load_state_dict(state)
    assert target.scales.dtype == torch.float32 and torch.equal(target.scales, state["scales"])
    assert torch.equal(target.weight.dequantize(), target.dequantize().weight)


def test_loading_what_does_not_fit_says_why() -> None:
    state, target = layer().state_dict(), layer()
    with pytest.raises(RuntimeError, match="scales must be float16 or bfloat16 or float32 in"):
        target.load_state_dict({**state, "scales": state["scales"].double()})
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        target.load_state_dict({**state, "codes": state["codes"][:, 1:]})
    with pytest.raises(RuntimeError, match=r"Missing key.*codes"):
        target.load_state_dict({k: v for k, v in state.items() if k != "codes"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*packed"):
        target.load_state_dict({**state, "packed": state["codes"]})
    broken = state["scales"].clone()
    broken[1, 0] = float("nan")
    target.load_state_dict({**state, "scales": broken})
    with pytest.raises(qkern.FormatError, match="scale of row 1, group 0 is not finite"):
        target(normal(1, K))


def test_a_bad_permutation_is_not_loaded() -> None:
    """A GPU would read memory with it."""
    target = layer()
    before, perm = target.state_dict(), torch.arange(K, dtype=torch.int32)
    for wrong in ({0: K}, {0: -1}, {0: 1}):
        bad = perm.clone()
        for at, value in wrong.items():
            bad[at] = value
        with pytest.raises(RuntimeError, match=r"perm must hold"):
            target.load_state_dict({**before, "perm": bad})
        assert target.perm is None
        assert all(torch.equal(before[n], part) for n, part in target.state_dict().items())
    swapped = perm.flip(0)
    target.load_state_dict({**before, "perm": swapped}, strict=True)
    assert torch.equal(target.perm, swapped)


@pytest.mark.parametrize("called", (False, True))
@pytest.mark.parametrize("how", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_are_equal_and_independent(called: bool, how) -> None:
    for module in (layer("nvfp4"), permuted()):
        x = normal(2, K)
        expected = copy.deepcopy(module)(x)
        if called:
            module(x)
        twin = how(module)
        assert not is_packed(twin) and equal_states(twin.state_dict(), module.state_dict())
        assert torch.equal(twin(x), expected) and torch.equal(module(x), expected)
        twin.scales = twin.scales.zero_()
        assert torch.equal(module(x), expected) and not torch.equal(twin(x), expected)


def test_saving_a_whole_model_keeps_shared_modules_shared() -> None:
    shared = layer("int8", bias=False)
    model = torch.nn.ModuleDict({"a": shared, "b": shared})
    shared(normal(1, K))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded["a"] is loaded["b"]
    assert torch.equal(loaded["a"](normal(2, K)), shared(normal(2, K)))


# ---- moving ----


def test_casts_touch_the_bias_alone() -> None:
    module = layer("int4-g32")
    before = copy.deepcopy(module.state_dict())
    y = module(normal(2, K))
    packed = module.packed
    module.double().half()
    assert module.packed is packed  # nothing was unpacked for it
    assert module.compute_dtype == module.bias.dtype == torch.float16
    state = module.state_dict()
    assert all(torch.equal(state[n], before[n]) for n in before if n != "bias")
    assert state["scales"].dtype == before["scales"].dtype
    assert module.dequantize().weight.dtype == torch.float16
    module.float().bias.copy_(before["bias"])
    assert torch.equal(module(normal(2, K)), y)
    fresh = layer("int8")  # float32 scales, canonical state
    scales = fresh.scales.clone()
    assert torch.equal(fresh.bfloat16().scales, scales)


@pytest.mark.parametrize("called", (False, True))
def test_to_meta_and_back_by_loading(called: bool) -> None:
    module = layer()
    state, y = copy.deepcopy(module.state_dict()), copy.deepcopy(module)(normal(2, K))
    if called:
        module(normal(2, K))
    module.to("meta")
    assert all(part.is_meta for part in module.state_dict().values())
    assert [tuple(p.shape) for p in module.state_dict().values()] == [
        tuple(p.shape) for p in state.values()
    ]
    with pytest.raises(ValueError, match="is on the meta device and has no numbers"):
        module(normal(2, K))
    assert module(normal(2, K).to("meta")).is_meta
    module.to_empty(device="cpu")
    module.load_state_dict(state)
    assert torch.equal(module(normal(2, K)), y)


def test_to_empty_forgets_the_packed_weight() -> None:
    module = layer()
    state, y = copy.deepcopy(module.state_dict()), module(normal(2, K))
    module.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(normal(2, K)), y)


def test_shared_memory() -> None:
    for called in (False, True):
        module = layer()
        y = layer()(normal(2, K))
        if called:
            module(normal(2, K))
        module.share_memory()
        assert all(b.is_shared() for b in module.buffers())
        assert torch.equal(module(normal(2, K)), y)


def test_assigning_a_part_replaces_it() -> None:
    module = layer(bias=False)
    y = module(normal(2, K))
    module.scales = module.scales * 2
    assert torch.equal(module(normal(2, K)), 2 * y)


# ---- compilation ----


@pytest.mark.slow
@pytest.mark.parametrize("called", (False, True))
def test_compiled_as_one_graph(called: bool) -> None:
    model = torch.nn.Sequential(layer("int4-g32"), torch.nn.ReLU()).requires_grad_(False)
    expected = copy.deepcopy(model)
    if called:
        model(normal(1, K))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for m in (2, 5, 8):
        assert torch.equal(compiled(normal(m, K)), expected(normal(m, K)))
    assert is_packed(model[0])


@pytest.mark.slow
def test_compiled_for_training() -> None:
    module = nn.Linear.from_float(float_layer(), "int4-g32")
    compiled = torch.compile(module, fullgraph=True)
    x = normal(3, K).requires_grad_()
    compiled(x).square().sum().backward()
    grads = x.grad.clone(), module.bias.grad.clone()
    x.grad = module.bias.grad = None
    module(x).square().sum().backward()
    assert torch.allclose(grads[0], x.grad, rtol=1e-6, atol=1e-6)  # only torch's own sums differ
    assert torch.allclose(grads[1], module.bias.grad, rtol=1e-6, atol=1e-6)


# ---- bad input ----


def test_bad_input_is_answered_with_a_sentence() -> None:
    module, x = layer(), normal(2, K)
    for error, sentence, call in (
        (ValueError, f"maps {K} columns to {N}, but the input has 69", lambda: module(x[:, 1:])),
        (TypeError, "x must be float32, .* but it is float64", lambda: module(x.double())),
        (ValueError, "at least one dimension", lambda: module(x[0, 0])),
        (TypeError, "A torch.nn.Linear was expected, but Conv1d came",
         lambda: nn.Linear.from_float(torch.nn.Conv1d(1, 1, 1), "int8")),
        (qkern.FormatError, "'half' is not a format", lambda: nn.Linear(8, 8, format="half")),
        (TypeError, "A QuantizedTensor was expected", lambda: nn.Linear.from_weight(x)),
        (ValueError, r"shape \(40,\), but its shape is \(3,\)",
         lambda: nn.Linear.from_weight(module.weight, x[0, :3])),
    ):  # fmt: skip
        with pytest.raises(error, match=sentence):
            call()
