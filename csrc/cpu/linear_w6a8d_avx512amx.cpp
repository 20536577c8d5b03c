// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T for Int weights of 6 bits.

#include "simd/a8_amx.h"

namespace qkern {

void linear_w6a8d_avx512amx(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_a8_amx<IntCodes<6>>(job, m0, m1, p0, p1);
}

}  // namespace qkern
