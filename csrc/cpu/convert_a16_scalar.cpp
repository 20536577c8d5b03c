// SPDX-License-Identifier: Apache-2.0
// float16 or bfloat16 to float32, exact, without vector instructions.

#include "kernels.h"

namespace qkern {

void convert_a16_scalar(const void* x, qk_dtype dtype, int64_t k, float* out) {
  for (int64_t i = 0; i < k; ++i) out[i] = load_float(x, dtype, i);
}

}  // namespace qkern
