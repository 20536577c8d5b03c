# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: qkern.grouped_linear, stacks of weights, and whole models."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch", reason="modules are torch modules")

import qkern  # noqa: E402
from qkern import nn  # noqa: E402

FORMATS = ("int4-g32", "int8-a8", "codebook4", "codebook4-tensor", "nf4-a8g", "int4-g32-asym",
           "int3-g24-asym-a8", "nvfp4", "mxfp4-a8")  # fmt: skip
E, N, K = 5, 50, 70
SIZES = ((3, 0, 17, 1, 4), (0, 0, 6, 0, 0), (1, 1, 1, 1, 1), (0, 0, 0, 0, 0), (40, 1500, 0, 9, 2))


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(fmt: str, perm: bool = False) -> list[qkern.QuantizedTensor]:
    made = []
    for e in range(E):
        qt = qkern.quantize(normal(N, K, seed=e) * (e + 1), fmt)
        if perm:
            order = torch.randperm(K, generator=torch.Generator().manual_seed(e)).int()
            qt = qkern.QuantizedTensor.from_parts(qt.format, qt.shape, **qt.parts(), perm=order)
        made.append(qt)
    return made


def offsets_of(sizes: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def one_by_one(x, tensors, offsets, bias=None) -> torch.Tensor:
    bounds = offsets.tolist()
    rows = [
        qkern.linear(x[a:b], qt, None if bias is None else bias[e])
        for e, (qt, a, b) in enumerate(zip(tensors, bounds[:-1], bounds[1:], strict=True))
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("perm", (False, True))
@pytest.mark.parametrize("fmt", FORMATS)
def test_it_is_linear_expert_by_expert(fmt: str, perm: bool) -> None:
    tensors = weights(fmt, perm)
    stack, bias = qkern.QuantizedStack.from_tensors(tensors), normal(E, N)
    for sizes in SIZES:
        offsets = offsets_of(sizes)
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(sum(sizes), K).to(dtype)
            expected = one_by_one(x, tensors, offsets, bias)
            assert torch.equal(qkern.grouped_linear(x, stack, offsets.int(), bias), expected)
        columns = normal(K, sum(sizes)).t()  # columns are not dense
        y = qkern.grouped_linear(columns, stack, offsets, bias.bfloat16())
        assert torch.equal(y, one_by_one(columns, tensors, offsets, bias.bfloat16()))
    assert torch.equal(qkern.grouped_linear(x, tensors, offsets), one_by_one(x, tensors, offsets))


@pytest.mark.parametrize("fmt", ("int4-g32-asym-a8g", "codebook3"))
def test_every_instruction_set_and_number_of_threads(fmt: str, isa: str) -> None:
    tensors, offsets = weights(fmt), offsets_of(SIZES[0])
    stack, x = qkern.QuantizedStack.from_tensors(tensors), normal(25, K)
    with qkern.override(isa="scalar", threads=1):
        expected = qkern.grouped_linear(x, stack, offsets)
    for threads in (1, 2, 7, 64):
        with qkern.override(threads=threads):
            assert torch.equal(qkern.grouped_linear(x, stack, offsets), expected)


# ---- the stack ----


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_stack_holds_its_weights_bit_for_bit(fmt: str) -> None:
    tensors = weights(fmt, perm=True)
    stack = qkern.QuantizedStack.from_tensors(tensors)
    size = stack.nbytes
    for packed in (False, True):
        assert stack.is_packed is packed and stack.nbytes == size and len(stack) == E
        for qt, mine in zip(tensors, stack, strict=True):
            assert qt.format == mine.format
            assert all(torch.equal(part, mine.parts()[n]) for n, part in qt.parts().items())
        assert torch.equal(stack[-1].dequantize(), tensors[-1].dequantize())
        assert torch.equal(stack.dequantize(), torch.stack([qt.dequantize() for qt in tensors]))
        twin = pickle.loads(pickle.dumps(stack))
        assert torch.equal(twin.codes, stack.codes)
        stack.pack_()
    stack.unpack_()
    assert not stack.is_packed and torch.equal(stack.codes[2], tensors[2].codes)


def test_mixed_dtypes_become_float32_and_missing_permutations_the_identity() -> None:
    small, large = qkern.quantize(normal(N, K), "int4-g32"), weights("int4-g32", perm=True)[1]
    wide = qkern.QuantizedTensor.from_parts(
        "int4-g32", (N, K), **{**small.parts(), "scales": small.scales.float() * 1.000001}
    )
    stack = qkern.QuantizedStack.from_tensors([small, wide, large])
    assert stack[0].scales.dtype == torch.float32
    x, offsets = normal(9, K), torch.tensor([0, 3, 6, 9])
    assert torch.equal(
        qkern.grouped_linear(x, stack, offsets), one_by_one(x, [small, wide, large], offsets)
    )


def test_gradients_reach_input_and_bias() -> None:
    stack, offsets = qkern.QuantizedStack.from_tensors(weights("int8-a8")), offsets_of(SIZES[0])
    x, bias = normal(25, K).requires_grad_(), normal(E, N).requires_grad_()
    grad = normal(25, N, seed=2)
    qkern.grouped_linear(x, stack, offsets, bias).backward(grad)
    bounds = offsets.tolist()
    for e, weight in enumerate(stack.dequantize()):
        rows = slice(bounds[e], bounds[e + 1])
        expected = grad[rows] @ weight
        limit = N * 2.0**-22 * (grad[rows].abs() @ weight.abs())
        assert ((x.grad[rows] - expected).abs() <= limit).all()
        assert torch.allclose(bias.grad[e], grad[rows].sum(0), rtol=0, atol=1e-5)


def test_bad_input_is_answered_with_a_sentence() -> None:
    tensors, offsets, x = weights("int8"), offsets_of(SIZES[0]), normal(25, K)
    stack = qkern.QuantizedStack.from_tensors(tensors)
    run = qkern.grouped_linear
    shifted, falling = offsets + 1, torch.tensor([0, 9, 3, 20, 21, 25])
    for error, sentence, call in (
        (ValueError, "offsets must have 6 numbers for 5 experts",
         lambda: run(x, stack, offsets[1:])),
        (ValueError, "offsets go from 0 to the 25 rows of x, got 1 to 26",
         lambda: run(x, stack, shifted)),
        (ValueError, "offsets must not descend, as at 1", lambda: run(x, stack, falling)),
        (ValueError, "offsets go from 0 to the 24", lambda: run(x[1:], stack, offsets)),
        (TypeError, "offsets must be int64 or int32", lambda: run(x, stack, offsets.float())),
        (TypeError, "offsets must be a torch tensor", lambda: run(x, stack, offsets.tolist())),
        (ValueError, r"x must be \[T, K\]", lambda: run(x[0], stack, offsets)),
        (ValueError, "must be the 70 columns", lambda: run(x[:, 1:], stack, offsets)),
        (ValueError, r"bias must be \[experts, N\]", lambda: run(x, stack, offsets, normal(N))),
        (TypeError, "Weight 1 is no QuantizedTensor", lambda: run(x, [tensors[0], x], offsets)),
        (ValueError, "Weight 1 is int4", lambda: qkern.QuantizedStack.from_tensors(
            [tensors[0], weights("int4")[0]])),
        (ValueError, "at least one weight", lambda: qkern.QuantizedStack.from_tensors([])),
        (qkern.FormatError, "has codes", lambda: qkern.QuantizedStack.from_parts(
            "int8", (E, N, K), codes=stack.codes[1:], scales=stack.parts()["scales"])),
        (IndexError, "has 5 weights; there is none at 5", lambda: stack[E]),
        (ValueError, "buffer only", lambda: torch.ops.qkern.grouped_linear(
            x, stack.pack_().packed().buffer[:9000].clone(), offsets, None, N)),
    ):  # fmt: skip
        with pytest.raises(error, match=sentence):
            call()


# ---- modules ----


def test_the_module_keeps_one_copy_and_a_clean_state() -> None:
    bias = normal(E, N)
    layer = nn.GroupedLinear.from_stack(normal(E, N, K), "int4-g32-asym")
    layer = nn.GroupedLinear(layer.weight, bias)
    x, offsets = normal(25, K), offsets_of(SIZES[0])
    before, y = copy.deepcopy(layer.state_dict()), layer(x, offsets)
    assert set(before) == {"codes", "scales", "zeros", "bias"}
    assert before["codes"].shape == (E, N, K // 2)
    assert {name for name, _ in layer.named_buffers()} == {"packed"}
    after = layer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = nn.GroupedLinear.from_config(layer.config())
    again.load_state_dict(before, strict=True, assign=True)
    assert torch.equal(again(x, offsets), y) and torch.equal(copy.deepcopy(layer)(x, offsets), y)
    assert torch.equal(y, one_by_one(x, list(layer.weight), offsets, bias))


def hf_model(kind: str):
    transformers = pytest.importorskip("transformers", reason="mixtures of experts of others")
    torch.manual_seed(0)
    shared = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_experts_per_tok": 2,
    }  # fmt: skip
    if kind == "mixtral":
        config = transformers.MixtralConfig(**shared, intermediate_size=48, num_local_experts=6)
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            **shared, intermediate_size=48, moe_intermediate_size=40, num_experts=6, head_dim=16
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    # Random stacks of the size that training leaves; initial ones are too small to matter.
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def experts_of(model) -> dict:
    return {n: m for n, m in model.named_modules() if type(m).__name__.endswith("Experts")}


@torch.no_grad()
@pytest.mark.parametrize("fmt", ("int8", "int4-g32"))
@pytest.mark.parametrize("kind", ("mixtral", "qwen3_moe"))
def test_a_model_with_its_experts_quantized(kind: str, fmt: str) -> None:
    model = hf_model(kind)
    reference = copy.deepcopy(model)
    old = experts_of(model)
    report = qkern.quantize_(model, {"*.experts": fmt}, progress=False, strict=True)
    assert report.quantized_count == len(old) == 2
    for name, module in old.items():
        new = model.get_submodule(name)
        assert type(new) is nn.Experts and report[name].format == fmt
        float_bytes = sum(p.nbytes for p in module.parameters())
        assert report[name].old_bytes == float_bytes > 3 * report[name].new_bytes
        assert report[name].weights == sum(p.numel() for p in module.parameters())
        for stack in ("gate_up_proj", "down_proj"):
            target = getattr(reference.get_submodule(name), stack)
            target.copy_(getattr(new, stack).weight.dequantize())
        assert 0 < report[name].error < (0.01 if fmt == "int8" else 0.2)
    x = normal(7, 32)
    index = torch.stack([torch.randperm(6)[:2] for _ in range(7)])
    share = torch.rand(7, 2)
    for name in old:
        ours = model.get_submodule(name)(x, index, share)
        theirs = reference.get_submodule(name)(x, index, share)
        # Sums of 32 and of at most 48 terms in other orders, of weights below 4 * 0.2 each: gate
        # and up are below 0.8 * sum|x|, their product squares that, and the second sum has 48.
        size = share.sum(1).max() * x.abs().sum(1).max() ** 2 * 0.8**3 * 48
        assert (ours - theirs).abs().max() <= (32 + 48 + 8) * 2.0**-23 * size
    ids = torch.arange(10).view(1, 10)
    expected = reference(ids).logits
    assert (model(ids).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_experts_are_made_again_from_config() -> None:
    model = hf_model("mixtral")
    source = next(iter(experts_of(model).values()))
    module = nn.Experts.from_float(source, "codebook4-a8")
    x, index, share = (
        normal(4, 32),
        torch.tensor([[0, 5], [1, 0], [5, 4], [2, 1]]),
        torch.rand(4, 2),
    )
    y = module(x, index, share)
    again = nn.Experts.from_config(module.config())
    again.load_state_dict(module.state_dict(), strict=True, assign=True)
    assert torch.equal(again(x, index, share), y)
    assert set(module.state_dict()) == {
        f"{stack}.{part}"
        for stack in ("gate_up_proj", "down_proj")
        for part in ("codes", "scales", "codebook")
    }  # fmt: skip
    # An index beyond the experts contributes nothing.
    index[:, 1] = 6
    alone = module(x, index, share)
    share[:, 1] = 0
    index[:, 1] = 2
    assert torch.equal(alone, module(x, index, share))


def test_experts_that_work_otherwise_are_left_alone() -> None:
    transformers = pytest.importorskip("transformers", reason="mixtures of experts of others")
    config = transformers.GptOssConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, head_dim=16,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    report = qkern.quantize_(model, "int8", progress=False)
    row = report["model.layers.0.mlp.experts"]
    assert row.format is None and "GptOssExperts has has_bias=True" in row.reason

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 2
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 8, 4))

    report = qkern.quantize_(torch.nn.ModuleDict({"own": Own()}), "int8", progress=False)
    assert report["own"].reason == "Own does not declare how it uses its stacks of weights"
    with pytest.raises(qkern.UnsupportedError, match="cannot be replaced: Own does not declare"):
        nn.Experts.from_float(Own(), "int8")


@pytest.mark.slow
def test_experts_compiled_as_one_graph() -> None:
    experts = nn.Experts(
        nn.GroupedLinear.from_stack(normal(4, 24, 16), "int4-g8"),
        nn.GroupedLinear.from_stack(normal(4, 16, 12), "int8-a8"),
        torch.nn.SiLU(),
    ).requires_grad_(False)
    compiled = torch.compile(experts, fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
        arguments = normal(tokens, 16), index, torch.rand(tokens, 2)
        # The compiled activation may round otherwise: 2 units, through 12 products and a sum.
        limit = 64 * 2.0**-23 * experts(*arguments).abs().max()
        assert (compiled(*arguments) - experts(*arguments)).abs().max() <= limit
