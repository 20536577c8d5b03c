# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend on a GPU.

Exact oracle: scales are powers of two, everything else small integers, so that every partial sum is
exact in float32 and the result, rounded once to the output type, has one right answer.
Real values: |error| <= additions * 2^-22 * sum |x||w| (the matrix unit may drop what lies below the
24 bits of the largest product of a step, hence 2^-22 and not 2^-24) + half an ulp of the output,
and for tables half an ulp of the 16-bit type per entry.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import qkern  # noqa: E402

pytestmark = pytest.mark.gpu

FLOAT_FORMATS = (
    "int4-g128", "int4-g32-asym", "int4", "int4-g24", "int8", "int8-g64-asym", "int3-g64",
    "int2-g32-asym", "codebook4", "codebook4-tensor", "codebook4-tensor-g64", "codebook3",
    "codebook2", "codebook4-group-g64", "codebook3-group-g100", "codebook2-group-g64", "lutb",
    "fp4", "iq4nl", "mxfp4", "nvfp4", "nf4",
)  # fmt: skip
INT8_FORMATS = (
    "int8-a8",
    "int4-a8",
    "int4-g128-a8",
    "int4-g64-asym-a8",
    "int4-g64-a8g",
    "int8-a8g",
    "int3-a8",
    "int2-g64-asym-a8",
    "codebook4-a8",
    "codebook3-a8",
    "codebook2-tensor-a8",
    "codebook4-tensor-g64-a8",
    "codebook4-group-g64-a8",
    "codebook3-group-g100-a8g",
    "codebook2-group-g64-a8",
    "nf4-a8",
    "mxfp4-a8g",
    "nvfp4-a8",
    "lutb-a8",
)
# One scale per row: sums are integers to the end.
EXACT_INT8 = (
    "int8-a8",
    "int4-a8",
    "int3-a8",
    "codebook4-a8",
    "codebook3-a8",
    "codebook2-tensor-a8",
)
# (M, N, K): all residues that matter of 8, 16, 32, 64 tokens, 64 rows, 16, 64 and 256 columns.
SHAPES = (
    (1, 1, 8), (1, 64, 64), (2, 63, 100), (3, 65, 129), (7, 128, 256), (8, 130, 1000),
    (9, 64, 2048), (16, 200, 777), (17, 96, 512), (33, 256, 4096), (64, 70, 330), (65, 300, 640),
    (127, 513, 1025), (256, 64, 4096), (257, 320, 512),
)  # fmt: skip
HALVES = (torch.float16, torch.bfloat16)
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def make(fmt: str, n: int, k: int, *, exact: bool, seed: int = 0, perm: bool = False) -> Any:
    """A weight on the CPU; with `exact`, scales are powers of two and learned tables integers."""
    generator = torch.Generator().manual_seed(seed)
    qt = qkern.quantize(torch.randn(n, k, generator=generator) * 0.05, fmt)
    parts = qt.parts()
    if exact:
        scales = parts.get("scales")
        if scales is not None and scales.dtype != torch.uint8:
            powers = torch.randint(-3, 1, scales.shape, generator=generator)
            parts["scales"] = torch.pow(2.0, powers.float()).to(scales.dtype)
        elif scales is not None and fmt.startswith("mxfp4"):
            parts["scales"] = torch.randint(124, 128, scales.shape, generator=generator).to(
                torch.uint8
            )
        elif scales is not None:  # float8 e4m3: exponent field alone
            field = torch.randint(4, 8, scales.shape, generator=generator) << 3
            parts["scales"] = field.to(torch.uint8)
        if "global_scale" in parts:
            parts["global_scale"] = torch.ones(1)
        if "codebook" in parts:
            table = torch.randint(-8, 8, parts["codebook"].shape, generator=generator)
            bytes_ = parts["codebook"].dtype == torch.uint8
            parts["codebook"] = (
                table.float().to(torch.float8_e4m3fn).view(torch.uint8) if bytes_ else table.float()
            )
    if perm:
        parts["perm"] = torch.randperm(k, generator=generator).to(torch.int32)
    return qkern.QuantizedTensor.from_parts(qt.format, (n, k), **parts)


