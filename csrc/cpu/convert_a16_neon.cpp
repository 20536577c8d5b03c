// SPDX-License-Identifier: Apache-2.0
// float16 or bfloat16 to float32, exact, 8 at a time. Run under emulation only.

#include "kernels.h"
#include "simd/rows_neon.h"

namespace qkern {

void convert_a16_neon(const void* x, qk_dtype dtype, int64_t k, float* out) {
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) {
    vst1q_f32(out + i, load_f32x4(x, dtype, i));
    vst1q_f32(out + i + 4, load_f32x4(x, dtype, i + 4));
  }
  for (; i < k; i += 4) {
    const int64_t count = min64(4, k - i);
    store_some_f32x4(out, QK_F32, i, count, load_some_f32x4(x, dtype, i, count));
  }
}

}  // namespace qkern
