# SPDX-License-Identifier: Apache-2.0
"""Formats: their text, their bytes and what the numbers mean."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator

import numpy as np
import pytest

from qkern import formats
from qkern._quantize import quantize
from qkern.errors import FormatError
from qkern.formats import (
    FORMATS,
    FP4,
    IQ4NL,
    MXFP4,
    NF4,
    NVFP4,
    Codebook,
    Format,
    Int,
    _fit,
    parse_format,
    register,
)
from qkern.formats._codes import E4M3, E8M0, e2m1_codes, e4m3_codes, pack_codes, unpack_codes
from qkern.tensor import QuantizedTensor

ALL = [fmt for cls in FORMATS.values() for fmt in cls.variants((8, 64))]


def f32(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


# ---- text ----


@pytest.mark.parametrize(
    ("text", "fmt"),
    [
        ("int4-g128", Int(4, group_size=128)),
        ("int4-g32-asym", Int(4, 32, symmetric=False)),
        ("int8", Int(8)),
        ("int3-g64", Int(3, 64)),
        ("int8-a8", Int(8, activations="int8")),
        ("int4-g128-a8", Int(4, 128, activations="int8")),
        ("int4-g32-asym-a8g", Int(4, 32, False, activations="int8_group")),
        ("codebook4", Codebook(4)),
        ("codebook3", Codebook(3, "row")),
        ("codebook4-a8", Codebook(4, activations="int8")),
        ("codebook4-tensor", Codebook(4, per="tensor")),
        ("codebook4-tensor-g64", Codebook(4, "tensor", 64)),
        ("codebook4-g64", Codebook(4, group_size=64)),
        ("codebook4-group-g64", Codebook(4, "group", 64)),
        ("nf4", NF4(64)),
        ("nf4-g128", NF4(group_size=128)),
        ("fp4", FP4()),
        ("iq4nl", IQ4NL(32)),
        ("iq4nl-g64-a8", IQ4NL(64, activations="int8")),
        ("mxfp4", MXFP4()),
        ("nvfp4-a8g", NVFP4(activations="int8_group")),
    ],
)
def test_text_of_a_format(text: str, fmt: Format) -> None:
    assert str(fmt) == text
    assert parse_format(text) == fmt


def test_text_and_repr_of_every_combination() -> None:
    names = {"qkern": types.SimpleNamespace(**{c.__name__: c for c in FORMATS.values()})}
    for fmt in ALL:
        assert parse_format(str(fmt)) == fmt
        assert eval(repr(fmt), names) == fmt
        assert hash(parse_format(str(fmt))) == hash(fmt)
        assert parse_format(fmt) is fmt
    assert len({str(fmt) for fmt in ALL}) == len(set(ALL)) == len(ALL)
    # Int 6 bits x 3 groups x 2 x 3; Codebook 4 bits x (3 + 3 + 2) x 3; five fixed tables; LUTB.
    assert len(ALL) == 108 + 96 + 6 + 6 + 9 + 3 + 3 + 3


def test_text_is_read_leniently() -> None:
    assert parse_format(" INT4-a8-ASYM-g32 ") == Int(4, 32, False, activations="int8")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("int4-g128-a16", ["'a16' is not one of", "asym, a8, a8g, g<size>", "int4-g128-a8"]),
        ("itn4-g128", ["must begin with one of", "'int4-g128'"]),
        ("int7", ["bits must be one of 2, 3, 4, 5, 6, 8, but 7 came", "'int"]),
        ("int", ["'int' must be followed by a number of bits"]),
        ("nf44", ["'nf4' must not be followed by a number", "'nf4'"]),
        ("mxfp4-g32", ["'g32' is not one of", "'mxfp4'"]),
        ("int4-g4", ["group_size must be at least 8", "4 came"]),
        ("int4-a8-a8g", ["repeats or contradicts"]),
        ("codebook4-group", ["needs a group_size", "codebook4-group-g64"]),
        ("codebook4-tensor-group-g64", ["repeats or contradicts"]),
        ("", ["must begin with one of"]),
    ],
)
def test_wrong_text_is_told_the_nearest_right_one(text: str, parts: list[str]) -> None:
    with pytest.raises(FormatError) as error:
        parse_format(text)
    for part in [repr(text), *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Int(7), "bits must be one of 2, 3, 4, 5, 6, 8, but 7 came."),
        (lambda: Int(True), "bits must be an integer, but True came."),
        (lambda: Int("4"), "bits must be an integer, but '4' came."),
        (lambda: Int(4, -1), "group_size must be at least 8, or None for one scale per row"),
        (lambda: Int(4, 32.0), "group_size must be an integer, but 32.0 came."),
        (lambda: Int(4, symmetric="no"), "symmetric must be True or False, but 'no' came."),
        (lambda: Int(4, activations="fp8"), "activations must be one of 'float', 'int8', 'int8_g"),
        (lambda: Int(4, activations=["int8"]), "activations must be one of"),
        (lambda: Codebook(5), "bits must be one of 2, 3, 4, 8, but 5 came."),
        (
            lambda: Codebook(4, "column"),
            "per must be one of 'tensor', 'row', 'group', not 'column'",
        ),
        (lambda: Codebook(4, "group"), "A codebook per group needs a group_size"),
        (lambda: NF4(None), "group_size must be an integer, but None came."),
    ],
)
def test_wrong_arguments(make, sentence: str) -> None:
    with pytest.raises(FormatError) as error:
        make()
    assert sentence in str(error.value)


def test_wrong_type_of_text() -> None:
    with pytest.raises(TypeError, match="A format or its text was expected, but int came"):
        parse_format(4)


def test_formats_are_immutable() -> None:
    fmt = Int(4, np.int64(32))
    assert type(fmt.group_size) is int
    for name in ("bits", "group_size", "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(fmt, name, 8)
    with pytest.raises(ValueError, match="read-only"):
        NF4().table[0] = 1
    assert fmt.with_activations("int8") == Int(4, 32, activations="int8") != fmt


# ---- golden bytes: worked out by hand ----

# w, text, codes as hex, scales, the other parts
GOLDEN = [
    # max 3, scale 1, code = w + 4: 7 1 4 5 6 3 2 4, as 3-bit digits 0x89eb0f
    (f32(3, -3, 0, 1, 2, -1, -2, 0), "int3", "0feb89", [[1]], {}),
    # max 7, scale 1, halves to even: 2.5 is 2, -0.5 is 0, 3.5 is 4; codes f 1 8 9 a 8 c 5
    (f32(7, -7, 0, 1, 2.5, -0.5, 3.5, -3), "int4", "1f988a5c", [[1]], {}),
    # scale 2^-3 in the first group, the short second one has scale 2: codes f 9 8.. | f 7
    (f32(0.875, 0.125, 0, 0, 0, 0, 0, 0, 14, -2), "int4-g8", "9f8888887f", [[0.125, 2]], {}),
    # max 127, code = w + 128
    (f32(127, -127, 0, 1), "int8", "ff018081", [[1]], {}),
    # -1..2 in steps of 1: zero 1, codes 0 1 2 3 0 1 2 3
    (f32(-1, 0, 1, 2, -1, 0, 1, 2), "int2-g8-asym", "e4e4", [[1]], {"zeros": [[1]]}),
    # one sign: the range is widened to hold 0, so scale 15/15 and zero 0
    (f32(15, 14, 1, 3), "int4-asym", "ef31", [[1]], {"zeros": [[0]]}),
    # max 15, code = w + 16: 31 1 16 17 15 18 14 19; 31 + 1*2^5 + 16*2^10 + 17*2^15 + 15*2^20
    # + 18*2^25 + 14*2^30 + 19*2^35 = 0x9ba4f8c03f
    (f32(15, -15, 0, 1, -1, 2, -2, 3), "int5", "3fc0f8a49b", [[1]], {}),
    # codes 63 1 32 33 as 6-bit digits: 63 + 1*2^6 + 32*2^12 + 33*2^18 = 0x86007f
    (f32(31, -31, 0, 1), "int6", "7f0086", [[1]], {}),
    # a table per row, ascending; codes 3 0 1 2 | short
    (f32(9, -4, 0, 2, 9), "codebook2", "9303", None, {"codebook": [[-4, 0, 2, 9]]}),
    # snapped: scale 127/127, the same integers
    (f32(127, -4, 0, 2), "codebook2-a8", "93", [[1]], {"codebook": [[-4, 0, 2, 127]]}),
    # one table per group of 8
    (
        f32(1, 2, 3, 4, 1, 2, 3, 4, 8, 7, 6, 5, 8, 7, 6, 5),
        "codebook2-group-g8",
        "e4e41b1b",
        None,
        {"codebook": [[1, 2, 3, 4], [5, 6, 7, 8]]},
    ),
    # scale = the group's maximum, the table holds quotients
    (
        f32(2, -2, 0, 1, 2, -2, 0, 1, 8, -8, 0, 4, 8, -8, 0, 4),
        "codebook2-tensor-g8",
        "93939393",
        [[2, 8]],
        {"codebook": [[-1, 0, 0.5, 1]]},
    ),
    # the table itself times 4, in order: codes 0..15
    (NF4().table[None] * 4, "nf4", "1032547698badcfe", [[4]], {}),
    # the same; code 8 is a second zero and never chosen
    (FP4().table[None] * 3, "fp4", "1032547690badcfe", [[3]], {}),
    (IQ4NL().table[None] * 0.5, "iq4nl", "1032547698badcfe", [[0.5]], {}),
    # mirrored: the scale takes the sign
    (IQ4NL().table[None] * -0.5, "iq4nl", "1032547698badcfe", [[-0.5]], {}),
    # max 12: floor(log2 12) - 2 = 1, byte 128
    (MXFP4().table[None] * 2, "mxfp4", "1032547690badcfe", [[128]], {}),
    # max 7.9: scale 1; 7.9 saturates at 6 (7), ties to even: 2.5 -> 2 (4), 3.5 -> 4 (6),
    # 5 -> 4 (6), 0.75 -> 1 (2), 1.25 -> 1 (2), 1.75 -> 2 (4), -0.25 -> 0 (0), -5 -> -4 (14)
    (f32(7.9, 2.5, 3.5, 5, 0.75, 1.25, 1.75, -0.25, -5), "mxfp4", "476622040e", [[127]], {}),
    # max 2688: global 1, first scale 448 (0x7e), second group max 6: scale 1 (0x38)
    (
        np.concatenate([NVFP4().table * 448, NVFP4().table[::-1]])[None],
        "nvfp4",
        "1032547690badcfe" + "efcdab0967452301",
        [[0x7E, 0x38]],
        {"global_scale": [1]},
    ),
]


@pytest.mark.parametrize(("w", "text", "codes", "scales", "others"), GOLDEN)
def test_golden_bytes(w, text, codes, scales, others) -> None:
    parts = parse_format(text).quantize(np.ascontiguousarray(w, np.float32))
    assert parts.pop("codes").tobytes().hex() == codes
    if scales is not None:
        np.testing.assert_array_equal(parts.pop("scales"), scales)
    assert parts.keys() == others.keys()
    for name, part in others.items():
        np.testing.assert_array_equal(parts[name], part)


def test_integer_tables() -> None:
    nf4 = [-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127]
    fp4 = [0, 1, 85, 127, 42, 64, 21, 32]
    e2m1 = [0, 1, 2, 3, 4, 6, 8, 12]
    for cls, expected, scale in [
        (NF4, nf4, np.float32(1) / np.float32(127)),
        (FP4, fp4 + [-v for v in fp4], np.float32(1) / np.float32(127)),
        (IQ4NL, list(IQ4NL().table), 1),
        (MXFP4, e2m1 + [-v for v in e2m1], 0.5),
        (NVFP4, e2m1 + [-v for v in e2m1], 0.5),
    ]:
        for activations in ("int8", "int8_group"):
            fmt = cls(activations=activations)
            np.testing.assert_array_equal(fmt.table, expected)
            assert fmt.table_scale == scale
            assert not np.signbit(fmt.table[fmt.table == 0]).any()
        assert cls().table_scale == 1
        assert not np.signbit(cls().table[cls().table == 0]).any()


# ---- small encodings ----


def test_bit_stream() -> None:
    """Against one long integer per row, and the packer of the core against the definition."""
    rng = np.random.default_rng(1)
    for bits in range(1, 9):
        for k in (1, 2, 3, 5, 7, 8, 31, 33):
            codes = rng.integers(0, 2**bits, (3, k), dtype=np.uint8)
            stream = pack_codes(codes, bits)
            number = sum(int(c) << bits * i for i, c in enumerate(codes[1]))
            assert stream[1].tobytes() == number.to_bytes((k * bits + 7) // 8, "little")
            np.testing.assert_array_equal(unpack_codes(stream, k, bits), codes)
            np.testing.assert_array_equal(_fit.pack(codes, bits), stream)


def test_byte_floats_against_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the oracle of float8 is not installed")
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(E4M3, every.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    np.testing.assert_array_equal(E8M0, every.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(MXFP4().table, e2m1)
    x = np.linspace(0, 440, 20001, dtype=np.float32)  # includes every tie below 440
    theirs = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(E4M3[e4m3_codes(x)], theirs)
    assert e4m3_codes(np.array([448, 1e9])).tolist() == [126, 126]
    x = np.linspace(-6, 6, 9601, dtype=np.float32)  # includes every tie
    theirs = x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(e2m1[e2m1_codes(x)], theirs)
    assert e2m1_codes(np.array([7, 1e9, -1e9, -0.2])).tolist() == [7, 7, 15, 0]


def test_nf4_table_against_the_normal_distribution() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the oracle of quantiles is not installed")
    # Eight steps above and seven below, from the quantile at which the outermost ones stand.
    outer = 0.9677083
    above = stats.norm.ppf(np.linspace(outer, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(outer, 0.5, 8)[:-1])
    table = np.sort(np.concatenate([above, below, [0]]))
    np.testing.assert_allclose(NF4().table, table / table.max(), atol=2e-7)


# ---- what the numbers mean ----


def random_parts(fmt: Format, n: int, k: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every part with numbers that a file may hold, perm included."""
    made = {}
    for name, (shape, dtypes) in fmt.parts(n, k).items():
        if name == "codes" or (name == "scales" and fmt.scale_encoding == "e8m0"):
            made[name] = rng.integers(100, 150, shape, dtype=np.uint8)
            if name == "codes":
                made[name] = rng.integers(0, 256, shape, dtype=np.uint8)
        elif name == "scales" and fmt.scale_encoding == "e4m3":
            made[name] = rng.integers(0, 127, shape, dtype=np.uint8)
        elif name == "codebook" and fmt.table_encoding == "e4m3":
            # Four neighbouring exponents: any such table serves int8 activations too.
            sign, mantissa = rng.integers(0, 2, shape) << 7, rng.integers(0, 8, shape)
            made[name] = (sign | rng.integers(6, 10, shape) << 3 | mantissa).astype(np.uint8)
        elif name == "codebook" and fmt.activations != "float":
            made[name] = rng.integers(-128, 128, shape).astype(np.float32)
        else:
            made[name] = (rng.standard_normal(shape) * 3).astype(rng.choice(list(numpy_of(dtypes))))
    made["perm"] = rng.permutation(k).astype(np.int32)
    return made


