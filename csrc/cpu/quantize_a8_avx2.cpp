// SPDX-License-Identifier: Apache-2.0
// Dynamic quantization of one row of activations, 8 at a time.
//
// Numbers: as quantize_a8_scalar. The largest magnitude is found among the bits of |x|, which order
// as the values do and put infinity and NaN on top; vcvtps2dq rounds half to even.

#include "kernels.h"
#include "simd/rows_avx2.h"

namespace qkern {
namespace {

static inline __m256i magnitude_bits(__m256 v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}

static inline uint32_t largest_lane(__m256i v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return (uint32_t)_mm_cvtsi128_si32(m);
}

// Eight codes, int8.
static inline __m128i codes_of(__m256 scaled) {
  const __m256i codes = _mm256_cvtps_epi32(scaled);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  return _mm_packs_epi16(words, words);
}

template <qk_dtype DTYPE>
uint32_t largest_magnitude(const void* x, int64_t begin, int64_t columns) {
  __m256i largest[4];
  for (int i = 0; i < 4; ++i) largest[i] = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 32 <= columns; k += 32)
    for (int i = 0; i < 4; ++i)
      largest[i] =
          _mm256_max_epi32(largest[i], magnitude_bits(load_f32x8(x, DTYPE, begin + k + 8 * i)));
  for (; k + 8 <= columns; k += 8)
    largest[0] = _mm256_max_epi32(largest[0], magnitude_bits(load_f32x8(x, DTYPE, begin + k)));
  if (k < columns)
    largest[1] = _mm256_max_epi32(
        largest[1], magnitude_bits(load_some_f32x8(x, DTYPE, begin + k, columns - k)));
  return largest_lane(_mm256_max_epi32(_mm256_max_epi32(largest[0], largest[1]),
                                       _mm256_max_epi32(largest[2], largest[3])));
}

template <qk_dtype DTYPE>
void quantize_row(const void* x, int64_t k, int64_t group, int8_t* q, int64_t q_group_stride,
                  float* scales) {
  for (int64_t g = 0; g * group < k; ++g) {
    const int64_t begin = g * group, columns = min64(group, k - begin);
    const uint32_t bits = largest_magnitude<DTYPE>(x, begin, columns);
    const float largest = bits_float(bits);
    const bool finite = bits < 0x7f800000u;
    const bool usable = finite && largest >= 0x1p-100f;
    scales[g] = !finite ? NAN : usable ? largest / 127.f : 0.f;
    int8_t* to = q + g * q_group_stride;
    if (!usable) {
      memset(to, 0, (size_t)columns);
      continue;
    }
    const __m256 factor = _mm256_set1_ps(127.f / largest);
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8)
      _mm_storel_epi64((__m128i*)(to + i),
                       codes_of(_mm256_mul_ps(load_f32x8(x, DTYPE, begin + i), factor)));
    if (i < columns) {
      const __m256 some = load_some_f32x8(x, DTYPE, begin + i, columns - i);
      int8_t codes[16];
      _mm_storeu_si128((__m128i*)codes, codes_of(_mm256_mul_ps(some, factor)));
      memcpy(to + i, codes, (size_t)(columns - i));
    }
  }
}

}  // namespace

void quantize_a8_avx2(const void* x, qk_dtype dtype, int64_t k, int64_t group, int8_t* q,
                      int64_t q_group_stride, float* scales) {
  if (dtype == QK_F32)
    quantize_row<QK_F32>(x, k, group, q, q_group_stride, scales);
  else if (dtype == QK_F16)
    quantize_row<QK_F16>(x, k, group, q, q_group_stride, scales);
  else
    quantize_row<QK_BF16>(x, k, group, q, q_group_stride, scales);
}

}  // namespace qkern
