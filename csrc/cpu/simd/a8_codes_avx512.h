// SPDX-License-Identifier: Apache-2.0
// From packed codes (layout.h) to bytes that a dot product can take: planes joined, tables looked
// up, always 64 bytes at a time. What formats differ in is here and only here.
//
// A vector of dword lanes is 16 outputs x 4 columns. A vector of row lanes is 4 outputs x 16
// columns, vector c of four holding outputs c, 4 + c, 8 + c and 12 + c.
#pragma once

#if !defined(__AVX512F__) || !defined(__AVX512BW__)
#error "compile this file with AVX-512 F and BW"
#endif
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include "../layout.h"
#include "transpose_avx512.h"

namespace qkern {
namespace {

// Vectors that one block of the narrowest plane turns into.
constexpr int parts_of(int bits) { return bits % 2 ? 8 : bits % 4 ? 4 : bits % 8 ? 2 : 1; }

template <int kRight>
inline __m512i shifted(__m512i v) {
  if constexpr (kRight > 0) return _mm512_srli_epi16(v, kRight);
  if constexpr (kRight < 0) return _mm512_slli_epi16(v, -kRight);
  return v;
}

// Parts kPart .. of one block of a plane of kPlane bits, whose lowest bit is bit kShift of a code.
// Shifts cross byte borders; the mask takes away what came over.
template <int kPlane, int kShift, int kPart = 0>
inline void add_block(__m512i block, __m512i* parts) {
  if constexpr (kPart < 8 / kPlane) {
    const __m512i bits = shifted<kPart * kPlane - kShift>(block);
    const __m512i mask = _mm512_set1_epi8((char)(((1 << kPlane) - 1) << kShift));
    if constexpr (kPlane == 8)
      parts[kPart] = bits;
    else if constexpr (kShift == 0)
      parts[kPart] = _mm512_and_si512(bits, mask);
    else
      parts[kPart] = _mm512_ternarylogic_epi32(parts[kPart], bits, mask, 0xf8);  // a | (b & c)
    add_block<kPlane, kShift, kPart + 1>(block, parts);
  }
}

// All blocks of a plane, kStride bytes apart; returns where the next plane starts.
template <int kPlane, int kShift, int kStride, int kParts>
inline const uint8_t* add_plane(const uint8_t* codes, __m512i* parts) {
#pragma GCC unroll 8
  for (int i = 0; i < kParts; i += 8 / kPlane, codes += kStride)
    add_block<kPlane, kShift>(_mm512_loadu_si512(codes), parts + i);
  return codes;
}

// The codes of one vector's share of a unit, one byte each.
template <int kBits, int kStride>
inline void join_planes(const uint8_t* codes, __m512i* parts) {
  constexpr int kParts = parts_of(kBits);
  if constexpr ((kBits & 8) != 0) codes = add_plane<8, 0, kStride, kParts>(codes, parts);
  if constexpr ((kBits & 4) != 0) codes = add_plane<4, 0, kStride, kParts>(codes, parts);
  if constexpr ((kBits & 2) != 0) codes = add_plane<2, kBits & 4, kStride, kParts>(codes, parts);
  if constexpr ((kBits & 1) != 0) codes = add_plane<1, kBits & 6, kStride, kParts>(codes, parts);
}

// Int: the bytes are the codes.
template <int kWidth>
struct IntCodes {
  static constexpr int kBits = kWidth;
  static constexpr Lanes kLanes = Lanes::kDword;
  static constexpr int kLaneBytes = 4;
  static constexpr int kPanelHalves = 2;
  static constexpr int kHalfVectors = 1;      // vectors that hold the same columns of a half
  static constexpr bool kPlain = kBits == 8;  // packed bytes are what the dot product takes
  static constexpr bool kStreamed = true;     // few rows go without scratch
  static constexpr bool kZeros = true;        // may be asymmetric
  static constexpr int kParts = parts_of(kBits);
  static constexpr int kUnit = kLaneBytes * kParts;
  static constexpr int kUnitBytes = kUnit * kHalf * kBits / 8;
  static constexpr int kLargest = (1 << kBits) - 1;

  explicit IntCodes(const Packed&) {}
  void load(const uint8_t* unit, int, const uint8_t*, __m512i* parts) const {
    join_planes<kBits, kHalf * kLaneBytes>(unit, parts);
  }
};

// A table for the whole tensor: entry + 128, looked up by a byte shuffle within 16 bytes.
template <int kWidth>
struct TableCodes : IntCodes<kWidth> {
  static constexpr bool kZeros = false;
  static constexpr int kLargest = 255;
  __m512i table;

  explicit TableCodes(const Packed& w)
      : IntCodes<kWidth>(w),
        table(_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(w.table)))) {}
  void load(const uint8_t* unit, int, const uint8_t*, __m512i* parts) const {
    join_planes<kWidth, kHalf * 4>(unit, parts);
#pragma GCC unroll 8
    for (int i = 0; i < this->kParts; ++i) parts[i] = _mm512_shuffle_epi8(table, parts[i]);
  }
};

// A table per row or per group: the same shuffle with a table in each 16-byte lane.
template <int kWidth>
struct RowTableCodes {
  static constexpr int kBits = kWidth;
  static constexpr Lanes kLanes = Lanes::kRow;
  static constexpr int kLaneBytes = 16;
  static constexpr int kPanelHalves = 1;
  static constexpr int kHalfVectors = 4;
  static constexpr bool kPlain = false;
  static constexpr bool kStreamed = true;
  static constexpr bool kZeros = false;
  static constexpr int kParts = parts_of(kBits);
  static constexpr int kUnit = kLaneBytes * kParts;
  static constexpr int kUnitBytes = kUnit * kHalf * kBits / 8;
  static constexpr int kLargest = 255;

  explicit RowTableCodes(const Packed&) {}
  void load(const uint8_t* unit, int vector, const uint8_t* tables, __m512i* parts) const {
    join_planes<kBits, kHalf * kLaneBytes>(unit + 64 * vector, parts);
    const __m512i table = _mm512_loadu_si512(tables + 64 * vector);
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) parts[i] = _mm512_shuffle_epi8(table, parts[i]);
  }
};

// A table per tile: 8 entries for the outputs of the first two 16-byte lanes, 8 for the others.
// Half `half` of a panel, whose tables lie one behind the other.
struct TileTableCodes : IntCodes<3> {
  static constexpr bool kZeros = false;
  static constexpr int kLargest = 255;

  using IntCodes<3>::IntCodes;
  void load(const uint8_t* unit, int half, const uint8_t* tables, __m512i* parts) const {
    join_planes<3, kHalf * 4>(unit, parts);
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tables + 16 * half));
    const __m512i table = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1),
                                                   _mm512_castsi128_si512(both));
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) parts[i] = _mm512_shuffle_epi8(table, parts[i]);
  }
};

}  // namespace
}  // namespace qkern
