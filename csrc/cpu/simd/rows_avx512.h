// SPDX-License-Identifier: Apache-2.0
// Sixteen numbers of any stored dtype as float32, and back. AVX-512 F, BW, DQ, VL.
#pragma once

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || \
    !defined(__AVX512VL__)
#error "compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl"
#endif

// gcc 12 warns about its own _mm512_undefined_* (PR 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "../numeric.h"

namespace qkern {

// Lanes below `count`, which may be 16 or more.
static inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
}

// Bytes below `count`, which may be 64 or more.
static inline __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << count) - 1;
}

static inline __m512 f16_to_f32x16(__m256i v) { return _mm512_cvtph_ps(v); }

static inline __m512 bf16_to_f32x16(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// A bf16 exponent of 0 is a subnormal scale, and e == 0 is 2^-127: both are built from bits, so
// that no mode of the floating point unit can flush them.
static inline __m512 e8m0_to_f32x16(__m512i e) {
  const __m512i bits = _mm512_slli_epi32(e, 23);
  const __mmask16 lowest = _mm512_testn_epi32_mask(e, e);
  return _mm512_castsi512_ps(_mm512_mask_set1_epi32(bits, lowest, 0x00400000));
}

static inline __m512 e4m3_to_f32x16(__m512i v) {
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(v, _mm512_set1_epi32(0x80)), 24);
  const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi32(0x7f));
  const __m512i normal =
      _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
  const __m512 subnormal =
      _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));  // magnitude < 8
  const __mmask16 low = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
  const __m512i value = _mm512_mask_mov_epi32(normal, low, _mm512_castps_si512(subnormal));
  return _mm512_castsi512_ps(_mm512_or_si512(value, sign));
}

// Elements of `p` as load_float gives them: scales and zeros of one half. Not NaN (packing refuses
// that).
static inline __m512 load_f32x16(const void* p, qk_dtype dtype) {
  switch (dtype) {
    case QK_F32:
      return _mm512_loadu_ps(p);
    case QK_F16:
      return f16_to_f32x16(_mm256_loadu_si256((const __m256i*)p));
    case QK_BF16:
      return bf16_to_f32x16(_mm256_loadu_si256((const __m256i*)p));
    default: {
      const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
      return dtype == QK_U8     ? _mm512_cvtepi32_ps(bytes)
             : dtype == QK_E8M0 ? e8m0_to_f32x16(bytes)
                                : e4m3_to_f32x16(bytes);
    }
  }
}

static inline __m256i f32_to_f16x16(__m512 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Half to even; NaN keeps its upper payload and becomes quiet.
static inline __m256i f32_to_bf16x16(__m512 v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i upper = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40)));
}

// Elements i .. i+15 of an array of F32, F16 or BF16. A masked store of whole vectors costs several
// times a plain one on some processors.
static inline void store_f32x16(void* data, qk_dtype dtype, int64_t i, __m512 v) {
  if (dtype == QK_F32)
    _mm512_storeu_ps((float*)data + i, v);
  else
    _mm256_storeu_si256((__m256i*)((uint16_t*)data + i),
                        dtype == QK_F16 ? f32_to_f16x16(v) : f32_to_bf16x16(v));
}

// The same past the caches; the vector is aligned to its size.
static inline void stream_f32x16(void* data, qk_dtype dtype, int64_t i, __m512 v) {
  if (dtype == QK_F32)
    _mm512_stream_ps((float*)data + i, v);
  else
    _mm256_stream_si256((__m256i*)((uint16_t*)data + i),
                        dtype == QK_F16 ? f32_to_f16x16(v) : f32_to_bf16x16(v));
}

// Those in `lanes`.
static inline void store_some_f32x16(void* data, qk_dtype dtype, int64_t i, __mmask16 lanes,
                                     __m512 v) {
  if (dtype == QK_F32)
    _mm512_mask_storeu_ps((float*)data + i, lanes, v);
  else
    _mm256_mask_storeu_epi16((uint16_t*)data + i, lanes,
                             dtype == QK_F16 ? f32_to_f16x16(v) : f32_to_bf16x16(v));
}

}  // namespace qkern
