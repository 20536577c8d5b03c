// SPDX-License-Identifier: Apache-2.0
// Dynamic quantization of one row of activations, 16 at a time.
//
// Numbers: as quantize_a8_scalar. The largest magnitude is found among the bits of |x|, which order
// as the values do and put infinity and NaN on top; vcvtps2dq rounds half to even.

#include "kernels.h"
#include "simd/rows_avx512.h"

namespace qkern {
namespace {

struct LoadF32 {
  static __m512 at(const void* x, int64_t i, __mmask16 lanes) {
    return _mm512_maskz_loadu_ps(lanes, (const float*)x + i);
  }
};
struct LoadF16 {
  static __m512 at(const void* x, int64_t i, __mmask16 lanes) {
    return f16_to_f32x16(_mm256_maskz_loadu_epi16(lanes, (const uint16_t*)x + i));
  }
};
struct LoadBf16 {
  static __m512 at(const void* x, int64_t i, __mmask16 lanes) {
    return bf16_to_f32x16(_mm256_maskz_loadu_epi16(lanes, (const uint16_t*)x + i));
  }
};

static inline __m512i magnitude_bits(__m512 v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}

template <class Load>
uint32_t largest_magnitude(const void* x, int64_t begin, int64_t columns) {
  const __mmask16 all = 0xffff;
  __m512i largest[4];
  for (int i = 0; i < 4; ++i) largest[i] = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= columns; k += 64)
    for (int i = 0; i < 4; ++i)
      largest[i] =
          _mm512_max_epi32(largest[i], magnitude_bits(Load::at(x, begin + k + 16 * i, all)));
  for (; k < columns; k += 16)
    largest[0] = _mm512_max_epi32(largest[0],
                                  magnitude_bits(Load::at(x, begin + k, first_lanes(columns - k))));
  return (uint32_t)_mm512_reduce_max_epi32(_mm512_max_epi32(
      _mm512_max_epi32(largest[0], largest[1]), _mm512_max_epi32(largest[2], largest[3])));
}

template <class Load>
void quantize_row(const void* x, int64_t k, int64_t group, int8_t* q, int64_t q_group_stride,
                  float* scales) {
  for (int64_t g = 0; g * group < k; ++g) {
    const int64_t begin = g * group, columns = min64(group, k - begin);
    const uint32_t bits = largest_magnitude<Load>(x, begin, columns);
    const float largest = bits_float(bits);
    const bool finite = bits < 0x7f800000u;
    const bool usable = finite && largest >= 0x1p-100f;
    scales[g] = !finite ? NAN : usable ? largest / 127.f : 0.f;
    int8_t* to = q + g * q_group_stride;
    if (!usable) {
      memset(to, 0, (size_t)columns);
      continue;
    }
    const __m512 factor = _mm512_set1_ps(127.f / largest);
    for (int64_t i = 0; i < columns; i += 16) {
      const __mmask16 lanes = first_lanes(columns - i);
      const __m512 scaled = _mm512_mul_ps(Load::at(x, begin + i, lanes), factor);
      const __m128i codes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled));
      if (columns - i >= 16)
        _mm_storeu_si128((__m128i*)(to + i), codes);
      else
        _mm_mask_storeu_epi8(to + i, lanes, codes);
    }
  }
}

}  // namespace

void quantize_a8_avx512(const void* x, qk_dtype dtype, int64_t k, int64_t group, int8_t* q,
                        int64_t q_group_stride, float* scales) {
  if (dtype == QK_F32)
    quantize_row<LoadF32>(x, k, group, q, q_group_stride, scales);
  else if (dtype == QK_F16)
    quantize_row<LoadF16>(x, k, group, q, q_group_stride, scales);
  else
    quantize_row<LoadBf16>(x, k, group, q, q_group_stride, scales);
}

}  // namespace qkern
