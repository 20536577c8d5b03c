# SPDX-License-Identifier: Apache-2.0
"""LUT-B: its bytes, its fit, its rules, and its kernels on whole and ragged tiles.

`tests/test_linear.py` holds the kernels to the contract; here they are reached through tensors.
"""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest

import qkern
from qkern import _core
from qkern.errors import FormatError, UnsupportedError
from qkern.formats import LUTB
from qkern.tensor import QuantizedTensor
from qkern.testing import Case, Problem

MODES = ("float", "int8", "int8_group")
# Whole tiles; one row and column more and fewer; less than a tile; halves and panels cut.
SHAPES = [(8, 64), (13, 100), (9, 65), (7, 63), (1, 1), (40, 200), (33, 128), (3, 300)]


def e4m3(byte: int) -> float:
    """The value of a byte, from the definition."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if sign else size


FINITE = [b for b in range(256) if b & 127 != 127]
NUMBERS = np.array(sorted({e4m3(b) for b in FINITE}))
VALUES = np.array([e4m3(b) if b & 127 != 127 else np.nan for b in range(256)], np.float32)


def weight(n: int, k: int, seed: int = 0, size: float = 0.1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, k)) * size).astype(np.float32)


def codes_of(stream: np.ndarray, k: int) -> np.ndarray:
    numbers = [int.from_bytes(row.tobytes(), "little") for row in stream]
    return np.array([[number >> 3 * i & 7 for i in range(k)] for number in numbers], np.uint8)


def tile_index(n: int, k: int) -> np.ndarray:
    return np.arange(n)[:, None] // 8 * -(-k // 64) + np.arange(k)[None] // 64


def unit(entries: np.ndarray) -> float:
    """2^(E - 6) of a tile."""
    largest = np.abs(entries).max()
    return 2.0 ** (np.floor(np.log2(largest)) - 6) if largest else 1.0


# ---- bytes ----


def test_golden_bytes() -> None:
    """Eight float8 numbers are kept exactly; codes of three bits, the first in the low bits."""
    w = np.zeros((9, 65), np.float32)
    w[0, :8] = [-1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2]
    w[8] = 448
    w[:, 64] = -(2.0**-9)
    for mode in MODES:
        qt = qkern.quantize(w, LUTB(activations=mode))
        assert qt.codes[0].tobytes().hex() == "88c6fa" + "dbb66d" * 7 + "00"
        assert qt.codes[8].tobytes().hex() == "00" * 25
        assert [row.tobytes().hex() for row in qt.codebook] == [
            "b8b0a80028303840",
            "81" * 8,
            "7e" * 8,
            "81" * 8,
        ]
        np.testing.assert_array_equal(qt.dequantize(), w)


def prototype_tiles(codes: np.ndarray) -> np.ndarray:
    """The prototype's bytes of whole tiles, written from its description: the 512 codes of a tile
    row by row, each eight of them a 24-bit little-endian word whose first code is lowest."""
    n, k = codes.shape
    packed = np.zeros((n // 8, k // 64, 192), np.uint8)
    for tile_row, tile_column in np.ndindex(packed.shape[:2]):
        flat = codes[8 * tile_row :][:8, 64 * tile_column :][:, :64].reshape(-1)
        for word in range(64):
            value = sum(int(c) << 3 * i for i, c in enumerate(flat[8 * word : 8 * word + 8]))
            three = list(value.to_bytes(3, "little"))
            packed[tile_row, tile_column, 3 * word : 3 * word + 3] = three
    return packed


def as_torch(array: np.ndarray) -> Any:
    return pytest.importorskip("torch", reason="torch is not installed").from_numpy(array)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_tiles_of_the_prototype(library: str) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (24, 192), dtype=np.uint8)
    packed = prototype_tiles(codes)
    codebook = rng.choice(np.array(FINITE, np.uint8), (3, 3, 8))
    expected = VALUES[codebook.reshape(-1, 8)[tile_index(24, 192), codes]]
    given: list[Any] = [packed, codebook]
    if library == "torch":
        import torch

        given = [as_torch(packed), as_torch(codebook).view(torch.float8_e4m3fn)]
    parts = LUTB.from_tiles(*given)
    qt = QuantizedTensor.from_parts("lutb", (24, 192), **parts)
    assert qt.kind == library
    np.testing.assert_array_equal(codes_of(np.asarray(qt.codes), 192), codes)
    np.testing.assert_array_equal(np.asarray(qt.dequantize()), expected)
    back = LUTB.to_tiles(qt.codes, qt.codebook, qt.shape)
    np.testing.assert_array_equal(np.asarray(back[0]), packed)
    np.testing.assert_array_equal(np.asarray(back[1]), codebook)


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_tiles_go_there_and_back(shape: tuple[int, int]) -> None:
    n, k = shape
    qt = qkern.quantize(weight(n, k), "lutb")
    codes = qt.codes.copy()
    if k * 3 % 8:
        codes[:, -1] |= 0xFF << k * 3 % 8 & 0xFF  # bits that mean nothing
    packed, codebook = LUTB.to_tiles(codes, qt.codebook, shape)
    whole = np.zeros((-(-n // 8) * 8, -(-k // 64) * 64), np.uint8)
    whole[:n, :k] = codes_of(qt.codes, k)
    np.testing.assert_array_equal(packed, prototype_tiles(whole))
    whole[n:], whole[:, k:] = 5, 5  # what lies outside the weight is cut off
    parts = LUTB.from_tiles(prototype_tiles(whole), codebook, shape)
    np.testing.assert_array_equal(parts["codes"], qt.codes)
    np.testing.assert_array_equal(parts["codebook"], qt.codebook)


def test_tiles_that_do_not_fit() -> None:
    packed, codebook = np.zeros((2, 3, 192), np.uint8), np.zeros((2, 3, 8), np.uint8)
    for arguments, sentence in [
        ((packed[..., :96], codebook), r"weight_packed must be uint8 \[N/8, K/64, 192\]"),
        ((packed.astype(np.int8), codebook), "but is int8"),
        ((packed, codebook[:1]), r"uint8 \[2, 3, 8\], but is uint8 \[1, 3, 8\]"),
        ((packed, codebook, (17, 192)), "17 x 192 has 3 x 3 tiles, but weight_packed has 2 x 3"),
    ]:
        with pytest.raises(FormatError, match=sentence):
            LUTB.from_tiles(*arguments)
    with pytest.raises(FormatError, match=r"codebook \[6, 8\], but"):
        LUTB.to_tiles(np.zeros((16, 72), np.uint8), codebook[0], (16, 192))


# ---- the fit ----


def error_of(w: np.ndarray, entries: np.ndarray, importance: np.ndarray) -> float:
    distance = np.abs(w.reshape(-1, 1).astype(np.float64) - entries).min(axis=1)
    return float((importance.reshape(-1) * distance**2).sum())


def allowed(exponent: int) -> np.ndarray:
    """Numbers that a tile whose largest has this exponent, or a lower one, may hold."""
    multiples = NUMBERS / 2.0 ** (exponent - 6)
    return NUMBERS[(multiples == np.rint(multiples)) & (np.abs(NUMBERS) < 2.0 ** (exponent + 1))]


def rounded_lloyd(w: np.ndarray, importance: np.ndarray, grid: np.ndarray) -> float:
    """Centres of the optimal k-means rounded to the grid, then Lloyd's steps on the grid."""
    table, _ = qkern.formats._fit.kmeans(
        w.reshape(1, -1), 3, "tensor", None, importance.reshape(1, -1).astype(np.float32)
    )
    entries, best = table[0].astype(np.float64), np.inf
    for _ in range(6):
        entries = grid[np.abs(entries[:, None] - grid).argmin(axis=1)]
        best = min(best, error_of(w, entries, importance))
        nearest = np.abs(w.reshape(-1, 1) - entries).argmin(axis=1)
        mass = np.bincount(nearest, importance.reshape(-1), 8)
        sums = np.bincount(nearest, (importance * w).reshape(-1), 8)
        entries = np.where(mass > 0, sums / np.where(mass > 0, mass, 1), entries)
    return best


