// SPDX-License-Identifier: Apache-2.0
// Packing and unpacking, one element of the destination at a time: pure functions that the kernels
// and the host tests share. `w` holds pointers to canonical storage, `packed` is the whole block.
#pragma once

#include <type_traits>

#include "convert_tables.cuh"

namespace qkern {
namespace cuda {

// Bit `bit` of the canonical code of (row, column).
QK_HD uint32_t canonical_bit(const uint8_t* codes, int64_t stride_bytes, int bits, int64_t row,
                             int64_t column, int bit) {
  const int64_t at = column * bits + bit;
  return codes[row * stride_bytes + (at >> 3)] >> (at & 7) & 1u;
}

// Word `index` (of 32 bits) of the packed codes.
QK_HD uint32_t pack_codes_word(const Layout& l, const uint8_t* codes, int64_t stride_bytes,
                               int64_t index) {
  const int64_t words_per_block = l.block_bytes / 4;
  const int64_t block = index / words_per_block;
  const int in_block = (int)(index % words_per_block);
  const int vector = in_block / 128, lane = in_block / 4 % 32, word = in_block % 4;
  const int64_t tile = block / l.k_blocks, k_block = block % l.k_blocks;
  uint32_t value = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const SlotBit b = slot_of(l.order, l.bits, vector, word, bit);
    const int64_t row = tile * kTileRows + block_row(b.slot, lane);
    const int64_t column =
        l.column_of(k_block * kBlockColumns + block_column(l.order, b.slot, lane));
    if (row < l.n && column >= 0)
      value |= canonical_bit(codes, stride_bytes, l.bits, row, column, b.bit) << bit;
  }
  return value;
}

// Byte `byte` of canonical row `row` out of the packed codes.
QK_HD uint8_t unpack_codes_byte(const Layout& l, const uint8_t* packed, int64_t row, int64_t byte) {
  uint32_t value = 0;
  for (int bit = 0; bit < 8; ++bit) {
    const int64_t at = byte * 8 + bit, column = at / l.bits;
    if (column < l.k)
      value |= (uint32_t)(l.code(packed, row, l.padded_column(column)) >> at % l.bits & 1) << bit;
  }
  return (uint8_t)value;
}

// A scale or zero: exact changes of type in both directions.
QK_HD void convert_number(const void* from, qk_dtype from_dtype, int64_t from_index, void* to,
                          qk_dtype to_dtype, int64_t to_index) {
  const uint8_t* from8 = (const uint8_t*)from + from_index;
  uint8_t* to8 = (uint8_t*)to + to_index;
  if (from_dtype == to_dtype) {
    if (to_dtype == QK_F32)
      ((uint32_t*)to)[to_index] = ((const uint32_t*)from)[from_index];
    else
      ((uint16_t*)to)[to_index] = ((const uint16_t*)from)[from_index];
  } else if (from_dtype == QK_U8) {
    store_number(to, to_dtype, to_index, (float)*from8);
  } else if (to_dtype == QK_U8) {
    *to8 = (uint8_t)load_number(from, from_dtype, from_index);
  } else if (from_dtype == QK_E8M0) {  // 2^-127 is a subnormal of bfloat16, 255 a NaN
    const uint16_t e = *from8;
    ((uint16_t*)to)[to_index] = e == 255 ? 0x7fc0u : e == 0 ? 0x0040u : (uint16_t)(e << 7);
  } else if (to_dtype == QK_E8M0) {
    const uint16_t h = ((const uint16_t*)from)[from_index];
    *to8 = (uint8_t)(h >> 7);
    if (h == 0x7fc0u) *to8 = 255;
  } else if (from_dtype == QK_E4M3) {
    const uint32_t v = *from8, sign = (v & 0x80u) << 8, exponent = v >> 3 & 15u, m = v & 7u;
    uint16_t h = (uint16_t)(sign | (exponent + 8) << 10 | m << 7);
    if (exponent == 15 && m == 7) h = (uint16_t)(sign | 0x7e00u);
    if (exponent == 0)  // m 2^-9
      h = (uint16_t)(sign | (m == 0 ? 0u : F16::from_float((float)m * 0.001953125f)));
    ((uint16_t*)to)[to_index] = h;
  } else {  // to E4M3
    const uint32_t h = ((const uint16_t*)from)[from_index], magnitude = h & 0x7fffu;
    const uint8_t sign = (uint8_t)(h >> 8 & 0x80u);
    if (magnitude >= 0x7c00u)
      *to8 = sign | 0x7f;
    else if (magnitude < 9u << 10)  // below 2^-6: a multiple of 2^-9
      *to8 = (uint8_t)(sign | (uint8_t)(F16::to_float((uint16_t)magnitude) * 512.f));
    else
      *to8 = (uint8_t)(sign | ((magnitude >> 7) - (8u << 3)));
  }
}

// Block tables: how many there are, and number `index` of them, in the types that linear kernels
// read, with its factor. Codes, scales and codebook have been packed.
QK_HD int64_t block_table_count(const Layout& l) {
  return l.block_table_bytes == 0
             ? 0
             : l.row_tiles * l.groups * (l.shared_tables() ? kTileRows / kTableRows : kTileRows);
}
template <class T, int kBits>
QK_HD void pack_block_table(const Layout& l, int64_t index, int type, uint8_t* packed) {
  const int per_tile = l.shared_tables() ? kTileRows / kTableRows : kTileRows;
  const int64_t cell = index / per_tile, tile = cell / l.groups, group = cell % l.groups;
  const int in_tile = (int)(index % per_tile);
  const int r = l.shared_tables() ? in_tile : in_tile / 8, g = l.shared_tables() ? 0 : in_tile % 8;
  const int64_t row = tile * kTileRows + 8 * r + g;
  constexpr int kEntries = 1 << kBits;
  float table[kEntries];
  uint16_t rounded[kEntries];
  const float* const from =
      (const float*)(packed + l.table_offset) + l.table_index(row < l.n ? row : l.n - 1, group);
#pragma unroll
  for (int e = 0; e < kEntries; ++e) table[e] = row < l.n ? from[e] : 0.f;
  const float factor = round_table<T>(table, kEntries, l.shared_tables(), rounded);
  uint8_t* const to = packed + l.block_tables_offset[type] + cell * l.block_table_bytes;
  constexpr int kEntryBytes = std::is_same_v<T, S8> ? 1 : 2;
#pragma unroll
  for (int i = 0; i < kEntries * kEntryBytes; ++i)
    to[table_byte(kEntries * kEntryBytes, r, g, l.shared_tables(), i)] =
        (uint8_t)(rounded[i % kEntries] >> (8 * (i / kEntries)));
  if (!l.factors) return;
  const int64_t at = l.scale_index(row, group);
  const float scale =
      l.scale_stored < 0 ? 1.f : load_number(packed + l.scales_offset, l.scale_stored, at);
  ((float*)(packed + l.factors_offset))[at] = mul_rn(scale, factor);
}
template <int kBits>
QK_HD void pack_block_table(const Layout& l, int64_t index, uint8_t* packed) {
  if (l.bytes()) return pack_block_table<S8, kBits>(l, index, 0, packed);
  pack_block_table<F16, kBits>(l, index, 0, packed);
  pack_block_table<BF16, kBits>(l, index, 1, packed);
}
QK_HD void pack_block_table(const Layout& l, int64_t index, uint8_t* packed) {
  if (l.bits == 2) return pack_block_table<2>(l, index, packed);
  if (l.bits == 3) return pack_block_table<3>(l, index, packed);
  pack_block_table<4>(l, index, packed);
}

}  // namespace cuda
}  // namespace qkern
