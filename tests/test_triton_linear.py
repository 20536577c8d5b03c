# SPDX-License-Identifier: Apache-2.0
"""Linear layers in Triton. Main oracle: small integers and powers of two, for which every order of
additions gives the same float32, so that results must be equal bit for bit."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import partial

import numpy as np
import pytest

import triton_cases as cases
from triton_cases import DEVICE, INTEGERS, SPECS, TABLES, Spec, cast, make_weight, name_of, torch

cases.require_kernels()

import qkern.triton_kernels as tk  # noqa: E402
from qkern.triton_kernels import configs, ops  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LUTB = TABLES[8]
PART_NAMES = ("codes", "scales", "zeros", "codebook", "perm", "table_scale")


def run_chosen(x, bias, weight, family, config, split=1):
    parts = [weight.parts.get(name) for name in PART_NAMES]
    return ops.linear_chosen(x, *parts, bias, weight.spec.text, family, *astuple(config), split)


def check_exact(weight, m, dtype, run, bias=False):
    """y from small integer activations against the product in float64 (exact there too)."""
    rng = np.random.default_rng(m)
    x = cases.small_integers(rng, m, weight.k)
    add = cases.small_integers(rng, weight.n) if bias else 0
    y = run(
        torch.from_numpy(x).to(dtype).to(DEVICE),
        torch.from_numpy(add).to(dtype).to(DEVICE) if bias else None,
    )
    exact = x.astype(np.float64) @ weight.dense.T.astype(np.float64) + add
    cases.assert_same(y, cast(exact, dtype))


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_every_format_is_exact(spec: Spec) -> None:
    """Rows 1 to 70 meet each family (gemv, split, tile); N and K are odd to every tile."""
    weight = make_weight(spec, 19, 172)
    for m, dtype in ((1, DTYPES[0]), (3, DTYPES[1]), (17, DTYPES[2]), (70, DTYPES[1])):
        check_exact(
            weight,
            m,
            dtype,
            lambda x, b: tk.linear(x, **weight.parts, bias=b, spec=spec),
            bias=m == 3,
        )


@pytest.mark.parametrize("n,k", [(1, 1), (1, 13), (7, 8), (64, 64), (33, 256), (3, 1025)])
@pytest.mark.parametrize("spec", [INTEGERS[1], INTEGERS[2], INTEGERS[6], TABLES[0], TABLES[8]],
                         ids=name_of)  # fmt: skip
def test_odd_shapes(spec: Spec, n: int, k: int) -> None:
    weight = make_weight(spec, n, k)
    if not weight.w.any():
        weight = make_weight(spec, n, k, seed=5)
    for m in (1, 2, 5):
        rng = np.random.default_rng(k)
        x = cases.small_integers(rng, m, k) + 4  # never all zeros
        y = tk.linear(torch.from_numpy(x).to(DEVICE), **weight.parts, spec=spec)
        cases.assert_same(y, cast(x.astype(np.float64) @ weight.w.T.astype(np.float64), y.dtype))


@pytest.mark.parametrize("spec", [INTEGERS[0], TABLES[4]], ids=name_of)
def test_permuted_columns(spec: Spec) -> None:
    weight = make_weight(spec, 9, 77, perm=True)
    for m in (1, 20):
        check_exact(weight, m, torch.float32, lambda x, b: tk.linear(x, **weight.parts, spec=spec))
    for activations in ("int8", "int8_group"):
        check_int8(cases.int8_spec(spec, activations), 9, 77, 3, perm=True)


SHAPES = ((33, 256), (70, 172), (5, 40))  # whole and ragged columns, one step, many


def ways(kind: str, index: int):
    """(shape, family, split): every family and class of shapes that a configuration may meet, and
    from one configuration to the next in other pairs."""
    several = 2 + index % 3
    families = [("split", 1), ("split", several), ("tile", several)]
    if kind == "gemv":
        families = [("gemv", 1), ("gemv", several), ("gemv", 2)]
    for number, shape in enumerate(SHAPES):
        yield shape, *families[(index + number) % 3]


def batch(config: configs.Config, index: int) -> int:
    """Rows of x below, at and beyond those of the tile."""
    return (config.rows + 1, config.rows, max(config.rows - 3, 1))[index % 3]


@pytest.mark.parametrize("kind", ["gemv", "dot", "dot_f32"])
def test_every_configuration(kind: str) -> None:
    """Whatever a table may name must be right, on every class of shapes, split and not."""
    dtype = torch.float32 if kind == "dot_f32" else torch.float16
    specs = (INTEGERS[0], INTEGERS[1], TABLES[3], TABLES[4])
    for index, config in enumerate(configs.CANDIDATES[kind]):
        for number, ((n, k), family, split) in enumerate(ways(kind, index)):
            weight = make_weight(specs[(index + number) % 4], n, k, seed=index)
            m = 3 if kind == "gemv" else batch(config, index + number)
            run = partial(run_chosen, weight=weight, family=family, config=config, split=split)
            check_exact(weight, m, dtype, run, bias=bool((index + number) % 2))


def check_int8(spec, n, k, m, run=None, perm=False, dtype=torch.float32):
    weight = make_weight(spec, n, k, perm=perm)
    rng = np.random.default_rng(n)
    stored = cases.quantizable(rng, m, k, weight.spec.activation_group())
    x = stored
    if perm:
        x = np.empty_like(stored)
        x[:, weight.parts["perm"].cpu().numpy()] = stored
    tensor = torch.from_numpy(x).to(dtype).to(DEVICE)
    y = run(tensor, None, weight) if run else tk.linear(tensor, **weight.parts, spec=spec)
    cases.assert_same(y, cast(stored.astype(np.float64) @ weight.w.T.astype(np.float64), dtype))


@pytest.mark.parametrize("activations", ["int8", "int8_group"])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_int8_activations_are_exact(spec: Spec, activations: str) -> None:
    """Activations that int8 holds exactly, powers of two as scales: no rounding anywhere."""
    for m in (1, 5):
        check_int8(cases.int8_spec(spec, activations), 19, 172, m)


@pytest.mark.parametrize("k,group", [(13, 9), (100, 20), (256, 128), (1024, 256), (512, None)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_int8_group_sizes(bits: int, k: int, group: int | None) -> None:
    """Groups that begin inside a byte, that are no power of two, that span several steps."""
    for symmetric in (True, False):
        for activations in ("int8", "int8_group"):
            spec = Spec("int", bits, group, symmetric, activations=activations)
            check_int8(spec, 5, k, 4, dtype=torch.float32)


def test_every_int8_configuration() -> None:
    specs = (INTEGERS[7], INTEGERS[5], TABLES[4])
    for index, config in enumerate(configs.CANDIDATES["int8"]):
        for number, ((n, k), family, split) in enumerate(ways("int8", index)):
            spec = specs[(index + number) % 3] if k > 64 else LUTB
            spec = cases.int8_spec(spec, ("int8", "int8_group")[(index // 2 + number) % 2])
            run = partial(run_chosen, family=family, config=config, split=split)
            check_int8(spec, n, k, batch(config, index + number), run)


def test_int8_extremes_do_not_overflow() -> None:
    """The largest products of one sign over a chunk of 65536 columns and beyond: the sum of one
    chunk fills int32. Chunk sums round once to float32, 2^-24 each, then their two-term sum."""
    k = 65536 + 640
    spec = Spec("int", 8, symmetric=False, activations="int8")
    codes = torch.full((1, k), 255, dtype=torch.uint8, device=DEVICE)
    ones = torch.ones((1, 1), device=DEVICE)
    x = torch.full((3, k), 127.0, device=DEVICE)
    y = tk.linear(x, codes, ones, torch.zeros_like(ones, dtype=torch.uint8), spec=spec)
    exact = 127.0 * 255.0 * k
    assert np.abs(y.cpu().numpy() - exact).max() <= 3 * 2.0**-24 * exact


@pytest.mark.parametrize("spec", [INTEGERS[1], TABLES[0], TABLES[4]], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_numbers_within_the_derived_bound(spec: Spec, dtype: torch.dtype) -> None:
    """|y - exact| <= sum |x||w| (K+2) u + rounding of the weight operand and of y. u = 2^-24 is
    half a unit of float32; the operand is off by at most 2^-8 (bfloat16, cut), 2^-11 (float16), 0
    (float32) of itself, and so is y of its own."""
    weight = make_weight(spec, 33, 172, exact=False)
    unit = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[dtype]
    for m in (1, 4, 20, 70):
        x = torch.from_numpy(np.random.default_rng(m).normal(size=(m, 172))).to(dtype)
        y = tk.linear(x.to(DEVICE), **weight.parts, spec=spec).cpu().double().numpy()
        x64, w64 = x.double().numpy(), weight.w.astype(np.float64)
        exact, size = x64 @ w64.T, np.abs(x64) @ np.abs(w64).T
        bound = size * (174 * 2.0**-24 + unit) + np.abs(exact) * (unit + 2.0**-24) + 1e-7 * unit
        assert (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_identity_gives_the_weights(spec: Spec) -> None:
    """float32 identity activations: every output is one dequantized weight, bit for bit."""
    weight = make_weight(spec, 21, 48, exact=False, float_zeros=True)
    eye = torch.eye(48, device=DEVICE)
    for rows in (eye, eye[:2]):
        y = tk.linear(rows.contiguous(), **weight.parts, spec=spec)
        cases.assert_same(y, torch.from_numpy(weight.w.T[: len(rows)].copy()))


# One for each way to sum, and for each type; the converters differ in other tests.
SUMS = [
    (INTEGERS[0], torch.float32), (TABLES[0], torch.float16), (LUTB, torch.bfloat16),
    (cases.int8_spec(INTEGERS[1], "int8"), torch.float16),
    (cases.int8_spec(INTEGERS[7], "int8_group"), torch.float32),
]  # fmt: skip
MORE_SUMS = [
    (INTEGERS[1], torch.float16), (INTEGERS[4], torch.bfloat16), (TABLES[4], torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("spec,dtype", SUMS + MORE_SUMS * cases.ALL, ids=name_of)
def test_a_row_has_the_same_bits_in_any_batch(spec: Spec, dtype: torch.dtype) -> None:
    """Random numbers, default configurations: a row alone, and in batches of every class, in tiles
    of every height, the parts of K side by side and in one program. (In the interpreter a step of
    64 columns stands for the instructions of a GPU that sum it.)"""
    n, k = 40, 1096
    weight = make_weight(spec, n, k, exact=False)
    x = torch.randn(130, k, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype).to(DEVICE)
    choices = [configs.choose_linear(configs.GENERIC, weight.spec, x.element_size(), m, n, k)
               for m in (1, 33, 65, 130)]  # fmt: skip
    assert {c.family for c in choices} == {"split", "tile"}
    assert {c.split for c in choices} == {2}, "the case is one of several parts"
    few = tk.linear(x[:5], **weight.parts, bias=bias, spec=spec)
    assert torch.equal(tk.linear(x[4:5], **weight.parts, bias=bias, spec=spec), few[4:])
    for m in (33, 65, 130):
        assert torch.equal(tk.linear(x[:m], **weight.parts, bias=bias, spec=spec)[:5], few), m


@pytest.mark.parametrize("activations", ["float", "int8", "int8_group"])
def test_a_factor_stored_with_the_weight(activations: str) -> None:
    """It comes as a tensor, and gives the bits of the same number in the spec: rows few and many,
    in parts of K, without the matrix units, backwards, and as floats."""
    n, k = 19, 80
    spec = cases.int8_spec(TABLES[3], activations)
    weight = make_weight(spec, n, k, exact=False)
    other = replace(spec, table_scale=77.0)
    stored = torch.full((1,), spec.table_scale, device=DEVICE)
    x = torch.randn(70, k, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def in_parts(spec, **parts):
        few = [parts.get(name) for name in PART_NAMES]
        config = configs.CANDIDATES["dot_f32" if activations == "float" else "int8"][1]
        return ops.linear_chosen(x[:2], *few, None, spec.text, "split", *astuple(config), 2)

    calls = [
        lambda **w: tk.linear(x[:2], **w),
        lambda **w: tk.linear(x, **w),
        lambda **w: tk.linear(x[:2], batch_invariant=False, **w),
        in_parts,
    ]
    if activations == "float":
        calls += [
            lambda **w: tk.linear_input_grad(x[:, :n], k=k, **w),
            lambda **w: tk.dequantize(k=k, dtype=x.dtype, **w),
            lambda **w: tk.embedding(torch.tensor([3], device=DEVICE), k=k, dtype=x.dtype, **w),
        ]
    for call in calls:
        expected = call(**weight.parts, spec=spec)
        cases.assert_same(call(**weight.parts, table_scale=stored, spec=other), expected.cpu())
    with pytest.raises(ValueError, match=r"table_scale must be float32 \[1\]"):
        tk.linear(x, **weight.parts, table_scale=stored.double(), spec=spec)


def test_a_few_rows_without_the_matrix_units() -> None:
    """What is asked for by name, and is no default: the gemv family."""
    device = configs.GENERIC
    for spec in (INTEGERS[0], cases.int8_spec(INTEGERS[0], "int8"), TABLES[4]):
        weight = make_weight(spec, 19, 172)
        for m in (1, 2):
            assert configs.choose_linear(device, spec, 4, m, 19, 172).family == "split"
            assert configs.choose_linear(device, spec, 4, m, 19, 172, False).family == "gemv"
            run = partial(tk.linear, **weight.parts, spec=spec, batch_invariant=False)
            if spec.activations == "float":
                check_exact(weight, m, torch.float32, lambda x, b, run=run: run(x))
            else:
                check_int8(spec, 19, 172, m, lambda x, b, w, run=run: run(x))


def test_gemv_rows_have_the_same_bits_in_any_company() -> None:
    """The gemv family on random numbers: row i of four alone, in two, in four, split and not."""
    weight = make_weight(INTEGERS[0], 9, 700, exact=False)
    x = torch.randn(4, 700, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    for config in configs.CANDIDATES["gemv"]:
        for split in (1, 4):
            together = run_chosen(x, None, weight, "gemv", config, split)
            for rows in (x[:1], x[:2], x[2:3]):
                alone = run_chosen(rows, None, weight, "gemv", config, split)
                first = 2 if rows.data_ptr() == x[2:3].data_ptr() else 0
                assert torch.equal(alone, together[first : first + len(rows)])


def test_views_and_empty_inputs() -> None:
    weight = make_weight(INTEGERS[0], 11, 64)
    dense = torch.from_numpy(weight.w).to(DEVICE)
    x = torch.arange(-120, 136, device=DEVICE).remainder(7).float().reshape(64, 4)
    views = {
        "transposed": x.t(),
        "expanded": x[:, :1].t().expand(5, 64),
        "strided": torch.stack([x.t(), -x.t()], -1)[..., 0],
    }
    for name, view in views.items():
        y = tk.linear(view, **weight.parts, spec=weight.spec)
        assert torch.equal(y, view @ dense.t()), name
    y = tk.linear(x.t().reshape(2, 2, 64), **weight.parts, spec=weight.spec)
    assert torch.equal(y, x.t().reshape(2, 2, 64) @ dense.t())
    assert tk.linear(x.t()[:0], **weight.parts, spec=weight.spec).shape == (0, 11)


def test_offsets_beyond_32_bits() -> None:
    """Rows of codes 2^30 + 7 bytes apart, and rows of x so many numbers: the third begins beyond
    2^31 (pages are never touched)."""
    weight = make_weight(INTEGERS[4], 3, 40)
    stride = 2**30 + 7
    codes = torch.empty(2 * stride + 40, dtype=torch.uint8, device=DEVICE)
    far = codes.as_strided((3, 40), (stride, 1))
    far.copy_(weight.parts["codes"])
    parts = {**weight.parts, "codes": far}
    for m in (1, 16):
        check_exact(weight, m, torch.float32, lambda x, b: tk.linear(x, **parts, spec=weight.spec))
    x = torch.empty(2 * stride + 40, dtype=torch.float16, device=DEVICE)
    rows = x.as_strided((3, 40), (stride, 1))

    def far_rows(near: torch.Tensor, bias: None) -> torch.Tensor:
        return tk.linear(rows.copy_(near), **weight.parts, spec=weight.spec)

    check_exact(weight, 3, torch.float16, far_rows)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_gradient_of_the_input(spec: Spec) -> None:
    weight = make_weight(spec, 37, 75, perm=spec.bits == 4)
    for m, dtype in ((5, torch.float32), (20, torch.float16)):
        dy = cases.small_integers(np.random.default_rng(m), m, 37)
        dx = tk.linear_input_grad(
            torch.from_numpy(dy).to(dtype).to(DEVICE), **weight.parts, spec=spec, k=75
        )
        cases.assert_same(dx, cast(dy @ weight.dense, dtype))
    random = make_weight(spec, 24, 75, exact=False)
    dx = tk.linear_input_grad(torch.eye(24, device=DEVICE), **random.parts, spec=spec, k=75)
    cases.assert_same(dx, torch.from_numpy(random.w))


@pytest.mark.parametrize("kind", ["grad", "grad_f32"])
def test_every_gradient_configuration(kind: str) -> None:
    dtype = torch.float32 if kind == "grad_f32" else torch.bfloat16
    for config in configs.CANDIDATES[kind]:
        for spec, k in ((INTEGERS[0], 256), (TABLES[7], 100)):
            weight = make_weight(spec, 70, k)
            dy = cases.small_integers(np.random.default_rng(k), 33, 70)
            parts = [weight.parts.get(name) for name in PART_NAMES]
            dx = ops.linear_input_grad_chosen(
                torch.from_numpy(dy).to(dtype).to(DEVICE),
                *parts,
                weight.spec.text,
                k,
                *astuple(config),
            )
            cases.assert_same(dx, cast(dy @ weight.w, dtype))


def test_backward_is_the_gradient() -> None:
    weight = make_weight(INTEGERS[1], 12, 40)
    x = torch.randn(6, 40, device=DEVICE, requires_grad=True)
    bias = torch.zeros(12, device=DEVICE, requires_grad=True)
    dy = torch.from_numpy(cases.small_integers(np.random.default_rng(0), 6, 12)).to(DEVICE)
    tk.linear(x, **weight.parts, bias=bias, spec=weight.spec).backward(dy)
    assert torch.equal(x.grad, dy @ torch.from_numpy(weight.w).to(DEVICE))
    assert torch.equal(bias.grad, dy.sum(0))