def inputs(m: int, k: int, dtype: Any, *, exact: bool, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if exact:
        # Sparse for long rows, so that results stay within float16.
        keep = torch.rand(m, k, generator=generator) < min(1.0, 200 / k)
        return (torch.randint(-4, 5, (m, k), generator=generator) * keep).to(dtype)
    return torch.randn(m, k, generator=generator).to(dtype)


def reference(x: Any, qt: Any, bias: Any = None) -> tuple[Any, Any]:
    """(result, sum of magnitudes) in float64 on the CPU."""
    w = qt.dequantize(torch.float32).double()
    y = x.double() @ w.T
    size = x.double().abs() @ w.abs().T
    if qt.zeros is not None:  # the zero is subtracted from sums: its part counts
        centre = 2.0 ** (qt.format.bits - 1)
        g = qt.format.group_size or qt.shape[1]
        spread = (qt.scales.double() * (centre + (qt.zeros.double() - centre).abs())).abs()
        columns = spread.repeat_interleave(g, 1)[:, : qt.shape[1]]
        size = x.double().abs() @ torch.maximum(columns, w.abs()).T
    return (y, size) if bias is None else (y + bias.double(), size + bias.double().abs())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fmt", [f for f in FLOAT_FORMATS if f not in ("nf4", "fp4")])
def test_exact(fmt: str, dtype: Any) -> None:
    """Without nf4 and fp4, whose tables are fractions."""
    for i, (m, n, k) in enumerate(SHAPES):
        qt = make(fmt, n, k, exact=True, seed=i, perm=i % 4 == 3)
        x = inputs(m, k, dtype, exact=True, seed=i)
        bias = torch.randint(-8, 8, (n,)).to(dtype) if i % 2 else None
        w = qt.dequantize(torch.float32).double()
        expected = x.double() @ w.T + (0 if bias is None else bias.double())
        got = qkern.linear(x.cuda(), qt.to("cuda"), None if bias is None else bias.cuda())
        assert torch.equal(got.cpu(), expected.to(dtype)), (fmt, m, n, k)
        assert m * n < 16 or got.count_nonzero() > got.numel() // 10


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fmt", FLOAT_FORMATS)
def test_real_values(fmt: str, dtype: Any) -> None:
    for i, (m, n, k) in enumerate(SHAPES):
        qt = make(fmt, n, k, exact=False, seed=i)
        x = inputs(m, k, dtype, exact=False, seed=i)
        y, size = reference(x, qt)
        got = qkern.linear(x.cuda(), qt.to("cuda")).cpu().double()
        bound = size * (2 * k + 64) * 2.0**-22 / 8 + y.abs() * UNIT[dtype] * 1.01 + 1e-7
        if qt.format.kind == "table":
            bound += size * UNIT[dtype] * 1.01
        assert ((got - y).abs() <= bound).all(), (fmt, m, n, k)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("fmt", INT8_FORMATS)
def test_int8_against_the_cpu(fmt: str, dtype: Any) -> None:
    """One scale per row: the CPU's bits. Groups: its numbers but for the order of additions."""
    for i, (m, n, k) in enumerate(SHAPES):
        qt = make(fmt, n, k, exact=False, seed=i, perm=i % 3 == 2)
        x = inputs(m, k, dtype, exact=False, seed=i)
        with qkern.override(backend="cpu"):
            expected = qkern.linear(x, qt)
        got = qkern.linear(x.cuda(), qt.to("cuda")).cpu()
        if fmt in EXACT_INT8:
            assert torch.equal(got, expected), (fmt, m, n, k)
        else:
            _, size = reference(x, qt)
            bound = size * (k / 16 + 64) * 2.0**-24 + expected.double().abs() * UNIT[dtype] * 2.02
            assert ((got.double() - expected.double()).abs() <= bound + 1e-7).all(), (fmt, m, n, k)


@pytest.mark.parametrize("fmt", (*FLOAT_FORMATS, *INT8_FORMATS))
def test_dequantize_has_the_bits_of_the_cpu(fmt: str) -> None:
    for i, (n, k) in enumerate(((1, 8), (63, 100), (65, 129), (200, 1024))):
        try:
            qt = make(fmt, n, k, exact=False, seed=i, perm=i == 3)
        except ValueError:
            pytest.skip(f"{fmt} is not a format of this version")
        for dtype in (torch.float32, *HALVES):
            assert torch.equal(
                qkern.dequantize(qt.to("cuda"), dtype).cpu(), qt.dequantize(dtype)
            ), (fmt, n, k, dtype)
        ids = torch.randint(0, n, (5, 3))
        rows = qkern.embedding(ids.cuda(), qt.to("cuda"), torch.float32).cpu()
        assert torch.equal(rows, qt.dequantize(torch.float32)[ids])


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_quantizer_has_the_bits_of_the_cpu(dtype: Any) -> None:
    for k in (1, 7, 64, 100, 1000, 4096):
        for group in (None, 32, 100):
            x = torch.randn(9, k).to(dtype)
            x[1] = 0
            x[2, 0] = float("nan")
            x[3, -1] = float("inf")
            x[4] = torch.randint(-127, 128, (k,)).to(dtype) / 2
            with qkern.override(backend="cpu"):
                q, s = qkern.quantize_activations(x, group)
            got_q, got_s = qkern.quantize_activations(x.cuda(), group)
            assert torch.equal(got_q.cpu(), q)
            assert torch.equal(got_s.cpu().nan_to_num(-1), s.nan_to_num(-1))


def test_rows_have_the_same_bits_in_every_batch_of_a_family() -> None:
    for fmt in ("int4-g128", "int4-g32-asym", "codebook4", "codebook4-tensor", "int8-a8"):
        qt = make(fmt, 513, 4096, exact=False).to("cuda")
        x = inputs(300, 4096, torch.float16, exact=False).cuda()
        for family in ((1, 64), (65, 256), (257, 300)):
            whole = qkern.linear(x[: family[1]], qt)
            for m in {family[0], (family[0] + family[1]) // 2}:
                assert torch.equal(qkern.linear(x[:m], qt), whole[:m]), (fmt, family, m)


@pytest.mark.parametrize("count", (200, pytest.param(10_000, marks=pytest.mark.slow)))
def test_repeats_have_the_same_bits(count: int) -> None:
    for m, n, k in ((1, 65, 2048), (13, 128, 4096), (70, 200, 2048)):
        qt = make("int4-g64", n, k, exact=False).to("cuda")
        x = inputs(m, k, torch.float16, exact=False).cuda()
        first = qkern.linear(x, qt)
        differences = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(count):
            # What the allocator hands out next holds NaN: an element left unwritten shows.
            torch.full_like(first, float("nan"))
            differences += (qkern.linear(x, qt) != first).sum()
        assert differences.item() == 0


def test_nothing_is_written_beside_the_output() -> None:
    from qkern.backends import cuda

    extension = cuda._extension()
    for m, n, k in ((1, 65, 1000), (20, 70, 4096), (70, 130, 512)):
        qt = make("int4-g64", n, k, exact=False).to("cuda")
        x = inputs(m, k, torch.float16, exact=False).cuda()
        packed = cuda.pack(qt.parts(), qt.format, qt.shape)
        device, stream = cuda._where(x)
        facts = (1, x.data_ptr(), m, *x.stride())
        size = extension.linear_workspace(*packed.arguments, device, *facts, 0, 0)
        workspace = torch.full((size + 512,), 0xFF, dtype=torch.uint8, device="cuda")
        stride = n + 9
        y = torch.full((m + 2, stride), float("nan"), dtype=torch.float16, device="cuda")
        extension.linear(
            *packed.arguments, device, stream, *facts, 0, 0, 1, y[1].data_ptr(), stride,
            workspace.data_ptr(), size, 0, 0, 0,
        )  # fmt: skip
        assert torch.equal(y[1 : m + 1, :n], qkern.linear(x, qt))
        assert y[0].isnan().all() and y[-1].isnan().all() and y[:, n:].isnan().all()
        assert (workspace[size:] == 0xFF).all()


def test_strides_and_alignments() -> None:
    qt = make("int4-g128", 96, 512, exact=True).to("cuda")
    base = inputs(12, 512, torch.float16, exact=True).cuda()
    expected = qkern.linear(base, qt)
    wide = torch.zeros(12, 1100, dtype=torch.float16, device="cuda")
    for offset in (0, 1, 3, 8):
        wide[:, offset : offset + 512] = base
        assert torch.equal(qkern.linear(wide[:, offset : offset + 512], qt), expected)
    wide[:, 0:1024:2] = base
    assert torch.equal(qkern.linear(wide[:, 0:1024:2], qt), expected)
    assert torch.equal(qkern.linear(base.T.contiguous().T, qt), expected)
    assert torch.equal(qkern.linear(base[:1].expand(5, 512), qt), expected[:1].expand(5, 96))
    assert torch.equal(qkern.linear(base.view(3, 4, 512), qt), expected.view(3, 4, 96))
    assert qkern.linear(base[:0], qt).shape == (0, 96)


def test_streams() -> None:
    qt = make("int4-g64", 300, 4096, exact=False).to("cuda")
    x = inputs(9, 4096, torch.float16, exact=False).cuda()
    expected = qkern.linear(x, qt)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for i in range(200):
        with torch.cuda.stream(streams[i % 4]):
            results.append(qkern.linear(x, qt))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize(
    "fmt", ("int4-g128", "codebook4", "codebook4-tensor", "lutb", "int8-a8", "nf4-a8")
)
def test_graphs(fmt: str) -> None:
    """Captured at the first launch of this shape, replayed with other inputs."""
    for m in (1, 20, 100):
        qt = make(fmt, 200, 4096, exact=False).to("cuda")
        qkern.dequantize(qt)  # packs
        x = inputs(m, 4096, torch.float16, exact=False).cuda()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = qkern.linear(x, qt)
        for seed in range(3):
            x.copy_(inputs(m, 4096, torch.float16, exact=False, seed=seed).cuda())
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, qkern.linear(x, qt))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "fmt", (*FLOAT_FORMATS, "int4-g64-a8", "codebook4-a8", "nf4-a8", "lutb-a8")
)
def test_gradient_is_that_of_the_dequantized_weight(fmt: str, dtype: Any) -> None:
    """The weight in the type of the gradient, rounded once; float32 sums; any rows and strides."""
    for i, (m, n, k) in enumerate(((7, 65, 200), (1, 8, 64), (130, 200, 129), (300, 513, 320))):
        qt = make(fmt, n, k, exact=False, seed=i, perm=i == 2)
        x = inputs(m, k, dtype, exact=False, seed=i).cuda().requires_grad_()
        bias = torch.zeros(n, dtype=dtype, device="cuda", requires_grad=True)
        grad = torch.randn(m, n + i).to(dtype)[:, :n].cuda()
        qkern.linear(x, qt.to("cuda"), bias).backward(grad)
        w = qt.dequantize(dtype).double()
        expected = grad.cpu().double() @ w
        size = grad.cpu().double().abs() @ w.abs()
        bound = size * (n + 8) * 2.0**-22 / 8 + expected.abs() * UNIT[dtype] * 1.01 + 1e-7
        assert ((x.grad.cpu().double() - expected).abs() <= bound).all(), (fmt, m, n, k)
        assert torch.equal(bias.grad, grad.sum(0))
        alone = x.detach()[-1:].clone().requires_grad_()
        qkern.linear(alone, qt.to("cuda")).backward(grad[-1:])
        assert torch.equal(alone.grad, x.grad[-1:])


