// SPDX-License-Identifier: Apache-2.0
// Eight numbers of F32, F16 or BF16 as float32, and back. AVX2, FMA, F16C.
#pragma once

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif

#include <immintrin.h>

#include "../numeric.h"

namespace qkern {

static inline __m256 bf16_to_f32x8(__m128i v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

// Elements i .. i+7.
static inline __m256 load_f32x8(const void* data, qk_dtype dtype, int64_t i) {
  if (dtype == QK_F32) return _mm256_loadu_ps((const float*)data + i);
  const __m128i v = _mm_loadu_si128((const __m128i*)((const uint16_t*)data + i));
  return dtype == QK_F16 ? _mm256_cvtph_ps(v) : bf16_to_f32x8(v);
}

// The first `count` < 8 elements from i on, then zeros.
static inline __m256 load_some_f32x8(const void* data, qk_dtype dtype, int64_t i, int64_t count) {
  uint8_t room[32] = {0};
  const int size = dtype == QK_F32 ? 4 : 2;
  memcpy(room, (const uint8_t*)data + i * size, (size_t)(count * size));
  return load_f32x8(room, dtype, 0);
}

// Half to even; NaN keeps its upper payload and becomes quiet.
static inline __m128i f32_to_bf16x8(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i upper = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// Elements i .. i+7 of an array of F32, F16 or BF16.
static inline void store_f32x8(void* data, qk_dtype dtype, int64_t i, __m256 v) {
  if (dtype == QK_F32)
    _mm256_storeu_ps((float*)data + i, v);
  else
    _mm_storeu_si128(
        (__m128i*)((uint16_t*)data + i),
        dtype == QK_F16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : f32_to_bf16x8(v));
}

static inline void store_some_f32x8(void* data, qk_dtype dtype, int64_t i, int64_t count,
                                    __m256 v) {
  uint8_t room[32];
  const int size = dtype == QK_F32 ? 4 : 2;
  store_f32x8(room, dtype, 0, v);
  memcpy((uint8_t*)data + i * size, room, (size_t)(count * size));
}

}  // namespace qkern
