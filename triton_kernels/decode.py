# SPDX-License-Identifier: Apache-2.0
# Argument lists are laid out by meaning.
# fmt: off
"""From canonical storage to numbers, inside a kernel: the converters that every kernel shares.

A kernel asks for a tile ``[ROWS, COLS]`` of one weight matrix and gets float32 values. The tile is
cut out of the stored bit streams themselves; there is no second copy of a weight. A converter is
selected by constants, which have the same names in every kernel:

``BITS``        width of a code, 1..8
``TABLE``       0: integer codes; else ``table[code]``, one table per 1: tensor, 2: row, 3: group,
                4: tile of 8 rows x 64 columns
``SYMMETRIC``   integers: the zero is ``2^(BITS-1)`` and is not stored
``GROUP``       columns per scale, per zero, and per table where TABLE is 3
``SCALES``      how the scales of a tile lie. 0: there are none; 1: one per row of the matrix;
                2: one per row of the tile, which is within a group; 3: ``COLS / GROUP`` per row;
                4: anyhow
``SCALE_TYPE``  0: a float type; 1: e8m0 bytes; 2: e4m3 bytes. TABLE_TYPE: likewise for tables
``SCALE_STORED``  the factor of all scales of a tensor is read from memory: ``table_scale`` of a
                kernel is its address, else the number itself
``ALIGNED``     the tile begins on a whole byte (on 8 codes where BITS does not divide 8)
``FULL``        every tile lies within the columns, so that no column needs a mask: unmasked loads
                are wide and asynchronous, and most layers are such

``row`` is int64, so that offsets beyond 2^31 are exact. Columns from ``end`` on read as code 0 and
scale 0; rows outside ``row_mask`` likewise; nothing outside the storage is touched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def tile_mask(row_mask, inside, FULL: tl.constexpr):
    """The mask of a tile from those of its rows and columns."""
    if FULL:
        return row_mask[:, None]
    else:
        return row_mask[:, None] & inside[None, :]


INTERPRETED = tl.constexpr(not isinstance(tile_mask, triton.JITFunction))
NVIDIA = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)


@triton.jit
def fma(a, b, c):
    """a * b + c in float32, rounded once, by broadcasting. (Not every interpreter of Triton's fuses
    the two steps.)"""
    a, b = tl.broadcast(a, b)
    a, c = tl.broadcast(a, c)
    b, c = tl.broadcast(b, c)
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def eight_codes(word, BITS: tl.constexpr):
    """The 8 codes of each word side by side: ``[ROWS, UNITS]`` to ``[ROWS, 8 * UNITS]``."""
    MASK: tl.constexpr = (1 << BITS) - 1
    c0 = (word & MASK).to(tl.int32)
    c1 = ((word >> BITS) & MASK).to(tl.int32)
    c2 = ((word >> (2 * BITS)) & MASK).to(tl.int32)
    c3 = ((word >> (3 * BITS)) & MASK).to(tl.int32)
    c4 = ((word >> (4 * BITS)) & MASK).to(tl.int32)
    c5 = ((word >> (5 * BITS)) & MASK).to(tl.int32)
    c6 = ((word >> (6 * BITS)) & MASK).to(tl.int32)
    c7 = ((word >> (7 * BITS)) & MASK).to(tl.int32)
    even = tl.interleave(tl.interleave(c0, c4), tl.interleave(c2, c6))
    odd = tl.interleave(tl.interleave(c1, c5), tl.interleave(c3, c7))
    return tl.interleave(even, odd)


@triton.jit
def codes_anywhere(codes, row_bytes, row_mask, column, end, BITS: tl.constexpr, COLS: tl.constexpr):
    """Codes of a tile that may begin inside a byte: two bytes and a shift for each."""
    k = column + tl.arange(0, COLS)
    bit = k * BITS
    shift = bit & 7
    at = codes + row_bytes[:, None] + (bit >> 3)[None, :]
    word = tl.load(at, mask=row_mask[:, None] & (k < end)[None, :], other=0).to(tl.int32)
    if 8 % BITS != 0:
        spans = (k < end) & (shift + BITS > 8)
        high = tl.load(at + 1, mask=row_mask[:, None] & spans[None, :], other=0).to(tl.int32)
        word |= high << 8
    return (word >> shift[None, :]) & ((1 << BITS) - 1)


@triton.jit
def codes_of_bytes(codes, row_bytes, row_mask, column, end, BITS: tl.constexpr, COLS: tl.constexpr,
                   FULL: tl.constexpr):
    """Codes that lie within bytes (BITS 1, 2, 4, 8): each byte is read once."""
    PER: tl.constexpr = 8 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    unit = tl.arange(0, COLS // PER)
    mask = tile_mask(row_mask, column + unit * PER < end, FULL)
    at = codes + row_bytes[:, None] + (column // PER + unit)[None, :]
    word = tl.load(at, mask=mask, other=0).to(tl.int32)
    if PER == 1:
        return word
    elif PER == 2:
        return tl.interleave(word & MASK, word >> BITS)
    elif PER == 4:
        even = tl.interleave(word & MASK, (word >> (2 * BITS)) & MASK)
        odd = tl.interleave((word >> BITS) & MASK, word >> (3 * BITS))
        return tl.interleave(even, odd)
    else:
        return eight_codes(word, BITS)


@triton.jit
def codes_of_units(codes, row_bytes, row_mask, column, end, BITS: tl.constexpr, COLS: tl.constexpr,
                   FULL: tl.constexpr):
    """Codes that straddle bytes (BITS 3, 5, 6, 7): 8 codes are BITS whole bytes, each read once."""
    unit = tl.arange(0, COLS // 8)
    at = codes + row_bytes[:, None] + (column // 8 * BITS + unit * BITS)[None, :]
    # The last unit of a row may be short of bytes.
    left = (end - column - unit * 8) * BITS
    word = tl.load(at, mask=tile_mask(row_mask, left > 0, FULL), other=0)
    word = word.to(tl.int32 if BITS < 4 else tl.int64)
    for byte in tl.static_range(1, BITS):
        part = tl.load(at + byte, mask=tile_mask(row_mask, left > 8 * byte, FULL), other=0)
        word |= part.to(tl.int32 if BITS < 4 else tl.int64) << (8 * byte)
    return eight_codes(word, BITS)


@triton.jit
def load_codes(codes, row_bytes, row_mask, column, end, BITS: tl.constexpr, COLS: tl.constexpr,
               ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """int32 ``[ROWS, COLS]``: the codes of columns ``column ..`` of the rows at ``row_bytes``."""
    if not ALIGNED:
        return codes_anywhere(codes, row_bytes, row_mask, column, end, BITS, COLS)
    elif 8 % BITS == 0:
        return codes_of_bytes(codes, row_bytes, row_mask, column, end, BITS, COLS, FULL)
    else:
        return codes_of_units(codes, row_bytes, row_mask, column, end, BITS, COLS, FULL)


@triton.jit
def to_float(raw, TYPE: tl.constexpr):
    """A loaded scale or table entry as float32, exactly (no subnormal takes part in arithmetic)."""
    if TYPE == 1:
        bits = raw.to(tl.int32)
        # Byte 0 is 2^-127, the one subnormal; byte 255 is NaN.
        bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
        return bits.to(tl.float32, bitcast=True)
    elif TYPE == 2:
        bits = raw.to(tl.int16)
        # The same fields in a float16, whose exponents are 8 higher; it holds all of them exactly.
        half = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    else:
        return raw.to(tl.float32)


@triton.jit
def load_scales(values, offsets, row_mask, column, end, TYPE: tl.constexpr, GROUP: tl.constexpr,
                SCALES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Scales (or zeros) of a tile as float32 that broadcasts against ``[ROWS, COLS]``."""
    if SCALES <= 2:
        at = values + offsets
        if SCALES == 2:
            at += column // GROUP
        return to_float(tl.load(at, mask=row_mask, other=0), TYPE)[:, None]
    elif SCALES == 3:
        MANY: tl.constexpr = COLS // GROUP
        part = tl.arange(0, MANY)
        at = values + offsets[:, None] + (column // GROUP + part)[None, :]
        mask = row_mask[:, None] & (column + part * GROUP < end)[None, :]
        few = to_float(tl.load(at, mask=mask, other=0), TYPE)
        return tl.reshape(tl.broadcast_to(few[:, :, None], (ROWS, MANY, GROUP)), (ROWS, COLS))
    else:
        k = column + tl.arange(0, COLS)
        at = values + offsets[:, None] + (k // GROUP)[None, :]
        return to_float(tl.load(at, mask=row_mask[:, None] & (k < end)[None, :], other=0), TYPE)


@triton.jit
def in_place(table, FULL: tl.constexpr):
    """Whether look-ups are loads written out for each entry, where the operand of the product lies.
    A load of Triton's would be laid out anew, addresses and entries passing through shared memory;
    but it has a mask, and knows other types and other devices."""
    return NVIDIA and FULL and table.dtype.element_ty == tl.float32


@triton.jit
def look_up(table, tables, code, row, row_mask, column, end, BITS: tl.constexpr,
            TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr, GROUP: tl.constexpr,
            COLS: tl.constexpr, FULL: tl.constexpr):
    """``table[code]`` as float32. ``tables``: how many there are per row (TABLE 3) or tile row
    (4)."""
    k = column + tl.arange(0, COLS)
    safe = tl.where(row_mask, row, 0)
    if TABLE == 1:
        index = code
    elif TABLE == 2:
        index = (safe << BITS)[:, None] + code
    elif TABLE == 3:
        index = ((safe * tables)[:, None] + (k // GROUP)[None, :] << BITS) + code
    else:
        index = ((safe // 8 * tables)[:, None] + (k // 64)[None, :] << BITS) + code
    if in_place(table, FULL):
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [(table + index).to(tl.int64)],
            dtype=tl.float32, is_pure=True, pack=1)
    else:
        mask = tile_mask(row_mask, k < end, FULL)
        return to_float(tl.load(table + index, mask=mask, other=0), TABLE_TYPE)


@triton.jit
def table_values(table, tables, table_scale, scale, code, row, row_mask, column, end,
                 BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                 SCALED: tl.constexpr, GROUP: tl.constexpr, COLS: tl.constexpr, FULL: tl.constexpr,
                 OUT: tl.constexpr):
    """Entries of a tile, times what they are scaled by."""
    found = look_up(table, tables, code, row, row_mask, column, end, BITS, TABLE, TABLE_TYPE, GROUP,
                    COLS, FULL)
    if SCALED:
        found *= scale * table_scale
    return found.to(OUT)


@triton.jit
def table_exponents(table, tables, row, row_mask, column, BITS: tl.constexpr):
    """int32 ``[ROWS]``: the exponent field of a float32 ``2^(E - 6)``, where ``2^E`` is the
    exponent of the largest entry of the float8 table of each row's tile; that of 1 for zeros."""
    first = (row // 8 * tables + column // 64) << BITS
    at = table + first[:, None] + tl.arange(0, 1 << BITS)[None, :]
    largest = tl.max(tl.load(at, mask=row_mask[:, None], other=0).to(tl.int32) & 0x7F, axis=1)
    # e4m3 with the exponent field 0 is a multiple of 2^-9: 4..7, 2..3, 1, 0 of it.
    small = tl.where(largest >= 2, 113, tl.where(largest == 1, 112, 127))
    return tl.where(largest >= 4, (largest >> 3) + 114, small)


@triton.jit
def int4_pairs(codes, row_bytes, row_mask, column, end, scale, COLS: tl.constexpr,
               FULL: tl.constexpr):
    """float32 ``scale * (code - 8)`` of a tile within a group, exactly, for scales of 11 bits.

    A byte is put into a float32 once, ``1 + (16 high + low) / 2^15``; each code is that with the
    other masked out, one instruction with one constant, and a multiply-add does the rest:
    ``(1 + low / 2^15) * (2^15 scale) - (2^15 + 8) * scale``, where ``2^15 + 8`` has 13 bits.
    """
    unit = tl.arange(0, COLS // 2)
    at = codes + row_bytes[:, None] + (column // 2 + unit)[None, :]
    byte = tl.load(at, mask=tile_mask(row_mask, column + unit * 2 < end, FULL), other=0)
    both = (byte.to(tl.int32) << 8) | 0x3F800000
    low = (both & ~0xF000).to(tl.float32, bitcast=True)
    high = (both & ~0x0F00).to(tl.float32, bitcast=True)
    return tl.interleave(fma(low, scale * 32768.0, scale * -32776.0),
                         fma(high, scale * 2048.0, scale * -2056.0))


@triton.jit
def load_weights(codes, codes_stride, scales, scales_stride, zeros, zeros_stride, table, tables,
                 table_scale, row, row_mask, column, end,
                 BITS: tl.constexpr, TABLE: tl.constexpr, TABLE_TYPE: tl.constexpr,
                 SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                 SCALE_TYPE: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr,
                 COLS: tl.constexpr, FULL: tl.constexpr, OUT: tl.constexpr):
    """``[ROWS, COLS]``: the weights; without SCALED, what their scale multiplies.

    In float32 bit for bit ``fl(scale * fl(code - zero))`` and ``fl(fl(scale * table_scale) *
    table[code])``, then rounded once to OUT. The tile begins on a multiple of 8 columns.
    """
    scale = tl.full((1, 1), 1.0, dtype=tl.float32)
    if SCALED and SCALES != 0:
        scale = load_scales(scales, row * scales_stride, row_mask, column, end, SCALE_TYPE, GROUP,
                            SCALES, ROWS, COLS)
    HALF: tl.constexpr = SCALED and scales.dtype.element_ty == tl.float16
    if HALF and not TABLE and SYMMETRIC and BITS == 4 and SCALES <= 2:
        return int4_pairs(codes, row * codes_stride, row_mask, column, end, scale, COLS,
                          FULL).to(OUT)
    code = load_codes(codes, row * codes_stride, row_mask, column, end, BITS, COLS, True, FULL)
    if TABLE:
        if in_place(table, FULL):
            return table_values(table, tables, table_scale, scale, code, row, row_mask, column, end,
                                BITS, TABLE, TABLE_TYPE, SCALED, GROUP, COLS, FULL, OUT)
        else:
            value = tl.zeros((ROWS, COLS), dtype=OUT)
            # Always so. A look-up hits the first-level cache; within a branch the compiler leaves
            # it there, and does not stage each one through shared memory as part of the pipeline.
            if column < end:
                value = table_values(table, tables, table_scale, scale, code, row, row_mask, column,
                                     end, BITS, TABLE, TABLE_TYPE, SCALED, GROUP, COLS, FULL, OUT)
            return value
    else:
        if SYMMETRIC:
            zero = tl.full((1, 1), 1 << (BITS - 1), dtype=tl.float32)
        else:
            zero = load_scales(zeros, row * zeros_stride, row_mask, column, end, 0, GROUP, SCALES,
                               ROWS, COLS)
        if HALF and (SYMMETRIC or zeros.dtype.element_ty == tl.uint8):
            # (1 + code / 2^11) * (2^11 scale) - (2^11 + zero) * scale: one multiply-add instead of
            # a subtraction and a product, and the same number, as no step of it is ever rounded:
            # 11 bits of a float16 times 12 bits.
            one = ((code << 12) | 0x3F800000).to(tl.float32, bitcast=True)
            value = fma(one, scale * 2048.0, -scale * (zero + 2048.0))
        else:
            # 2^23 + code, then a subtraction: both exact, and faster than a conversion.
            value = (code | 0x4B000000).to(tl.float32, bitcast=True)
            if SYMMETRIC:
                value -= 8388608.0 + (1 << (BITS - 1))
            else:
                value = (value - 8388608.0) - zero
            if SCALED:
                value *= scale
        return value.to(OUT)


@triton.jit
def row_scales(scales, scales_stride, table_scale, row, row_mask, TABLE: tl.constexpr,
               SCALES: tl.constexpr, SCALE_TYPE: tl.constexpr):
    """The factor of each row where it has a single one (SCALES 0 and 1), for the end of a sum."""
    if SCALES == 0:
        return tl.where(row_mask, table_scale, 0.0)
    else:
        scale = to_float(tl.load(scales + row * scales_stride, mask=row_mask, other=0), SCALE_TYPE)
        if TABLE:
            scale *= table_scale
        return scale