def draws() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (8, 64)
    heavy = rng.standard_t(2, shape) * 0.02
    return [
        draw.astype(np.float32)
        for draw in (
            rng.standard_normal(shape) * 0.02,
            rng.standard_normal(shape) * 40,
            rng.standard_normal(shape) * 0.003,
            rng.uniform(0, 1, shape),
            np.clip(heavy, -400, 400),
            np.where(rng.random(shape) < 0.01, 300, rng.standard_normal(shape)),
        )
    ]


@pytest.mark.parametrize("mode", ["float", "int8"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_rounding_of_centres_is_better(mode: str, weighted: bool) -> None:
    for w in draws():
        importance = np.ones(w.shape)
        if weighted:
            importance = np.random.default_rng(2).exponential(size=w.shape).astype(np.float32)
        qt = qkern.quantize(w, LUTB(activations=mode), importance=importance)
        entries = VALUES[qt.codebook[0]].astype(np.float64)
        ours = error_of(w, entries, importance)
        assert (np.diff(entries) >= 0).all()
        top = int(np.floor(np.log2(np.abs(w).max())))
        grids = [NUMBERS] if mode == "float" else [allowed(e) for e in (top + 1, top, top - 1)]
        for grid in grids:
            assert ours <= rounded_lloyd(w, importance, grid) * (1 + 1e-12)
        got = float((importance * (qt.dequantize().astype(np.float64) - w) ** 2).sum())
        assert got == pytest.approx(ours, rel=1e-12)  # codes are those of the nearest entries


@pytest.mark.parametrize("mode", ["float", "int8"])
def test_the_best_of_all_choices(mode: str) -> None:
    """Every choice of 8 from the candidates near the weights, tried out."""
    rng = np.random.default_rng(3)
    for size in (0.006, 0.9, 300):
        w = (rng.uniform(0.6, 1, (4, 5)) * size).astype(np.float32)
        w[0, 0] = size / 40 if size > 1 else w[0, 0]
        qt = qkern.quantize(w, LUTB(activations=mode))
        ours = error_of(w, VALUES[qt.codebook[0]].astype(np.float64), np.ones(20))
        top = int(np.floor(np.log2(w.max())))
        grids = [NUMBERS] if mode == "float" else [allowed(e) for e in range(top - 1, top + 2)]
        best = np.inf
        for grid in grids:
            # Only the two numbers around a mean of weights can be best: those next to a weight.
            near = np.unique(np.searchsorted(grid, w.reshape(-1)).clip(1, len(grid) - 1))
            candidates = np.unique(np.concatenate([grid[near - 1], grid[near]]))[-13:]
            low = grid[np.abs(grid - w.min()).argmin()]
            candidates = np.unique(np.append(candidates, low))
            for entries in itertools.combinations(candidates, min(8, len(candidates))):
                best = min(best, error_of(w, np.array(entries), np.ones(20)))
        assert ours <= best * (1 + 1e-12)
        assert best < np.inf


@pytest.mark.parametrize("mode", ["int8", "int8_group"])
def test_the_grid_of_int8(mode: str) -> None:
    for seed, size in enumerate((1e-3, 0.02, 1, 100)):
        qt = qkern.quantize(weight(40, 200, seed, size), LUTB(activations=mode))
        for entries in VALUES[qt.codebook]:
            multiples = entries / unit(entries)
            assert (multiples == np.rint(multiples)).all()
            assert np.abs(multiples).max() <= 120
        assert (qt.codebook != 0x80).all()
        QuantizedTensor.from_parts(qt.format, qt.shape, **qt.parts())


def test_threads_and_instruction_sets_change_nothing(isa: str) -> None:
    w = weight(37, 300, 5)
    importance = np.random.default_rng(6).random(300).astype(np.float32)
    expected = qkern.quantize(w, "lutb-a8", importance=importance)
    for threads in (1, 3):
        with qkern.override(threads=threads):
            again = qkern.quantize(w, "lutb-a8", importance=importance)
        np.testing.assert_array_equal(again.codes, expected.codes)
        np.testing.assert_array_equal(again.codebook, expected.codebook)
    _core.set_isa("scalar")
    again = qkern.quantize(w, "lutb-a8", importance=importance)
    np.testing.assert_array_equal(again.codebook, expected.codebook)


def test_importance_decides() -> None:
    """Columns of importance 0 get what is left; where all have none, all count the same."""
    w = weight(8, 64, 7)
    w[:, 32:] = 5 + weight(8, 32, 8)
    importance = np.repeat(np.float32([1, 0]), 32)
    qt = qkern.quantize(w, "lutb", importance=importance)
    assert np.abs(VALUES[qt.codebook]).max() < 1
    alone = qkern.quantize(w[:, :32], "lutb")
    np.testing.assert_array_equal(qt.codebook, alone.codebook)
    nothing = qkern.quantize(w, "lutb", importance=np.zeros(64, np.float32))
    np.testing.assert_array_equal(nothing.codebook, qkern.quantize(w, "lutb").codebook)


def test_weights_that_float8_cannot_hold() -> None:
    w = weight(8, 64)
    w[3, 5] = -449
    with pytest.raises(FormatError, match=r"lutb cannot hold .*: weight\[3, 5\] is -449"):
        qkern.quantize(w, "lutb")
    with pytest.raises(FormatError, match="lutb-a8 cannot hold these weights: all of them are"):
        qkern.quantize(np.full((8, 64), 2.0**-11, np.float32), "lutb-a8")
    zeros = qkern.quantize(np.zeros((8, 64), np.float32), "lutb-a8")
    assert not zeros.dequantize().any() and not zeros.pack_().dequantize().any()


# ---- rules ----


def test_parts_that_break_the_rules() -> None:
    codes = np.zeros((9, 24), np.uint8)
    codebook = np.zeros((2, 8), np.uint8)
    codebook[1] = [0x00, 0x01, 0x38, 0x38, 0x38, 0x38, 0x38, 0x39]  # 2^-9 beside 1
    QuantizedTensor.from_parts("lutb", (9, 64), codes=codes, codebook=codebook)
    with pytest.raises(FormatError, match=r"integers times one power of two.*codebook\[1, 1\] is"):
        QuantizedTensor.from_parts("lutb-a8", (9, 64), codes=codes, codebook=codebook)
    codebook[1, 1] = 0x80
    QuantizedTensor.from_parts("lutb", (9, 64), codes=codes, codebook=codebook)
    with pytest.raises(FormatError, match=r"no negative zero.*codebook\[1, 1\] is -0"):
        QuantizedTensor.from_parts("lutb-a8g", (9, 64), codes=codes, codebook=codebook)
    codebook[0, 3] = 0x7F
    with pytest.raises(FormatError, match=r"codebook must be finite, but codebook\[0, 3\] is nan"):
        QuantizedTensor.from_parts("lutb", (9, 64), codes=codes, codebook=codebook)
    with pytest.raises(FormatError, match=r"codebook must have shape \(4, 8\)"):
        QuantizedTensor.from_parts(
            "lutb", (9, 65), codes=np.zeros((9, 25), np.uint8), codebook=codebook
        )
    with pytest.raises(FormatError, match="codebook must be uint8 for lutb"):
        QuantizedTensor.from_parts("lutb", (9, 64), codes=codes, codebook=codebook.astype("f4"))


def test_every_byte_survives_packing() -> None:
    """All finite float8 numbers, negative zero included, through the float16 of the layout; all
    integers of the int8 grid at every exponent."""
    tables = np.array(FINITE + FINITE[:2], np.uint8).reshape(-1, 8)
    n, k = 8 * len(tables), 64
    codes = np.tile(np.uint8([0x88, 0xC6, 0xFA]), (n, 8))
    qt = QuantizedTensor.from_parts("lutb", (n, k), codes=codes, codebook=tables).pack_()
    assert qt.codebook.tobytes() == tables.tobytes()
    expected = VALUES[tables[tile_index(n, k), codes_of(codes, k)]]
    np.testing.assert_array_equal(qt.dequantize().view(np.int32), expected.view(np.int32))

    rows = []
    for grid in map(allowed, range(-9, 9)):
        for some in np.array_split(grid, len(grid) // 7 + 1):
            rows.append(np.resize(np.append(some, grid[-1]), 8))
    byte = {e4m3(b): b for b in FINITE if b != 0x80}
    tables = np.array([[byte[v] for v in row] for row in rows], np.uint8)
    n = 8 * len(tables)
    codes = np.tile(np.uint8([0x88, 0xC6, 0xFA]), (n, 8))
    qt = QuantizedTensor.from_parts("lutb-a8", (n, k), codes=codes, codebook=tables).pack_()
    assert qt.codebook.tobytes() == tables.tobytes()
    expected = VALUES[tables[tile_index(n, k), codes_of(codes, k)]]
    np.testing.assert_array_equal(qt.dequantize().view(np.int32), expected.view(np.int32))


def test_bytes_of_memory() -> None:
    qt = qkern.quantize(weight(128, 512), "lutb")
    assert qt.bits_per_weight == 3.125
    assert qt.packed().nbytes <= 1.05 * qt.nbytes + 512


def test_a_damaged_header_is_refused() -> None:
    p = Problem(Case(3, "float", 64, table="tile", scale="none"), 16, 64)
    p.packed[16:24] = np.frombuffer(np.int64(1 << 20).tobytes(), np.uint8)  # n
    with pytest.raises(ValueError, match="header of this packed weight was overwritten"):
        p.linear(np.zeros((1, 64), np.float32))


def test_what_the_core_refuses() -> None:
    p = Problem(Case(3, "float", 64, table="tile", scale="none"), 16, 64)
    p.codebook[1, 2] = 1 + 2.0**-12
    with pytest.raises(FormatError, match=r"must be exact in float16.*; entry 10 is"):
        p.pack()
    with pytest.raises(ValueError, match="a table per tile has codes of 3 bits, got 4"):
        Problem(Case(4, "float", 64, table="tile", scale="none"), 16, 64)


# ---- kernels ----


def problem_of(qt: QuantizedTensor) -> Problem:
    """The tensor as a problem of the contract, its numbers taken from the bytes anew."""
    n, k = qt.shape
    mode = qt.format.activations
    floats = mode == "float"
    p = Problem(Case(3, mode, 64, table="tile", scale="none" if floats else "e8m0"), n, k)
    p.codes = codes_of(np.asarray(qt.codes), k)
    entries = VALUES[np.asarray(qt.codebook)]
    p.codebook = entries
    if not floats:
        units = np.array([unit(row) for row in entries], np.float32)
        p.codebook = entries / units[:, None]
        p.scale_values = units.reshape(-1, p.groups).repeat(8, axis=0)[:n]
    return p


@pytest.mark.parametrize("mode", MODES)
def test_linear_is_the_contract(isa: str, mode: str) -> None:
    rng = np.random.default_rng(9)
    for n, k in SHAPES:
        qt = qkern.quantize(weight(n, k, n, 0.3), LUTB(activations=mode))
        p = problem_of(qt)
        np.testing.assert_array_equal(p.dequantized(), qt.dequantize())
        for m in (1, 3, 9):
            x = rng.standard_normal((m, k)).astype(np.float32)
            bias = rng.standard_normal(n).astype(np.float32)
            got = qkern.numpy.linear(x, qt, bias)
            np.testing.assert_array_equal(
                got.view(np.int32), p.contract(x, bias).view(np.int32), f"{isa} {n} {k} {m}"
            )


@pytest.mark.parametrize("mode", MODES)
def test_act_order_and_rows(isa: str, mode: str) -> None:
    rng = np.random.default_rng(10)
    n, k = 21, 150
    made = qkern.quantize(weight(n, k), LUTB(activations=mode))
    perm = rng.permutation(k).astype(np.int32)
    qt = QuantizedTensor.from_parts(made.format, (n, k), **made.parts(), perm=perm)
    expected = np.empty((n, k), np.float32)
    expected[:, perm] = made.dequantize()
    p = problem_of(made)
    p.perm = perm
    x = rng.standard_normal((4, k)).astype(np.float32)
    for state in (qt, qt.pack_()):
        np.testing.assert_array_equal(state.dequantize(), expected)
        ids = np.array([[20, 0], [8, 8]])
        np.testing.assert_array_equal(qkern.numpy.embedding(ids, state), expected[ids])
        np.testing.assert_array_equal(qkern.numpy.linear(x, state), p.contract(x))
    back = pickle.loads(pickle.dumps(qt))
    for name, part in made.parts().items():
        np.testing.assert_array_equal(back.parts()[name], part)


def test_kernels_are_chosen_and_explained(isa: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for mode in ("float", "int8"):
        qt = qkern.quantize(torch.from_numpy(weight(16, 64)), LUTB(activations=mode))
        said = qkern.explain(qt)
        usable = [
            row["name"]
            for row in _core.kernels()
            if row["op"] == "linear" and row["usable"] and "tile-table" in row["weights"]
        ]
        assert said.kernel in usable
        reasons = {kernel: reason for kernel, _, reason in said.candidates}
        if "linear_lut3a32_row_avx2" in reasons and isa != "scalar":
            others = {"float": "linear_lut3a32", "int8": "linear_lut3a8d"}[mode]
            assert reasons[f"{others}_row_avx2"] == "it wants tables per row"
            assert reasons[f"{others}_avx2"] == "it wants one table per tensor"
    wide = qkern.quantize(weight(16, 64), "codebook3-tensor")
    p = Problem(Case(3, "float", table="tensor", scale="none"), *wide.shape)
    for row in _core.kernels():
        if "_tile_" in row["name"] and row["usable"] and row["activations"] == "float":
            with pytest.raises(UnsupportedError, match="it wants tables per tile"):
                p.linear(np.zeros((1, 64), np.float32), kernel=row["name"])


def test_torch_parts_and_modules() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    layer = torch.nn.Linear(100, 13)
    for text in ("lutb", "lutb-a8g"):
        module = qkern.nn.Linear.from_float(layer, text)
        x = torch.randn(3, 100)
        w = module.weight.dequantize()
        bound = 1e-4 if text == "lutb" else 0.05 * float(x.abs().max())
        assert (module(x) - torch.nn.functional.linear(x, w, layer.bias)).abs().max() < bound
        again = qkern.nn.Linear(100, 13, format=text)
        again.load_state_dict(module.state_dict())
        assert torch.equal(again(x), module(x))
        assert module.state_dict()["codebook"].dtype == torch.uint8