@pytest.mark.parametrize("fmt", (*FLOAT_FORMATS, "int8-a8", "int4-g64-a8g", "nf4-a8", "lutb-a8"))
def test_experts(fmt: str) -> None:
    """Against the exact product of each expert; rows of none are zeros; offsets stay on the
    device, so that a graph replays with others. Few rows of many columns split K."""
    n = 130
    for sizes, k, dtype in (
        ([3, 0, 17, 1], 264, torch.float16),
        ([0, 200, 1, 30], 264, torch.bfloat16),
        ([3, 0, 17, 1], 2304, torch.float16),
    ):
        each = [
            make(fmt, n, k, exact=False, seed=e, perm=fmt == "int4-g24") for e in range(len(sizes))
        ]
        stack = qkern.QuantizedStack.from_tensors(each).to("cuda")
        m = sum(sizes) + 2
        x = inputs(m, k, dtype, exact=False).cuda()
        bias = torch.randn(len(sizes), n).to(dtype).cuda()
        offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], device="cuda")
        y = qkern.grouped_linear(x, stack, offsets, bias)
        assert (y[-2:] == 0).all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = qkern.grouped_linear(x, stack, offsets, bias)
        for order in (sizes, sizes[::-1]):
            offsets.copy_(torch.tensor([0, *torch.tensor(order).cumsum(0)]))
            graph.replay()
            for e, size in enumerate(order):
                rows = slice(int(offsets[e]), int(offsets[e]) + size)
                one = qkern.linear(x[rows], stack[e], bias[e])
                # The same numbers in another order of sums.
                _, magnitude = reference(x[rows].cpu(), each[e], bias[e].cpu())
                bound = (
                    magnitude * (2 * k + 64) * 2.0**-22 / 4
                    + one.cpu().double().abs() * UNIT[dtype] * 2.02
                )
                error = (again[rows].cpu().double() - one.cpu().double()).abs()
                assert (error <= bound + 1e-7).all(), (fmt, order, e)


