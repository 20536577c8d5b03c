# SPDX-License-Identifier: Apache-2.0
"""The bit stream of canonical storage: golden bytes, every width, tails, strides, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from qkern import _core
from qkern.errors import FormatError
from qkern.testing import pack_bits

CANARY = 0xA5

# Written down by hand: the codes as binary numbers, last code first, cut into bytes from the right.
GOLDEN = {
    # 3,0,1,2,3 -> 11 | 10 01 00 11
    2: ([3, 0, 1, 2, 3], "9303"),
    # 4,5,2,7,1,6,3,0,5 -> 000 011 110 001 111 010 101 100 = 0x0f1eac, then 101
    3: ([4, 5, 2, 7, 1, 6, 3, 0, 5], "ac1e0f05"),
    # 1,2,3,4,15 -> 0x21 0x43 0x0f
    4: ([1, 2, 3, 4, 15], "21430f"),
    # 1,2,31 -> 11111 00010 00001 = 0x7c41
    5: ([1, 2, 31], "417c"),
    # 1,2,3,4,63 -> 000100 000011 000010 000001 = 0x103081, then 111111
    6: ([1, 2, 3, 4, 63], "8130103f"),
    # 127,1,64 -> 1000000 0000001 1111111 = 0x1000ff
    7: ([127, 1, 64], "ff0010"),
    # one bit: 1,0,1,1,0,0,0,1, 1 -> 10001101, 1
    1: ([1, 0, 1, 1, 0, 0, 0, 1, 1], "8d01"),
    8: ([0, 127, 255], "007fff"),
}


def stream_bytes(k: int, bits: int) -> int:
    return (k * bits + 7) // 8


def pack(codes: np.ndarray, bits: int, gap: int = 0) -> np.ndarray:
    """The stream of `codes` [N, K], rows `gap` bytes further apart than needed."""
    n, k = codes.shape
    width = stream_bytes(k, bits)
    stream = np.full((n, width + gap), CANARY, np.uint8)
    _core.codes_pack(
        codes.ctypes.data, n, k, codes.strides[0], bits, stream.ctypes.data, stream.strides[0]
    )
    assert (stream[:, width:] == CANARY).all()
    return stream[:, :width]


def unpack(stream: np.ndarray, k: int, bits: int, gap: int = 0) -> np.ndarray:
    n = len(stream)
    codes = np.full((n, k + gap), CANARY, np.uint8)
    _core.codes_unpack(
        stream.ctypes.data, n, k, stream.strides[0], bits, codes.ctypes.data, codes.strides[0]
    )
    assert (codes[:, k:] == CANARY).all()
    return codes[:, :k]


@pytest.mark.parametrize("bits", sorted(GOLDEN))
def test_golden_bytes(bits: int) -> None:
    codes, golden = GOLDEN[bits]
    row = np.array([codes], np.uint8)
    assert pack(row, bits).tobytes().hex() == golden
    stream = np.frombuffer(bytes.fromhex(golden), np.uint8)[None].copy()
    assert unpack(stream, len(codes), bits).tolist() == [codes]


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_length_and_the_way_back(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for k in [*range(1, 42), 2047, 2048, 2049]:
        codes = rng.integers(0, 2**bits, (3, k), np.uint8)
        stream = pack(codes, bits, gap=5)
        assert np.array_equal(stream, pack_bits(codes, bits)), k
        assert np.array_equal(unpack(np.ascontiguousarray(stream), k, bits, gap=3), codes), k


@pytest.mark.parametrize("bits", range(1, 9))
def test_strided_codes_and_every_code(bits: int) -> None:
    codes = np.tile(np.arange(256) % 2**bits, (2, 1)).astype(np.uint8)
    wide = np.full((2, 300), 255, np.uint8)
    wide[:, :256] = codes
    assert np.array_equal(pack(wide[:, :256], bits), pack_bits(codes, bits))


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 7])
def test_bits_after_the_last_code_are_ignored_when_read_and_zero_when_written(bits: int) -> None:
    k = 11
    ones = np.full((1, stream_bytes(k, bits)), 255, np.uint8)
    codes = unpack(ones, k, bits)
    assert (codes == 2**bits - 1).all()
    used = k * bits % 8
    assert pack(codes, bits)[0, -1] == (2**used - 1 if used else 255)


def test_a_code_that_does_not_fit_is_refused_and_nothing_is_written() -> None:
    codes = np.zeros((4, 9), np.uint8)
    codes[2, 7] = 8
    codes[3, 0] = 200
    stream = np.full((4, 4), CANARY, np.uint8)
    with pytest.raises(FormatError, match="code 8 in row 2, column 7 does not fit 3 bits"):
        _core.codes_pack(codes.ctypes.data, 4, 9, 9, 3, stream.ctypes.data, 4)
    assert (stream == CANARY).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "expected 1 to 8 bits, got 0"),
        ({"bits": 9}, "expected 1 to 8 bits, got 9"),
        ({"n": -1}, "sizes must not be negative"),
        ({"k": -3}, "sizes must not be negative"),
        ({"codes": 0}, "codes is NULL"),
        ({"stream": 0}, "stream is NULL"),
        ({"codes_stride": 8}, "rows of codes are 9 long but only 8 apart"),
        ({"stream_stride_bytes": 3}, "rows of stream are 4 long but only 3 apart"),
        ({"n": 2**60}, "does not fit in memory"),
        ({"n": 1, "k": 2**62}, "does not fit in memory"),
        ({"k": 2**62, "codes_stride": 2**62}, "does not fit in memory"),
    ],
)
def test_senseless_arguments(change: dict[str, int], message: str) -> None:
    codes, stream = np.zeros((2, 9), np.uint8), np.zeros((2, 4), np.uint8)
    good = {
        "codes": codes.ctypes.data,
        "n": 2,
        "k": 9,
        "codes_stride": 9,
        "bits": 3,
        "stream": stream.ctypes.data,
        "stream_stride_bytes": 4,
    }
    for call in (_core.codes_pack, _core.codes_unpack):
        call(**good)
        with pytest.raises(ValueError, match=message):
            call(**(good | change))


def test_empty_matrices_touch_nothing() -> None:
    _core.codes_pack(0, 0, 9, 9, 3, 0, 4)
    _core.codes_pack(0, 5, 0, 0, 3, 0, 0)
    _core.codes_unpack(0, 5, 0, 0, 3, 0, 0)
