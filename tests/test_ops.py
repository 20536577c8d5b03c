# SPDX-License-Identifier: Apache-2.0
"""The torch operations: values, the bitwise promise, gradients, compilation, bad input."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the operations are on torch tensors")

import qkern  # noqa: E402
from qkern import _library  # noqa: E402

FORMATS = (
    "int4-g32",
    "int4-g32-asym",
    "int8",
    "int3-g24",
    "codebook4",
    "nf4-g32",
    "mxfp4",
    "int8-a8",
    "int4-g32-asym-a8g",
    "codebook4-a8",
    "nf4-g32-a8g",
    "lutb-a8g",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
N, K = 37, 75  # no multiple of any tile; the last group is short


def made(fmt: str, n: int = N, k: int = K, seed: int = 0) -> qkern.QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    return qkern.quantize(torch.randn(n, k, generator=generator), fmt)


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(y: torch.Tensor) -> torch.Tensor:
    """The bit patterns, so that NaN equals NaN and 0 differs from -0."""
    return y.contiguous().view(torch.int32 if y.dtype == torch.float32 else torch.int16)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def seen(x: torch.Tensor, fmt: qkern.formats.Format) -> torch.Tensor:
    """What the product sees of x, in float64."""
    if fmt.activations == "float":
        return x.double()
    group = None if fmt.activations == "int8" else fmt.group_size or 128
    q, scale = qkern.quantize_activations(x, group)
    scale = scale.double().repeat_interleave(group or x.shape[-1], -1)[..., : x.shape[-1]]
    return q.double() * scale


def magnitude(qt: qkern.QuantizedTensor) -> torch.Tensor:
    """Upper bound of what is added up per weight: with a stored zero, code and zero each."""
    if qt.zeros is None:
        return qt.dequantize().double().abs()
    scale = qt.scales.double().repeat_interleave(qt.format.group_size or qt.shape[1], 1)
    return scale[:, : qt.shape[1]] * 2 ** (qt.format.bits + 1)


def assert_close(y: torch.Tensor, x: torch.Tensor, qt: qkern.QuantizedTensor, bias=None) -> None:
    """y against float64. Each of the K products is rounded when it is formed or added, a chunk's
    scale and the bias add a few roundings, the weight itself has two: (K + 8) units of 2^-24
    of the sum of magnitudes. One rounding to the output dtype comes on top."""
    x64 = seen(x, qt.format)
    exact = x64 @ qt.dequantize().double().T
    size = x64.abs() @ magnitude(qt).T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    out = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[y.dtype]
    allowed = (qt.shape[1] + 8) * 2.0**-24 * size * (1 + out) + out * exact.abs() + 2.0**-24
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- values ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_agrees_with_float64(fmt: str, dtype: torch.dtype) -> None:
    qt, bias = made(fmt), normal(N, seed=2)
    for m in (1, 2, 7, 33):
        x = normal(m, K, dtype=dtype)
        y = qkern.linear(x, qt, bias)
        assert y.dtype == dtype and y.shape == (m, N) and y.is_contiguous()
        assert_close(y, x, qt, bias)
    assert_close(qkern.linear(x, qt), x, qt)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_is_added_in_float32_whatever_its_dtype(bias_dtype: torch.dtype) -> None:
    qt, x, bias = made("int8"), normal(3, K), normal(N, dtype=bias_dtype)
    assert same_bits(qkern.linear(x, qt, bias), qkern.linear(x, qt) + bias.float())
    every_other = torch.stack([bias, bias], 1).flatten()[::2]
    assert same_bits(qkern.linear(x, qt, every_other), qkern.linear(x, qt, bias))


def test_nan_and_infinity_stay_in_their_row() -> None:
    qt, x = made("int4-g32"), normal(4, K)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = qkern.linear(x, qt)
    assert y[1].isnan().all() and not y[2].isfinite().any()
    assert same_bits(y[[0, 3]], qkern.linear(x[[0, 3]], qt))


@pytest.mark.parametrize("fmt", ("int4-g32-asym", "codebook4", "nf4-g32", "int8-a8"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_and_embedding_give_the_weight(fmt: str, dtype: torch.dtype) -> None:
    qt = made(fmt)
    weight = qt.dequantize(dtype)
    assert same_bits(qkern.dequantize(qt, dtype), weight)
    ids = torch.tensor([[0, N - 1], [5, 5], [1, 0]])
    assert same_bits(qkern.embedding(ids, qt, dtype), weight[ids])
    assert same_bits(qkern.embedding(ids.int().T, qt, dtype), weight[ids.T])
    assert qkern.embedding(ids[:0], qt).shape == (0, 2, K)


@pytest.mark.parametrize("group", (None, 8, 32, 75, 100))
def test_quantize_activations_is_the_stated_rounding(group: int | None) -> None:
    x = normal(5, 3, K)
    x[0, 0] = 0
    q, scale = qkern.quantize_activations(x, group)
    for begin in range(0, K, group or K):
        part = x[..., begin : begin + (group or K)].numpy()
        top = np.abs(part).max(-1, keepdims=True)
        inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
        assert np.array_equal(q[..., begin : begin + (group or K)].numpy(), np.rint(part * inverse))
        index = begin // (group or K)
        assert np.array_equal(scale[..., index : index + 1].numpy(), top / np.float32(127))
    assert q.dtype == torch.int8 and scale.shape[-1] == -(-K // (group or K))


def test_int8_matmul_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (3, 5, 2500), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (2500, 7), dtype=torch.int8, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(qkern.int8_matmul(a, b).long(), a.long() @ b.long())
    low = torch.full((2, 131071), -128, dtype=torch.int8)
    assert (qkern.int8_matmul(low, low.T) == 2**14 * 131071).all()
    with pytest.raises(ValueError, match="overflow"):
        qkern.int8_matmul(low.new_zeros(1, 131072), low.new_zeros(131072, 1))


# ---- the bitwise promise ----


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_does_not_depend_on_its_batch(fmt: str, isa: str) -> None:
    qt, bias, x = made(fmt), normal(N), normal(19, K)
    y = qkern.linear(x, qt, bias)
    for i in range(19):
        assert same_bits(qkern.linear(x[i : i + 1], qt, bias), y[i : i + 1])
        assert same_bits(qkern.linear(x[i], qt, bias), y[i])
    for begin, end in ((0, 2), (1, 8), (3, 19)):
        assert same_bits(qkern.linear(x[begin:end], qt, bias), y[begin:end])


def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """x [M, K] in other memory layouts."""
    m, k = x.shape
    found = {
        "transposed": x.T.contiguous().T,
        "every other column": torch.stack([x, x], -1).flatten(1)[:, ::2],
        "every other row": x.repeat_interleave(2, 0)[::2],
        "wide rows": torch.cat([x, x], 1)[:, :k],
    }
    for offset in range(1, 17):
        room = torch.zeros(offset + m * k, dtype=x.dtype)
        room[offset:] = x.flatten()
        found[f"offset {offset}"] = room[offset:].view(m, k)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ("int4-g32", "int8-a8", "codebook4"))
def test_memory_layout_changes_nothing(fmt: str, dtype: torch.dtype) -> None:
    qt, x = made(fmt), normal(6, K, dtype=dtype)
    y = qkern.linear(x, qt)
    for name, view in views(x).items():
        assert same_bits(qkern.linear(view, qt), y), name
    assert same_bits(qkern.linear(x[:1].expand(4, K), qt), y[:1].expand(4, N))
    assert same_bits(qkern.linear(x.view(2, 3, K), qt), y.view(2, 3, N))
    assert same_bits(
        qkern.linear(x.view(2, 3, K).transpose(0, 1), qt), y.view(2, 3, N).transpose(0, 1)
    )
    assert same_bits(qkern.linear(x.view(1, 3, 2, 1, K), qt), y.view(1, 3, 2, 1, N))
    for view in (views(x)["transposed"], views(x)["every other column"]):
        for ours, plain in zip(
            qkern.quantize_activations(view, 32), qkern.quantize_activations(x, 32), strict=True
        ):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("fmt", ("int4-g32", "int8-a8", "codebook4-a8", "int4-g32-asym-a8g"))
@pytest.mark.usefixtures("torch_threads")
def test_the_number_of_threads_changes_nothing(fmt: str) -> None:
    qt = made(fmt, 200, 333)
    for m in (1, 5):
        x, results = normal(m, 333), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(qkern.linear(x, qt))
        assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@pytest.mark.parametrize("fmt", FORMATS)
def test_instruction_sets_give_the_same_bits(fmt: str, isa: str) -> None:
    qt, x = made(fmt), normal(9, K)
    y = qkern.linear(x, qt)
    with qkern.override(isa="scalar"):
        assert same_bits(qkern.linear(x, qt), y)


# ---- sizes and modes ----


@pytest.mark.parametrize("shape", ((0, K), (3, 0, K), (0, 2, 0, K)))
def test_no_rows_give_no_rows(shape: tuple[int, ...]) -> None:
    for fmt in ("int4-g32", "int8-a8"):
        y = qkern.linear(torch.empty(shape), made(fmt), normal(N))
        assert y.shape == (*shape[:-1], N)
    assert qkern.quantize_activations(torch.empty(shape))[0].shape == shape


@pytest.mark.parametrize("n,k", ((1, 1), (1, 8), (2, 3), (65, 1), (16, 129)))
def test_small_weights(n: int, k: int) -> None:
    for fmt in ("int4-g32", "int8-a8", "nf4-g32", "codebook2"):
        qt, x = made(fmt, n, k), normal(5, k)
        assert_close(qkern.linear(x, qt), x, qt)


def test_autocast_computes_in_the_dtype_of_the_region() -> None:
    qt, x, bias = made("int4-g32"), normal(3, K), normal(N)
    expected = qkern.linear(x.bfloat16(), qt, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(qkern.linear(x, qt, bias), expected)
        trained = qkern.linear(x.requires_grad_(), qt, bias)
        assert same_bits(trained, expected)
    trained.sum().backward()
    assert x.grad.dtype == torch.float32


def test_modes_and_default_devices_change_nothing() -> None:
    qt, x = made("int4-g32"), normal(3, K)
    y = qkern.linear(x, qt)
    with torch.inference_mode():
        assert same_bits(qkern.linear(x, qt), y)
    with torch.device("meta"):
        assert same_bits(qkern.linear(x, qt), y)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert same_bits(qkern.linear(x, qt), y)
        trained = qkern.linear(x.requires_grad_(), qt)
        trained.sum().backward()
    finally:
        torch.set_default_dtype(default)
    assert x.grad.dtype == torch.float32


def test_a_weight_with_numpy_parts_serves_tensors() -> None:
    qt, x = made("int4-g32"), normal(3, K)
    assert same_bits(qkern.linear(x, qt.numpy()), qkern.linear(x, qt))


def test_one_copy_of_the_weight_remains() -> None:
    qt = made("int4-g32", 64, 64)
    codes = qt.codes
    qkern.linear(normal(1, 64), qt)
    assert qt.is_packed
    assert torch.equal(qt.codes, codes)


# ---- gradients ----


@pytest.mark.parametrize("fmt", ("int4-g32", "int4-g32-asym", "codebook4", "int8-a8"))
@pytest.mark.parametrize("shape", ((5, K), (K,), (2, 3, K), (0, K)))
def test_gradients_are_those_of_the_dequantized_weight(fmt: str, shape: tuple[int, ...]) -> None:
    """The sum over N has N products and N additions, each rounded once: N + 2 units of 2^-24 of
    the sum of magnitudes (one more for the weight's own rounding, one for slack of order two)."""
    qt = made(fmt)
    x = normal(*shape).requires_grad_()
    bias = normal(N, seed=3).requires_grad_()
    y = qkern.linear(x, qt, bias)
    assert same_bits(y.detach(), qkern.linear(x.detach(), qt, bias.detach()))
    grad = normal(*y.shape, seed=4)
    y.backward(grad)
    weight = qt.dequantize().double()
    exact = grad.double() @ weight
    allowed = (N + 2) * 2.0**-24 * (grad.double().abs() @ weight.abs())
    assert ((x.grad.double() - exact).abs() <= allowed).all()
    rows = grad.double().reshape(-1, N)
    allowed = (len(rows) + 2) * 2.0**-24 * rows.abs().sum(0)
    assert ((bias.grad.double() - rows.sum(0)).abs() <= allowed).all()


def test_the_backward_pass_takes_the_weight_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkern.backends import cpu

    qt, x = made("int4-g32"), normal(4, K).requires_grad_()
    qkern.linear(x, qt).sum().backward()
    whole, x.grad = x.grad, None
    monkeypatch.setattr(cpu, "_GRADIENT_BLOCK", 5 * K)
    qkern.linear(x, qt).sum().backward()
    weight = qt.dequantize().double()
    allowed = 2 * (N + 2) * 2.0**-24 * weight.abs().sum(0)
    assert ((x.grad.double() - whole.double()).abs() <= allowed).all()
    assert ((x.grad.double() - weight.sum(0)).abs() <= allowed).all()


def test_only_what_needs_a_gradient_gets_one() -> None:
    qt, x, bias = made("int8"), normal(2, K), normal(N).requires_grad_()
    qkern.linear(x, qt, bias).sum().backward()
    assert x.grad is None and torch.equal(bias.grad, torch.full((N,), 2.0))
    with torch.no_grad():
        assert not qkern.linear(x, qt, bias).requires_grad
    half = normal(2, K, dtype=torch.bfloat16).requires_grad_()
    qkern.linear(half, qt, bias).sum().backward()
    assert half.grad.dtype == torch.bfloat16


# ---- the operations themselves, and compilation ----


def packed(qt: qkern.QuantizedTensor) -> torch.Tensor:
    return qt.packed().buffer


def test_the_meta_device_gives_shapes() -> None:
    weight = packed(made("int8")).to("meta")
    y = _library.linear(torch.empty(4, 5, K, device="meta", dtype=torch.bfloat16), weight, None, N)
    assert y.is_meta and y.shape == (4, 5, N) and y.dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_with_a_dynamic_number_of_rows() -> None:
    qt, bias = made("int4-g32"), normal(N)
    weight = packed(qt)

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return _library.linear(x * 2, weight, bias, N) + 1

    for m in (2, 3, 9):
        x = normal(m, K)
        assert same_bits(compiled(x), qkern.linear(x * 2, qt, bias) + 1)


# ---- bad input ----


def test_bad_input_is_answered_with_a_sentence() -> None:
    qt, x = made("int4-g32"), normal(2, K)
    cases = [
        (TypeError, "x must be float32, float16 or bfloat16, but it is float64", x.double(), qt),
        (TypeError, "but it is int64", x.long(), qt),
        (TypeError, "x must be a torch tensor, but it is ndarray", x.numpy(), qt),
        (TypeError, "A QuantizedTensor was expected, but Tensor came", x, x),
        (ValueError, rf"must be the {K} columns of the weight, .*\(2, {K - 1}\)", x[:, 1:], qt),
        (ValueError, r"shape \(2, 0\)", x[:, :0], qt),
        (ValueError, "at least one dimension", x[0, 0], qt),
        (ValueError, "The weight is on cpu, but x is on meta", x.to("meta"), qt),
        (ValueError, "The weight is on meta, but x is on cpu", x, qt.to("meta")),
        (ValueError, rf"shape \({N},\), but its shape is \({N + 1},\)", x, qt, normal(N + 1)),
        (TypeError, "bias must be float32, .* but it is int32", x, qt, normal(N).int()),
        (TypeError, "bias must be a torch tensor or None, but it is int", x, qt, 1),
        (ValueError, "but bias is on meta", x, qt, normal(N).to("meta")),
    ]
    for error, sentence, *arguments in cases:
        with pytest.raises(error, match=sentence):
            qkern.linear(*arguments)


def test_the_operation_itself_never_reads_beyond_its_tensors() -> None:
    weight, x = packed(made("int4-g32")), normal(2, K)
    cases = [
        (ValueError, f"the input has {K - 1} columns", x[:, 1:], weight, None, N),
        (ValueError, "the input has 0 columns", x[:, :0], weight, None, N),
        (ValueError, f"the output {N + 1}", x, weight, None, N + 1),
        (ValueError, "bias must have one number per row", x, weight, normal(3), N),
        (ValueError, "dense one-dimensional uint8", x, weight.view(-1, 1), None, N),
        (ValueError, "dense one-dimensional uint8", x, weight.float(), None, N),
        (ValueError, "dense one-dimensional uint8", x, weight[::2], None, N),
        (ValueError, "multiple of 64 bytes", x, weight[1:], None, N),
        (ValueError, "buffer only", x, weight[:-64].clone(), None, N),
        (ValueError, "at least", x, weight[:0], None, N),
        (ValueError, "not a weight packed by this version", x, torch.zeros_like(weight), None, N),
        (TypeError, "but it is float64", x.double(), weight, None, N),
        (ValueError, "one device", x, weight, normal(N).to("meta"), N),
    ]
    for error, sentence, *arguments in cases:
        with pytest.raises(error, match=sentence):
            _library.linear(*arguments)
    for call, sentence in (
        (lambda: _library.dequantize(weight, N, K + 1, torch.float32), f"{N} x {K}, but"),
        (lambda: _library.embedding(torch.tensor([0]), weight, K - 1, torch.float32), "but any x"),
        (lambda: _library.linear_grad_input(normal(2, N + 1), weight, K), f"{N} x {K}, but"),
        (lambda: _library.quantize_activations(x, -1), "at least 1 column"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_bad_arguments_of_the_other_functions() -> None:
    qt, x = made("int4-g32"), normal(2, K)
    for error, sentence, call in (
        (ValueError, f"{N}.* is not in 0", lambda: qkern.embedding(torch.tensor([N]), qt)),
        (ValueError, "-1 .* is not in 0", lambda: qkern.embedding(torch.tensor([0, -1]), qt)),
        (TypeError, "ids must be int64 or int32", lambda: qkern.embedding(x, qt)),
        (TypeError, "dtype must be", lambda: qkern.dequantize(qt, torch.float64)),
        (TypeError, "dtype must be", lambda: qkern.dequantize(qt, "int8")),
        (ValueError, "at least 1", lambda: qkern.quantize_activations(x, 0)),
        (TypeError, "an integer or None", lambda: qkern.quantize_activations(x, 1.5)),
        (TypeError, "but it is float64", lambda: qkern.quantize_activations(x.double())),
        (TypeError, "a must be int8", lambda: qkern.int8_matmul(x, x.T)),
        (ValueError, "shapes are", lambda: qkern.int8_matmul(*[x.to(torch.int8)] * 2)),
    ):
        with pytest.raises(error, match=sentence):
            call()
