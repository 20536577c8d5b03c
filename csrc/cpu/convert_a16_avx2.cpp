// SPDX-License-Identifier: Apache-2.0
// float16 or bfloat16 to float32, exact, 8 at a time.

#include "kernels.h"
#include "simd/rows_avx2.h"

namespace qkern {

void convert_a16_avx2(const void* x, qk_dtype dtype, int64_t k, float* out) {
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) store_f32x8(out, QK_F32, i, load_f32x8(x, dtype, i));
  if (i < k) store_some_f32x8(out, QK_F32, i, k - i, load_some_f32x8(x, dtype, i, k - i));
}

}  // namespace qkern
