// SPDX-License-Identifier: Apache-2.0
// Tables of 256 entries, looked up in registers. AVX-512 F and BW.
//
// vpermi2w chooses one of 64 words, so that four registers are 128 words and two bits of the code
// choose among pairs of registers. Bytes lie two in a word: the lowest bit of the code says which.
// Floats are two planes of words.
//
// Per weight on a Zen 4 core at 3.7 GHz, table and codes at hand: bytes 0.08 ns, floats 0.14 ns.
// Tried and lost: bytes by 16 vpshufb and 15 blends (0.13 ns); floats by vpermi2ps, which chooses
// one of 32 (0.24 ns with a tree of blends, 0.31 ns chained under masks); vgatherdps (0.39 ns).
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
#include <stdint.h>

namespace qkern {
namespace {

struct ByteTable256 {
  __m512i words[4];

  ByteTable256() = default;
  explicit ByteTable256(const uint8_t* entries) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) words[i] = _mm512_loadu_si512(entries + 64 * i);
  }

  // Word lanes: the words that hold entries 2 * index and 2 * index + 1, index of 7 bits.
  __m512i pairs(__m512i index, __mmask32 upper) const {
    const __m512i low = _mm512_permutex2var_epi16(words[0], index, words[1]);
    const __m512i high = _mm512_permutex2var_epi16(words[2], index, words[3]);
    return _mm512_mask_mov_epi16(low, upper, high);
  }

  __m512i operator()(__m512i codes) const {
    const __mmask32 even_upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x80));
    const __mmask32 odd_upper = _mm512_movepi16_mask(codes);
    __m512i even = pairs(_mm512_srli_epi16(codes, 1), even_upper);
    __m512i odd = pairs(_mm512_srli_epi16(codes, 9), odd_upper);
    const __mmask32 even_second = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(1));
    const __mmask32 odd_first = _mm512_testn_epi16_mask(codes, _mm512_set1_epi16(0x100));
    even = _mm512_mask_srli_epi16(even, even_second, even, 8);
    odd = _mm512_mask_slli_epi16(odd, odd_first, odd, 8);
    return _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaaull, odd);
  }
};

struct FloatTable256 {
  __m512i low[8], high[8];  // words of the entries

  explicit FloatTable256(const float* entries) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Words 0, 2, 4, ... of two registers.
    const __m512i even = _mm512_or_si512(
        _mm512_slli_epi32(lane, 2),
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_slli_epi32(lane, 2), _mm512_set1_epi32(2)), 16));
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i first = _mm512_loadu_si512(entries + 32 * i);
      const __m512i second = _mm512_loadu_si512(entries + 32 * i + 16);
      low[i] = _mm512_permutex2var_epi16(first, even, second);
      high[i] = _mm512_permutex2var_epi16(first, odd, second);
    }
  }

  static __m512i choose(const __m512i (&plane)[8], __m512i codes, __mmask32 bit6, __mmask32 bit7) {
    const __m512i q0 = _mm512_permutex2var_epi16(plane[0], codes, plane[1]);
    const __m512i q1 = _mm512_permutex2var_epi16(plane[2], codes, plane[3]);
    const __m512i q2 = _mm512_permutex2var_epi16(plane[4], codes, plane[5]);
    const __m512i q3 = _mm512_permutex2var_epi16(plane[6], codes, plane[7]);
    return _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(q0, bit6, q1), bit7,
                                 _mm512_mask_mov_epi16(q2, bit6, q3));
  }

  // Word lanes: the words of the entries that the lowest 8 bits of each lane choose.
  void words(__m512i codes, __m512i* lows, __m512i* highs) const {
    const __mmask32 bit6 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
    const __mmask32 bit7 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x80));
    *lows = choose(low, codes, bit6, bit7);
    *highs = choose(high, codes, bit6, bit7);
  }

  // values[j]: the entries that byte j of every dword chooses.
  void quad(__m512i codes, __m512 (&values)[4]) const {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m512i lows, highs;
      words(j ? _mm512_srli_epi16(codes, 8) : codes, &lows, &highs);
      values[j] = _mm512_castsi512_ps(
          _mm512_mask_mov_epi16(lows, 0xaaaaaaaau, _mm512_slli_epi32(highs, 16)));
      values[j + 2] = _mm512_castsi512_ps(
          _mm512_mask_mov_epi16(_mm512_srli_epi32(lows, 16), 0xaaaaaaaau, highs));
    }
  }

  // values[0] and values[1]: the entries that the 16 bytes `first` and `second` choose, in order.
  void pair(__m128i first, __m128i second, __m512 (&values)[2]) const {
    const __m256i bytes =
        _mm256_set_m128i(_mm_unpackhi_epi32(first, second), _mm_unpacklo_epi32(first, second));
    __m512i lows, highs;
    words(_mm512_cvtepu8_epi16(bytes), &lows, &highs);
    values[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(lows, highs));
    values[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(lows, highs));
  }
};

}  // namespace
}  // namespace qkern
