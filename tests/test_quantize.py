# SPDX-License-Identifier: Apache-2.0
"""quantize(): what it takes, what it refuses, and the choices it makes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from qkern import _quantize
from qkern._quantize import METHODS, Method, quantize
from qkern.errors import FormatError, UnsupportedError
from qkern.formats import FORMATS, Format, Int

ALL = [fmt for cls in FORMATS.values() for fmt in cls.variants((16,))]
ONE_EACH = ("int4-g16", "int8", "int3-g16-asym", "codebook3", "codebook2-tensor-g16", "nf4-g16")


def normal(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def assert_same(a: Any, b: Any) -> None:
    assert a.parts().keys() == b.parts().keys()
    for name, part in a.parts().items():
        np.testing.assert_array_equal(np.asarray(part), np.asarray(b.parts()[name]))


# ---- what is taken ----


@pytest.mark.parametrize("text", ONE_EACH)
def test_layouts_of_numpy(text: str) -> None:
    w = normal(7, 50)
    expected = quantize(w, text)
    assert expected.kind == "numpy"
    big = np.zeros((14, 150), np.float32)
    big[::2, ::3] = w
    views = [
        np.asfortranarray(w),
        big[::2, ::3],
        w[::-1, ::-1].copy()[::-1, ::-1],
        w.astype(np.float64),
        w.astype(w.dtype.newbyteorder()),
    ]
    readonly = w.copy()
    readonly.flags.writeable = False
    unaligned = np.frombuffer(b"x" + w.tobytes(), np.uint8)[1:].view(np.float32).reshape(w.shape)
    assert not unaligned.flags.aligned
    for view in [*views, readonly, unaligned]:
        assert_same(quantize(view, text), expected)
    np.testing.assert_array_equal(w, normal(7, 50))


@pytest.mark.parametrize("text", ONE_EACH)
def test_torch_tensors(text: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    w = torch.from_numpy(normal(7, 50))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        cast = w.to(dtype)
        qt = quantize(cast, text)
        assert qt.kind == "torch"
        assert_same(qt, quantize(cast.float().numpy(), text))
    parameter = torch.nn.Parameter(w)
    for view in (parameter, w.t().contiguous().t(), torch.stack([w, w], 1)[:, 1]):
        assert_same(quantize(view, text), quantize(w.numpy(), text))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("weight", "error", "sentence"),
    [
        ([[1.0]], TypeError, "weight must be a numpy array or a torch tensor, but it is list."),
        (np.zeros(8, "f4"), FormatError, "two dimensions [N, K], but has shape (8,)."),
        (np.zeros((2, 2, 2), "f4"), FormatError, "two dimensions [N, K], but has shape (2, 2, 2)."),
        (np.zeros((0, 8), "f4"), FormatError, "at least one row and one column, but has 0 x 8."),
        (np.zeros((8, 0), "f4"), FormatError, "at least one row and one column, but has 8 x 0."),
        (np.zeros((8, 8), "i4"), FormatError, "weight must be of a float dtype, but is int32."),
        (np.zeros((8, 8), "c8"), FormatError, "weight must be of a float dtype, but is complex64."),
    ],
)
def test_bad_weights(weight: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        quantize(weight, "int8")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("text", ONE_EACH)
def test_weights_that_are_not_finite(value: float, text: str) -> None:
    w = normal(7, 50).astype(np.float64)
    w[3, 41] = w[5, 2] = value
    with pytest.raises(FormatError) as error:
        quantize(w, text)
    assert f"weight must be finite in float32, but weight[3, 41] is {value}." in str(error.value)


def test_torch_weights_that_cannot_be() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(FormatError, match="must be of a float dtype, but is int8"):
        quantize(torch.zeros(4, 8, dtype=torch.int8), "int8")
    with pytest.raises(UnsupportedError, match="weight is on the meta device and has no numbers"):
        quantize(torch.zeros(4, 8, device="meta"), "int8")
    bad = torch.zeros(4, 8, dtype=torch.bfloat16)
    bad[1, 7] = torch.inf
    with pytest.raises(FormatError, match=r"weight\[1, 7\] is inf"):
        quantize(bad, "int8")


def test_unknown_format_and_method() -> None:
    with pytest.raises(FormatError, match="'int9' is not a format"):
        quantize(normal(2, 8), "int9")
    with pytest.raises(UnsupportedError) as error:
        quantize(normal(2, 8), "int8", method="rnt")
    assert str(error.value) == "There is no method 'rnt'; there are: rtn. Did you mean 'rtn'?"
    with pytest.raises(UnsupportedError, match=r"There is no method \['rtn'\]"):
        quantize(normal(2, 8), "int8", method=["rtn"])


def test_hessian_and_importance_where_nothing_uses_them() -> None:
    with pytest.raises(UnsupportedError, match="'rtn' does not use a hessian; no method here does"):
        quantize(normal(2, 8), "int8", hessian=np.eye(8))
    with pytest.raises(UnsupportedError, match="'rtn' does not use importance for int8; it does"):
        quantize(normal(2, 8), "int8", importance=np.ones(8))


@pytest.mark.parametrize(
    ("importance", "error", "sentence"),
    [
        ([1.0] * 8, TypeError, "importance must be a numpy array or a torch tensor"),
        (np.ones(7), FormatError, "importance must have shape (8,) or (2, 8), but has (7,)."),
        (np.full(8, -1.0), FormatError, "not negative, but importance[0] is -1.0."),
        (np.full((2, 8), np.nan), FormatError, "not negative, but importance[0, 0] is nan."),
        (np.full(8, np.inf), FormatError, "must be finite and not negative, but importance[0]"),
    ],
)
def test_bad_importance(importance: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        quantize(normal(2, 8), "codebook2", importance=importance)
    assert sentence in str(caught.value)


def test_a_new_method_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def doubled(w: np.ndarray, fmt: Format, *, importance: Any, hessian: Any) -> Any:
        seen["hessian"] = hessian
        return fmt.quantize(2 * w)

    monkeypatch.setattr(_quantize, "doubled", doubled, raising=False)
    monkeypatch.setitem(METHODS, "doubled", Method("qkern._quantize:doubled", uses_hessian=True))
    w, hessian = normal(2, 8), np.eye(8)
    qt = quantize(w, "int8", method="doubled", hessian=hessian)
    assert_same(qt, quantize(2 * w, "int8"))
    assert seen["hessian"] is hessian
    with pytest.raises(UnsupportedError, match="those that do: doubled"):
        quantize(w, "int8", hessian=hessian)


# ---- choices ----


def test_dtype_of_scales() -> None:
    w = normal(3, 64)
    for text, scale, dtype in [
        ("int4-g16", 1, "float16"),
        ("int4-g16-asym", 1, "float16"),
        ("nf4", 1, "float16"),
        ("codebook4-tensor-g16", 1, "float16"),
        ("int8-g16", 1, "float32"),  # eight bits deserve an exact scale
        ("codebook8-g16", 1, "float32"),
        ("int4", 1, "float32"),  # one per row costs nothing
        ("codebook4-a8", 1, "float32"),
        ("codebook4-g16-a8", 1, "float32"),  # a product of two factors
        ("int4-g16", 1e-4, "float32"),  # no normal float16 from 6.1e-5 down
        ("int4-g16", 1e6, "float32"),  # beyond 65504
        ("nf4", 1e-5, "float32"),
        ("iq4nl", 1e-3, "float32"),
    ]:
        qt = quantize(w * np.float32(scale), text)
        assert qt.scales.dtype == dtype, (text, scale)
    sparse = w.copy()
    sparse[0] = 0  # groups of zeros do not ask for float32
    for text in ("int4-g16", "nf4", "iq4nl", "codebook4-tensor-g16"):
        qt = quantize(sparse, text)
        assert qt.scales.dtype == np.float16
        assert (qt.dequantize()[0] == 0).all()


@pytest.mark.parametrize(
    "group",
    [0, 1e-45, 1e-38, 1e-30, -1e-8, 6e4, 3.4e38],
    ids=lambda v: f"{v:g}",
)
def test_groups_of_any_size(group: float) -> None:
    """Zero, denormal, tiny and huge groups: no NaN, no infinity, no group lost.

    Below 1e-35 a group may become zeros: its scale would be no normal float32. Half of the group's
    largest weight is what the widest grid (-2..1) may lose, and 2^-10 the rounding of a scale.
    """
    w = np.full((3, 48), group, np.float32)
    w[:, ::5] /= 2
    for fmt in ALL:
        if fmt.family == "lutb":
            continue  # without scales: tests/test_lutb.py
        qt = quantize(w, fmt)
        type(qt).from_parts(fmt, qt.shape, **qt.parts())  # the numbers pass the checks
        values = qt.dequantize()
        assert np.isfinite(values).all(), fmt
        assert np.abs(values - w).max() <= (0.5 + 2.0**-10) * max(abs(group), 1e-35), fmt
        assert values.any() or abs(group) < 1e-35, fmt


def test_range_beyond_float32() -> None:
    w = np.array([[3.4e38, -3.4e38] * 8], np.float32)
    with pytest.raises(FormatError, match="int4-g8-asym cannot hold these weights: the range of"):
        quantize(w, "int4-g8-asym")


# ---- codebooks ----


def weighted_error(w: np.ndarray, values: np.ndarray, weight: np.ndarray) -> float:
    return float((weight * (w.astype(np.float64) - values) ** 2).sum())


def best_error(w: np.ndarray, weight: np.ndarray, centres: int) -> float:
    """Of all ways to cut the sorted values into runs, the least weighted squared error."""
    order = np.argsort(w)
    w, weight = w[order].astype(np.float64), weight[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(w)), centres - 1):
        total = 0.0
        for run in np.split(np.arange(len(w)), cuts):
            mean = np.average(w[run], weights=weight[run])
            total += (weight[run] * (w[run] - mean) ** 2).sum()
        best = min(best, total)
    return best


@pytest.mark.parametrize("shape", ["none", "columns", "all"])
def test_codebook_is_the_optimum(shape: str) -> None:
    """float32 centres: each of the 10 errors may differ by 2 * 2^-24 * |w| * |w - centre|."""
    w = normal(3, 10, seed=8)
    rng = np.random.default_rng(9)
    weight = {
        "none": np.ones((3, 10)),
        "columns": np.tile(rng.uniform(0.1, 9, 10), (3, 1)),
        "all": rng.uniform(0.1, 9, (3, 10)),
    }[shape]
    importance = {"none": None, "columns": weight[0], "all": weight}[shape]
    values = quantize(w, "codebook2", importance=importance).dequantize()
    for row in range(3):
        ours = weighted_error(w[row], values[row], weight[row])
        assert ours == pytest.approx(best_error(w[row], weight[row], 4), rel=1e-5)
    if shape != "none":
        plain = quantize(w, "codebook2").dequantize()
        assert weighted_error(w, values, weight) < weighted_error(w, plain, weight)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_importance_with_group_scales(per: str, activations: str) -> None:
    """The fit on quotients weighs by scale^2, so importance helps where it is laid."""
    w = normal(16, 64, seed=10) * np.exp2(np.arange(4).repeat(16)).astype(np.float32)
    weight = np.where(np.arange(64) % 2, 100.0, 0.01)
    fmt = FORMATS["codebook"](3, per, 16, activations=activations)
    plain, weighed = quantize(w, fmt), quantize(w, fmt, importance=weight)
    assert weighted_error(w, weighed.dequantize(), weight) < weighted_error(
        w, plain.dequantize(), weight
    )
    even = np.ones(64)
    assert weighted_error(w, plain.dequantize(), even) < weighted_error(
        w, weighed.dequantize(), even
    )


def test_importance_of_nothing() -> None:
    """Where no weight counts, any table will do, but it must be one."""
    for text in ("codebook2", "codebook2-tensor", "codebook2-tensor-g16-a8"):
        qt = quantize(normal(3, 48), text, importance=np.zeros(48))
        assert np.isfinite(qt.dequantize()).all()


@pytest.mark.parametrize("text", ["codebook4-a8", "codebook4-tensor-a8", "codebook3-group-g16-a8"])
def test_snapped_tables(text: str) -> None:
    """The table for int8 activations: the float table to within half of max|table| / 127, its
    largest entry at 127, and every code the nearest entry of the snapped table."""
    w = normal(6, 48, seed=11)
    exact = quantize(w, text.removesuffix("-a8"))
    qt = quantize(w, text)
    factor = np.abs(exact.codebook).max(axis=1, keepdims=True) / np.float32(127)
    assert (np.abs(qt.codebook).max(axis=1) == 127).all()
    assert (np.abs(qt.codebook * factor - exact.codebook) <= factor * 0.5001).all()
    values = (qt.codebook * factor).reshape(-1, qt.codebook.shape[1])
    groups = len(values) if "group" not in text else len(values) // 3
    for row, column in itertools.product(range(6), range(48)):
        table = {1: 0, 6: row}[groups] * (3 if "group" in text else 1)
        table += column // 16 if "group" in text else 0
        nearest = np.abs(values[table] - w[row, column]).min()
        ours = abs(qt.dequantize()[row, column] - w[row, column])
        assert ours <= nearest + 1e-6  # two float32 roundings of numbers below 4


def test_symmetric_and_asymmetric_zero() -> None:
    """A zero weight stays zero on every integer grid."""
    w = normal(4, 40)
    w[:, 7] = 0
    for bits, group, symmetric in itertools.product((2, 3, 4, 5, 6, 8), (None, 8), (True, False)):
        assert (quantize(w, Int(bits, group, symmetric)).dequantize()[:, 7] == 0).all()
