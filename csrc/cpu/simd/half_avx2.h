// SPDX-License-Identifier: Apache-2.0
// A half (sixteen outputs) as two registers of eight floats: its scales and zeros, the end of a
// chunk, the end of a row. Every rounding of the contract after the sums happens here.
#pragma once

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "this header needs -mavx2 -mfma -mf16c"
#endif

#include <immintrin.h>

#include "../kernels.h"

namespace qkern {
namespace {

constexpr int64_t kLineBytes = 64;

struct Half {
  __m256 v[2];
};

// fn(0) .. fn(N - 1) without a loop: gcc keeps an array of accumulators in registers only where
// every index is a constant before it looks at loops.
template <int N, class Fn>
__attribute__((always_inline)) inline void repeat(const Fn& fn) {
  if constexpr (N > 0) {
    repeat<N - 1>(fn);
    fn(N - 1);
  }
}

inline __m256i load256(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}
inline void store256(void* at, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(at), v); }
inline __m128i load128(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }

inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }

inline __m256i bytes_to_dwords(const uint8_t* at) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
}

// Eight values of a stored dtype, exactly.
inline __m256 load_floats(const uint8_t* at, qk_dtype dtype) {
  switch (dtype) {
    case QK_F32:
      return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    case QK_F16:
      return _mm256_cvtph_ps(load128(at));
    case QK_BF16:
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(at)), 16));
    case QK_U8:
      return _mm256_cvtepi32_ps(bytes_to_dwords(at));
    case QK_E8M0:  // the exponent of a float; byte 0 is the subnormal 2^-127
      return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(bytes_to_dwords(at), 23),
                                                  _mm256_set1_epi32(0x00400000)));
    default: {  // E4M3 lies inside float16 with another bias; subnormals convert exactly
      const __m128i words =
          _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
      const __m128i magnitude = _mm_slli_epi16(_mm_and_si128(words, _mm_set1_epi16(0x7f)), 7);
      const __m128i sign = _mm_slli_epi16(_mm_and_si128(words, _mm_set1_epi16(0x80)), 8);
      return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(magnitude, sign)), _mm256_set1_ps(256.f));
    }
  }
}

inline Half load_half(const uint8_t* at, qk_dtype dtype) {
  return {{load_floats(at, dtype), load_floats(at + 8 * dtype_size(dtype), dtype)}};
}

// What a group says about one half: read once per chunk, used for all rows.
struct GroupScales {
  Half scale, zero;
  bool asymmetric;
};

inline GroupScales load_scales(const Packed& w, const uint8_t* block, int64_t g, int halves,
                               int half) {
  GroupScales s;
  const __m256 one = _mm256_set1_ps(1.f);
  s.scale = {{one, one}};
  if (w.scale_bytes)
    s.scale = load_half(w.scales_of(block, g, halves) + half * w.scale_bytes, w.h.scale_stored);
  s.asymmetric = w.zero_bytes != 0;
  s.zero = s.scale;
  if (s.asymmetric)
    s.zero = load_half(w.zeros_of(block, g, halves) + half * w.zero_bytes, w.h.zero_stored);
  return s;
}

// acc += (sum - zero * X) * scale for one row of a half.
inline void add_chunk(const GroupScales& s, Half sum, float x_sum, float factor, float* acc) {
  for (int i = 0; i < 2; ++i) {
    __m256 t = sum.v[i];
    if (s.asymmetric) t = _mm256_fnmadd_ps(s.zero.v[i], _mm256_set1_ps(x_sum), t);
    // The factor is the table scale, or the scale of a group of activations; 1 changes no bit.
    const __m256 scale = _mm256_mul_ps(s.scale.v[i], _mm256_set1_ps(factor));
    const __m256 old = _mm256_loadu_ps(acc + 8 * i);
    _mm256_storeu_ps(acc + 8 * i, _mm256_fmadd_ps(t, scale, old));
  }
}

// Half to even; NaN stays NaN.
inline __m128i to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// Eight outputs; `count` of them exist.
inline void store_outputs(void* y, qk_dtype dtype, int64_t at, __m256 v, int64_t count) {
  if (dtype == QK_F32) {
    float* out = static_cast<float*>(y) + at;
    if (count >= 8) return _mm256_storeu_ps(out, v);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskstore_ps(out, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lane), v);
  }
  uint8_t* out = static_cast<uint8_t*>(y) + 2 * at;
  const __m128i words =
      dtype == QK_F16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : to_bf16(v);
  if (count >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(out), words);
  memcpy(out, &words, (size_t)(2 * count));
}

inline __m256 load_bias(const float* bias, int64_t count) {
  if (count >= 8) return _mm256_loadu_ps(bias);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(bias, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lane));
}

// The end of row m of a half whose first output is n0: activation scale, bias, output dtype.
inline void finish_half(const LinearJob& job, const float* acc, int64_t m, int64_t n0) {
  const bool scaled = job.w->h.activations == QK_ACT_INT8;
  const __m256 x_scale = _mm256_set1_ps(scaled ? job.q_scale[m] : 1.f);
  for (int64_t n = n0; n < min64(n0 + kHalf, job.w->h.n); n += 8) {
    const int64_t count = job.w->h.n - n;
    __m256 v = _mm256_loadu_ps(acc + (n - n0));
    // With the factor 1 the fused step is the plain addition of the other modes.
    if (job.bias)
      v = _mm256_fmadd_ps(v, x_scale, load_bias(job.bias + n, count));
    else if (scaled)
      v = _mm256_mul_ps(v, x_scale);
    store_outputs(job.y, job.y_dtype, m * job.y_stride + n, v, count);
  }
}

}  // namespace
}  // namespace qkern
