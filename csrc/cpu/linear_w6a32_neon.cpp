// SPDX-License-Identifier: Apache-2.0
// y = x . W^T with float activations, 6-bit Int (simd/float_neon.h). Run under emulation only.
#include "simd/float_neon.h"

namespace qkern {

void linear_w6a32_neon(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_float<FloatWideInt<6>>(job, m0, m1, p0, p1);
}

}  // namespace qkern
