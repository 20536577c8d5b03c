# SPDX-License-Identifier: Apache-2.0
"""out=: results in memory of the caller, in torch and in numpy."""

from __future__ import annotations

import numpy as np
import pytest

import qkern

torch = pytest.importorskip("torch", reason="the operations are on torch tensors")

from op_samples import K, N, normal, packed, weight  # noqa: E402

IDS = torch.tensor([[0, N - 1], [5, 5], [1, 0]])


def rooms(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Memory for a result: dense, rows apart, at an odd offset; full of NaN (or of 99)."""
    fill = float("nan") if dtype.is_floating_point else 99
    wide = torch.full((*shape[:-1], shape[-1] + 5), fill, dtype=dtype)
    flat = torch.full((3 + int(np.prod(shape)),), fill, dtype=dtype)
    return [torch.full(shape, fill, dtype=dtype), wide[..., 2:-3], flat[3:].view(shape)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("fmt", ("int4-g32-asym", "int8-a8", "codebook4"))
def test_linear_writes_the_result_and_nothing_else(fmt: str, dtype: torch.dtype) -> None:
    qt, bias = weight(fmt), normal(N)
    for x in (normal(5, K, dtype=dtype), normal(2, 3, K, dtype=dtype), normal(K, dtype=dtype)):
        expected = qkern.linear(x, qt, bias)
        for out in rooms(tuple(expected.shape), dtype):
            outside = out.untyped_storage().nbytes() // out.element_size() - out.numel()
            assert qkern.linear(x, qt, bias, out=out) is out
            assert torch.equal(out, expected)
            whole = torch.empty(0, dtype=dtype).set_(out.untyped_storage())
            assert whole.isnan().sum() == outside
    empty = torch.empty(0, 3, N, dtype=dtype)
    assert qkern.linear(torch.empty(0, 3, K, dtype=dtype), qt, out=empty) is empty


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_dequantize_and_embedding_take_the_dtype_of_out(dtype: torch.dtype) -> None:
    qt = weight()
    for out in rooms((N, K), dtype):
        assert qkern.dequantize(qt, out=out) is out
        assert torch.equal(out, qt.dequantize(dtype))
        assert qkern.dequantize(qt, dtype, out=out) is out
    for out in rooms((3, 2, K), dtype):
        assert qkern.embedding(IDS, qt, out=out) is out
        assert torch.equal(out, qt.dequantize(dtype)[IDS])
    assert qkern.dequantize(qt).dtype == qkern.embedding(IDS, qt).dtype == torch.float32


@pytest.mark.parametrize("group", (None, 32))
def test_quantize_activations_fills_both(group: int | None) -> None:
    x = normal(2, 3, K)
    expected = qkern.quantize_activations(x, group)
    for codes in rooms((2, 3, K), torch.int8):
        scales = torch.full(expected[1].shape, float("nan"))
        pair = qkern.quantize_activations(x, group, out=(codes, scales))
        assert pair[0] is codes and pair[1] is scales
        assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])


def test_columns_of_one_matrix_hold_input_and_output() -> None:
    qt = weight("int8", 75, 75)
    both = torch.cat([normal(4, 75), torch.zeros(4, 75)], 1)
    x, out = both[:, :75], both[:, 75:]
    expected = qkern.linear(x.clone(), qt)
    assert torch.equal(qkern.linear(x, qt, out=out), expected)
    for overlapping in (x, both[:, 74:149], both[:, 1:76], both.view(-1)[75:375].view(4, 75)):
        with pytest.raises(ValueError, match="out shares memory with x"):
            qkern.linear(x, qt, out=overlapping)
    square = normal(75, 75)
    with pytest.raises(ValueError, match="out shares memory with x"):
        qkern.linear(square.T, qt, out=square)
    room = torch.zeros(5, 75)
    assert torch.equal(qkern.linear(room[:1], qt, out=room[1:2]), torch.zeros(1, 75))
    with pytest.raises(ValueError, match="out shares memory with bias"):
        qkern.linear(x[:1], qt, room[0], out=room[:1])


def test_what_does_not_fit_is_answered_with_a_sentence() -> None:
    qt, x, good = weight(), normal(2, K), torch.empty(2, N)
    codes, scales = torch.empty(2, K, dtype=torch.int8), torch.empty(2, 1)
    leaf = torch.empty(2, N, requires_grad=True)
    linear = qkern.linear
    for error, sentence, call in (
        (ValueError, rf"the shape \(2, {N}\) of the result", lambda: linear(x, qt, out=good[:1])),
        (TypeError, "must be float32, but it is float16", lambda: linear(x, qt, out=good.half())),
        (TypeError, "must be a torch tensor, but it is nd", lambda: linear(x, qt, out=x.numpy())),
        (ValueError, "must be on cpu, but it is on m", lambda: linear(x, qt, out=good.to("meta"))),
        (ValueError, "must be dense", lambda: linear(x, qt, out=torch.empty(N, 2).T)),
        (ValueError, "must be dense", lambda: linear(x, qt, out=good[:1].expand(2, N))),
        (ValueError, "must be dense",
         lambda: linear(normal(2, 3, K), qt, out=torch.empty(3, 2, N).transpose(0, 1))),
        (RuntimeError, "no gradient, but x req", lambda: linear(x + leaf[:, :1], qt, out=good)),
        (RuntimeError, "no gradient, but out requires", lambda: linear(x, qt, out=leaf)),
        (TypeError, "dtype must be", lambda: qkern.dequantize(qt, out=codes)),
        (TypeError, "must be float16, but it is float32",
         lambda: qkern.dequantize(qt, torch.float16, out=torch.empty(N, K))),
        (ValueError, "of the result", lambda: qkern.embedding(IDS, qt, out=torch.empty(3, K))),
        (TypeError, "a pair of tensors", lambda: qkern.quantize_activations(x, out=codes)),
        (TypeError, "codes of out must be int8",
         lambda: qkern.quantize_activations(x, out=(codes.float(), scales))),
        (ValueError, "scales of out must have the shape",
         lambda: qkern.quantize_activations(x, 32, out=(codes, scales))),
        (ValueError, "scales of out must be dense",
         lambda: qkern.quantize_activations(x, 32, out=(codes, torch.empty(3, 2).T))),
        (ValueError, "the codes of out shares? memory with x", lambda: qkern.quantize_activations(
            x, out=(x.view(torch.int8)[:, :K], scales))),
        (ValueError, rf"{N} .*not in 0", lambda: qkern.embedding(
            torch.tensor([N]), qt, out=torch.empty(1, K))),
    ):  # fmt: skip
        with pytest.raises(error, match=sentence):
            call()
    with torch.no_grad():
        linear(x, qt, out=leaf)
    assert torch.equal(leaf.detach(), linear(x, qt))


def test_autocast_leaves_out_alone() -> None:
    x, out = normal(2, K), torch.empty(2, N)
    with torch.autocast("cpu", torch.bfloat16):
        qkern.linear(x, weight(), out=out)
    assert torch.equal(out, qkern.linear(x, weight()))


def test_out_in_a_compiled_function() -> None:
    block, bias = packed(), normal(N)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        torch.ops.qkern.linear_out(x * 2, block, bias, room[:, 1:])
        return room + 1

    for m in (2, 5):
        x, room = normal(m, K), torch.zeros(m, N + 1)
        y = compiled(x, room)
        assert torch.equal(room[:, 1:], torch.ops.qkern.linear(x * 2, block, bias, N))
        assert torch.equal(y, room + 1) and not room[:, 0].any()


# ---- numpy ----


@pytest.mark.parametrize("dtype", (np.float32, np.float16))
def test_numpy_out(dtype: type) -> None:
    qt = weight().numpy()
    x = normal(2, 3, K).numpy().astype(dtype)
    bias = normal(N).numpy()
    wide = np.full((2, 3, N + 2), np.nan, dtype)
    out = wide[..., 1:-1]
    assert qkern.numpy.linear(x, qt, bias, out=out) is out
    assert np.array_equal(out, qkern.numpy.linear(x, qt, bias))
    assert np.isnan(wide[..., [0, -1]]).all()
    table = np.empty((N, K), dtype)
    assert qkern.numpy.dequantize(qt, out=table) is table
    assert np.array_equal(table, qkern.numpy.dequantize(qt, dtype))
    rows = np.empty((3, 2, K + 1), dtype)[..., :K]
    assert qkern.numpy.embedding(IDS.numpy(), qt, out=rows) is rows
    assert np.array_equal(rows, table[IDS.numpy()])


def test_numpy_out_that_does_not_fit() -> None:
    qt, x = weight().numpy(), normal(2, K).numpy()
    good = np.empty((2, N), np.float32)
    frozen = good.copy()
    frozen.flags.writeable = False
    linear = qkern.numpy.linear
    for error, sentence, call in (
        (TypeError, "out must be a numpy array", lambda: linear(x, qt, out=[1])),
        (ValueError, "the shape", lambda: linear(x, qt, out=good[:1])),
        (TypeError, "must be float32, but is", lambda: linear(x, qt, out=good.astype("f8"))),
        (ValueError, "must be dense", lambda: linear(x, qt, out=np.empty((N, 2), "f4").T)),
        (ValueError, "must be dense", lambda: linear(x, qt, out=good[::-1])),
        (ValueError, "read-only", lambda: linear(x, qt, out=frozen)),
        (ValueError, "shares memory with x", lambda: linear(x, qt, out=x[:, :N])),
        (TypeError, "must be float16", lambda: qkern.numpy.dequantize(
            qt, np.float16, out=np.empty((N, K), np.float32))),
        (ValueError, "the shape", lambda: qkern.numpy.embedding(np.array([0]), qt, out=good)),
    ):  # fmt: skip
        with pytest.raises(error, match=sentence):
            call()
