# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts linear in Triton, and the ops as torch sees them."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest

import triton_cases as cases
from triton_cases import DEVICE, INTEGERS, TABLES, Spec, cast, make_weight, name_of, torch

cases.require_kernels()

import qkern.triton_kernels as tk  # noqa: E402
from qkern.triton_kernels import configs, ops_grouped  # noqa: E402

SIZES = ([3, 0, 17, 1], [0, 0, 5, 0], [33], [0, 0])
N, K = 16, 72
NAMES = ("codes", "scales", "zeros", "codebook", "perm")


def stacked(spec: Spec, experts: int, perm: bool = False):
    """Parts of all experts along the first axis, and the value of each."""
    weights = [make_weight(spec, N, K, seed=e, perm=perm) for e in range(experts)]
    parts = {name: torch.cat([w.parts[name] for w in weights]) for name in weights[0].parts}
    if perm:
        parts["perm"] = torch.stack([w.parts["perm"] for w in weights])
    return parts, [w.dense for w in weights]


def expected_rows(x: np.ndarray, offsets: list[int], dense: list[np.ndarray]) -> np.ndarray:
    y = np.zeros((len(x), N))
    for e, w in enumerate(dense):
        rows = slice(offsets[e], offsets[e + 1])
        y[rows] = x[rows].astype(np.float64) @ w.T.astype(np.float64)
    return y


@pytest.mark.parametrize("spec", [*INTEGERS[:4], *TABLES], ids=name_of)
def test_every_expert_gets_its_tokens(spec: Spec) -> None:
    """Experts of any size, also none; rows outside all experts are zeros."""
    for sizes in SIZES[: 4 if spec == INTEGERS[0] else 1]:
        offsets = [2, *(2 + np.cumsum(sizes)).tolist()]
        tokens = offsets[-1] + 3
        parts, dense = stacked(spec, len(sizes))
        x = cases.small_integers(np.random.default_rng(tokens), tokens, K)
        for dtype in (torch.float32, torch.bfloat16):
            y = tk.grouped_linear(
                torch.from_numpy(x).to(dtype).to(DEVICE),
                torch.tensor(offsets, device=DEVICE),
                **parts,
                spec=spec,
            )
            expected = cast(expected_rows(x, offsets, dense), dtype)
            if sum(sizes):
                cases.assert_same(y, expected)
            assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize("activations", ["int8", "int8_group"])
@pytest.mark.parametrize("spec", [INTEGERS[0], INTEGERS[5], TABLES[0], TABLES[4]], ids=name_of)
def test_int8_experts(spec: Spec, activations: str) -> None:
    spec = cases.int8_spec(spec, activations)
    parts, dense = stacked(spec, 4)
    offsets = [0, *np.cumsum(SIZES[0]).tolist()]
    x = cases.quantizable(np.random.default_rng(0), 21, K, spec.of_columns(K).activation_group())
    y = tk.grouped_linear(
        torch.from_numpy(x).to(DEVICE),
        torch.tensor(offsets, dtype=torch.int32, device=DEVICE),
        **parts,
        spec=spec,
    )
    cases.assert_same(y, cast(expected_rows(x, offsets, dense), torch.float32))


def test_bias_permutations_and_factors_of_experts() -> None:
    spec = TABLES[1]
    parts, dense = stacked(spec, 4, perm=True)
    factors = torch.tensor([2.0, 1.0, 0.5, 4.0])
    offsets = [0, *np.cumsum(SIZES[0]).tolist()]
    x = cases.small_integers(np.random.default_rng(0), 21, K)
    bias = cases.small_integers(np.random.default_rng(1), 4, N)
    y = tk.grouped_linear(
        torch.from_numpy(x).to(DEVICE),
        torch.tensor(offsets, device=DEVICE),
        **parts,
        bias=torch.from_numpy(bias).to(DEVICE),
        table_scales=factors.to(DEVICE),
        spec=spec,
    )
    dense = [w / spec.table_scale * f for w, f in zip(dense, factors.tolist(), strict=True)]
    rows = np.repeat(np.arange(4), SIZES[0])
    cases.assert_same(y, cast(expected_rows(x, offsets, dense) + bias[rows], torch.float32))