def numpy_of(dtypes: tuple[str, ...]) -> Iterator[str]:
    return (name for name in dtypes if name not in ("bfloat16", "uint8"))


def by_the_definition(fmt: Format, parts: dict, n: int, k: int, row: int, column: int):
    """One weight, straight from the formulas, in float32 with one rounding per operation."""
    f = np.float32
    stored = int(np.flatnonzero(parts["perm"] == column)[0])
    stream = int.from_bytes(parts["codes"][row].tobytes(), "little")
    code = stream >> stored * fmt.bits & (2**fmt.bits - 1)
    group = stored // fmt.group_size if fmt.group_size else 0
    scale = f(1)
    if "scales" in parts:
        scale = parts["scales"][row, group]
        if fmt.scale_encoding == "e8m0":
            scale = f(2.0 ** (int(scale) - 127))
        elif fmt.scale_encoding == "e4m3":
            scale = E4M3[scale]
    if fmt.kind == "int":
        zero = f(parts["zeros"][row, group]) if "zeros" in parts else f(2 ** (fmt.bits - 1))
        return f(scale) * (f(code) - zero)
    if "global_scale" in parts:
        factor = f(fmt.table_scale) * parts["global_scale"][0]
    else:
        factor = f(fmt.table_scale)
    tables = len(parts["codebook"]) if "codebook" in parts else 1
    index = {1: 0, n: row, n * fmt.groups(k): row * fmt.groups(k) + group}
    table = parts["codebook"][index[tables]] if "codebook" in parts else fmt.table
    if fmt.table_encoding == "e4m3":  # a single tile
        table = E4M3[table]
    return f(scale) * factor * table[code]


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_dequantize_is_the_definition(fmt: Format) -> None:
    rng = np.random.default_rng(2)
    n, k = 3, 21
    parts = random_parts(fmt, n, k, rng)
    w = fmt.dequantize(parts, (n, k))
    expected = [
        [by_the_definition(fmt, parts, n, k, row, col) for col in range(k)] for row in range(n)
    ]
    np.testing.assert_array_equal(w.view(np.int32), np.array(expected, np.float32).view(np.int32))


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_kernels_dequantize_the_same_bits(fmt: Format) -> None:
    rng = np.random.default_rng(3)
    for n, k in [(1, 1), (1, 64), (5, 7), (17, 130), (33, 65), (2, 257)]:
        parts = random_parts(fmt, n, k, rng)
        qt = QuantizedTensor.from_parts(fmt, (n, k), **parts)
        expected = fmt.dequantize(parts, (n, k))
        for state in (qt, qt.pack_()):
            np.testing.assert_array_equal(
                state.dequantize().view(np.int32), expected.view(np.int32)
            )
        with np.errstate(over="ignore"):
            half = expected.astype(np.float16)
        np.testing.assert_array_equal(qt.dequantize(np.float16), half)


