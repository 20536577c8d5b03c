// SPDX-License-Identifier: Apache-2.0
// Lane sums of four registers of dwords. AVX-512 F.
#pragma once

#if !defined(__AVX512F__)
#error "compile with -mavx512f"
#endif

#include <immintrin.h>

namespace qkern {

static inline __m128i fold_dwords(const __m512i (&s)[4]) {
  const __m512i s01 =
      _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
  const __m512i s23 =
      _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(s01, s23), _mm512_unpackhi_epi64(s01, s23));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

}  // namespace qkern