def test_every_configuration_of_the_experts() -> None:
    offsets = torch.tensor([0, 3, 3, 19, 20], dtype=torch.int32, device=DEVICE)
    for activations, kinds in (("float", ("dot", "dot_f32")), ("int8", ("int8",))):
        spec = cases.int8_spec(INTEGERS[1], activations)
        parts, dense = stacked(spec, 4)
        names = [parts.get(name) for name in NAMES]
        x = cases.quantizable(np.random.default_rng(0), 20, K, None)
        exact = cast(expected_rows(x, offsets.tolist(), dense), torch.float32)
        for kind in kinds:
            for index, config in enumerate(configs.CANDIDATES[kind]):
                y = ops_grouped.grouped_linear_chosen(
                    torch.from_numpy(x).to(DEVICE), offsets, *names, None, None, spec.text,
                    *astuple(config), 1 + index % 3,
                )  # fmt: skip
                cases.assert_same(y, exact)


@pytest.mark.parametrize("spec", [
    INTEGERS[1], TABLES[4], cases.int8_spec(INTEGERS[7], "int8_group"),
], ids=name_of)  # fmt: skip
def test_a_token_has_the_bits_of_the_linear_layer(spec: Spec) -> None:
    """Random numbers, K in parts: with its expert's weight alone, in any company."""
    n, k, sizes = 16, 1096, (40, 0, 1)
    weights = [make_weight(spec, n, k, seed=e, exact=False) for e in range(len(sizes))]
    parts = {name: torch.cat([w.parts[name] for w in weights]) for name in weights[0].parts}
    bounds = np.cumsum((0, *sizes)).tolist()
    x = torch.randn(bounds[-1], k, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y = tk.grouped_linear(x, torch.tensor(bounds, device=DEVICE), **parts, spec=spec)
    assert configs.choose_linear(configs.GENERIC, weights[0].spec, 4, 1, n, k).split > 1
    for e, w in enumerate(weights):
        mine = slice(bounds[e], bounds[e + 1])
        assert torch.equal(y[mine], tk.linear(x[mine], **w.parts, spec=spec))


def backwards(spec: Spec, dy: np.ndarray, offsets: list[int]):
    """dx by the kernel, and by the weights as floats: zeros where no expert is."""
    parts, dense = stacked(spec, len(offsets) - 1, perm=spec.bits == 4)
    got = ops_grouped.grouped_input_grad(
        torch.from_numpy(dy).to(DEVICE),
        torch.tensor(offsets, device=DEVICE),
        *(parts.get(name) for name in NAMES),
        None,
        spec.text,
        K,
    )
    expected = np.zeros((len(dy), K))
    for e, w in enumerate(dense):
        rows = slice(offsets[e], offsets[e + 1])
        expected[rows] = dy[rows].astype(np.float64) @ w.astype(np.float64)
    return got, expected


@pytest.mark.parametrize("spec", [*INTEGERS[:2], *TABLES[:1], *TABLES[3:5], *TABLES[7:]],
                         ids=name_of)  # fmt: skip
def test_gradient_of_the_tokens(spec: Spec) -> None:
    for sizes in SIZES[: 4 if spec == INTEGERS[0] else 1]:
        offsets = [2, *(2 + np.cumsum(sizes)).tolist()]
        dy = cases.small_integers(np.random.default_rng(1), offsets[-1] + 3, N)
        got, expected = backwards(spec, dy, offsets)
        assert torch.equal(got.cpu(), cast(expected, torch.float32))
        assert bool(got.any()) == bool(sum(sizes))


@pytest.mark.parametrize("kind", ["grad", "grad_f32"])
def test_every_gradient_configuration_of_the_experts(kind: str) -> None:
    spec, offsets = INTEGERS[1], [0, 3, 3, 19, 20]
    parts, dense = stacked(spec, 4)
    dtype = torch.float32 if kind == "grad_f32" else torch.bfloat16
    dy = cases.small_integers(np.random.default_rng(0), 20, N)
    for config in configs.CANDIDATES[kind]:
        got = ops_grouped.grouped_input_grad_chosen(
            torch.from_numpy(dy).to(dtype).to(DEVICE), torch.tensor(offsets, device=DEVICE),
            *(parts.get(name) for name in NAMES), None, spec.text, K, *astuple(config),
        )  # fmt: skip
        rows = [dy[offsets[e] : offsets[e + 1]] @ w for e, w in enumerate(dense)]
        cases.assert_same(got, cast(np.concatenate(rows), dtype))


def test_backward_of_the_experts_is_that_of_their_linear_layers() -> None:
    """Random numbers: dx bit for bit, of bias the sums."""
    sizes, bounds = (5, 0, 3), [0, 5, 5, 8]
    weights = [make_weight(INTEGERS[1], N, K, seed=e, exact=False) for e in range(3)]
    parts = {name: torch.cat([w.parts[name] for w in weights]) for name in weights[0].parts}
    x = torch.randn(8, K, device=DEVICE, requires_grad=True)
    bias = torch.zeros(3, N, device=DEVICE, requires_grad=True)
    dy = torch.randn(8, N, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    offsets = torch.tensor(bounds, device=DEVICE)
    tk.grouped_linear(x, offsets, **parts, bias=bias, spec=INTEGERS[1]).backward(dy)
    for e, w in enumerate(weights):
        mine = slice(bounds[e], bounds[e + 1])
        alone = tk.linear_input_grad(dy[mine], **w.parts, spec=INTEGERS[1], k=K)
        assert torch.equal(x.grad[mine], alone)
        sums = dy[mine].double().sum(0)
        assert bool(((bias.grad[e] - sums).abs() <= sizes[e] * 2.0**-22 * 4).all())


def op_calls() -> dict[str, tuple]:
    w = make_weight(INTEGERS[1], 8, 40)
    # No codebook, permutation or factor.
    weight = (w.parts["codes"], w.parts["scales"], w.parts["zeros"], None, None, None)
    text = w.spec.text
    x, dy = torch.ones(3, 40, device=DEVICE), torch.ones(3, 8, device=DEVICE)
    offsets = torch.tensor([0, 3], device=DEVICE)
    return {
        "dequantize": (*weight, None, text, 40, torch.float32),
        "quantize_activations": (x, None, 32),
        "linear": (x.requires_grad_(), *weight, None, text),
        "linear_input_grad": (dy, *weight, text, 40),
        "grouped_linear": (x, offsets, *weight, None, text),
        "grouped_input_grad": (dy, offsets, *weight, text, 40),
    }


@pytest.mark.parametrize("name", list(op_calls()))
def test_opcheck(name: str) -> None:
    """Schema, fake tensors, autograd registration, tracing with symbolic shapes. Tracing enters the
    kernels only where they are compiled; an interpreted kernel has nothing to enter."""
    tests = ["test_schema", "test_autograd_registration"]
    if not cases.INTERPRETED:
        tests += ["test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(getattr(torch.ops.qkern_triton, name), op_calls()[name], test_utils=tests)


def test_bad_input_is_refused_with_a_sentence() -> None:
    w = make_weight(INTEGERS[0], 8, 64)
    x = torch.ones(2, 64, device=DEVICE)
    codes, scales = w.parts["codes"], w.parts["scales"]
    bad = {
        "codes must be uint8": lambda: tk.linear(x[:, :63], codes[:, :20], scales, spec=w.spec),
        "scales must be": lambda: tk.linear(x, codes, scales[:4], spec=w.spec),
        "need scales": lambda: tk.linear(x, codes, spec=w.spec),
        "zeros must be given": lambda: tk.linear(x, codes, scales, scales, spec=w.spec),
        "x must be float": lambda: tk.linear(x.double(), codes, scales, spec=w.spec),
        "bias must be": lambda: tk.linear(x, codes, scales, bias=x[0], spec=w.spec),
        "perm must be": lambda: tk.linear(x, codes, scales, perm=torch.arange(64), spec=w.spec),
        "codebook must be": lambda: tk.linear(x, codes, None, None, x, spec=TABLES[1]),
        "columns of codes": lambda: tk.linear(x, codes.t().contiguous().t(), scales, spec=w.spec),
        "cannot be stored": lambda: tk.linear(x, codes, scales,
                                              spec=replace(w.spec, scale_type="e8m0")),
        "ids must be": lambda: tk.embedding(x, codes, scales, spec=w.spec, k=64, dtype=x.dtype),
        "offsets": lambda: tk.grouped_linear(x, x, codes, scales, spec=w.spec),
        "at least one column": lambda: tk.quantize_activations(x[:, :0]),
        "dy must have": lambda: tk.linear_input_grad(x, codes, scales, spec=w.spec, k=64),
    }  # fmt: skip
    for words, call in bad.items():
        with pytest.raises(ValueError, match=words):
            call()