def test_gradients_of_experts() -> None:
    each = [make("int4-g64", 96, 256, exact=False, seed=e) for e in range(3)]
    stack = qkern.QuantizedStack.from_tensors(each).to("cuda")
    x = inputs(40, 256, torch.float16, exact=False).cuda().requires_grad_()
    bias = torch.zeros(3, 96, dtype=torch.float16, device="cuda", requires_grad=True)
    offsets = torch.tensor([0, 10, 10, 40], device="cuda")
    grad = torch.randn(40, 96).half().cuda()
    qkern.grouped_linear(x, stack, offsets, bias).backward(grad)
    for e, (first, last) in enumerate(((0, 10), (10, 10), (10, 40))):
        part = x.detach()[first:last].clone().requires_grad_()
        qkern.linear(part, stack[e]).backward(grad[first:last])
        assert torch.equal(x.grad[first:last], part.grad)
        assert torch.equal(bias.grad[e], grad[first:last].sum(0))


def test_a_nan_stays_in_its_row() -> None:
    for fmt in ("int4-g128", "codebook3", "int8-a8"):
        qt = make(fmt, 70, 256, exact=False).to("cuda")
        x = inputs(12, 256, torch.float16, exact=False).cuda()
        clean = qkern.linear(x, qt)
        x[5, 17] = float("nan")
        got = qkern.linear(x, qt)
        assert got[5].isnan().all()
        keep = [r for r in range(12) if r != 5]
        assert torch.equal(got[keep], clean[keep])


def test_refusals_are_sentences() -> None:
    qt = make("int4-g128", 64, 256, exact=False).to("cuda")
    with pytest.raises(qkern.UnsupportedError, match="float16 or bfloat16"):
        qkern.linear(torch.zeros(2, 256, device="cuda"), qt)


def test_the_kernel_that_explain_names_runs() -> None:
    from qkern.backends import cuda

    for fmt, name in (
        ("int4-g128", "linear_w4a16_f16_sm80"),
        ("codebook4", "linear_lut4a16_f16_sm80"),
    ):
        qt = make(fmt, 64, 256, exact=False).to("cuda")
        x = inputs(2, 256, torch.float16, exact=False).cuda()
        qkern.linear(x, qt)
        assert qkern.explain(qt, x).kernel == name == cuda._extension().last_kernel()
