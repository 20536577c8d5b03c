// SPDX-License-Identifier: Apache-2.0
// Tables of 256 entries without gathers: bytes by sixteen vpshufb and a tree of blends, floats one
// load each.
//
// Per weight on a Zen 4 core at 3.7 GHz, table and codes at hand: bytes 0.14 ns, floats 0.22 ns.
// Tried and lost: vpgatherdd and vgatherdps (0.39 ns); bytes one load each (0.54 ns); floats stored
// one by one and loaded as vectors (0.31 ns).
#pragma once

#include "codes_avx2.h"

namespace qkern {
namespace {

// Entries of 32 codes. Part i of the table, entries 16i .. 16i + 15 of both 16-byte lanes, is
// part(i).
template <class Part>
struct ByteTree {
  const Part& part;
  __m256i low, bits[4];  // bits[i]: bit 4 + i of a code as the highest bit of its byte

  ByteTree(const Part& p, __m256i codes)
      : part(p),
        low(_mm256_and_si256(codes, _mm256_set1_epi8(15))),
        bits{_mm256_slli_epi16(codes, 3), _mm256_slli_epi16(codes, 2), _mm256_slli_epi16(codes, 1),
             codes} {}

  template <int kLevel>
  __attribute__((always_inline)) __m256i entries(int first) const {
    if constexpr (kLevel == 0)
      return _mm256_shuffle_epi8(part(first), low);
    else
      return _mm256_blendv_epi8(entries<kLevel - 1>(first),
                                entries<kLevel - 1>(first + (1 << (kLevel - 1))), bits[kLevel - 1]);
  }
};

template <class Part>
__attribute__((always_inline)) inline __m256i look_up_bytes(const Part& part, __m256i codes) {
  return ByteTree<Part>(part, codes).template entries<4>(0);
}

// Entries of four codes, the first in the lowest byte.
inline __m128 look_up_floats(const float* table, uint32_t codes) {
  return _mm_setr_ps(table[codes & 255], table[codes >> 8 & 255], table[codes >> 16 & 255],
                     table[codes >> 24]);
}

// Tables of two outputs, one for each 16-byte lane, in the manner of BytePlanes.
struct WidePair {
  const float *first, *second;

  void look_up(__m256i codes, __m256 values[4]) const {
    alignas(32) uint32_t fours[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(fours), codes);
    for (int q = 0; q < 4; ++q)
      values[q] =
          _mm256_set_m128(look_up_floats(second, fours[4 + q]), look_up_floats(first, fours[q]));
  }
};

}  // namespace
}  // namespace qkern
