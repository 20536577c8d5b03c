# SPDX-License-Identifier: Apache-2.0
"""QuantizedTensor: what it accepts, what it says otherwise, and its two states."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qkern._quantize import quantize
from qkern.errors import FormatError, UnsupportedError
from qkern.formats import FORMATS, parse_format
from qkern.tensor import QuantizedTensor

KINDS = ("numpy", "torch")
# One of each combination of parts.
TEXTS = (
    "int4-g32",
    "int3-g32-asym-a8",
    "int8",
    "codebook3",
    "codebook4-a8",
    "codebook2-group-g32-a8g",
    "codebook4-tensor-g64",
    "nf4",
    "mxfp4",
    "nvfp4-a8",
    "lutb-a8",
)
N, K = 5, 100


def torch_module() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


def made(text: str, kind: str = "numpy", perm: bool = False) -> QuantizedTensor:
    rng = np.random.default_rng(0)
    qt = quantize(rng.standard_normal((N, K)).astype(np.float32), text)
    parts = qt.parts()
    if perm:
        parts["perm"] = rng.permutation(K).astype(np.int32)
    if kind == "torch":
        parts = {name: torch_module().from_numpy(part) for name, part in parts.items()}
    return QuantizedTensor.from_parts(text, (N, K), **parts)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert type(a[name]) is type(b[name])
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(*(numbers(part) for part in (a[name], b[name])))


def numbers(part: Any) -> np.ndarray:
    """As numpy, which has no bfloat16."""
    return np.asarray(part.float() if str(part.dtype) == "torch.bfloat16" else part)


# ---- what is accepted ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_parts_and_sizes(text: str, kind: str) -> None:
    qt = made(text, kind)
    fmt = parse_format(text)
    assert (qt.format, qt.shape, qt.kind) == (fmt, (N, K), kind)
    for name in ("codes", "scales", "zeros", "codebook", "global_scale"):
        part = getattr(qt, name)
        rule = fmt.parts(N, K).get(name)
        assert (part is None) == (rule is None)
        if rule is not None:
            assert tuple(part.shape) == rule.shape
    assert qt.perm is None
    parts = [np.asarray(part) for part in qt.parts().values()]
    assert qt.nbytes == sum(part.nbytes for part in parts)
    assert qt.bits_per_weight == 8 * qt.nbytes / (N * K)
    assert str(fmt) in repr(qt)
    assert "packed" not in repr(qt)
    assert "packed" in repr(qt.pack_())
    assert qt.nbytes == sum(part.nbytes for part in parts)


def test_parts_are_kept_where_they_are_dense() -> None:
    parts = made("int4-g32-asym").parts()
    qt = QuantizedTensor.from_parts("int4-g32-asym", (N, K), **parts)
    assert all(qt.parts()[name] is part for name, part in parts.items())
    wide = {name: np.repeat(part, 2, axis=1)[:, ::2] for name, part in parts.items()}
    swapped = wide | {"scales": wide["scales"].astype(wide["scales"].dtype.newbyteorder())}
    for given in (wide, swapped):
        other = QuantizedTensor.from_parts("int4-g32-asym", (N, K), **given)
        assert_same(other.parts(), parts)
        np.testing.assert_array_equal(other.dequantize(), qt.dequantize())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scales_of_every_float_dtype(dtype: str) -> None:
    torch = torch_module()
    parts = made("int4-g32-asym", "torch").parts()
    parts["scales"] = parts["scales"].to(getattr(torch, dtype))
    for zeros in ("uint8", "float16", "float32"):
        parts["zeros"] = (parts["zeros"].float() + 0.0).to(getattr(torch, zeros))
        qt = QuantizedTensor.from_parts("int4-g32-asym", (N, K), **parts)
        plain = qt.numpy()
        assert plain.scales.dtype == ("float32" if dtype == "bfloat16" else dtype)
        expected = qt.format.dequantize(plain.parts(), qt.shape)
        for state in (qt, qt.pack_(), qt.numpy()):
            np.testing.assert_array_equal(np.asarray(state.dequantize()), expected)
        assert_same(qt.parts(), parts)


def test_float8_scales_are_taken_as_their_bytes() -> None:
    torch = torch_module()
    for text, dtype in [("mxfp4", torch.float8_e8m0fnu), ("nvfp4", torch.float8_e4m3fn)]:
        parts = made(text, "torch").parts()
        qt = QuantizedTensor.from_parts(
            text, (N, K), **parts | {"scales": parts["scales"].view(dtype)}
        )
        assert_same(qt.parts(), parts)


def test_table() -> None:
    np.testing.assert_array_equal(made("nf4").table, parse_format("nf4").table[None])
    assert made("nf4", "torch").table.shape == (1, 16)
    book = made("codebook3")
    assert book.table is book.codebook
    assert made("int8").table is None
    qt = made("nvfp4-a8")
    assert qt.table_scale == np.float32(0.5) * qt.global_scale[0]
    assert made("nf4").table_scale == 1


# ---- what is refused ----

Change = Callable[[dict[str, np.ndarray]], dict[str, Any]]


def replaced(name: str, change: Callable[[np.ndarray], Any]) -> Change:
    return lambda parts: parts | {name: change(parts[name])}


def with_value(name: str, value: float) -> Change:
    def change(part: np.ndarray) -> np.ndarray:
        part = part.copy()
        part[-1, -1] = value
        return part

    return replaced(name, change)


BAD_PARTS: list[tuple[str, Change, str]] = [
    (
        "int4-g32",
        lambda p: {"codes": p["codes"]},
        "int4-g32 needs scales, but none came; its parts",
    ),
    ("int4-g32", lambda p: {}, "int4-g32 needs codes, but none came; its parts are codes, scales."),
    (
        "int4-g32",
        lambda p: p | {"zeros": p["codes"]},
        "int4-g32 has no part zeros; its parts are codes, scales and, if wished, perm. "
        "Formats with zeros end in '-asym'.",
    ),
    ("nf4", lambda p: p | {"colour": p["codes"]}, "nf4 has no part colour; its parts are codes"),
    ("int4-g32", replaced("codes", lambda c: c.tolist()), "codes must be a numpy array or a torch"),
    (
        "int4-g32",
        replaced("codes", lambda c: c[:, 1:]),
        "codes must have shape (5, 50) for int4-g32 with a weight of 5 x 100, but has (5, 49).",
    ),
    ("int4-g32", replaced("scales", lambda s: s[:, :3]), "scales must have shape (5, 4) for int4"),
    ("int4-g32", replaced("codes", lambda c: c.view(np.int8)), "codes must be uint8 for int4-g32"),
    (
        "int4-g32",
        replaced("scales", lambda s: s.astype(np.float64)),
        "scales must be float16 or bfloat16 or float32 for int4-g32 with a weight of 5 x 100, but "
        "is float64.",
    ),
    (
        "int4-g32-asym",
        replaced("zeros", lambda z: z.astype(np.int32)),
        "zeros must be uint8 or float16 or float32",
    ),
    ("int4-g32", with_value("scales", np.nan), "scales must be finite, but scales[4, 3] is nan."),
    ("int4-g32", with_value("scales", np.inf), "scales must be finite, but scales[4, 3] is inf."),
    ("mxfp4", with_value("scales", 255), "scales must be finite, but scales[4, 3] is nan."),
    ("nvfp4", with_value("scales", 0x7F), "scales must be finite, but scales[4, 6] is nan."),
    (
        "nvfp4",
        replaced("global_scale", lambda g: g * np.float32(np.inf)),
        "global_scale must be finite, but global_scale[0] is inf.",
    ),
    (
        "int4-g32-asym",
        replaced("zeros", lambda z: z.astype(np.float16) - np.float16(np.inf)),
        "zeros must be finite, but zeros[0, 0] is -inf.",
    ),
    ("codebook3", with_value("codebook", np.nan), "codebook must be finite, but codebook[4, 7]"),
    (
        "codebook4-a8",
        with_value("codebook", 0.5),
        "codebook must hold integers in -128..127 for codebook4-a8 (activations 'int8'), but "
        "codebook[4, 15] is 0.5.",
    ),
    ("codebook4-a8", with_value("codebook", 128), "but codebook[4, 15] is 128.0."),
    ("codebook4-a8", with_value("codebook", -129), "but codebook[4, 15] is -129.0."),
    ("int8", lambda p: p | {"perm": np.arange(K)}, "perm must be int32 for int8"),
    ("int8", lambda p: p | {"perm": np.arange(9, dtype="i4")}, "perm must have shape (100,)"),
    (
        "int8",
        lambda p: p | {"perm": np.arange(1, K + 1, dtype="i4")},
        "perm must hold columns 0..99, but perm[99] is 100.",
    ),
    ("int8", lambda p: p | {"perm": np.arange(-1, K - 1, dtype="i4")}, "but perm[0] is -1."),
    (
        "int8",
        lambda p: p | {"perm": np.arange(K, dtype="i4") // 2 * 2},
        "perm must hold every column once, but holds 0 repeatedly.",
    ),
]


@pytest.mark.parametrize("wrong", [[1 << 30], [-1], [0, 0]])
def test_a_bad_permutation_that_nobody_looked_at_writes_nowhere(wrong: list[int]) -> None:
    """Dequantizing indexes memory with it, also where from_parts was told not to look."""
    weight = made("int8")
    parts = weight.parts() | {"perm": np.arange(K, dtype="i4")}
    parts["perm"][: len(wrong)] = wrong
    unseen = QuantizedTensor.from_parts(weight.format, weight.shape, check=False, **parts)
    for read in (unseen.dequantize, lambda: unseen.rows(np.array([1]))):
        with pytest.raises(FormatError, match=r"perm must hold every column 0\.\.99 once"):
            read()


@pytest.mark.parametrize(("text", "change", "sentence"), BAD_PARTS)
def test_bad_parts(text: str, change: Change, sentence: str) -> None:
    parts = change(made(text).parts())
    with pytest.raises((FormatError, TypeError)) as error:
        QuantizedTensor.from_parts(text, (N, K), **parts)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((5,), "shape must be two integers (N, K), but (5,) came."),
        ((5, 100.0), "shape must be two integers"),
        (7, "shape must be two integers (N, K), but 7 came."),
        ((0, 100), "at least one row and one column, but has 0 x 100."),
        ((5, -1), "at least one row and one column"),
        ((5, 2**31), "at most 2**31 - 1 columns"),
    ],
)
def test_bad_shapes(shape: Any, sentence: str) -> None:
    with pytest.raises(FormatError) as error:
        QuantizedTensor.from_parts("int4-g32", shape, **made("int4-g32").parts())
    assert sentence in str(error.value)


def test_parts_must_share_a_home() -> None:
    torch = torch_module()
    parts = made("int4-g32", "torch").parts()
    with pytest.raises(FormatError, match="codes is of torch and scales of numpy"):
        QuantizedTensor.from_parts(
            "int4-g32", (N, K), codes=parts["codes"], scales=parts["scales"].numpy()
        )
    with pytest.raises(FormatError, match="codes is on cpu and scales on meta"):
        QuantizedTensor.from_parts(
            "int4-g32", (N, K), codes=parts["codes"], scales=parts["scales"].to("meta")
        )
    meta = {name: part.to("meta") for name, part in parts.items()}
    qt = QuantizedTensor.from_parts("int4-g32", (N, K), **meta)
    assert qt.device == torch.device("meta")
    assert qt.bits_per_weight == made("int4-g32").bits_per_weight
    with pytest.raises(UnsupportedError, match=r"is for the CPU, but this tensor is on meta"):
        qt.packed()


def test_numbers_are_left_unread_on_request() -> None:
    parts = with_value("scales", np.nan)(made("int4-g32").parts())
    assert QuantizedTensor.from_parts("int4-g32", (N, K), check=False, **parts).shape == (N, K)
    with pytest.raises(FormatError, match="codes must have shape"):
        QuantizedTensor.from_parts("int4-g32", (N, K + 2), check=False, **parts)


def test_constructor_names_the_ways() -> None:
    with pytest.raises(TypeError, match=r"Use qkern\.quantize or QuantizedTensor\.from_parts"):
        QuantizedTensor()


def test_bad_dtype() -> None:
    with pytest.raises(UnsupportedError, match="to float32, float16, not to float64"):
        made("int8").dequantize(np.float64)
    with pytest.raises(UnsupportedError, match="to float32, float16, not to bfloat16"):
        made("int8").dequantize("bfloat16")
    with pytest.raises(TypeError, match="A dtype was expected"):
        made("int8").dequantize("half a float")


# ---- the packed state ----


@pytest.mark.parametrize("perm", [False, True], ids=["", "perm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_packed_state_gives_every_bit_back(text: str, kind: str, perm: bool) -> None:
    qt = made(text, kind, perm)
    before, values = qt.parts(), np.asarray(qt.dequantize())
    table_scale = qt.table_scale
    holder = qt.packed()
    assert qt.packed() is holder
    assert not qt.is_packed
    assert holder.address % 64 == 0
    assert holder.describe()["n"] == N
    assert qt.pack_() is qt
    assert qt.is_packed
    assert qt.packed() is holder
    assert qt.table_scale == table_scale
    assert "codes" not in qt._state[0], "the canonical copy must be gone"
    assert_same(qt.parts(), before)
    assert qt.codes is not qt.codes, "a packed tensor hands out fresh arrays"
    np.testing.assert_array_equal(np.asarray(qt.dequantize()), values)
    for other in (pickle.loads(pickle.dumps(qt)), copy.deepcopy(qt)):
        assert not other.is_packed
        assert_same(other.parts(), before)
    assert qt.unpack_() is qt
    assert qt._state[1] is None, "the machine layout must be gone"
    assert_same(qt.parts(), before)


def test_rows() -> None:
    qt = made("codebook4-a8", perm=True)
    values = qt.dequantize()
    ids = np.array([3, 0, 3, 4])
    for state in (qt, qt.pack_()):
        np.testing.assert_array_equal(state.rows(ids), values[ids])


def test_states_under_threads() -> None:
    """Readers see one state or the other while another thread switches."""
    qt = made("int4-g32-asym")
    codes, values = qt.codes.copy(), qt.dequantize()
    wrong: list[str] = []

    def read() -> None:
        for _ in range(300):
            if not (qt.codes == codes).all() or not (qt.dequantize() == values).all():
                wrong.append("a reader saw other numbers")

    def switch() -> None:
        for _ in range(300):
            qt.pack_()
            qt.unpack_()

    threads = [threading.Thread(target=t) for t in (read, read, switch, switch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- moving ----


@pytest.mark.parametrize("text", TEXTS)
def test_between_the_libraries(text: str) -> None:
    torch = torch_module()
    qt = made(text)
    there = qt.to("cpu")
    assert there.device == torch.device("cpu")
    assert there.to("cpu") is there
    assert_same(there.numpy().parts(), qt.parts())
    assert qt.numpy() is qt
    assert there.dequantize(torch.float16).dtype == torch.float16
    expected = torch.from_numpy(qt.dequantize()).to(torch.bfloat16)
    for name in (torch.bfloat16, "bfloat16"):
        assert torch.equal(there.dequantize(name), expected)
    meta = qt.pack_().to("meta")
    assert all(part.device.type == "meta" for part in meta.parts().values())


@pytest.mark.gpu
@pytest.mark.parametrize("text", TEXTS)
def test_on_a_gpu(text: str) -> None:
    torch = torch_module()
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    qt = made(text, "torch")
    there = qt.pack_().to("cuda")
    assert all(part.device.type == "cuda" for part in there.parts().values())
    assert there.table_scale == qt.table_scale
    assert_same(there.to("cpu").parts(), qt.parts())
    assert torch.equal(there.dequantize().cpu(), qt.dequantize())
    weight = torch.randn(N, K, device="cuda")
    ours = quantize(weight, text)
    assert ours.device.type == "cuda"
    assert_same(ours.to("cpu").parts(), quantize(weight.cpu(), text).parts())


def test_every_format_has_a_case_here() -> None:
    families = {type(parse_format(text)).family for text in TEXTS}
    alike = {"fp4", "iq4nl"}  # of the same class as nf4
    assert families | alike == set(FORMATS)


@pytest.mark.parametrize(
    "fmt",
    ["int8", "int4-g64", "int4-g32-asym", "int4-g128-a8", "int3-g64", "int2-g64", "nf4", "mxfp4",
     "nvfp4", "codebook4", "codebook4-a8", "codebook3", "codebook3-a8", "codebook2", "lutb",
     "lutb-a8"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(384, 384), (384, 1536), (1536, 384)])
def test_packed_bytes_are_within_5_percent_of_canonical_ones(
    fmt: str, shape: tuple[int, int]
) -> None:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    qt = quantize(w, fmt)
    assert qt.packed().nbytes <= 1.05 * qt.nbytes
