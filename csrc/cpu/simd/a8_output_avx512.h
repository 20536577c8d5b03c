// SPDX-License-Identifier: Apache-2.0
// From int32 sums to outputs, 16 outputs per vector: scales and zeros of any stored dtype, the
// float32 steps of the contract in their order, bias and conversion. Used by the int8 kernels.
#pragma once

#include <immintrin.h>

#include "../kernels.h"

namespace qkern {
namespace {

inline __m512 e8m0_to_floats(__m512i e) {
  // 2^-127 has no exponent of its own: it is the subnormal 0x00400000.
  const __mmask16 subnormal = _mm512_testn_epi32_mask(e, e);
  return _mm512_castsi512_ps(
      _mm512_mask_mov_epi32(_mm512_slli_epi32(e, 23), subnormal, _mm512_set1_epi32(0x00400000)));
}

inline __m512 e4m3_to_floats(__m512i v) {
  const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi32(0x7f));
  const __m512i normal =
      _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
  const __m512 subnormal =
      _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0.001953125f));  // 2^-9
  const __mmask16 small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
  const __m512i value = _mm512_mask_mov_epi32(normal, small, _mm512_castps_si512(subnormal));
  const __m512i sign = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(0x7f), v), 24);
  return _mm512_castsi512_ps(_mm512_or_si512(value, sign));
}

// Sixteen scales or zeros of a half.
inline __m512 load_values(const uint8_t* at, qk_dtype dtype) {
  const __m128i* bytes = reinterpret_cast<const __m128i*>(at);
  const __m256i* words = reinterpret_cast<const __m256i*>(at);
  switch (dtype) {
    case QK_F32:
      return _mm512_loadu_ps(at);
    case QK_F16:
      return _mm512_cvtph_ps(_mm256_loadu_si256(words));
    case QK_BF16:
      return _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(words)), 16));
    case QK_U8:
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes)));
    case QK_E8M0:
      return e8m0_to_floats(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes)));
    default:
      return e4m3_to_floats(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes)));
  }
}

// Scales of half `half` of `halves` in group g, 1 where there are none.
inline __m512 load_scales(const Packed& w, const uint8_t* block, int64_t g, int half, int halves) {
  if (!w.scale_bytes) return _mm512_set1_ps(1.f);
  return load_values(w.scales_of(block, g, halves) + half * w.scale_bytes, w.h.scale_stored);
}

inline __m512 load_negative_zeros(const Packed& w, const uint8_t* block, int64_t g, int half,
                                  int halves) {
  const __m512 zeros =
      load_values(w.zeros_of(block, g, halves) + half * w.zero_bytes, w.h.zero_stored);
  return _mm512_xor_ps(zeros, _mm512_set1_ps(-0.f));
}

inline __m256i to_f16(__m512 v) {
  const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  // A NaN loses its payload, as in float_to_f16.
  const __m256i nan = _mm256_or_si256(_mm256_and_si256(half, _mm256_set1_epi16((short)0x8000)),
                                      _mm256_set1_epi16(0x7e00));
  return _mm256_mask_mov_epi16(half, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
}

inline __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i nan = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan));
}

// Bias, the row's scale where the activations have one, and y[m][n0 ..] up to the last output.
inline void store_outputs(const LinearJob& job, __m512 acc, int64_t m, int64_t n0) {
  const int64_t left = job.w->h.n - n0;
  const __mmask16 mask = left >= kHalf ? 0xffff : (__mmask16)((1u << left) - 1);
  if (job.bias) {
    const __m512 bias = _mm512_maskz_loadu_ps(mask, job.bias + n0);
    acc = job.w->h.activations == QK_ACT_INT8
              ? _mm512_fmadd_ps(acc, _mm512_set1_ps(job.q_scale[m]), bias)
              : _mm512_add_ps(acc, bias);
  } else if (job.w->h.activations == QK_ACT_INT8) {
    acc = _mm512_mul_ps(acc, _mm512_set1_ps(job.q_scale[m]));
  }
  const int64_t at = m * job.y_stride + n0;
  if (job.y_dtype == QK_F32)
    _mm512_mask_storeu_ps(static_cast<float*>(job.y) + at, mask, acc);
  else
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(job.y) + at, mask,
                             job.y_dtype == QK_F16 ? to_f16(acc) : to_bf16(acc));
}

}  // namespace
}  // namespace qkern
