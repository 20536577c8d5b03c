// SPDX-License-Identifier: Apache-2.0
// float16 or bfloat16 to float32, exact, 16 at a time.

#include "kernels.h"
#include "simd/rows_avx512.h"

namespace qkern {

void convert_a16_avx512(const void* x, qk_dtype dtype, int64_t k, float* out) {
  const uint16_t* from = (const uint16_t*)x;
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)(from + i));
    _mm512_storeu_ps(out + i, dtype == QK_F16 ? f16_to_f32x16(v) : bf16_to_f32x16(v));
  }
  if (i == k) return;
  const __mmask16 lanes = first_lanes(k - i);
  const __m256i v = _mm256_maskz_loadu_epi16(lanes, from + i);
  _mm512_mask_storeu_ps(out + i, lanes, dtype == QK_F16 ? f16_to_f32x16(v) : bf16_to_f32x16(v));
}

}  // namespace qkern