def half_step(fmt: Format) -> float:
    """Largest distance of a weight from its nearest value, in units of the effective scale.

    Half the widest step. Beyond the ends: IQ4NL reaches 127 on one side and 113 on the other;
    MXFP4's scale is rounded down so that up to 8 saturates at 6; NVFP4's is rounded to 3 bits of
    mantissa, at most 1/16 too small, so that 6 * 17/16 saturates at 6 (within half a step).
    """
    if fmt.kind == "int":
        # Scales of float16 move an end by 2^-11 of at most 15 steps.
        return 0.5 + 15 * 2.0**-11
    step = np.diff(np.sort(fmt.table)).max() / 2
    beyond = {"iq4nl": 14, "mxfp4": 2 / fmt.table_scale}.get(fmt.family, 0)
    return max(step, beyond) + np.abs(fmt.table).max() * 2.0**-11


@pytest.mark.parametrize("fmt", [f for f in ALL if not f.uses_importance], ids=str)
def test_error_of_rounding_to_nearest(fmt: Format) -> None:
    """|w - dequantized| <= scale * half_step, and half a step is what rounding may cost.

    The quotient w / scale and the product carry one float32 rounding each (2^-24 of at most 255
    steps), hence the factor 1 + 2^-14.
    """
    rng = np.random.default_rng(4)
    n, k = 9, 100
    w = rng.standard_normal((n, k)).astype(np.float32)
    w[0] = np.abs(w[0])  # one sign only
    w[1] = -np.abs(w[1])
    w[2] = 0
    parts = fmt.quantize(w)
    factor = np.abs(fmt.decode_scales(parts["scales"]) * np.float32(fmt.table_factor(parts)))
    scale = factor[:, np.arange(k) // (fmt.group_size or k)]
    error = np.abs(fmt.dequantize(parts, (n, k)) - w)
    assert (error <= scale * half_step(fmt) * (1 + 2.0**-14)).all()
    assert (error[2] == 0).all()
    # Not better than it can be either: the codes do vary and some weight is off by 2/5 of a step.
    smallest = 1 if fmt.kind == "int" else np.diff(np.unique(fmt.table)).min()
    assert (error[3:] > 0.4 * smallest * scale[3:]).any()


# ---- other people's decoders ----


def test_iq4nl_against_gguf() -> None:
    quants = pytest.importorskip("gguf.quants", reason="the oracle of GGUF is not installed")
    from gguf import GGMLQuantizationType

    rng = np.random.default_rng(5)
    n, k = 40, 256
    qt = quantize(rng.standard_normal((n, k)).astype(np.float32), "iq4nl")
    codes = unpack_codes(qt.codes, k, 4).reshape(n, k // 32, 32)
    blocks = np.empty((n, k // 32, 18), np.uint8)
    assert qt.scales.dtype == np.float16
    blocks[..., :2] = qt.scales.view(np.uint8).reshape(n, k // 32, 2)
    blocks[..., 2:] = codes[..., :16] | codes[..., 16:] << 4
    theirs = quants.dequantize(blocks.reshape(n, -1), GGMLQuantizationType.IQ4_NL)
    np.testing.assert_array_equal(qt.dequantize(), theirs)


def test_mxfp4_against_gguf() -> None:
    quants = pytest.importorskip("gguf.quants", reason="the oracle of GGUF is not installed")
    from gguf import GGMLQuantizationType

    rng = np.random.default_rng(6)
    n, k = 40, 256
    w = (rng.standard_normal((n, k)) * np.exp2(rng.integers(-9, 9, (n, 1)))).astype(np.float32)
    qt = quantize(w, "mxfp4")
    blocks = quants.quantize(w, GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(qt.scales, blocks.reshape(n, k // 32, 17)[..., 0])
    theirs = quants.dequantize(blocks, GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(qt.dequantize(), theirs)


# ---- a new format ----


@pytest.fixture
def ternary() -> Iterator[type[Format]]:
    """All that a new format takes: one class."""

    @register
    @dataclasses.dataclass(frozen=True, repr=False)
    class Ternary(formats.fixed.ScaledTable):
        group_size: int = 32
        family = "ternary"
        bits = 2
        values = int_values = formats.fixed._table([0, 1, -1, 0])
        int_scale = 1.0

    yield Ternary
    del FORMATS["ternary"]


def test_a_new_format_is_one_class(ternary: type[Format]) -> None:
    fmt = parse_format("ternary-g16-a8")
    assert fmt == ternary(group_size=16, activations="int8")
    w = np.repeat(f32(0.5, -0.5, 0, 0.25 + 1e-6), 8, axis=1)
    qt = quantize(w, fmt)
    assert qt.codes.tobytes().hex() == "5555aaaa" + "00005555"
    expected = np.repeat(f32(0.5, -0.5, 0, 0.25), 8, axis=1)
    np.testing.assert_allclose(qt.dequantize(), expected, rtol=1e-3)
    qt.pack_()
    np.testing.assert_array_equal(qt.dequantize(), fmt.dequantize(qt.parts(), qt.shape))
    with pytest.raises(ValueError, match="'ternary' is already registered"):
        register(ternary)
    ternary.values = ternary.values[:3]  # a table that kernels would read past
    with pytest.raises(FormatError, match=r"must be float32 \[4\], but is float32 \[3\]"):
        ternary()
